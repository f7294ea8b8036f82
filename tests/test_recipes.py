"""The recipes that ship with smbert parse, fit the models they are for, and run as a user would run them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from datasets import concatenate_datasets
from run_helpers import checkpoint, raw_checkpoint, splits, stage_folders, texts, tiny_context
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification

from smbert._report_tables import INT8_TEACHER
from smbert.recipe import Recipe
from smbert.report import Report
from smbert.stages import Distill, Outline, WidthPruning
from smbert.surgery import keep_layers, structure_of
from smbert.teacher import freeze
from smbert.trainer import SmbertTrainer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
YAML = sorted(RECIPES.glob("*.yaml"))


def script(name: str) -> ModuleType:
    """A recipe's module, by its path: recipes/smbert.py must not hide the package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_recipes_are_tested() -> None:
    assert {p.stem for p in YAML} >= {"smbert", "demo", "two_cores"}
    assert {p.stem for p in RECIPES.glob("*.py")} == {
        "smbert", "custom_checkpoint", "unlabelled", "classical", "frontier",
    }  # fmt: skip


@pytest.mark.parametrize("file", YAML, ids=lambda p: p.stem)
def test_yaml_and_python_are_the_same_recipe(file: Path) -> None:
    recipe = Recipe.from_yaml(file)
    assert Recipe.named(file.stem) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.name and len(recipe.stages) >= (1 if file.stem == "vocabulary" else 2)


@pytest.mark.parametrize("file", [p for p in YAML if p.stem != "vocabulary"], ids=lambda p: p.stem)
@pytest.mark.parametrize("layers", [6, 12])
def test_recipes_fit_the_depths_that_they_are_for(file: Path, layers: int, tmp_path: Path) -> None:
    model = tiny("bert", layers=layers, max_position_embeddings=132, hidden_size=48, num_attention_heads=12)
    recipe = Recipe.from_yaml(file)  # the small tokenizer has no pieces that could go
    recipe = replace(recipe, stages=tuple(s for s in recipe.stages if s.kind != "vocab_pruning"))
    context = tiny_context(tmp_path, teacher=freeze(model))
    after = recipe.check(Outline(structure_of(model)), context)
    kept = {6: {"smbert": 2, "demo": 2, "two_cores": 2}, 12: {"smbert": 3, "demo": 4, "two_cores": 3}}[layers]
    if file.stem in kept:
        assert len(after.structure.layer_widths) == kept[file.stem]
        assert set(after.structure.layer_widths) == {(8, 48)}  # 2/3 of 12 heads, 2/3 of 64 neurons rounded up to 8


def test_the_paper_has_its_numbers() -> None:
    one, two, distill, width, recovery = Recipe.named("smbert").stages
    assert (one.base, one.slope, one.learning_rate, one.epochs) == (0.3, 0.0006, 1e-5, 15)  # type: ignore[attr-defined]
    assert (two.base, two.slope, two.learning_rate, two.epochs) == (0.4, 0.0008, 1e-5, 15)  # type: ignore[attr-defined]
    assert isinstance(distill, Distill) and isinstance(recovery, Distill)
    assert [(o.kind, o.weight) for o in distill.objectives] == [("logits", 5.0), ("hidden", 2.0), ("attention", 1.0)]
    assert isinstance(width, WidthPruning) and (width.heads, width.ffn) == ("2/3", "2/3")


def run_script(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "100"}
    )


