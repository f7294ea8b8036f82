"""The run loop: results whole or not at all, finished work never done twice, and never mistaken for other work."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import (
    FAST,
    QUIET,
    as_nobody,
    child,
    finish,
    kill,
    pause_training,
    same_weights,
    splits,
    stage_folders,
    state_of,
    tiny_context,
    tiny_recipe,
    wait_for,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from smbert.context import Context, TaskData
from smbert.inputs import tokenised
from smbert.recipe import Recipe
from smbert.runner import Runner, run_recipe, stage_inputs, weights_hash
from smbert.stages import DepthReduction, Distill, Finetune, RetrainingFreePruning, WidthPruning
from smbert.stages.distill import TARGET_TEACHER
from smbert.surgery import structure_of
from smbert.tasks import Task
from smbert.teacher import freeze, model_fingerprint

NAMES = ["01-depth_reduction", "02-distill", "03-width_pruning", "04-finetune"]


def start(out: Path, seed: int = 1, **kwargs: Any) -> tuple[PreTrainedModel, Context]:
    model = tiny("bert", max_position_embeddings=132)
    return model, tiny_context(out, teacher=freeze(copy.deepcopy(model)), seed=seed, **kwargs)


def go(out: Path, recipe: Recipe | None = None, resume: bool = True, seed: int = 1, **kwargs: Any) -> PreTrainedModel:
    model, context = start(out, seed, **kwargs)
    return run_recipe(recipe or tiny_recipe(), model, context, Runner(out, resume))[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; tests copy it before they touch it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    go(out)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a stage is run."""

    def run(*args: Any) -> Any:
        raise AssertionError("a stage was run")

    for stage in (DepthReduction, Distill, WidthPruning, Finetune):
        monkeypatch.setattr(stage, "run", run)


# ------------------------------------------------------------------------------------------------------------ what it leaves


def test_every_stage_leaves_a_folder_that_loads(finished: Path) -> None:
    assert stage_folders(finished) == NAMES
    shapes = [[(4, 64)] * 2, [(4, 64)] * 2, [(3, 48)] * 2, [(3, 48)] * 2]
    for name, shape in zip(NAMES, shapes, strict=True):
        folder = finished / name
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert list(structure_of(model).layer_widths) == shape
        assert AutoTokenizer.from_pretrained(folder)("word1 word2")["input_ids"] == [2, 6, 7, 3]
        record = json.loads((folder / "stage.json").read_text())
        assert record["name"] == name and record["weights_sha256"] == weights_hash(folder)
        assert record["layer_widths"] == [list(w) for w in shape]
        assert record["inputs"]["seed"] == 1 and record["stage"] == record["inputs"]["stage"]
        assert 0 <= record["validation"]["accuracy"] <= 1 and record["seconds"] >= 0
        assert {"smbert", "transformers", "torch"} <= set(record)
        assert not list(folder.glob(".*")), "a half-written file was left"
    records = [json.loads((finished / name / "stage.json").read_text()) for name in NAMES]
    assert records[0]["layers_kept"] == [0, 1] and records[0]["optimiser_steps"] == 2
    assert records[1]["teacher_ran_live"] is True and records[2]["scored_rows"] == 8
    assert Recipe.from_dict({"stages": [r["stage"] for r in records]}).stages == tiny_recipe().stages


def test_each_stage_begins_with_what_the_one_before_left(finished: Path) -> None:
    before = model_fingerprint(tiny("bert", max_position_embeddings=132))
    for name in NAMES:
        assert json.loads((finished / name / "stage.json").read_text())["inputs"]["model"] == before
        before = model_fingerprint(AutoModelForSequenceClassification.from_pretrained(finished / name))


