"""Exported folders answer as torch does, say what they are, and are refused where they lose too much; nothing half-written stays."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISE, TELLING
from datasets import Dataset
from run_helpers import WORDS, tiny_tokenizer
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smbert.checkpoints import load_model
from smbert.export.gate import Gate
from smbert.modeling import FAMILIES
from smbert.runtime import Classifier, open_graph
from smbert.surgery import PruningPlan, empty_parts, keep_units, pass_by
from smbert.tasks import Task, prepare

pytest.importorskip("onnx", reason="needs onnx (pip install smbert[onnx])")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install smbert[onnx])")

from smbert import export as exporting
from smbert._cli_export import add_parsers
from smbert.export import export, quantise
from smbert.export.onnx_graph import example, input_names, products_by_layer, weight_products, write_onnx
from smbert.export.quantise import Setting, ladder

TASK = Task("up-down", ("text",), label_names=("down", "up"))
PAIRS = Task("same", ("a", "b"), label_names=("no", "yes"))
UNEVEN = PruningPlan(heads=((0,), (), (1, 2)), ffn=((1, 5), tuple(range(8)), ()))


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(n)]


def checkpoint(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    (model if model is not None else tiny("bert")).save_pretrained(folder)
    (tokenizer if tokenizer is not None else tiny_tokenizer()).save_pretrained(folder)
    return folder


def torch_logits(folder: Path, texts: list[Any], max_length: int = 60) -> np.ndarray:
    """What transformers answers, text by text."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    out = []
    with torch.no_grad():
        for text in texts:
            parts = text if isinstance(text, tuple) else (text,)
            inputs = tokenizer(*parts, return_tensors="pt", truncation=True, max_length=max_length)
            out.append(model(**inputs).logits[0].numpy())
    return np.stack(out)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its two answers are about equally frequent."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    model = tiny("bert", layers=2)
    logits = torch_logits(checkpoint(folder, model), sentences(20, seed=9))
    with torch.no_grad():
        model.classifier.bias[0] -= float(np.median(logits[:, 0] - logits[:, 1]))
    return checkpoint(folder, model)


def labelled(folder: Path, n: int = 40) -> Dataset:
    """Rows whose labels are the model's own answers, so that every change of an answer costs."""
    texts = sentences(n, seed=5)
    labels = torch_logits(folder, texts).argmax(axis=1)
    rows = {"text": texts, "label": [TASK.label_names[i] for i in labels]}
    return prepare(TASK, {"validation": Dataset.from_dict(rows)}, ("validation",))["validation"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_fp32_answers_as_torch_at_other_batches_and_lengths(family: str, tmp_path: Path, tokenizer) -> None:
    # A layer without heads and one without neurons.
    model = keep_units(tiny(family, layers=3, num_labels=3), UNEVEN)
    typed = family in ("bert", "electra")
    folder = checkpoint(tmp_path / "model", model, tiny_tokenizer() if typed else tokenizer)
    made = export(folder, tmp_path / "out", max_length=32)
    assert made.manifest["parity"]["largest_logit_difference_fp32"] < 1e-5
    words = WORDS if typed else [*TELLING[0], *NOISE]
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=k)) for k in (1, 2, 7, 13, 30, 5, 50, 3)]
    expected = torch_logits(folder, texts, 32)
    for batch_size in (1, 3, 8):
        found = Classifier(made.folder, batch_size=batch_size, threads=1).logits(texts)
        assert np.abs(found - expected).max() < 1e-5
    pairs = list(zip(texts, reversed(texts)))
    assert np.abs(Classifier(made.folder).logits(pairs) - torch_logits(folder, pairs, 32)).max() < 1e-5
    assert ("token_type_ids" in made.manifest["inputs"]) == typed


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_parts_that_are_passed_by(family: str, tmp_path: Path) -> None:
    model = keep_units(tiny(family, layers=3, num_labels=3), UNEVEN)
    folder = checkpoint(tmp_path / "model", pass_by(model, empty_parts(model)))
    for precision in ("fp32", "int8"):
        made = export(folder, tmp_path / precision, max_length=32, precision=precision)
        assert made.manifest["parity"]["largest_logit_difference_fp32"] < 1e-5


