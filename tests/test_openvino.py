"""The same folders behind OpenVINO: its answers are torch's, int8 is multiplied in int8, and nothing but openvino is needed."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from run_helpers import TASK, WORDS, tiny_tokenizer
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("onnx", reason="needs onnx (pip install smbert[openvino])")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install smbert[openvino])")
pytest.importorskip("openvino", reason="needs openvino (pip install smbert[openvino])")

import openvino

from smbert._cli_export import add_parsers
from smbert.export import Gate, export
from smbert.export.onnx_graph import example, input_names, write_onnx
from smbert.export.quantise import sensitive_layers
from smbert.measure import environment
from smbert.runtime import Classifier, open_graph
from smbert.surgery import PruningPlan, empty_parts, keep_units, pass_by
from smbert.tasks import prepare

needs_bf16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="needs a CPU that multiplies bf16",
)
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + 3 * (i % 7))) for i in range(30)]


def checkpoint(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def torch_logits(folder: Path) -> np.ndarray:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in TEXTS])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for integer kernels; its two answers are about equally frequent."""
    folder = tmp_path_factory.mktemp("openvino") / "bert"
    model = tiny("bert", layers=2, hidden_size=128, intermediate_size=256)
    logits = torch_logits(checkpoint(folder, model))
    with torch.no_grad():
        model.classifier.bias[0] -= float(np.median(logits[:, 0] - logits[:, 1]))
    return checkpoint(folder, model)


@pytest.fixture(scope="module")
def gate(bert: Path) -> Gate:
    """Rows whose labels are the model's own answers, so that every change of an answer costs."""
    labels = [TASK.label_names[i] for i in torch_logits(bert).argmax(axis=1)]
    rows = prepare(TASK, {"validation": Dataset.from_dict({"text": TEXTS, "label": labels})}, ("validation",))
    return Gate(TASK, rows["validation"], max_drop=10)


