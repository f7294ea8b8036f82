"""A family: each member from the one before, all taught by the original, one report."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_helpers import millisecond_per_mac, raw_checkpoint, splits
from tiny_models import tiny

import smbert
from smbert import (
    DepthReduction,
    Distill,
    EmbeddingFactorisation,
    Recipe,
    RetrainingFreePruning,
    VocabPruning,
    teacher_states,
)
from smbert._report_tables import prediction
from smbert.family import AIM, trained_for
from smbert.measure import macs
from smbert.report import Report
from smbert.stages import Finetune, retraining_free
from smbert.surgery import structure_of
from smbert.trainer import SmbertTrainer

QUICK = {"max_steps": 2, "batch_size": 8}
RECIPE = Recipe(
    max_length=32,
    teacher=Finetune(**QUICK),
    stages=(
        RetrainingFreePruning(speedup=9, shape="4x16", samples=16, batch_size=8, calibration=8, search_steps=0, ffn_levels=4),
        Distill(objectives=({"kind": "logits", "weight": 1.0},), **QUICK),
    ),
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    millisecond_per_mac(monkeypatch)
    compress = importlib.import_module("smbert.compress")

    monkeypatch.setattr(compress, "latency", partial(compress.latency, warmup=0, min_runs=2, min_seconds=0))
    monkeypatch.setattr(compress, "SHAPES", ((4, 16),))


def run(model: Path, out: Path, speedups: Any = (1.5, 2), recipe: Any = RECIPE, **options: Any) -> Any:
    data = splits()
    return smbert.compress_family(
        model, speedups, recipe, output_dir=out, train_dataset=data["train"], eval_dataset=data["validation"],
        args={"disable_tqdm": True, "bf16": False}, **{"int8_teacher": False, **options},
    )  # fmt: skip


def test_each_member_comes_from_the_one_before(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = tmp_path / "out", retraining_free.whole_models_ms
    slower = {"teacher": 1.1}  # as the original, timed on its own once more, may turn out
    monkeypatch.setattr(
        retraining_free,
        "whole_models_ms",
        lambda models, *_, **__: {name: ms * slower.get(name, 1) for name, ms in told(models).items()},
    )
    family = run(raw_checkpoint(tmp_path / "model"), out)
    assert sorted(family.members) == [1.5, 2]
    first, second = (json.loads((out / f"{s}x" / "01-retraining_free" / "stage.json").read_text()) for s in (1.5, 2))
    assert first["stage"]["speedup"] == pytest.approx(AIM * 1.5, abs=1e-4) and "latency_ms" not in first["stage"]
    # The second budget is what the first member lacks as measured beside the original, which need not be what was asked of it.
    reached = first["latency_ms"]["teacher_speedup"]
    assert reached == pytest.approx(1.1 * first["latency_ms"]["speedup"]) and reached > 1.5
    assert second["stage"]["speedup"] == pytest.approx(AIM * 2 / reached, abs=1e-4)
    assert second["latency_ms"]["teacher_speedup"] == pytest.approx(reached * second["latency_ms"]["speedup"])
    one, two = (structure_of(family.members[s].model) for s in (1.5, 2))
    for (heads, ffn), (more_heads, more_ffn) in zip(two.layer_widths, one.layer_widths, strict=True):
        assert heads <= more_heads and ffn <= more_ffn
    # The original is the teacher of both, and is made once.
    assert (out / "1.5x" / "00-teacher").is_dir() and not (out / "2x" / "00-teacher").exists()
    distilled = [json.loads((out / f"{s}x" / "02-distill" / "stage.json").read_text()) for s in (1.5, 2)]
    assert distilled[0]["inputs"]["teacher"] == distilled[1]["inputs"]["teacher"]

    report = Report.read(out)
    assert [row.name for row in report.rows] == ["teacher", "smbert 1.5x", "majority class", "smbert 2x"]
    assert report.rows[3].retention == pytest.approx(report.rows[3].metric / report.rows[0].metric)
    assert len(report.notes) == 2 and all("was asked for and" in note for note in report.notes)
    assert (out / "2x" / "model" / "config.json").is_file() and (out / "report.png").is_file()

    monkeypatch.setattr(SmbertTrainer, "train", None)  # a second run trains nothing
    again = run(tmp_path / "model", out)
    assert [row.metrics for row in again.report.rows] == [row.metrics for row in report.rows]


def test_an_interrupted_restart_goes_on_without_the_old_members(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", raw_checkpoint(tmp_path / "model")
    run(model, out)
    other = replace(RECIPE, stages=(RECIPE.stages[0], replace(RECIPE.stages[1], learning_rate=1e-3)))
    family = importlib.import_module("smbert.family")
    compress, calls = family.compress, iter((True, False))
    monkeypatch.setattr(
        family,
        "compress",
        lambda *a, **k: compress(*a, **k) if next(calls) else (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        run(model, out, recipe=other, resume=False)
    monkeypatch.setattr(family, "compress", compress)
    assert sorted(run(model, out, recipe=other).members) == [1.5, 2]


def test_a_faster_member_trains_longer(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "out"
    run(raw_checkpoint(tmp_path / "model"), out, (1.5, 2.5))
    for speedup, steps in ((1.5, 2), (2.5, round(2 * (2.5 / 2) ** 0.5))):
        record = json.loads((out / f"{speedup}x" / "02-distill" / "stage.json").read_text())
        assert record["optimiser_steps"] == steps
    prune, distill = RECIPE.stages
    assert trained_for(prune, 8) is prune
    by_epochs = replace(distill, max_steps=-1, epochs=3)
    assert [(s.epochs, s.max_steps) for s in (trained_for(by_epochs, x) for x in (1.2, 2, 8))] == [
        (3, -1),
        (3, -1),
        (6, -1),
    ]


def test_the_teacher_runs_over_the_texts_once_for_all_members(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], teacher_states._write
    monkeypatch.setattr(teacher_states, "_write", lambda *args: (written.append(args[4]), write(*args)))
    prune, distill = RECIPE.stages
    recipe = replace(RECIPE, stages=(prune, replace(distill, objectives=({"kind": "hidden", "weight": 1.0},))))
    run(raw_checkpoint(tmp_path / "model"), tmp_path / "out", recipe=recipe)
    assert [folder.parent for folder in written] == [tmp_path / "out" / "states"]
    assert not (tmp_path / "out" / "states").exists()


def test_what_the_member_before_has_reached_already_is_a_hair_away(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "out"
    run(raw_checkpoint(tmp_path / "model"), out, (1.5, 1.501))
    first, second = (
        json.loads((out / f"{s}x" / "01-retraining_free" / "stage.json").read_text()) for s in (1.5, 1.501)
    )
    assert first["latency_ms"]["speedup"] > AIM * 1.501 and second["stage"]["speedup"] == 1.01
    assert second["latency_ms"]["speedup"] >= 1.01


def test_a_speedup_behind_an_engine_is_judged_there(tmp_path: Path, quick: None) -> None:
    pytest.importorskip("onnxruntime")
    prune, distill = RECIPE.stages
    recipe = replace(RECIPE, stages=(replace(prune, engine="onnx", threads=1), distill))
    family = run(raw_checkpoint(tmp_path / "model"), tmp_path / "out", recipe=recipe)
    whole, *members = (macs(m) for m in (tiny("bert"), *(family.members[s].model for s in (1.5, 2))))
    for speedup, own, note in zip((1.5, 2), members, family.report.notes, strict=True):
        assert f"{speedup:g}x at 4x16 behind onnx with 1 thread was asked for and {whole / own:.2f}x measured" in note
        record = (tmp_path / "out" / f"{speedup:g}x" / "01-retraining_free" / "stage.json").read_text()
        assert f"then measured them: {prediction(json.loads(record)['latency_ms'])}." in note
        told = json.loads((tmp_path / "out" / f"{speedup:g}x" / "report.json").read_text())["stages"]
        assert [set(stage["latency_ms"]) for stage in told if "latency_ms" in stage] == [{"predicted", "measured"}]


def test_a_speedup_at_a_shape_that_reports_do_not_have_is_judged_by_the_stage(tmp_path: Path, quick: None) -> None:
    prune, distill = RECIPE.stages
    family = run(
        raw_checkpoint(tmp_path / "model"),
        tmp_path / "out",
        recipe=replace(RECIPE, stages=(replace(prune, shape="2x8"), distill)),
    )
    whole, *members = (macs(m) for m in (tiny("bert"), *(family.members[s].model for s in (1.5, 2))))
    for speedup, own, note in zip((1.5, 2), members, family.report.notes, strict=True):
        assert f"{speedup:g}x at 2x8 was asked for and {whole / own:.2f}x measured" in note
        assert "predicted and then measured" in note


def test_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("smbert.family"), "compress", None)
    for speedups in ((), (1,), (2, "x"), (True,)):
        with pytest.raises(ValueError, match=r"`speedups` must be numbers above 1.*To resolve"):
            run(tmp_path, tmp_path / "out", speedups)
    for given in ({"target": {"speedup": 2}}, {"states_dir": tmp_path}):
        with pytest.raises(TypeError, match=f"`{next(iter(given))}` must not be given"):
            run(tmp_path, tmp_path / "out", **given)
    with pytest.raises(ValueError, match="exactly one retraining_free stage, got depth_reduction"):
        run(tmp_path, tmp_path / "out", recipe=[DepthReduction(layers=1)])
    for change in ({"database": "sizes"}, {"latency_table": "table.json"}):
        stages = (replace(RECIPE.stages[0], **change), *RECIPE.stages[1:])
        with pytest.raises(ValueError, match=rf"`{next(iter(change))}` must not name what belongs to one.*To resolve"):
            run(tmp_path, tmp_path / "out", recipe=replace(RECIPE, stages=stages))
    for stage in (VocabPruning(), EmbeddingFactorisation(rank=4)):
        with pytest.raises(ValueError, match=rf"`recipe` must leave the embedding .*got {stage.kind}.*To resolve"):
            run(tmp_path, tmp_path / "out", recipe=[*RECIPE.stages, stage])
    assert not (tmp_path / "out").exists()


def test_the_recipe_that_ships_prunes_to_a_speedup() -> None:
    assert [stage.kind for stage in Recipe.named("frontier").stages] == ["retraining_free", "distill"]


def test_the_command(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    from smbert.cli import main

    model, data, out = raw_checkpoint(tmp_path / "model"), splits(), tmp_path / "out"
    for name in ("train", "validation"):
        data[name].to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    argv = [
        "compress", "--model", str(model), "--train-file", str(tmp_path / "train.csv"), "--disable-tqdm",
        "--validation-file", str(tmp_path / "validation.csv"), "--recipe", str(tmp_path / "recipe.yaml"), "--output-dir", str(out),
    ]  # fmt: skip
    assert main([*argv, "--speedups", "1.5"]) == 0
    shown = capsys.readouterr().out
    assert "smbert 1.5x" in shown and "1.5x at 4x16 was asked for" in shown
    assert main([*argv, "--speedups", "fast"]) == 2
    assert "--speedups" in capsys.readouterr().err
    assert main([*argv, "--speedups", "2", "--target", "speedup=2"]) == 2
    assert "must not be given together" in capsys.readouterr().err