def test_losses_are_logged(tmp_path: Path) -> None:
    model, context = start(tmp_path, args={**QUIET, "logging_steps": 1})
    Runner(tmp_path).run(Distill(**FAST), model, context, "01-distill")
    log = json.loads((tmp_path / "01-distill" / "loss_log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2]
    assert all({"loss", "learning_rate"} <= set(entry) and sum("loss/" in k for k in entry) == 3 for entry in log)


def test_the_model_that_comes_in_is_left_alone(tmp_path: Path) -> None:
    model, context = start(tmp_path)
    before, flags = model_fingerprint(model), [p.requires_grad for p in model.parameters()]
    run_recipe(tiny_recipe(), model, context, Runner(tmp_path))
    assert model_fingerprint(model) == before and [p.requires_grad for p in model.parameters()] == flags


def test_later_stages_can_name_an_earlier_one_as_teacher(tmp_path: Path) -> None:
    recipe = Recipe(stages=(Finetune(**FAST), Distill(teacher="01-finetune", **FAST)))
    go(tmp_path, recipe)
    assert stage_folders(tmp_path) == ["01-finetune", "02-distill"]


def test_a_model_that_reloads_differently_is_not_called_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import smbert.runner

    def other(folder: Any) -> PreTrainedModel:
        return tiny("bert", layers=2, max_position_embeddings=132, seed=9)

    monkeypatch.setattr(smbert.runner, "load_model", other)
    model, context = start(tmp_path)
    stage = DepthReduction(layers=2, method="truncate")
    with pytest.raises(RuntimeError, match="01-depth_reduction answers differently when loaded again"):
        Runner(tmp_path).run(stage, model, context, "01-depth_reduction")
    assert stage_folders(tmp_path) == [".01-depth_reduction.work"]


# ------------------------------------------------------------------------------------------------------------------- resuming


def test_finished_stages_are_skipped(copied: Path, no_work: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "smbert")
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    model = go(copied)
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before
    assert [name for name in NAMES if f"stage {name} is done already" in caplog.text] == NAMES
    last = AutoModelForSequenceClassification.from_pretrained(copied / NAMES[-1])
    assert model_fingerprint(model) == model_fingerprint(last)


def test_a_deleted_stage_is_made_again_and_the_same(copied: Path, finished: Path) -> None:
    shutil.rmtree(copied / NAMES[1])
    go(copied)
    assert all(same_weights(copied / name, finished / name) for name in NAMES)


def test_a_fresh_head_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """It is drawn at random, and a resumed run has drawn less before."""
    model, context = start(tmp_path)
    task = Task("three", ("text",), label_names=("a", "b", "c"))
    rows = context.data.train.map(lambda row, i: {"labels": i % 3}, with_indices=True)
    context = replace(context, other={"three": TaskData(task, rows, rows)})
    recipe = Recipe(stages=(Finetune(**FAST), Finetune(task="three", **{**FAST, "max_steps": 3})))
    run_recipe(recipe, model, context, Runner(tmp_path))
    shutil.move(tmp_path / "02-finetune", tmp_path / "first")
    run_recipe(recipe, model, context, Runner(tmp_path))
    assert state_of(tmp_path / "first")["classifier.weight"].shape == (3, 32)
    assert same_weights(tmp_path / "first", tmp_path / "02-finetune")


def test_shown_and_kept_things_do_not_count_as_changes(copied: Path, no_work: None) -> None:
    go(copied, args={**QUIET, "logging_steps": 7, "save_steps": 3, "report_to": "none"})


def test_a_work_folder_left_beside_its_finished_stage_goes(copied: Path, no_work: None) -> None:
    (copied / ".02-distill.work" / "checkpoints").mkdir(parents=True)
    go(copied)
    assert stage_folders(copied) == NAMES


def test_starting_over(copied: Path, finished: Path) -> None:
    (copied / ".04-finetune.work").mkdir()
    (copied / "my-notes.txt").write_text("mine")
    (copied / "05-data").mkdir()
    (copied / "06-notes.txt").write_text("mine")
    go(copied)  # they are no stages of another recipe
    go(copied, resume=False, seed=5)
    assert (copied / "05-data").is_dir() and (copied / "06-notes.txt").read_text() == "mine"
    assert (
        stage_folders(copied) == [*NAMES, "05-data", "06-notes.txt"] and (copied / "my-notes.txt").read_text() == "mine"
    )
    assert not same_weights(copied / NAMES[-1], finished / NAMES[-1])


def test_starting_over_costs_nothing_until_a_stage_begins(copied: Path) -> None:
    Runner(copied, resume=False)
    assert stage_folders(copied) == NAMES


# --------------------------------------------------------------------------------------------------- refusing what is not ours


def changed(number: int, **changes: Any) -> Recipe:
    recipe = tiny_recipe()
    stages = [replace(s, **changes) if i == number - 1 else s for i, s in enumerate(recipe.stages)]
    return replace(recipe, stages=tuple(stages))


@pytest.mark.parametrize(
    ("recipe", "folder", "words"),
    [
        (changed(1, learning_rate=2e-3), "01-depth_reduction", ["`stage.learning_rate` was 0.001 and is 0.002"]),
        (changed(2, batch_size=4, max_steps=3), "02-distill", ["`stage.batch_size` was 8 and is 4", "`stage.max_steps` was 2 and is 3"]),
        (changed(3, heads="1/2"), "03-width_pruning", ['`stage.heads` was 3 and is "1/2"']),
        (changed(4, max_train_samples=9), "04-finetune", ["`stage.max_train_samples` was", "is 9"]),
        (changed(2, objectives=({"kind": "logits"},)), "02-distill", ["`stage.objectives`"]),
    ],
)  # fmt: skip
def test_a_changed_recipe_names_the_field(
    copied: Path, no_work: None, recipe: Recipe, folder: str, words: list[str]
) -> None:
    with pytest.raises(ValueError, match="was made with other settings") as error:
        go(copied, recipe)
    for word in [folder, "To resolve", "--restart", *words]:
        assert word in str(error.value)
    assert stage_folders(copied) == NAMES


def test_a_recipe_of_other_stages_is_refused_before_any_of_them(copied: Path, no_work: None) -> None:
    recipe = Recipe(stages=(Finetune(**FAST), *tiny_recipe().stages[1:]), name="other")
    with pytest.raises(ValueError, match=r"is of another recipe: it holds 01-depth_reduction.*'other'.*To resolve"):
        go(copied, recipe)


def test_a_change_in_a_later_stage_is_refused_before_the_earlier_ones_are_made(copied: Path, no_work: None) -> None:
    shutil.rmtree(copied / NAMES[0])
    with pytest.raises(
        ValueError, match=r"04-finetune was made with other settings: `stage.batch_size` was 8 and is 4"
    ):
        go(copied, changed(4, batch_size=4))


def test_more_stages_may_follow(copied: Path, finished: Path) -> None:
    recipe = tiny_recipe()
    go(copied, replace(recipe, stages=(*recipe.stages, Finetune(**FAST))))
    assert stage_folders(copied) == [*NAMES, "05-finetune"]


def test_another_seed_is_refused(copied: Path, no_work: None) -> None:
    with pytest.raises(ValueError, match="`seed` was 1 and is 2"):
        go(copied, seed=2)


def test_other_arguments_are_refused(copied: Path, no_work: None) -> None:
    with pytest.raises(ValueError, match=r'`args.lr_scheduler_type` was .* is "constant"'):
        go(copied, args={**QUIET, "lr_scheduler_type": "constant"})


def test_another_model_is_refused(copied: Path, no_work: None) -> None:
    _, context = start(copied)
    other = tiny("bert", max_position_embeddings=132, seed=3)
    with pytest.raises(ValueError, match="01-depth_reduction was made with other settings: the model is another one"):
        run_recipe(tiny_recipe(), other, context, Runner(copied))


def test_another_teacher_is_refused(copied: Path, no_work: None) -> None:
    model, context = start(copied)
    context = replace(context, teacher=freeze(tiny("bert", max_position_embeddings=132, seed=3)))
    with pytest.raises(ValueError, match="02-distill was made with other settings: the teacher is another one"):
        run_recipe(tiny_recipe(), model, context, Runner(copied))


@pytest.mark.parametrize("name", TARGET_TEACHER)
def test_the_teacher_counts_by_either_of_its_names(copied: Path, name: str) -> None:
    _, context = start(copied)
    two = [replace(context, teacher=freeze(tiny("bert", max_position_embeddings=132, seed=seed))) for seed in (3, 4)]
    one, other = (stage_inputs(Distill(teacher=name), tiny("bert"), c) for c in two)
    assert one["teacher"] != other["teacher"]


def test_other_data_are_refused(copied: Path, no_work: None) -> None:
    model, context = start(copied)
    data = tokenised(context.data.task, splits(32, seed=7), context.tokenizer, 32)
    with pytest.raises(ValueError, match="01-depth_reduction was made with other settings: the data is another one"):
        run_recipe(tiny_recipe(), model, replace(context, data=data), Runner(copied))


def test_a_pool_is_part_of_what_a_distillation_depends_on(tmp_path: Path) -> None:
    model, context = start(tmp_path)
    pooled = replace(context, pool=context.data.validation.remove_columns("labels"))
    assert set(stage_inputs(Distill(), model, pooled)) - set(stage_inputs(Distill(), model, context)) == {"pool"}
    assert stage_inputs(Finetune(), model, pooled) == stage_inputs(Finetune(), model, context)


def test_a_pool_is_part_of_what_a_pruning_depends_on_where_the_task_has_too_few_rows(tmp_path: Path) -> None:
    model, context = start(tmp_path)
    pooled = replace(context, pool=context.data.validation.remove_columns("labels"))
    rows = len(context.data.train)
    for samples, names in ((rows, set()), (rows + 1, {"pool"})):
        stage = RetrainingFreePruning(macs="50%", samples=samples, calibration=4)
        assert set(stage_inputs(stage, model, pooled)) - set(stage_inputs(stage, model, context)) == names


def no_record(folder: Path) -> None:
    (folder / "stage.json").unlink()


def half_record(folder: Path) -> None:
    (folder / "stage.json").write_text((folder / "stage.json").read_text()[:100])


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-3}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [NAMES[1], NAMES[3]])
@pytest.mark.parametrize(
    ("damage", "word"),
    [(no_record, "stage.json"), (half_record, "stage.json"), (truncated, "damaged"), (no_weights, "damaged"), (other_weights, "changed")],
)  # fmt: skip
def test_a_damaged_stage_is_refused_by_name(copied: Path, no_work: None, damage: Any, word: str, name: str) -> None:
    damage(copied / name)
    with pytest.raises(ValueError, match="delete that folder") as error:
        go(copied)
    assert str(copied / name) in str(error.value) and word in str(error.value)
    shutil.rmtree(copied / name)  # what the message says
    with pytest.raises(AssertionError, match="a stage was run"):
        go(copied)