def test_the_script_explains_itself() -> None:
    done = run_script(str(RECIPES / "smbert.py"), "--help")
    assert done.returncode == 0, done.stderr
    for word in (
        "usage: smbert.py",
        "WHY these steps",
        "--demo",
        "--data-dir",
        "--intermediate",
        "distill.epochs=5",
        "relation_heads",
    ):
        assert word in done.stdout, word


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = raw_checkpoint(tmp_path / "model"), splits()
    for name in ("train", "validation"):
        data[name].to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.setattr(sys.modules["smbert.compress"], "SHAPES", ((1, 16),))
    out = tmp_path / "out"
    short = [f"{kind}.max_steps=1" for kind in ("teacher", "depth_reduction", "distill")]
    argv = [
        "--model", str(model), "--train-file", str(tmp_path / "train.csv"), "--validation-file", str(tmp_path / "validation.csv"),
        "--text-columns", "text", "--label-column", "label", "--output-dir", str(out), "--disable-tqdm", "--no-baseline",
        *(word for change in [*short, "width_pruning.samples=8"] for word in ("--set", change)),
    ]  # fmt: skip
    assert script("smbert").recipe_main("smbert", argv) == 0
    assert "smbert" in capsys.readouterr().out
    assert stage_folders(out)[0] == "00-teacher" and len(stage_folders(out)) == 6
    small = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert structure_of(small).layer_widths == ((3, 48),)


def test_a_checkpoint_and_a_csv_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = raw_checkpoint(tmp_path / "model"), splits()
    for name in ("train", "validation"):
        data[name].to_csv(tmp_path / f"{name}.csv", index=False)
    compress = sys.modules["smbert.compress"]
    monkeypatch.setattr(compress, "SHAPES", ((1, 16),))
    monkeypatch.setattr("smbert.report.draw", lambda rows: b"plot")
    monkeypatch.setattr(compress, "latency", partial(compress.latency, warmup=1, min_runs=5))
    # Speed is measured; a tiny model on a busy machine would make the test a matter of luck.
    monkeypatch.setattr(compress, "sizes_for", lambda goal, *models: compress.Sizes(1, 2, 32))
    train = SmbertTrainer.train

    def two_steps(self: SmbertTrainer, **kwargs: object) -> object:
        self.args.max_steps = 2
        return train(self, **kwargs)

    monkeypatch.setattr(SmbertTrainer, "train", two_steps)
    out = tmp_path / "out"
    script("custom_checkpoint").main(
        str(model), str(tmp_path / "train.csv"), str(tmp_path / "validation.csv"), str(out)
    )
    shown = capsys.readouterr().out
    assert "| smbert" in shown and "target met: " in shown and str(out / "model") in shown
    small = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert structure_of(small).layer_widths == ((2, 32),)
    assert len((RECIPES / "custom_checkpoint.py").read_text().splitlines()) < 45
    done = run_script(str(RECIPES / "custom_checkpoint.py"))
    assert done.returncode == 1 and "custom_checkpoint.py MODEL" in done.stderr