def test_the_folder_says_what_it_is(bert: Path, tmp_path: Path) -> None:
    made = export(bert, tmp_path / "out")
    assert sorted(p.name for p in made.folder.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "runtime.py",
        "tokenizer.json",
    ]
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest == made.manifest
    assert manifest["kind"] == "single_label" and manifest["labels"] == ["LABEL_0", "LABEL_1"]
    assert manifest["inputs"] == {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0}
    assert manifest["parent"]["name"] == "bert" and len(manifest["parent"]["weights_sha256"]) == 64
    assert manifest["max_length"] == 64 and manifest["opset"] == 17 and manifest["setting"] == {"precision": "fp32"}
    assert set(manifest["files"]) == {"model.onnx", "tokenizer.json", "runtime.py"}
    assert {"torch", "onnxruntime", "tokenizers"} <= set(manifest["versions"])
    assert str(tmp_path) not in (made.folder / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("setting", "share", "worst"),
    [
        ({"precision": "fp16"}, 0.6, 0.02),
        ({"precision": "int8"}, 0.4, 0.3),
        ({"precision": "int8", "per_channel": False}, 0.4, 0.3),
        ({"precision": "int8", "method": "static"}, 0.4, 0.6),
    ],
)
def test_smaller_precisions(setting: dict[str, Any], share: float, worst: float, tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "model", tiny("bert", layers=1, hidden_size=128, intermediate_size=256, vocab_size=800)
    )
    texts = sentences(32)
    whole = export(folder, tmp_path / "fp32")
    small = export(folder, tmp_path / "small", calibration=texts, **setting)
    assert small.size_mb < share * whole.size_mb
    one, two = (Classifier(made.folder).logits(texts) for made in (whole, small))
    assert 0 < np.abs(one - two).max() < worst * np.abs(one).max()
    assert small.manifest["setting"]["precision"] == setting["precision"]


def test_a_model_without_any_heads(tmp_path: Path) -> None:
    """Nothing in its graph depends on the mask."""
    plan = PruningPlan(heads=((), ()), ffn=((1, 2, 3), (4,)))
    folder = checkpoint(tmp_path / "model", keep_units(tiny("bert", layers=2), plan))
    texts = sentences(5, seed=3)
    made = export(folder, tmp_path / "out")
    assert "attention_mask" not in made.manifest["inputs"]
    assert np.abs(Classifier(made.folder).logits(texts) - torch_logits(folder, texts)).max() < 1e-5
    static = export(folder, tmp_path / "static", precision="int8", method="static", calibration=texts)
    assert np.abs(Classifier(static.folder).logits(texts) - torch_logits(folder, texts)).max() < 0.3


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_int8_of_layers_without_units(family: str, tmp_path: Path, tokenizer) -> None:
    folder = checkpoint(tmp_path / "model", keep_units(tiny(family, layers=3), UNEVEN), tokenizer)
    texts = [" ".join(NOISE[i : i + 9]) for i in range(8)]
    made = export(folder, tmp_path / "out", precision="int8", calibration=texts)
    assert np.abs(Classifier(made.folder).logits(texts) - torch_logits(folder, texts)).max() < 0.3