def test_a_damaged_config_is_refused(copied: Path, no_work: None) -> None:
    (copied / NAMES[0] / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"01-depth_reduction.config\.json"):
        go(copied)


def test_an_interrupted_stage_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    recipe = Recipe(stages=(Finetune(**FAST),))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Finetune, "run", interrupted)
        go(tmp_path, recipe)
    assert stage_folders(tmp_path) == [".01-finetune.work"]
    with pytest.raises(
        ValueError, match=r"01-finetune\.work holds an interrupted stage .*`stage.batch_size` was 8 and is 4"
    ):
        go(tmp_path, Recipe(stages=(Finetune(**{**FAST, "batch_size": 4}),)))
    with pytest.raises(ValueError, match="holds an interrupted stage with other settings: `seed` was 1 and is 2"):
        go(tmp_path, recipe, seed=2)
    go(tmp_path, recipe)
    assert stage_folders(tmp_path) == ["01-finetune"]


def test_checkpoints_of_unknown_settings_are_not_used(tmp_path: Path) -> None:
    junk = tmp_path / ".01-finetune.work" / "checkpoints" / "checkpoint-1"
    junk.mkdir(parents=True)
    (junk / "trainer_state.json").write_text("{}")
    go(tmp_path, Recipe(stages=(Finetune(**FAST),)))
    assert stage_folders(tmp_path) == ["01-finetune"]


