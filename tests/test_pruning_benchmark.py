"""benchmarks/pruning.py on a tiny fine-tuned model: every method in every cell, resumed, and told what is wrong."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from conftest import NOISE, TELLING
from datasets import Dataset
from tiny_models import tiny

from smbert._report_tables import INT8_TEACHER
from smbert.measure import macs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def pruning(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_pruning", BENCHMARKS / "pruning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(tmp_path, tokenizer) -> list[str]:
    model, rng = tiny("bert", layers=2), random.Random(0)
    model.config.id2label, model.config.label2id = (
        {0: "entailment", 1: "not_entailment"},
        {"entailment": 0, "not_entailment": 1},
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "rte").mkdir(parents=True)
    for split, n in (("train", 40), ("validation", 12)):
        texts = [[" ".join(rng.choices(NOISE + TELLING[i % 2], k=5)) for i in range(n)] for _ in range(2)]
        rows = {"sentence1": texts[0], "sentence2": texts[1], "label": [i % 2 for i in range(n)]}
        Dataset.from_dict(rows).to_parquet(str(tmp_path / "data" / "rte" / f"{split}.parquet"))
    return [
        "--model", str(tmp_path / "model"), "--task", "rte", "--data-dir", str(tmp_path / "data"), "--speedups", "1.5,3",
        "--samples", "32", "--search-steps", "1", "--max-length", "32", "--output", str(tmp_path / "out"),
    ]  # fmt: skip


def test_every_method_within_every_budget_and_resumed(pruning, command, tmp_path, monkeypatch, capsys):
    assert pruning.main(command) == 0
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    names = [*pruning.SCORERS, *pruning.METHODS]
    assert [(row["name"], row["budget"]) for row in report["rows"]] == [(n, b) for n in names for b in (1.5, 3.0)]
    whole = macs(tiny("bert", layers=2))
    for row in report["rows"]:
        assert row["macs"] <= whole / row["budget"]
        assert row["retention"] == pytest.approx(row["metric"] / report["teacher"]["metric"])
        assert (
            row["rows_seen"] == (0 if row["name"] == "magnitude" else 32)
            and row["seconds"] > 0
            and row["peak_memory_mb"] > 0
        )
    if find_spec("onnx") and find_spec("onnxruntime"):
        assert report["teacher_int8"]["metric"] > 0 and INT8_TEACHER in (tmp_path / "out" / "pruning.md").read_text()
    else:
        assert "pip install" in report["teacher_int8"]["missing"]
    assert report["teacher"]["macs"] == whole and report["teacher"]["pass_seconds"] > 0
    shown = (tmp_path / "out" / "pruning.md").read_text()
    assert shown in capsys.readouterr().out and "| obs * |" in shown and "| taylor |" in shown
    assert (tmp_path / "out" / "pruning.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(pruning, "cell", None)
    monkeypatch.setattr(pruning, "teacher_cell", None)
    assert pruning.main(command) == 0
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["rows"] == report["rows"]
    for change in (["--seed", "1"], ["--max-length", "31"]):
        assert pruning.main([*command, *change]) == 2
        assert "other settings" in capsys.readouterr().err
    task, data = pruning.load_task("rte", str(tmp_path / "data"))
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "load_task", lambda *_: (replace(task, name="another"), data))
        assert pruning.main(command) == 2
    assert "other settings" in capsys.readouterr().err
    file = tmp_path / "data" / "rte" / "validation.parquet"
    Dataset.from_parquet(str(file)).select(range(10)).to_parquet(str(file))
    assert pruning.main(command) == 2
    assert "other data or other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--methods", "lottery"], "`--methods`"),
        (["--speedups", "fast"], "`--speedups`"),
        (["--speedups", "0"], "`--speedups`"),
        (["--speedups", "1"], "`--speedups`"),
        (["--speedups", "4/3"], "`--speedups`"),
    ],
)
def test_tells_what_is_wrong(pruning, command, tmp_path, capsys, change, told):
    assert pruning.main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert told in error and "To resolve" in error and not (tmp_path / "out").exists()


def test_needs_a_finetuned_model(pruning, command, tmp_path, capsys):
    tiny("bert", head="encoder", layers=2).save_pretrained(tmp_path / "model")
    assert pruning.main(command) == 2
    assert "fine-tuned" in capsys.readouterr().err