def kernels(folder: Path) -> list[str]:
    """What multiplies weights, such as "brgemm_avx512_I8", as OpenVINO tells it after an answer."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", config)
    infos = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    return [i["primitiveType"].astype(str) for i in infos if i["layerType"].astype(str) == "FullyConnected"]


@pytest.mark.parametrize("passed_by", [False, True])
def test_fp32_answers_as_torch_whatever_the_batch(passed_by: bool, tmp_path: Path) -> None:
    # A layer without heads and one without neurons.
    uneven = PruningPlan(heads=((0,), (), (1, 2)), ffn=((1, 5), tuple(range(8)), ()))
    model = keep_units(tiny("bert", layers=3, num_labels=3), uneven)
    folder = checkpoint(tmp_path / "model", pass_by(model, empty_parts(model)) if passed_by else model)
    made = export(folder, tmp_path / "out", engine="openvino", max_length=32)
    assert made.manifest["engine"] == "openvino" and "openvino" in made.manifest["versions"]
    assert made.manifest["parity"]["largest_logit_difference_fp32"] < 1e-5
    expected = torch_logits(folder)
    for size in (1, 7, 64):
        assert np.abs(Classifier(made.folder, batch_size=size, threads=1).logits(TEXTS) - expected).max() < 1e-5


def test_int8_is_multiplied_in_int8(bert: Path, tmp_path: Path) -> None:
    whole = export(bert, tmp_path / "fp32", engine="openvino")
    expected = Classifier(whole.folder, threads=1).logits(TEXTS)
    for method, calibration in (("dynamic", ()), ("static", TEXTS)):
        made = export(
            bert, tmp_path / method, engine="openvino", precision="int8", method=method, calibration=calibration
        )
        assert made.size_mb < 0.4 * whole.size_mb
        found = Classifier(made.folder, threads=1).logits(TEXTS)
        assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    # The pooler and six products in each layer; the classifier stays in fp32.
    assert sum(kernel.endswith("_I8") for kernel in kernels(tmp_path / "static")) == 2 * 6 + 1


@pytest.mark.skipif(
    {"avx_vnni", "avx512_vnni", "amx_int8"}.isdisjoint(environment()["isa"]), reason="needs a CPU that multiplies int8"
)
def test_dynamic_int8_rounds_the_activations_too(bert: Path, tmp_path: Path) -> None:
    file = export(bert, tmp_path / "out", engine="openvino", precision="int8").folder / "model.onnx"
    ids = np.tile(np.arange(5, 45), (4, 1))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    weights_only = openvino.Core().compile_model(str(file), "CPU", config).create_infer_request().infer(batch)[0]
    both = open_graph(file, "openvino", "int8", threads=1)(batch)
    assert both.shape == (4, 2) and 1e-5 < np.abs(weights_only - both).max() < 0.05


@needs_bf16
def test_bf16_is_computed_in_bf16_and_fp32_is_not(bert: Path, tmp_path: Path) -> None:
    expected = torch_logits(bert)
    differences = {}
    for precision in ("fp32", "bf16"):
        made = export(bert, tmp_path / precision, engine="openvino", precision=precision)
        assert made.manifest["setting"] == {"precision": precision}
        differences[precision] = np.abs(Classifier(made.folder, threads=1).logits(TEXTS) - expected).max()
    assert differences["fp32"] < 1e-5 < 1e-4 < differences["bf16"] < 0.05


def test_the_gate_judges_what_openvino_answers(bert: Path, gate: Gate, tmp_path: Path) -> None:
    made = export(bert, tmp_path / "out", engine="openvino", precision="int8", gate=gate)
    (tried,) = made.manifest["gate"]["attempts"]
    logits = Classifier(made.folder, threads=1).logits(TEXTS)
    expected = torch_logits(bert)
    assert tried["passed"] and tried["metric"] == pytest.approx(
        np.mean(logits.argmax(1) == expected.argmax(1)), abs=1e-6
    )
    assert tried["largest_logit_difference"] == pytest.approx(np.abs(logits - expected).max(), abs=1e-3)


def test_sensitive_layers_are_found_with_openvino(tmp_path: Path) -> None:
    model = tiny("bert", layers=3)
    with torch.no_grad():  # in each output a huge weight sets a scale that the others drown in
        model.bert.encoder.layer[1].output.dense.weight[:, 0] *= 100
    names = input_names(model, tiny_tokenizer())
    write_onnx(model, names, tmp_path / "fp32.onnx", 17)
    batches = [{name: tensor.numpy() for name, tensor in example(model, names, 8, 16).items()}]
    order = sensitive_layers(tmp_path / "fp32.onnx", model, batches, tmp_path, "openvino")
    assert sorted(order) == [0, 1, 2] and order[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["fp32.onnx"]


def test_threads_share_a_classifier(bert: Path, tmp_path: Path) -> None:
    classify = Classifier(export(bert, tmp_path / "out", engine="openvino").folder, threads=1)
    expected = classify.logits(TEXTS)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda i: classify.logits(TEXTS[i:]), range(20)))
    assert all(np.abs(part - expected[i:]).max() < 1e-5 for i, part in enumerate(parts))


def test_it_needs_openvino_and_no_other_engine(bert: Path, tmp_path: Path) -> None:
    folder = export(bert, tmp_path / "out", engine="openvino").folder
    code = (
        "import sys\n"
        f"sys.path += {[str(Path(openvino.__file__).parents[1]), str(folder)]!r}\n"
        "for name in ('torch', 'transformers', 'smbert', 'onnx', 'onnxruntime'): sys.modules[name] = None\n"
        "import json, runtime\n"
        f"print(json.dumps(runtime.Classifier({str(folder)!r}, threads=1).logits({TEXTS!r}).tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-B", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(json.loads(done.stdout)) - torch_logits(bert)).max() < 1e-5


def test_the_command(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    out = tmp_path / "out"
    args = parser.parse_args(["export", str(bert), "--engine", "openvino", "--precision", "int8", "--output", str(out)])
    args.run(args)
    assert "int8 dynamic per channel" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["engine"] == "openvino"


def test_bf16_is_refused_where_the_cpu_has_none(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Old)
    with pytest.raises(ValueError, match=r"bf16 needs a CPU that multiplies bf16 itself.*use fp32 or int8"):
        export(bert, tmp_path / "out", engine="openvino", precision="bf16")
    assert list(tmp_path.iterdir()) == []
