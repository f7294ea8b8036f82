"""`smbert distill-classical`, `smbert explain` and recipes/classical.py, as a user runs them."""

from __future__ import annotations

import argparse
import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from run_helpers import checkpoint, raw_checkpoint, splits, texts
from tiny_models import tiny

from smbert._cli_students import _pool, add_parsers
from smbert._report_tables import INT8_TEACHER
from smbert.classical import load_student
from smbert.classical.features import count_vectorizers
from smbert.classical.kinds import KINDS
from smbert.cli import guarded
from smbert.report import Report
from smbert.text_latency import text_latency
from smbert.trainer import SmbertTrainer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "classical.py"
SMALL = ["--words", "1,1", "--set", "folds=2", "--disable-tqdm"]


def run(*argv: Any) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args([str(a) for a in argv])
    return guarded(args.run, args)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher, other (three labels), train.csv, validation.csv, pool.jsonl, pairs.csv."""
    folder = tmp_path_factory.mktemp("students")
    checkpoint(folder / "teacher")
    checkpoint(folder / "other", tiny("bert", num_labels=3, max_position_embeddings=132))
    data = splits(64)
    for name in ("train", "validation"):
        data[name].to_csv(folder / f"{name}.csv", index=False)
    texts(40, seed=9, labels=False).to_json(folder / "pool.jsonl")
    return folder


def data_flags(place: Path) -> list[str]:
    return ["--train-file", str(place / "train.csv"), "--validation-file", str(place / "validation.csv")]


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert run(*argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "To resolve" in lines[-1], lines
    return lines[-1]


def test_a_baseline(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*data_flags(place), *SMALL, "--output-dir", tmp_path / "s"]
    assert run("distill-classical", "--student", "multinomial_nb", *flags) == 0
    shown = capsys.readouterr().out
    assert "gold labels" in shown and "majority class 0.5000" in shown and "load_student" in shown
    assert load_student(tmp_path / "s")("word0 word1")[0]["label"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_teacher_and_a_pool(place: Path, tmp_path: Path, stream: bool, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*data_flags(place), *SMALL, "--output-dir", tmp_path / "s", "--unlabelled-file", place / "pool.jsonl"]
    flags += ["--stream", "--set", "epochs=1"] if stream else []
    assert run("distill-classical", "--model", place / "teacher", *flags, "--set", "temperature=2") == 0
    shown = capsys.readouterr().out
    assert "soft labels" in shown and "texts: pool 40" in shown
    student = load_student(tmp_path / "s")
    assert student.training["pool"] == 40 and student.training.get("streamed", False) is stream
    assert list((tmp_path / "s-cache").glob("*.npy"))


@pytest.mark.parametrize("stream", [False, True])
def test_what_looks_like_no_text_in_a_csv_is_one(tmp_path: Path, stream: bool) -> None:
    (tmp_path / "pool.csv").write_text("text\nnull\nNA\n007\n", encoding="utf-8")
    pool = _pool(argparse.Namespace(unlabelled_file=str(tmp_path / "pool.csv"), stream=stream))
    assert pool is not None and [row["text"] for row in pool] == ["null", "NA", "007"]


def test_explanations_side_by_side(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*data_flags(place), *SMALL, "--output-dir", tmp_path / "s"]
    assert run("distill-classical", "--model", place / "teacher", *flags) == 0
    explain = ["explain", place / "teacher", tmp_path / "s", "--samples", 50, "--seeds", 2]
    out = ["--output-dir", tmp_path / "e"]
    capsys.readouterr()
    assert run(*explain, "--validation-file", place / "validation.csv", "--limit", 2, *out) == 0
    shown = capsys.readouterr().out
    assert "fidelity" in shown and "teacher" in shown and "explanations.html" in shown
    data = json.loads((tmp_path / "e" / "explanations.json").read_text())
    assert data["models"] == ["teacher", "s"] and len(data["rows"]) == 2 and data["report"]["seeds"] == 2
    assert data["rows"][0][0]["exact"] is None and data["rows"][0][1]["exact"]
    assert run(*explain[:3], "--text", "word1 word9", "--text", "", "--label", "1", *out) == 0
    data = json.loads((tmp_path / "e" / "explanations.json").read_text())
    assert [one["label"] for row in data["rows"] for one in row] == [1] * 4
    capsys.readouterr()


def test_errors_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = data_flags(place), ["--output-dir", tmp_path / "x"]
    distill = ["distill-classical", *data, *out]
    assert "label" in fails(capsys, *distill, "--model", place / "other")
    assert "`teacher`" in fails(capsys, *distill, "--unlabelled-file", place / "pool.jsonl")
    assert "--stream" in fails(capsys, *distill, "--stream")
    assert "--words" in fails(capsys, *distill, "--words", "two")
    assert "`words`" in fails(capsys, *distill, "--words", "2,1")
    assert "warmth" in fails(capsys, *distill, "--set", "warmth=2")
    assert "--task" in fails(capsys, "distill-classical", *out)
    assert "streamed pool" in fails(
        capsys, *distill, "--model", place / "teacher", "--student", "decision_tree",
        "--unlabelled-file", place / "pool.jsonl", "--stream",
    )  # fmt: skip
    explain = ["explain", place / "teacher", *out]
    assert "--text-pair" in fails(capsys, *explain, "--text", "a", "--text-pair", "b", "--text-pair", "c")
    assert "--label" in fails(capsys, *explain, "--text", "a", "--label", "no such")
    assert "one or two" in fails(capsys, "explain", "a", "b", "c", "--text", "a")
    assert "same labels" in fails(capsys, *explain[:2], place / "other", *out, "--text", "a")
    assert "`samples`" in fails(capsys, *explain, "--text", "a", "--samples", 1)
    assert "count n-grams" in fails(
        capsys, *distill, "--model", place / "teacher", "--student", "static_embedding", "--words", "1,2"
    )
    assert not (tmp_path / "x").exists()
    full = ["distill-classical", *data, "--model", place / "nobody", "--output-dir", place]
    assert "earlier student" in fails(capsys, *full)  # before the teacher is looked for


def test_flags_change_the_students_own_features(place: Path, tmp_path: Path) -> None:
    flags = [*data_flags(place), "--student", "decision_tree", "--words", "1,2", "--output-dir", tmp_path / "s"]
    assert run("distill-classical", *flags, "--disable-tqdm") == 0
    vectorizer = next(count_vectorizers(load_student(tmp_path / "s").pipeline[0]))
    own = KINDS["decision_tree"].features
    assert vectorizer.ngram_range == (1, 2) and own.words == (1, 1)
    assert (vectorizer.min_df, vectorizer.max_features) == (own.min_df, own.max_features)


# ------------------------------------------------------------------------------------------------------------- the recipe


def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("recipe_classical", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    students = ["multinomial_nb", "decision_tree", "static_embedding"]
    argv = ["--model", str(place / "teacher"), *data_flags(place), "--labels", "24", "--students", *students]
    argv += ["--set", "folds=0", "--set", "epochs=1", "--timing-seconds", "0.05", "--disable-tqdm"]
    out = tmp_path / "out"
    assert recipe().main([*argv, "--output", str(out)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    report = Report.read(out)
    rows = {row.name: row for row in report.rows}
    int8 = [INT8_TEACHER] if find_spec("onnx") and find_spec("onnxruntime") else []
    assert set(rows) == {
        "teacher",
        *int8,
        "majority class",
        *(f"{s}, {k}" for s in students for k in ("gold labels", "distilled")),
    }
    for name in int8:
        assert set(rows[name].latency_ms) == {"1xtext", "16xtext"} and rows[name].size_mb > 0
    nb, teacher = rows["multinomial_nb, distilled"], rows["teacher"]
    assert nb.params_total and set(nb.latency_ms) == {"1xtext", "16xtext"} and teacher.speedup["1xtext"] == 1.0
    assert nb.speedup["1xtext"] == pytest.approx(teacher.latency_ms["1xtext"]["p50"] / nb.latency_ms["1xtext"]["p50"])
    assert any(note.startswith("Texts per second, 16 at a time: teacher ") for note in report.notes)
    assert any("24 labelled texts, 40 unlabelled" in note for note in report.notes)
    assert "points over the majority class" in shown
    for name, kind in (("multinomial_nb-distilled", "soft labels"), ("static_embedding-gold-labels", "gold labels")):
        student = load_student(out / "students" / name)
        assert student.training["taught_by"] == kind
    assert load_student(out / "students" / "multinomial_nb-distilled").training["pool"] == 40
    assert (out / "report.md").is_file() and (out / "report.png").is_file()
    fewer = [*argv, "--students", "multinomial_nb", "--no-int8-teacher", "--validation-samples", "8"]
    assert recipe().main([*fewer, "--output", str(tmp_path / "fewer")]) == 0
    assert set(Report.read(tmp_path / "fewer").rows[0].latency_ms) == {"1xtext", "8xtext"}
    assert recipe().main([*fewer[:-1], "0", "--output", str(tmp_path / "none")]) == 2
    assert "`--validation-samples`" in capsys.readouterr().err
    argv[argv.index("24")] = "64"
    assert recipe().main([*argv, "--output", str(tmp_path / "none")]) == 2
    assert "`--labels`" in capsys.readouterr().err


def test_the_recipe_finetunes_a_raw_teacher_on_the_labels_that_there_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_checkpoint(tmp_path / "raw")
    argv = ["--model", str(raw), *data_flags(place), "--labels", "24", "--students", "multinomial_nb"]
    argv += ["--set", "folds=0"]
    argv += ["--teacher-epochs", "1", "--timing-seconds", "0.05", "--disable-tqdm", "--output", str(tmp_path / "out")]
    assert recipe().main(argv) == 0, capsys.readouterr().err
    stage = json.loads((tmp_path / "out" / "00-teacher" / "stage.json").read_text(encoding="utf-8"))
    assert stage["train_rows"] == 24
    metrics = {row.name: row.metrics for row in Report.read(tmp_path / "out").rows}
    monkeypatch.setattr(SmbertTrainer, "train", None)  # a second run trains nothing
    assert recipe().main(argv) == 0, capsys.readouterr().err
    assert {row.name: row.metrics for row in Report.read(tmp_path / "out").rows} == metrics


def test_the_texts_are_the_same_for_all_models() -> None:
    seen: dict[str, list[list[str]]] = {"a": [], "b": []}
    models = {name: seen[name].append for name in seen}
    found = text_latency(models, ["x", "y", "z"], (1, 2), warmup=1, min_runs=6, disable_tqdm=True)
    assert seen["a"] == seen["b"] and len(seen["a"]) == 2 * 7
    assert seen["a"][:4] == [["x"], ["y"], ["z"], ["x"]] and seen["a"][7:9] == [["x", "y"], ["z", "x"]]
    assert set(found["a"]) == {"1xtext", "2xtext"} and found["b"]["2xtext"]["p50"] <= found["b"]["2xtext"]["p95"]
    for texts_, models_ in ((["x"], models), (["x", "y"], {})):
        with pytest.raises(ValueError, match="To resolve"):
            text_latency(models_, texts_, (1, 2))
