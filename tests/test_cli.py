"""The command line: exit statuses, one-line errors, and flags that say what they mean."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from run_helpers import checkpoint, child, finish, pause_training, raw_checkpoint, splits, stage_folders, wait_for
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification

from smbert._recipe_help import documented_attributes, meanings_of, recipe_help
from smbert.cli import command_line, main, pairs, recipe_main
from smbert.objectives import OBJECTIVES
from smbert.recipe import Recipe
from smbert.report import Report
from smbert.stages import STAGES, Finetune
from smbert.surgery import PruningPlan, keep_units, structure_of
from smbert.trainer import SmbertTrainer, TrainingDiverged

SHORT = "name: short\nmax_length: 32\nteacher: {max_steps: 2, batch_size: 8}\nstages:\n"
SHORT += "- {kind: depth_reduction, layers: 1/2, max_steps: 2, batch_size: 8}\n"
SHORT += "- {kind: width_pruning, heads: 3, ffn: 48, samples: 8}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model (two labels), raw (no head), slim (uneven), train.csv, validation.csv, recipe.yaml."""
    folder = tmp_path_factory.mktemp("cli")
    checkpoint(folder / "model")
    raw_checkpoint(folder / "raw")
    model = tiny("bert", layers=2, max_position_embeddings=132)
    checkpoint(folder / "slim", keep_units(model, PruningPlan(heads=((0, 1), (2,)), ffn=(tuple(range(40)), (5,)))))
    data = splits()
    for name in ("train", "validation"):
        data[name].to_csv(folder / f"{name}.csv", index=False)
    (folder / "recipe.yaml").write_text(SHORT)
    return folder


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("smbert.compress"), "SHAPES", ((1, 16),))


def data_flags(place: Path) -> list[str]:
    return ["--train-file", str(place / "train.csv"), "--validation-file", str(place / "validation.csv")]


def compress_flags(place: Path, out: Path, model: str = "model") -> list[str]:
    return [
        "compress", "--model", str(place / model), *data_flags(place), "--recipe", str(place / "recipe.yaml"),
        "--output-dir", str(out), "--disable-tqdm", "--arg", "bf16=false", "--no-baseline", "--no-int8-teacher",
    ]  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """Runs a command that has to end with status 2 and one line; gives the line."""
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.err.strip().splitlines()[-1] == lines[0], captured.err
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


# ------------------------------------------------------------------------------------------------------------------- compress