def test_int8_takes_the_products_and_the_embeddings(bert: Path, tmp_path: Path) -> None:
    import onnx

    graphs = {
        p: onnx.load(str(export(bert, tmp_path / p, precision=p).folder / "model.onnx")) for p in ("fp32", "int8")
    }
    assert len(weight_products(graphs["fp32"])) == 2 * 6 + 1  # and the pooler
    layers = products_by_layer(graphs["fp32"], tiny("bert", layers=2))
    assert {number: len(names) for number, names in layers.items()} == {0: 6, 1: 6}
    kinds = [node.op_type for node in graphs["int8"].graph.node]
    assert kinds.count("MatMulInteger") == 2 * 6 + 1 and "Gemm" not in kinds
    assert kinds.count("MatMul") == 2 * 2 + 1  # the two products of each attention, and the classifier
    types = {t.name: t.data_type for t in graphs["int8"].graph.initializer}
    for table in ("word_embeddings", "position_embeddings"):
        assert types[f"model.bert.embeddings.{table}.weight_rows"] == onnx.TensorProto.INT8
        assert f"model.bert.embeddings.{table}.weight" not in types
    assert "model.bert.embeddings.word_embeddings.weight" not in types


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_in_int8_are_the_weights_but_for_rounding(per_channel: bool, bert: Path, tmp_path: Path) -> None:
    """The form for OpenVINO, which onnxruntime reads too."""
    import onnx
    from onnx import numpy_helper

    model = AutoModelForSequenceClassification.from_pretrained(bert)
    names = input_names(model, tiny_tokenizer())
    write_onnx(model, names, tmp_path / "fp32.onnx", 17)
    setting = Setting("int8", per_channel=per_channel)
    quantise.convert(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", setting, model, engine="openvino")
    before, after = (onnx.load(str(tmp_path / name)) for name in ("fp32.onnx", "int8.onnx"))
    old, new = ({t.name: numpy_helper.to_array(t) for t in g.graph.initializer} for g in (before, after))
    stored = {node.output[0]: node for node in after.graph.node if node.op_type == "DequantizeLinear"}
    weights = {node.name: node.input[1] for node in before.graph.node if node.name in weight_products(before)}
    assert len(weights) == 2 * 6 + 1
    for node in after.graph.node:
        if node.name in weights:
            order = stored[node.input[1]]
            integers, scales, zeros = (new[name] for name in order.input)
            axis = order.attribute[0].i
            shaped = np.expand_dims(scales, 1 - axis) if per_channel else scales
            assert integers.dtype == np.int8 and not zeros.any()
            assert scales.size == (integers.shape[axis] if per_channel else 1)
            assert (np.abs(integers * shaped - old[weights[node.name]]) <= shaped / 2 + 1e-7).all()
            assert weights[node.name] not in new and node.name in weights
    whole, small = (open_graph(tmp_path / name, threads=1) for name in ("fp32.onnx", "int8.onnx"))
    batch = {k: v.numpy() for k, v in example(model, names, 4, 12).items()}
    assert 0 < np.abs(whole(batch) - small(batch)).max() < 0.05


def test_sensitive_layers_are_found_and_left_out(bert: Path, tmp_path: Path) -> None:
    import onnx

    model = tiny("bert", layers=3)
    with torch.no_grad():  # in each output a huge weight sets a scale that the others drown in
        model.bert.encoder.layer[2].output.dense.weight[:, 0] *= 100
    names = input_names(model, tiny_tokenizer())
    write_onnx(model, names, tmp_path / "fp32.onnx", 17)
    batches = [{k: v.numpy() for k, v in example(model, names, 8, 16).items()}]
    order = quantise.sensitive_layers(tmp_path / "fp32.onnx", model, batches, tmp_path)
    assert sorted(order) == [0, 1, 2] and order[0] == 2
    quantise.convert(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Setting("int8", fp32_layers=(2,)), model)
    left = weight_products(onnx.load(str(tmp_path / "int8.onnx")))
    assert sum("layer.2/" in name for name in left) == 6 and not any(
        f"layer.{i}/" in name for i in (0, 1) for name in left
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]


def test_the_ladder() -> None:
    steps = [str(s) for s in ladder(Setting("int8", per_channel=False), lambda: [3, 1, 0, 2, 4], True)]
    assert steps == [
        "int8 dynamic per tensor",
        "int8 dynamic per channel",
        "int8 dynamic per channel, layers 1, 3 in fp32",
        "int8 dynamic per channel, layers 0, 1, 3 in fp32",
        "int8 static per channel",
        "fp32",
    ]
    assert [str(s) for s in ladder(Setting("int8"), lambda: [0], False)] == [
        "int8 dynamic per channel",
        "int8 dynamic per channel, layers 0 in fp32",
        "fp32",
    ]
    assert [str(s) for s in ladder(Setting("fp16"), list, True)] == ["fp16", "fp32"]
    assert [str(s) for s in ladder(Setting(), list, True)] == ["fp32"]


# ------------------------------------------------------------------------------------------------------------------- gate


def broken_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 whose graphs answer the opposite; initializers go by names that change with onnxruntime's version."""
    convert = exporting.convert

    def spoilt(source: Path, target: Path, setting: Setting, *rest: Any) -> None:
        convert(source, target, setting, *rest)
        if setting.precision == "int8" and not setting.fp32_layers:
            import onnx

            model = onnx.load(str(target))
            answer = model.graph.output[0].name
            (last,) = (node for node in model.graph.node if answer in node.output)
            last.output[list(last.output).index(answer)] = "opposite"
            model.graph.node.append(onnx.helper.make_node("Neg", ["opposite"], [answer]))
            onnx.save(model, str(target))

    monkeypatch.setattr(exporting, "convert", spoilt)


def test_a_gate_takes_the_first_setting_that_passes(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = labelled(bert)
    good = export(bert, tmp_path / "good", gate=Gate(TASK, rows, max_drop=0), precision="fp32")
    assert good.manifest["gate"]["attempts"] == [
        {"setting": "fp32", "metric": 1.0, "drop_points": 0.0, "passed": True,
         "largest_logit_difference": pytest.approx(0, abs=1e-5)}
    ]  # fmt: skip
    assert good.manifest["gate"]["torch_fp32"] == 1.0 and good.manifest["texts_per_row"] == 1
    broken_int8(monkeypatch)
    made = export(bert, tmp_path / "out", precision="int8", per_channel=False, gate=Gate(TASK, rows, max_drop=30))
    tried = made.manifest["gate"]["attempts"]
    assert [a["passed"] for a in tried] == [False, False, True], tried
    assert tried[0]["drop_points"] == pytest.approx(100 * (1 - tried[0]["metric"])) and tried[0]["drop_points"] > 30
    assert made.setting.fp32_layers and made.manifest["setting"]["fp32_layers"] == list(made.setting.fp32_layers)
    measured = export(bert, tmp_path / "measured", precision="int8", gate=Gate(TASK, rows))
    assert str(measured.setting) == "int8 dynamic per channel" and measured.manifest["gate"]["attempts"][0]["passed"]


def test_a_gate_refuses_and_says_by_how_much(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = labelled(bert)
    broken_int8(monkeypatch)
    with pytest.raises(
        ValueError, match=r"more than 0.5 points.*1\.0000 on 40 rows.*per channel loses \d+\.\d\d points.*Nothing was"
    ):
        export(bert, tmp_path / "out", precision="int8", gate=Gate(TASK, rows, max_drop=0.5, fallback=False))
    assert list(tmp_path.iterdir()) == []


def test_a_gate_never_passes_what_answers_nan(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, logits = labelled(bert), Classifier.logits

    def overflow(self: Classifier, texts: Any) -> np.ndarray:
        found = logits(self, texts)
        return np.full_like(found, np.nan) if self.manifest["setting"]["precision"] == "int8" else found

    monkeypatch.setattr(Classifier, "logits", overflow)
    made = export(bert, tmp_path / "out", precision="int8", gate=Gate(TASK, rows, max_drop=0.5))
    tried = made.manifest["gate"]["attempts"]
    assert made.setting.precision == "fp32" and len(tried) > 1 and tried[-1]["passed"]
    assert all(a["finite"] is False and not a["passed"] and a["drop_points"] == 100 for a in tried[:-1])
    for drop, told in (
        (None, "must be finite: int8 dynamic per channel answers NaN"),
        (0.5, "per channel answers NaN"),
    ):
        with pytest.raises(ValueError, match=rf"{told}.*Nothing was written"):
            export(bert, tmp_path / "no", precision="int8", gate=Gate(TASK, rows, max_drop=drop, fallback=False))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_gate_measures_half_precision_models_against_fp32(bert: Path, tmp_path: Path) -> None:
    rows, model = labelled(bert), load_model(bert)
    gate = export(model.bfloat16(), tmp_path / "out", gate=Gate(TASK, rows), tokenizer=bert).manifest["gate"]
    assert gate["attempts"][0]["largest_logit_difference"] < 1e-5


@pytest.mark.parametrize("drop", [-1, float("nan"), float("inf"), "much", True])
def test_a_gate_without_sense(drop: Any, bert: Path) -> None:
    with pytest.raises(ValueError, match="`max_drop`"):
        Gate(TASK, labelled(bert, 4), max_drop=drop)
    with pytest.raises(ValueError, match="at least one validation row"):
        Gate(TASK, labelled(bert, 4).select([]))


def test_pairs_regression_and_several_labels(tmp_path: Path) -> None:
    rows = {"a": sentences(8), "b": sentences(8, 1), "label": ["no", "yes"] * 4}
    checked = prepare(PAIRS, {"validation": Dataset.from_dict(rows)}, ("validation",))["validation"]
    folder = checkpoint(tmp_path / "pairs", tiny("bert", layers=1))
    made = export(folder, tmp_path / "a", gate=Gate(PAIRS, checked))
    assert made.manifest["texts_per_row"] == 2
    assert made.manifest["gate"]["attempts"][0]["largest_logit_difference"] < 1e-5
    score = export(checkpoint(tmp_path / "score", tiny("bert", layers=1, num_labels=1)), tmp_path / "b").manifest
    assert score["kind"] == "regression" and score["labels"] == []
    several = tiny("bert", layers=1, num_labels=3, problem_type="multi_label_classification")
    assert export(checkpoint(tmp_path / "several", several), tmp_path / "c").manifest["kind"] == "multi_label"


# ----------------------------------------------------------------------------------------------------------- command line


def command(*arguments: Any) -> None:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(["export", *map(str, arguments)])
    args.run(args)


def test_the_command(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = labelled(bert, 12)
    names = ["LABEL_0", "LABEL_1"]
    file = tmp_path / "rows.csv"
    texts = list(rows["text"])
    lines = [f"{text},{names[label]}" for text, label in zip(texts, list(rows["label"]))]
    file.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    data = ("--train-file", file, "--validation-file", file)
    out = tmp_path / "out"
    command(
        bert, "--output", out, "--precision", "int8", "--method", "static", "--max-drop", 100, "--max-length", 40, *data
    )
    printed = capsys.readouterr().out
    assert "int8 static per channel: accuracy" in printed and "points, passed" in printed and "runtime.py" in printed
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["setting"]["method"] == "static" and manifest["max_length"] == 40
    assert manifest["gate"]["torch_fp32"] == 1.0 and manifest["gate"]["rows"] == 12 and manifest["texts_per_row"] == 1
    local = shutil.copytree(bert, tmp_path / "local")
    command(local)
    assert json.loads((tmp_path / "local-onnx-fp32/manifest.json").read_text())["setting"] == {"precision": "fp32"}


def test_bad_commands(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`--max-drop` needs validation rows"):
        command(bert, "--output", tmp_path / "out", "--max-drop", 1)
    with pytest.raises(ValueError, match="`--output` must be given"):
        command("somebody/model")
    with pytest.raises(SystemExit):
        command(bert, "--precision", "int3")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- bad input


def test_a_failed_export_leaves_nothing_and_an_earlier_one_as_it_was(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(bert, out)
    before = (out / "manifest.json").read_text()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "convert", full)
    with pytest.raises(OSError, match=r"could not write .*No space left.*earlier export is as it was"):
        export(bert, out, precision="int8")
    assert (out / "manifest.json").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    assert export(bert, out, precision="int8").manifest["setting"]["precision"] == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_answers_differently_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "largest_difference", lambda *args: 0.5)
    with pytest.raises(RuntimeError, match=r"differ by 5\.0e-01"):
        export(bert, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny("bert", layers=1)
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="differ by nan"):
        export(checkpoint(tmp_path / "model", model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "`engine` must be one of onnx, openvino"),
        ({"precision": "int4"}, "`precision` must be one of fp32, fp16, int8, bf16"),
        ({"precision": "bf16"}, "`precision` must be one of fp32, fp16, int8 for onnx, got 'bf16'"),
        ({"engine": "openvino", "precision": "fp16"}, "`precision` must be one of fp32, bf16, int8 for openvino"),
        ({"precision": "int8", "method": "magic"}, "`method`"),
        ({"precision": "int8", "method": "static"}, "`calibration` must hold texts"),
        ({"calibration": "one text"}, "`calibration` must be a list"),
        ({"opset": 9}, "`opset`"),
        ({"max_length": 65}, "`max_length` must be from 5 to 64"),
        ({"max_length": 0}, "`max_length`"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(bert, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trained classification head"):
        export(checkpoint(tmp_path / "raw", tiny("bert", head="encoder")), tmp_path / "out")
    with pytest.raises(ValueError, match="no folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        export(bert, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        export(bert, tmp_path / "mine")
    with pytest.raises(ValueError, match="holds other files"):
        export(bert, bert)
    bare = shutil.copytree(bert, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        export(bare, tmp_path / "out")
    wrong = Task("wrong", ("text",), label_names=("a", "b", "c"))
    rows = prepare(wrong, {"validation": Dataset.from_dict({"text": ["x"], "label": ["a"]})}, ("validation",))
    with pytest.raises(ValueError, match="`num_labels` must agree"):
        export(bert, tmp_path / "out", gate=Gate(wrong, rows["validation"]))
    assert not (tmp_path / "out").exists()