def test_few_labels_and_much_unlabelled_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = raw_checkpoint(tmp_path / "teacher")
    student = checkpoint(tmp_path / "student", keep_layers(tiny("bert", head="encoder"), [0]))
    train, held_out = texts(40), texts(12, seed=1)
    leaked = concatenate_datasets([train, held_out.select([0])])  # one text of the evaluation set stands in the pool
    leaked.to_csv(tmp_path / "train.csv", index=False)
    held_out.to_csv(tmp_path / "validation.csv", index=False)
    monkeypatch.setattr(sys.modules["smbert.compress"], "SHAPES", ((1, 16),))
    monkeypatch.setattr(
        script_compress := sys.modules["smbert.compress"],
        "latency",
        partial(script_compress.latency, warmup=0, min_runs=2, min_seconds=0),
    )
    argv = [
        "--teacher", str(teacher), "--student", str(student), "--train-file", str(tmp_path / "train.csv"),
        "--validation-file", str(tmp_path / "validation.csv"), "--text-columns", "text", "--label-column", "label",
        "--labels", "8", "--seeds", "0,1", "--max-length", "32", "--teacher-epochs", "1", "--student-epochs", "1",
        "--control-epochs", "1", "--disable-tqdm", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    recipe = script("unlabelled")
    events: list[str] = []
    rows_of = recipe.rows_of
    waiting = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: events.append("wait"))
    monkeypatch.setattr(recipe, "process_state", lambda: waiting)
    monkeypatch.setattr(recipe, "rows_of", lambda *a, **k: (events.append("time"), rows_of(*a, **k))[1])
    assert recipe.main(argv) == 0
    assert events == ["time", "wait"] * 2  # the other processes stand still while the main one times
    report = Report.read(tmp_path / "out")
    int8 = [INT8_TEACHER] if find_spec("onnx") and find_spec("onnxruntime") else []
    names = [
        "teacher",
        *int8,
        "smbert",
        "same shape, no distillation",
        "same shape, twice the labels",
        "majority class",
    ]
    assert [(row.seed, row.name) for row in report.rows] == [(seed, name) for seed in (0, 1) for name in names]
    stages = {p.name: json.loads((p / "stage.json").read_text()) for p in (tmp_path / "out" / "seed-0").glob("0*")}
    rows = {name: record["train_rows"] for name, record in stages.items()}
    assert rows["00-teacher"] == rows["02-labels"] == 8 and rows["03-twice_the_labels"] == 16
    kept = int(report.notes[0].split()[2])
    assert rows["01-distill"] == kept < 41 and "stand in the evaluation set" in report.notes[0]
    assert " 0 stand in" not in report.notes[0]

    most = [*argv, "--labels", "41", "--seeds", "0", "--no-int8-teacher", "--output", str(tmp_path / "most")]
    most[most.index(str(teacher))] = str(tmp_path / "out" / "seed-0" / "00-teacher")  # fine-tuned: taken as it is
    assert recipe.main(most) == 0
    few = Report.read(tmp_path / "most")
    assert few.rows[0].metrics == report.rows[0].metrics and few.notes[0].startswith("The teacher came fine-tuned")
    assert "no control with twice the labels" in few.notes[-1]
    assert "same shape, twice the labels" not in {row.name for row in few.rows}

    monkeypatch.setattr(SmbertTrainer, "train", None)  # a second run trains nothing
    assert recipe.main(argv) == 0
    assert [r.metrics for r in Report.read(tmp_path / "out").rows] == [r.metrics for r in report.rows]
    assert recipe.main([*argv, "--no-int8-teacher"]) == 0
    assert INT8_TEACHER not in {row.name for row in Report.read(tmp_path / "out").rows}
    events.clear()
    monkeypatch.setattr(recipe, "rows_of", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.main(argv)
    assert events == ["wait"]
    capsys.readouterr()
    assert recipe.main([*argv, "--labels", "42"]) == 2
    assert "from 1 to 41, the labelled rows, got 42" in capsys.readouterr().err


def test_a_pool_in_files_is_read_as_the_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts(12).to_csv(tmp_path / "rows.csv", index=False)
    recipe, found = script("unlabelled"), []
    monkeypatch.setattr(recipe, "one_seed", lambda *given: found.append(given[5]["text"][:]) or [])
    monkeypatch.setattr(recipe.Report, "markdown", lambda self: "")
    monkeypatch.setattr(recipe.Report, "write", lambda self, folder: None)
    argv = [
        "--teacher", "t", "--student", "s", "--train-file", str(tmp_path / "rows.csv"), "--validation-file",
        str(tmp_path / "rows.csv"), "--text-columns", "text", "--label-column", "label", "--labels", "4", "--output", "out",
    ]  # fmt: skip
    (tmp_path / "pool.csv").write_text("text\nnull\nNA\n007\n", encoding="utf-8")
    assert recipe.main([*argv, "--pool", str(tmp_path / "pool.csv")]) == 0
    assert found == [["null", "NA", "007"]]
    for content, message in (('{"text": "a"}\n{"text": null}\n', "None in row 1"), ('{"title": "a"}\n', "'text'")):
        (tmp_path / "pool.jsonl").write_text(content, encoding="utf-8")
        capsys.readouterr()
        assert recipe.main([*argv, "--pool", str(tmp_path / "pool.jsonl")]) == 2
        assert message in capsys.readouterr().err
