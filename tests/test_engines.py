"""benchmarks/engines.py on tiny checkpoints: every engine in a process of its own, and figures that belong together."""

from __future__ import annotations

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from run_helpers import WORDS, tiny_tokenizer
from tiny_models import tiny

from smbert.surgery import PruningPlan, keep_units

pytest.importorskip("onnx", reason="needs onnx (pip install smbert[onnx])")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install smbert[onnx])")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/engines.py"


@pytest.fixture(scope="module")
def engines():
    spec = importlib.util.spec_from_file_location("benchmarks_engines", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = {
        "sentence1": [" ".join(WORDS[i : i + 5]) for i in range(12)],
        "sentence2": WORDS[:12],
        "label": [i % 2 for i in range(12)],
    }
    (tmp_path / "glue/rte").mkdir(parents=True)
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(str(tmp_path / f"glue/rte/{split}.parquet"))
    return tmp_path / "glue"


def test_every_engine_in_a_process_of_its_own(engines, data_dir: Path, tmp_path: Path) -> None:
    # A model that only smbert's own classes can load.
    slim = keep_units(tiny("bert", layers=2), PruningPlan(heads=((0,), (1, 2)), ffn=((1,), (2, 3))))
    slim.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    out = tmp_path / "out"
    every = ["torch-fp32", "onnx-fp32", "onnx-int8", *(["openvino-int8-static"] if find_spec("openvino") else [])]
    status = engines.main(
        [f"small={tmp_path / 'small'}", "--engines", ",".join(every), "--task", "rte", "--data-dir", str(data_dir), "--max-length", "32",
         "--parity", "1,7", "--batches", "1,3", "--lengths", "8,512", "--threads", "1", "--warmup", "0", "--min-runs", "2", "--output", str(out)]
    )  # fmt: skip
    assert status == 0
    report = json.loads((out / "engines.json").read_text())
    rows = {(row["model"], row["engine"]): row for row in report["rows"]}
    assert list(rows) == [("small", engine) for engine in every]
    for row in rows.values():
        assert list(row["latency_ms"]) == ["1x8", "3x8", "1xtext"]  # there are no 512 positions
        assert all(0 < v["p50"] <= v["p95"] for v in row["latency_ms"].values())
        assert row["cold_start_seconds"] > 0 and 0 < row["first_answer_rss_mb"] <= row["peak_rss_mb"]
        base = rows["small", "torch-fp32"]["latency_ms"]["1x8"]["p50"]
        assert row["speedup"]["1x8"] == pytest.approx(base / row["latency_ms"]["1x8"]["p50"])
    onnx, torch = rows["small", "onnx-fp32"], rows["small", "torch-fp32"]
    assert onnx["metrics"] == torch["metrics"]
    # The whole split answered in batches of 32, 1 and 7.
    assert all(set(row["difference"]) == {"32", "1", "7"} for row in rows.values()) and torch["difference"]["32"] == 0
    assert max(onnx["difference"].values()) < 1e-4 < max(rows["small", "onnx-int8"]["difference"].values())
    if len(every) == 4:
        assert rows["small", every[3]]["setting"] == "int8 static per channel"
    # What imports no torch needs far less memory than what does.
    assert onnx["peak_rss_mb"] < 0.6 * torch["peak_rss_mb"]
    text = (out / "engines.md").read_text()
    assert "| small | onnx-int8 (int8 dynamic per channel) |" in text and "1xtext" in text and "difference at 7" in text
    assert (out / "engines.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["artefacts", "engines.json", "engines.md", "engines.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "must look like NAME=DIR"),
        (["a=x", "--engines", "tpu"], "`--engines` must be among"),
        (["a=x", "--rounds", "0"], "`--rounds`"),
        (["a=x", "--parity", "1,x"], "`--parity` must look like"),
        (["a=x", "--parity", "7", "--engines", "onnx-fp32"], "`--parity` needs torch-fp32"),
    ],
)
def test_bad_arguments(engines, arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert engines.main([*arguments, "--task", "rte", "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