def test_compress(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = [*compress_flags(place, out), "--set", "width_pruning.heads=1/2", "--set", "stages.1.learning_rate=1e-3"]
    assert main([*flags, "--seed", "3", "--target-shape", "1x16"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "teacher",
        "smbert",
        str(out / "report.md"),
        str(out / "report.png"),
        str(out / "model"),
        "import smbert",
    ):
        assert word in shown, word
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert structure_of(model).layer_widths == ((2, 48), (2, 48))
    recipe = Recipe.from_yaml(out / "model" / "recipe.yaml")
    assert recipe.stages[0].learning_rate == 1e-3 and recipe.stages[1].heads == "1/2"  # type: ignore[attr-defined]
    report = Report.read(out)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {row.seed for row in report.rows} == {3} and report.command == command_line()
    assert stage_folders(out) == ["01-depth_reduction", "02-width_pruning"]

    message = fails(capsys, *flags, "--seed", 3, "--set", "width_pruning.heads=1")
    assert "02-width_pruning" in message and '`stage.heads` was "1/2" and is 1' in message and "--restart" in message
    assert main([*flags, "--seed", "3", "--set", "width_pruning.heads=1", "--restart"]) == 0
    capsys.readouterr()
    assert structure_of(AutoModelForSequenceClassification.from_pretrained(out / "model")).layer_widths[0] == (1, 48)


def test_compress_with_a_target_a_teacher_and_unlabelled_texts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pool.jsonl").write_text('{"text": "word1 word2"}\n{"text": "word9"}\n')
    recipe = SHORT + "- {kind: distill, max_steps: 1, batch_size: 8, objectives: [{kind: logits}]}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    out = tmp_path / "out"
    flags = [*compress_flags(place, out), "--recipe", str(tmp_path / "r.yaml"), "--teacher", str(place / "model")]
    assert main([*flags, "--target", "params=60%", "--unlabelled-file", str(tmp_path / "pool.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"target params 60%: measured \d+,\d+, met", shown), shown[-1500:]
    record = json.loads((out / "03-distill" / "stage.json").read_text())
    assert record["train_rows"] == 34 and "pool" in record["inputs"]
    message = fails(capsys, *flags, "--unlabelled-file", tmp_path / "none.jsonl", "--restart")
    assert "none.jsonl" in message and stage_folders(out)[-1] == "03-distill"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model", "nowhere/at/all"], ["nowhere/at/all"]),
        (["--model", "no-such-org/no-such-model"], ["no-such-org/no-such-model", "To resolve"]),
        (["--recipe", "none.yaml"], ["none.yaml"]),
        (["--recipe", "none"], ["smbert", "none"]),
        (["--set", "heads"], ["--set", "KEY=VALUE"]),
        (["--set", "=3"], ["--set", "KEY=VALUE"]),
        (["--set", "width_pruning.heads={"], ["--set", "YAML"]),
        (["--set", "width_pruning.hats=3"], ["hats", "heads"]),
        (["--set", "distill.epochs=3"], ["distill.epochs", "01-depth_reduction"]),
        (["--set", "width_pruning.heads=9"], ["02-width_pruning", "at most 4", "9"]),
        (["--arg", "fp61=true"], ["fp61"]),
        (["--arg", "learning_rate=1"], ["learning_rate"]),
        (["--target", "speed=3"], ["speedup"]),
        (["--target", "params=0%"], ["params"]),
        (["--text-columns", "body"], ["body", "'text'"]),
        (["--label-column", "stars"], ["stars", "'label'"]),
        (["--label-names", "0", "1", "2"], ["2 labels", "have 3", "--new-head"]),
        (["--train-file", "none.csv"], ["none.csv"]),
        (["--tokenizer", "nowhere/at/all"], ["nowhere/at/all", "--tokenizer"]),
        (["--max-length", "1000"], ["max_length", "128"]),
        (["--unlabelled-file", "pool.docx"], ["pool.docx"]),
        (["--turned-pairs"], ["two text columns", "'text'", "--turned-pairs"]),
    ],
)
def test_errors_are_one_line_and_status_2(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], words: list[str]
) -> None:
    message = fails(capsys, *compress_flags(place, tmp_path / "out"), *changes)
    for word in words:
        assert word in message, message
    assert stage_folders(tmp_path / "out") == []


def test_all_faults_of_a_recipe_have_a_line_each(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--set", "width_pruning.heads=9", "--set", "depth_reduction.layers=7"]
    assert main([*compress_flags(place, tmp_path / "out"), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:8] for line in lines if line.startswith(("error: ", "  - stage"))] == [
        "error: t",
        "  - stag",
        "  - stag",
    ]


def test_nothing_given(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert "--demo" in fails(capsys, "compress")
    assert "`--task`" in fails(capsys, "compress", "--model", place / "model")
    assert "--validation-file" in fails(
        capsys, "compress", "--model", place / "model", "--train-file", place / "train.csv"
    )
    for argv in ([], ["compres"], ["compress", "--sed", "x", "--seed", "x"]):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2


def test_what_diverges_is_no_traceback(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **kwargs: Any) -> None:
        raise TrainingDiverged("the loss is nan at step 3\n(gold nan).")

    monkeypatch.setattr(SmbertTrainer, "train", diverge)
    assert fails(capsys, *compress_flags(place, tmp_path / "out")) == "error: the loss is nan at step 3 (gold nan)."


# ------------------------------------------------------------------------------------------------------------------ interrupt


def interrupted_run(argv: list[str], file: str) -> int:
    """In a child: the command, which waits for ever after a step and says so in a file."""
    # Shells start background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pause_training("", 1, Path(file))
    sys.argv = ["/usr/bin/smbert", *argv]
    sys.stderr = open(file + ".err", "w", buffering=1)  # noqa: SIM115
    return main(argv)


def test_ctrl_c_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "paused"
    flags = compress_flags(place, out)
    process = child(interrupted_run, [*flags, "--restart"], str(file))
    wait_for(file.exists, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    last = Path(str(file) + ".err").read_text().strip().splitlines()[-1]
    assert last.startswith("interrupted. To go on where it stopped: smbert compress --model ")
    assert "--restart" not in last and last.endswith("--no-int8-teacher") and "Traceback" not in last
    assert stage_folders(out) == [".01-depth_reduction.work"]
    assert main(flags) == 0
    assert stage_folders(out) == ["01-depth_reduction", "02-width_pruning"]


# --------------------------------------------------------------------------------------------------- evaluate, bench, inspect


def test_evaluate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(place / "model"), "--validation-file", str(place / "validation.csv")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("custom validation"))
    assert set(found) == {"custom validation accuracy", "custom validation f1_macro"}
    assert 0 <= float(found["custom validation accuracy"]) <= 1


def test_evaluate_on_a_glue_task_from_a_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    rows = splits()["validation"].rename_column("text", "sentence")
    rows.to_parquet(tmp_path / "glue" / "sst2" / "validation.parquet")
    flags = ["--task", "sst2", "--data-dir"]
    assert main(["evaluate", str(place / "model"), *flags, str(tmp_path / "glue")]) == 0
    assert re.search(r"^sst2 validation accuracy [01]\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    assert "sst2" in fails(capsys, "evaluate", place / "model", "--task", "mrpc", "--data-dir", tmp_path / "glue")


def test_evaluate_refuses_what_has_nothing_to_say(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = ["--validation-file", place / "validation.csv"]
    assert "no trained classification head" in fails(capsys, "evaluate", place / "raw", *data)
    assert "2 labels" in fails(capsys, "evaluate", place / "model", *data, "--kind", "regression")
    assert "nowhere" in fails(capsys, "evaluate", tmp_path / "nowhere", *data)
    assert "'text'" in fails(capsys, "evaluate", place / "model", *data, "--text-columns", "body")


def test_bench(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(place / "model"), str(place / "slim"), "--shapes", "1x8,2x16", "--threads", "1"]) == 0
    told = capsys.readouterr()
    for word in ("speed-up", "1x8", "2x16", "1.00x", "0.0", "threads 1", "torch"):
        assert word in told.out, word
    assert "latency 1x8" in told.err
    assert main(["bench", str(place / "model"), "--shapes", "1x8", "--threads", "1", "--disable-tqdm"]) == 0
    assert "latency" not in capsys.readouterr().err
    assert "--shapes" in fails(capsys, "bench", place / "model", "--shapes", "1-8")
    assert "`shapes`" in fails(capsys, "bench", place / "model", "--shapes", "0x8")
    assert "132" in fails(capsys, "bench", place / "model", "--shapes", "1x133")
    assert "`threads`" in fails(capsys, "bench", place / "model", "--shapes", "1x8", "--threads", 0)


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(place / "slim")]) == 0
    shown = capsys.readouterr().out
    cells = [[c.strip(" █") for c in re.split("[│┃]", line)] for line in shown.splitlines()]
    layers = [[c for c in row if c] for row in cells if len([c for c in row if c]) == 3 and row[1].isdigit()]
    assert layers == [["0", "2", "40"], ["1", "1", "5"]] or layers == [["0", "2", "40"], ["1", "1", "1"]]
    assert "hidden 32, head 8, vocabulary 100" in shown and "MACs at length 128" in shown and "parameters 0." in shown
    assert "nowhere" in fails(capsys, "inspect", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------- flags


def test_values_of_flags() -> None:
    items = {
        "a=2/3": "2/3", "b=1e-5": 1e-5, "c=3": 3, "d=0.5": 0.5, "e=35%": "35%", "f=true": True, "g=null": None, "h=uniform": "uniform",
        "i=[0, 2]": [0, 2], "j=[{kind: logits, weight: 2}]": [{"kind": "logits", "weight": 2}], "k=a=b": "a=b", "l=-1": -1, "m=": None,
    }  # fmt: skip
    assert pairs(list(items), "--set") == {key[0]: value for key, value in items.items()}
    assert [type(v) for v in pairs(["a=1e-5", "b=3", "c=3.0"], "--set").values()] == [float, int, float]


def test_help_explains_every_key_of_every_stage_and_objective() -> None:
    shown = recipe_help()
    for cls in (Recipe, *STAGES.values(), *OBJECTIVES.values()):
        meanings = meanings_of(cls)
        for field in fields(cls):
            assert len(meanings.get(field.name, "")) > 3, f"{cls.__name__}.{field.name} is not explained"
            assert re.search(rf"^ +{field.name}( = .*)?: \S", shown, re.MULTILINE), field.name
        assert set(meanings) == {field.name for field in fields(cls)}, f"{cls.__name__} explains what it does not have"
    for kind in (*STAGES, *OBJECTIVES):
        assert f"\n  {kind}: " in shown


def test_documented_attributes() -> None:
    doc = """Words.

    Attributes:
        a: one
            and more: here.
        b, c: two.

    Raises:
        d: three.
    """
    assert documented_attributes(doc) == {"a": "one and more: here.", "b": "two.", "c": "two."}
    assert documented_attributes("Words.") == {}
    assert "epochs" in meanings_of(Finetune)


@pytest.mark.parametrize(
    "argv", [["--help"], ["compress", "--help"], ["evaluate", "-h"], ["bench", "-h"], ["inspect", "-h"]]
)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: smbert")
    if argv[0] == "compress":
        assert recipe_help() in shown and "params=35%" in shown


def test_every_flag_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe_main("smbert", ["--help"], description="WHY")
    flags = capsys.readouterr().out.split("recipe keys")[0]
    assert "WHY" in flags
    for entry in re.split(r"\n  (?=-)", flags)[1:]:
        words = entry.split("\n\n")[0].split()
        meant = [w for w in words if not w.startswith(("-", "[", "{")) and not re.fullmatch(r"[A-Z_=]+\]?|\.\.\.\]", w)]
        assert len(meant) >= 2, entry