# ----------------------------------------------------------------------------------------------------------------- bad folders


def test_the_output_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ValueError, match=r"`output_dir` must be a folder, but .*out is a file. To resolve"):
            Runner(place)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_output_folder_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to everybody else
        Path(name).chmod(0o755)
        (Path(name) / "out").mkdir(mode=0o555)
        for place in (Path(name) / "out", Path(name) / "out" / "deeper" / "still"):
            with pytest.raises(ValueError, match=r"`output_dir` must be writable, but .*out is not.*To resolve"):
                as_nobody(lambda place=place: Runner(place))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    done = (
        mount
        and subprocess.run([mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True).returncode
        == 0
    )
    if not done:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # the weights of loaded models are mapped from there


@pytest.mark.parametrize("save_steps", [1, 500])
def test_a_full_disk(small_disk: Path, tmp_path: Path, save_steps: int) -> None:
    recipe = Recipe(stages=(DepthReduction(layers=2, method="truncate"), Finetune(**FAST)))
    out = small_disk / "out"
    args = {**QUIET, "save_steps": save_steps, "save_strategy": "steps" if save_steps == 1 else "no"}
    model, context = start(tmp_path, args=args)
    (small_disk / "other").write_bytes(bytes(120_000 if save_steps == 1 else 330_000))
    with pytest.raises(OSError, match=r"the disk is full; stage 02-finetune is not finished") as error:
        # A model takes 0.1 MB. With a checkpoint (the optimiser's state is twice as large), or beside the other file, two are too many.
        run_recipe(recipe, model, context, Runner(out))
    assert error.value.errno == errno.ENOSPC and "To resolve, free space" in str(error.value)
    assert stage_folders(out) == [".02-finetune.work", "01-depth_reduction"]
    assert (
        weights_hash(out / "01-depth_reduction")
        == json.loads((out / "01-depth_reduction" / "stage.json").read_text())["weights_sha256"]
    )
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    run_recipe(recipe, model, context, Runner(out))
    run_recipe(recipe, model, context, Runner(tmp_path / "other"))
    assert same_weights(out / "02-finetune", tmp_path / "other" / "02-finetune")


def run_with_small_files(out: str) -> int:
    """In a child: no file may grow above 100 KB, which stands for a disk that is full in the middle of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, context = start(Path(out))
    runner = Runner(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        run_recipe(tiny_recipe(), model, context, runner)
    except OSError as error:
        return 5 if "To resolve, free" in str(error) else 6
    return 0


def test_a_file_that_cannot_grow_leaves_no_half_of_a_stage(tmp_path: Path) -> None:
    assert finish(child(run_with_small_files, str(tmp_path))) == 5
    assert stage_folders(tmp_path) == [".01-depth_reduction.work"]
    go(tmp_path)
    assert stage_folders(tmp_path) == NAMES


# --------------------------------------------------------------------------------------------------------------------- kill -9


LONG = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-3}  # three epochs of 32 rows
SAVING = {**QUIET, "save_steps": 5}


def run_until_pause(out: str, stage: str, step: int, file: str) -> int:
    """In a child: the run, with a pause after a step of a stage."""
    pause_training(stage, step, Path(file))
    go(Path(out), tiny_recipe(**LONG), args=SAVING)
    return 0


def run_until_result(out: str, stage: str, at: str, file: str) -> int:
    """In a child: the run, with a pause in the saving of a stage's result."""
    import smbert.runner as runner

    def pause(part: str) -> None:
        if at == part and any(stage in p.name for p in Path(out).glob(".*.work")):
            Path(file).touch()
            signal.pause()

    save_model, write_json = runner.save_model, runner.write_json

    def saving(model: Any, folder: Path, tokenizer: Any) -> None:
        pause("before the weights")
        save_model(model, folder, tokenizer)
        if at == "half the weights" and stage in str(folder):
            (folder / "model.safetensors").write_bytes(b"half")
        pause("half the weights")

    def writing(target: Path, value: Any) -> None:
        if target.name == "stage.json":
            pause("before the record")
        write_json(target, value)
        if target.name == "stage.json":
            pause("before the name")

    runner.save_model, runner.write_json = saving, writing
    go(Path(out), tiny_recipe(**LONG), args=SAVING)
    return 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    go(out, tiny_recipe(**LONG), args=SAVING)
    return out


@pytest.mark.parametrize(
    ("stage", "step", "checkpoint"),
    [("01-depth_reduction", 7, 5), ("02-distill", 3, None), ("02-distill", 11, 10), ("04-finetune", 8, 5)],
)
def test_killed_inside_a_stage(
    tmp_path: Path, uninterrupted: Path, stage: str, step: int, checkpoint: int | None
) -> None:
    out, signal_file = tmp_path / "out", tmp_path / "paused"
    process = child(run_until_pause, str(out), stage, step, str(signal_file))
    wait_for(signal_file.exists, process)
    kill(process)
    before = NAMES[: NAMES.index(stage)]
    assert stage_folders(out) == sorted([f".{stage}.work", *before])
    work = out / f".{stage}.work" / "checkpoints"
    assert sorted(p.name for p in work.glob("*")) == ([f"checkpoint-{checkpoint}"] if checkpoint else [])
    made = {name: (out / name / "stage.json").stat().st_mtime_ns for name in before}
    if checkpoint:  # a kill may also hit the writing of a newer checkpoint
        shutil.copytree(work / f"checkpoint-{checkpoint}", work / "checkpoint-999")
        (work / "checkpoint-999" / "trainer_state.json").unlink()
    go(out, tiny_recipe(**LONG), args=SAVING)
    assert stage_folders(out) == NAMES
    assert {name: (out / name / "stage.json").stat().st_mtime_ns for name in before} == made
    for name in NAMES:
        assert same_weights(out / name, uninterrupted / name), name
    if checkpoint:
        log = json.loads((out / stage / "stage.json").read_text())
        assert log["optimiser_steps"] == 12


def test_continuing_uses_the_checkpoint(tmp_path: Path, uninterrupted: Path) -> None:
    """The weights that a continued run starts from are the checkpoint's: other ones there give another result."""
    out, signal_file = tmp_path / "out", tmp_path / "paused"
    process = child(run_until_pause, str(out), "01-depth_reduction", 7, str(signal_file))
    wait_for(signal_file.exists, process)
    kill(process)
    file = out / ".01-depth_reduction.work" / "checkpoints" / "checkpoint-5" / "model.safetensors"
    weights = load_file(file)
    save_file({k: v + 0.01 for k, v in weights.items()}, file, {"format": "pt"})
    go(out, Recipe(stages=tiny_recipe(**LONG).stages[:1]), args=SAVING)
    assert not same_weights(out / NAMES[0], uninterrupted / NAMES[0])


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("02-distill", "before the weights"),
        ("03-width_pruning", "half the weights"),
        ("04-finetune", "before the record"),
        ("02-distill", "before the name"),
    ],
)
def test_killed_between_stages(tmp_path: Path, uninterrupted: Path, stage: str, at: str) -> None:
    out, signal_file = tmp_path / "out", tmp_path / "paused"
    process = child(run_until_result, str(out), stage, at, str(signal_file))
    wait_for(signal_file.exists, process)
    kill(process)
    assert stage_folders(out) == sorted([f".{stage}.work", *NAMES[: NAMES.index(stage)]])
    go(out, tiny_recipe(**LONG), args=SAVING)
    assert stage_folders(out) == NAMES
    for name in NAMES:
        assert same_weights(out / name, uninterrupted / name), name


def test_two_seeds_give_two_models(tmp_path: Path, uninterrupted: Path) -> None:
    """The comparisons above could not fail if nothing depended on chance."""
    go(tmp_path, Recipe(stages=tiny_recipe(**LONG).stages[:1]), args=SAVING, seed=2)
    assert not same_weights(tmp_path / NAMES[0], uninterrupted / NAMES[0])
    assert os.environ.get("OMP_NUM_THREADS") != "0" and torch.get_num_threads() == 1
