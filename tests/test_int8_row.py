"""The teacher in int8 beside the other rows: measured as they are, made once, and never a reason for a run to fail."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import QUIET, checkpoint, splits, tiny_context, tiny_recipe
from tiny_models import tiny

pytest.importorskip("onnx", reason="needs onnx (pip install smbert[onnx])")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install smbert[onnx])")

import smbert.export as exporting
from smbert._int8_row import Served, with_int8_teacher
from smbert._report_tables import INT8_TEACHER
from smbert.context import Context
from smbert.report import Report

module = importlib.import_module("smbert.compress")
SIZES = {"max_position_embeddings": 132, "hidden_size": 64, "intermediate_size": 256}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHAPES", ((1, 16), (4, 16)))
    monkeypatch.setattr(module, "latency", partial(module.latency, warmup=0, min_runs=3, min_seconds=0))
    monkeypatch.setattr("smbert.report.draw", lambda rows: b"plot")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return tiny_context(tmp_path)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("exported again")


def test_it_answers_as_the_teacher_but_for_rounding(context: Context, tmp_path: Path) -> None:
    teacher = tiny("bert", layers=2, **SIZES).eval()
    models, notes = with_int8_teacher(
        {"teacher": teacher, "smbert": teacher}, context.tokenizer, tmp_path / "teacher-int8"
    )
    assert list(models) == ["teacher", INT8_TEACHER, "smbert"] and notes == []
    batch = context.collator([context.data.validation[i] for i in range(8)])
    ids, mask, types = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    served = models[INT8_TEACHER]
    with torch.inference_mode():
        expected, found = (model(ids, mask, token_type_ids=types).logits for model in (teacher, served))
        assert torch.equal(served(input_ids=ids, attention_mask=mask).logits, found)  # of one text the types are 0
    assert found.shape == (8, 2) and 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_row_is_measured_as_the_others_are(context: Context, tmp_path: Path) -> None:
    teacher = tiny("bert", layers=2, **SIZES).eval()
    models, _ = with_int8_teacher({"teacher": teacher}, context.tokenizer, tmp_path / "teacher-int8")
    rows = {row.name: row for row in module.rows_of(models, context, {"teacher": 7.0}, shapes=((1, 16), (4, 16)))}
    base, row = rows["teacher"], rows[INT8_TEACHER]
    assert row.metric_name == base.metric_name == "accuracy" and set(row.metrics) == set(base.metrics)
    assert (row.params_total, row.params_encoder, row.macs) == (base.params_total, base.params_encoder, base.macs)
    assert row.size_mb == (tmp_path / "teacher-int8" / "model.onnx").stat().st_size / 1e6 < 0.6 * base.size_mb
    assert list(row.latency_ms) == list(base.latency_ms) == ["1x16", "4x16"] and row.train_seconds is None
    for shape, figures in row.latency_ms.items():
        assert row.speedup[shape] == pytest.approx(base.latency_ms[shape]["p50"] / figures["p50"])


def test_its_metric_is_that_of_its_own_answers(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny("bert", layers=2, **SIZES).eval()
    models, _ = with_int8_teacher({"teacher": teacher}, context.tokenizer, tmp_path / "teacher-int8")
    served = models[INT8_TEACHER]
    longest_first = sorted(
        context.data.validation, key=lambda row: -len(row["input_ids"])
    )  # one batch of the evaluation
    truth = np.eye(2, dtype=np.float32)[[row["labels"] for row in longest_first]]
    assert isinstance(served, Served)
    for told, accuracy in ((truth, 1.0), (-truth, 0.0)):
        monkeypatch.setattr(served, "_graph", lambda batch, told=told: told)
        assert context.evaluate(served)["accuracy"] == accuracy  # type: ignore[arg-type]


def test_it_is_not_timed_against_a_gpu(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny("bert", layers=1, **SIZES).eval()
    models, _ = with_int8_teacher({"teacher": teacher}, context.tokenizer, tmp_path / "teacher-int8")
    monkeypatch.setattr(module, "device_of_run", lambda: torch.device("cuda"))
    base, row = module.rows_of(models, context, {}, shapes=((1, 16),))
    assert row.name == INT8_TEACHER and row.latency_ms == row.speedup == {} and row.metric is not None
    assert list(base.latency_ms) == ["1x16"]


def test_made_once_and_anew_where_it_is_damaged_or_another_teachers(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, teacher = tmp_path / "teacher-int8", tiny("bert", layers=1, **SIZES).eval()
    with_int8_teacher({"teacher": teacher}, context.tokenizer, folder)
    made = json.loads((folder / "manifest.json").read_text())
    export = exporting.export
    monkeypatch.setattr(exporting, "export", refuse)
    assert INT8_TEACHER in with_int8_teacher({"teacher": teacher}, context.tokenizer, folder)[0]
    monkeypatch.setattr(exporting, "export", export)
    (folder / "model.onnx").write_bytes(b"half")
    assert with_int8_teacher({"teacher": teacher}, context.tokenizer, folder)[1] == []
    assert json.loads((folder / "manifest.json").read_text())["files"] == made["files"]
    other = tiny("bert", layers=1, seed=1, **SIZES).eval()
    with_int8_teacher({"teacher": other}, context.tokenizer, folder)
    assert json.loads((folder / "manifest.json").read_text())["files"]["model.onnx"] != made["files"]["model.onnx"]
    assert sorted(p.name for p in tmp_path.iterdir() if "int8" in p.name) == ["teacher-int8"]


def test_made_anew_for_another_length(context: Context, tmp_path: Path) -> None:
    model = {"teacher": tiny("bert", **SIZES)}
    for length in (16, 32):
        with_int8_teacher(model, context.tokenizer, tmp_path / "int8", length)
        assert json.loads((tmp_path / "int8" / "manifest.json").read_text(encoding="utf-8"))["max_length"] == length


def test_without_onnxruntime_the_report_says_how_to_get_the_row(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_installed", lambda package: package != "onnxruntime")
    teacher = tiny("bert", layers=1)
    models, (note,) = with_int8_teacher({"teacher": teacher}, context.tokenizer, tmp_path / "teacher-int8")
    assert list(models) == ["teacher"] and "needs onnxruntime" in note and "pip install smbert[onnx]" in note
    assert note.endswith(" Then run the same command again.")
    assert "\n" not in note and not (tmp_path / "teacher-int8").exists()


def test_what_goes_wrong_costs_the_row_and_not_the_run(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "largest_difference", lambda *_: 0.5)
    models, (note,) = with_int8_teacher({"teacher": tiny("bert", layers=1)}, context.tokenizer, tmp_path / "int8")
    assert list(models) == ["teacher"] and "differ by 5.0e-01" in note
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    _, (note,) = with_int8_teacher({"teacher": tiny("bert", layers=1)}, context.tokenizer, tmp_path / "mine")
    assert "holds other files" in note and (tmp_path / "mine/thesis.tex").read_text() == "x"
    assert "same command" not in note


def test_an_error_of_onnxruntimes_own_costs_the_row_only(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state").Fail

    def fails(*_: Any, **__: Any) -> None:
        raise fail("[ONNXRuntimeError] : 1 : FAIL : no such kernel")

    monkeypatch.setattr(exporting, "export", fails)
    models, (note,) = with_int8_teacher({"teacher": tiny("bert", layers=1)}, context.tokenizer, tmp_path / "int8")
    assert list(models) == ["teacher"] and note.endswith("FAIL : no such kernel")


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out, data = checkpoint(tmp_path / "model"), tmp_path / "out", splits()

    def run(**options: Any) -> Report:
        return module.compress(
            model,
            tiny_recipe(max_steps=1),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            output_dir=out,
            args=QUIET,
            baseline=False,
            **options,
        ).report

    report = run()
    assert [row.name for row in report.rows] == ["teacher", INT8_TEACHER, "smbert", "majority class"]
    row = report.rows[1]
    assert row.retention == pytest.approx(row.metric / report.rows[0].metric) and list(row.speedup) == ["1x16", "4x16"]
    assert f"| {INT8_TEACHER} |" in (out / "report.md").read_text() and report.notes == []
    assert sorted(p.name for p in (out / "teacher-int8").iterdir()) == [
        "manifest.json",
        "model.onnx",
        "runtime.py",
        "tokenizer.json",
    ]
    assert str(tmp_path) not in (out / "teacher-int8" / "manifest.json").read_text()
    monkeypatch.setattr(exporting, "export", refuse)
    assert [r.metrics for r in run().rows] == [r.metrics for r in report.rows]
    assert [r.name for r in run(int8_teacher=False).rows] == ["teacher", "smbert", "majority class"]
