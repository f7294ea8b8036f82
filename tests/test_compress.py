"""compress() from end to end, on every kind of input; and what it refuses, before any work is done."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from run_helpers import (
    FAST,
    QUIET,
    checkpoint,
    child,
    kill,
    pause_training,
    raw_checkpoint,
    same_weights,
    splits,
    stage_folders,
    state_of,
    texts,
    tiny_recipe,
    tiny_tokenizer,
    wait_for,
)
from tiny_models import tiny
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, TrainingArguments

import smbert
from smbert.checkpoints import load_model
from smbert.compress import CompressionResult, compress
from smbert.inputs import with_turned_pairs
from smbert.measure import count_parameters
from smbert.objectives import GoldObjective, HiddenObjective, LogitsObjective, RelationObjective
from smbert.recipe import Recipe
from smbert.report import Report
from smbert.stages import DepthReduction, Distill, Finetune, WidthPruning
from smbert.surgery import PruningPlan, keep_layers, keep_units, structure_of
from smbert.tasks import Task, glue_task
from smbert.teacher import model_fingerprint
from smbert.trainer import SmbertTrainer

# The function of the same name hides the module from a plain import.
module = importlib.import_module("smbert.compress")
NAMES = ["01-depth_reduction", "02-distill", "03-width_pruning", "04-finetune"]
DATA = splits()
SHORT = Recipe(
    max_length=32,
    teacher=Finetune(**FAST),
    stages=(
        DepthReduction(layers=2, method="truncate"),
        Distill(objectives=(LogitsObjective(), GoldObjective()), **FAST),
    ),
)


@pytest.fixture(autouse=True)
def short_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small measurements, and no plot: tests/test_cli.py has one."""
    monkeypatch.setattr(module, "SHAPES", ((1, 16), (4, 16)))
    monkeypatch.setattr(module, "latency", partial(module.latency, warmup=1, min_runs=5))
    monkeypatch.setattr("smbert.report.draw", lambda rows: b"plot")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head for two labels."""
    return checkpoint(tmp_path_factory.mktemp("tuned") / "bert")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw_checkpoint(tmp_path_factory.mktemp("raw") / "bert")


def run(model: Any, out: Path, recipe: Any = None, **changes: Any) -> CompressionResult:
    values: dict[str, Any] = {
        "train_dataset": DATA["train"],
        "eval_dataset": DATA["validation"],
        "output_dir": out,
        "args": QUIET,
        "baseline": False,
        "int8_teacher": False,  # tests/test_int8_row.py has it
        **changes,
    }
    return compress(model, tiny_recipe() if recipe is None else recipe, **values)


def check(result: CompressionResult, out: Path, rows: set[str]) -> dict[str, Any]:
    """What holds of every result; returns the rows by name."""
    folder = result.model_dir
    assert folder == out / "model" and not result.model.training
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model_fingerprint(loaded) == model_fingerprint(result.model)
    tokens = AutoTokenizer.from_pretrained(folder)("word1 word20 word3", return_tensors="pt")
    tokens = {k: tokens[k] for k in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        assert torch.equal(loaded(**tokens).logits, result.model(**tokens).logits)
    assert Recipe.from_yaml(folder / "recipe.yaml") == result.recipe
    assert (folder / "README.md").read_text().startswith("---\n")

    report = Report.read(out)
    assert report == Report.from_json(result.report.to_json())
    assert (out / "report.png").read_bytes() == b"plot" and "| smbert" in (out / "report.md").read_text()
    named = {row.name: row for row in report.rows}
    assert set(named) == rows | {"teacher", "smbert"}
    teacher, own = named["teacher"], named["smbert"]
    for name in {"teacher", "smbert", "same shape, no distillation"} & set(named):
        row = named[name]
        assert row.task == own.task and row.seed == 42 and row.metric == row.metrics[row.metric_name]
        if row.retention is not None:
            assert row.retention == pytest.approx(row.metric / teacher.metric)
        assert set(row.latency_ms) == set(row.speedup) == {"1x16", "4x16"}
        for shape, figures in row.latency_ms.items():
            assert 0 < figures["p50"] <= figures["p95"]
            assert row.speedup[shape] == pytest.approx(teacher.latency_ms[shape]["p50"] / figures["p50"])
        assert row.params_total > row.params_encoder > 0 and row.params_embedding > 0 and row.macs > 0
        assert row.size_mb == pytest.approx(row.params_total * 4 / 1e6, rel=0.05)
    count = count_parameters(loaded)
    assert (own.params_total, own.params_encoder) == (count.total, count.encoder)
    assert own.params_total < teacher.params_total and own.macs < teacher.macs
    assert len(report.stages) == len(result.recipe.stages)
    return named


# ----------------------------------------------------------------------------------------------------------------- end to end


def test_a_finetuned_checkpoint(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    result = run(tuned, out, baseline=True, command="the command")
    rows = check(result, out, {"same shape, no distillation", "majority class"})
    assert stage_folders(out) == [*NAMES, "undistilled"]  # it is its own teacher
    assert result.target_met is None and result.report.command == "the command"
    assert rows["majority class"].metric == 0.5 and rows["majority class"].latency_ms == {}
    assert [s["name"] for s in result.report.stages] == NAMES
    twin = AutoModelForSequenceClassification.from_pretrained(out / "undistilled" / "03-finetune")
    assert smbert.structure_of(twin) == smbert.structure_of(result.model)
    assert rows["same shape, no distillation"].params_total == rows["smbert"].params_total

    result.save_pretrained(tmp_path / "saved")
    assert state_of(tmp_path / "saved").keys() == state_of(result.model_dir).keys()
    assert (tmp_path / "saved" / "tokenizer.json").is_file()

    monkeypatch.setattr(SmbertTrainer, "train", None)  # a second run trains nothing
    (out / "model" / "README.md").write_text("my own words")
    again = run(tuned, out, baseline=True, command="the command")
    assert model_fingerprint(again.model) == model_fingerprint(result.model)
    assert (out / "model" / "README.md").read_text() == "my own words"


def test_a_raw_checkpoint_with_pairs_and_named_classes(raw: Path, tmp_path: Path) -> None:
    def pairs(n: int, seed: int) -> Dataset:
        one, two = texts(n, seed), texts(n, seed + 50)
        names = ["entails", "neutral", "contradicts"]
        return Dataset.from_dict(
            {"id": list(range(n)), "premise": list(one["text"]), "hypothesis": list(two["text"]),
             "relation": [names[i % 3] for i in range(n)]},
        )  # fmt: skip

    out = tmp_path / "out"
    result = run(
        raw, out, train_dataset=pairs(30, 1), eval_dataset=pairs(12, 2), text_columns=("premise", "hypothesis"),
        label_column="relation", task="pairs", baseline=True,
    )  # fmt: skip
    check(result, out, {"same shape, no distillation", "majority class"})
    assert stage_folders(out) == ["00-teacher", *NAMES, "undistilled"]
    assert result.model.config.id2label == {0: "contradicts", 1: "entails", 2: "neutral"}
    assert result.report.rows[0].task == "pairs" and result.report.rows[0].train_seconds is not None
    teacher = AutoModelForSequenceClassification.from_pretrained(out / "00-teacher")
    assert teacher.config.num_labels == 3
    record = json.loads((out / "02-distill" / "stage.json").read_text())
    assert record["inputs"]["teacher"] == model_fingerprint(teacher)


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "mpnet", "modernbert"])
def test_other_families(tmp_path: Path, family: str) -> None:
    place = checkpoint(tmp_path / "model", family=family)
    if family == "modernbert":  # what a fused family cannot do is no part of this test
        config = json.loads((place / "config.json").read_text())
        assert config["model_type"] == "modernbert"
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    result = run(place, tmp_path / "out", tokenizer=tokenizer)
    check(result, tmp_path / "out", {"majority class"})


def test_regression(raw: Path, tmp_path: Path) -> None:
    def scores(n: int, seed: int) -> Dataset:
        rows = texts(n, seed)
        return Dataset.from_dict(
            {"text": list(rows["text"]), "label": [float(v) + i / 100 for i, v in enumerate(rows["label"])]}
        )

    result = run(raw, tmp_path, SHORT, train_dataset=scores(32, 0), eval_dataset=scores(16, 1))
    rows = check(result, tmp_path, {"majority class"})
    assert result.model.config.num_labels == 1 and result.model.config.problem_type == "regression"
    assert rows["smbert"].metric_name == "pearson" and "mse" in rows["smbert"].metrics


def test_multi_label(raw: Path, tmp_path: Path) -> None:
    def tags(n: int, seed: int) -> Dataset:
        rows = texts(n, seed)
        labels = [[["a"], ["b", "c"], ["a", "c"], []][i % 4] for i in range(n)]
        return Dataset.from_dict(
            {"text": list(rows["text"]), "labels": labels},
            Features({"text": Value("string"), "labels": List(Value("string"))}),
        )

    result = run(raw, tmp_path, SHORT, train_dataset=tags(32, 0), eval_dataset=tags(16, 1))
    rows = check(result, tmp_path, {"majority class"})
    assert result.model.config.num_labels == 3 and result.model.config.problem_type == "multi_label_classification"
    assert rows["smbert"].metric_name == "f1_micro"


def test_loaded_objects_stay_as_they_are(tmp_path: Path) -> None:
    for head in ("encoder", "sequence-classification"):
        model, tokenizer = tiny("bert", head, max_position_embeddings=132), tiny_tokenizer()
        before, config = model_fingerprint(model), copy.deepcopy(model.config.to_dict())
        flags = [p.requires_grad for p in model.parameters()]
        result = run(model, tmp_path / head, SHORT, tokenizer=tokenizer)
        assert model_fingerprint(model) == before and model.config.to_dict() == config
        assert [p.requires_grad for p in model.parameters()] == flags
        assert result.tokenizer is tokenizer
        assert ("00-teacher" in stage_folders(tmp_path / head)) == (head == "encoder")


@pytest.mark.parametrize("as_teacher", [False, True])
def test_loaded_objects_in_half_precision_are_taken_in_fp32(raw: Path, tmp_path: Path, as_teacher: bool) -> None:
    half = tiny("bert", "sequence-classification", max_position_embeddings=132).half()
    before = model_fingerprint(half)
    result = run(
        raw if as_teacher else half,
        tmp_path / "out",
        SHORT,
        tokenizer=tiny_tokenizer(),
        teacher=half if as_teacher else None,
    )
    assert model_fingerprint(half) == before and half.dtype == torch.float16
    assert result.model.dtype == torch.float32
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["dtype"] == "float32"
    assert result.report.rows[0].latency_ms


def test_a_teacher_of_another_width(raw: Path, tuned: Path, tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher", hidden_size=48, num_attention_heads=6, layers=5)
    recipe = Recipe(
        stages=(
            DepthReduction(layers=2, method="truncate"),
            Distill(objectives=(LogitsObjective(), RelationObjective(), HiddenObjective()), **FAST),
        )
    )
    out = tmp_path / "out"
    result = run(tuned, out, recipe, teacher=teacher)
    rows = check(result, out, {"majority class"})
    assert (
        rows["teacher"].params_total
        == count_parameters(AutoModelForSequenceClassification.from_pretrained(teacher)).total
    )
    assert smbert.structure_of(result.model).hidden_size == 32 and stage_folders(out) == [
        "01-depth_reduction",
        "02-distill",
    ]
    record = json.loads((out / "02-distill" / "stage.json").read_text())
    assert record["teacher_ran_live"] is True
    # A raw student under the same teacher, too.
    result = run(raw, tmp_path / "raw", recipe, teacher=AutoModelForSequenceClassification.from_pretrained(teacher))
    check(result, tmp_path / "raw", {"majority class"})
    assert stage_folders(tmp_path / "raw") == ["01-depth_reduction", "02-distill"]


def test_the_control_of_another_student_is_cut_from_that_student(tuned: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", tiny("bert", head="encoder", hidden_size=48, max_position_embeddings=132))
    relation = {"objectives": ({"kind": "relation"}, {"kind": "logits"})}
    recipe = Recipe(stages=(Distill(student=str(other), **relation, **FAST),), teacher=Finetune(**FAST))
    result = run(tuned, tmp_path / "out", recipe, baseline=True)
    twin = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "undistilled" / "02-finetune")
    assert smbert.structure_of(twin) == smbert.structure_of(result.model) == smbert.structure_of(load_model(other))
    again = run(tuned, tmp_path / "out", recipe, baseline=True)  # a fresh head is the same one again
    assert [row.metrics for row in again.report.rows] == [row.metrics for row in result.report.rows]


def test_the_control_trains_as_long_as_the_longest_stage(tuned: Path) -> None:
    model = load_model(tuned)
    for stages, expected in (
        ((Distill(epochs=20), Distill(max_steps=10)), (20, -1)),
        ((DepthReduction(epochs=15), Distill(epochs=2)), (15, -1)),
        ((DepthReduction(epochs=15, method="truncate"), Distill(epochs=4)), (4, -1)),
        ((Distill(epochs=2, batch_size=10), Distill(epochs=3, max_steps=21)), (3, 21)),
    ):
        recipe = Recipe(stages=stages, teacher=Finetune(epochs=1))
        control = module.undistilled(recipe, model, model, 100).stages[-1]
        assert (control.epochs, control.max_steps) == (pytest.approx(expected[0]), expected[1])


def test_the_papers_recipe_with_fewer_steps(tuned: Path, tmp_path: Path) -> None:
    short = {f"{kind}.{key}": value for kind in ("depth_reduction", "distill") for key, value in FAST.items()}
    recipe = Recipe.named("smbert").override({**short, "width_pruning.samples": 8, "max_length": 32})
    result = run(tuned, tmp_path, recipe)
    check(result, tmp_path, {"majority class"})
    assert smbert.structure_of(result.model).layer_widths == (
        (3, 48),
    )  # 4 -> 2 -> 1 layers, 2/3 of 4 heads and 64 neurons


def test_a_target_of_parameters(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tuned, out, target={"params": "60%"})
    rows = check(result, out, {"majority class"})
    assert result.target_met is True and rows["smbert"].params_total <= 0.6 * rows["teacher"].params_total
    target = Report.read(out).target
    assert target == {"goal": "params", "asked": "60%", "measured": rows["smbert"].params_total, "met": True}
    sizes = json.loads((out / "target.json").read_text())["sizes"]
    assert smbert.structure_of(result.model).layer_widths == ((sizes["heads"], sizes["ffn"]),) * sizes["layers"]
    # The largest that fits, not just any.
    assert rows["smbert"].params_total > 0.5 * rows["teacher"].params_total


def test_a_target_of_speed_is_measured_once(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "sizes_for", lambda goal, *models: seen.append(goal) or module.Sizes(2, 2, 32))
    target = {"speedup": 1.5, "shape": "2x16"}
    result = run(tuned, tmp_path, target=target)
    assert smbert.structure_of(result.model).layer_widths == ((2, 32), (2, 32))
    row = result.report.rows[1]
    assert set(row.latency_ms) == {"1x16", "4x16", "2x16"}
    assert result.report.target["measured"] == round(row.speedup["2x16"], 3) and result.report.target["shape"] == "2x16"
    assert result.target_met == (row.speedup["2x16"] >= 1.5 * 0.95)
    run(tuned, tmp_path, target=target)
    assert len(seen) == 1
    run(tuned, tmp_path, target=target, resume=False)
    assert len(seen) == 2


def test_an_intermediate_task(raw: Path, tmp_path: Path) -> None:
    def nli(n: int, seed: int) -> Dataset:
        rows = Dataset.from_dict({"text": list(texts(n, seed)["text"]), "label": [i % 3 for i in range(n)]})
        return rows.cast_column("label", ClassLabel(names=["yes", "no", "perhaps"]))

    recipe = tiny_recipe().through("nli")
    out = tmp_path / "out"
    result = run(raw, out, recipe, intermediate={"nli": {"train": nli(30, 5), "validation": nli(12, 6)}})
    check(result, out, {"majority class"})
    names = ["01-finetune", "02-depth_reduction", "03-distill", "04-width_pruning", "05-finetune", "06-finetune"]
    assert stage_folders(out) == ["00-teacher", *names]
    labels = [json.loads((out / n / "config.json").read_text()).get("id2label", {}) for n in names]
    assert [len(x) or 2 for x in labels] == [3, 3, 3, 3, 3, 2] and result.model.config.num_labels == 2


def test_unlabelled_texts(tuned: Path, tmp_path: Path) -> None:
    recipe = Recipe(stages=(Distill(objectives=(LogitsObjective(), GoldObjective()), **FAST),))
    pool = texts(24, 9, labels=False)
    run(tuned, tmp_path / "with", recipe, unlabelled_dataset=pool)
    run(tuned, tmp_path / "without", recipe)
    rows = [
        json.loads((tmp_path / d / "01-distill" / "stage.json").read_text())["train_rows"] for d in ("with", "without")
    ]
    assert rows == [32 + 24, 32]
    only = Recipe(stages=(Distill(objectives=(LogitsObjective(),), data="pool", **FAST),))
    run(tuned, tmp_path / "only", only, unlabelled_dataset=pool)
    assert json.loads((tmp_path / "only" / "01-distill" / "stage.json").read_text())["train_rows"] == 24


def test_turned_pairs_come_before_the_pools_texts() -> None:
    train = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [0]})
    pool = Dataset.from_dict({"idx": [0], "sentence2": ["d"], "sentence1": ["c"]})
    both = {"sentence1": ["b", "c"], "sentence2": ["a", "d"]}
    assert with_turned_pairs(pool, train, glue_task("rte")).to_dict() == both
    assert with_turned_pairs(None, train, glue_task("rte")).to_dict() == {"sentence1": ["b"], "sentence2": ["a"]}
    with pytest.raises(ValueError, match="unlabelled split has no column 'sentence2'"):
        with_turned_pairs(pool.remove_columns("sentence2"), train, glue_task("rte"))


def test_own_metrics(tuned: Path, tmp_path: Path) -> None:
    def metrics(pair: Any) -> dict[str, float]:
        logits, labels = pair
        return {"right": float((logits.argmax(1) == labels).mean()), "rows": float(len(labels))}

    result = run(tuned, tmp_path, SHORT, compute_metrics=metrics)
    rows = check(result, tmp_path, set())
    assert rows["smbert"].metric_name == "right" and rows["smbert"].metrics["rows"] == 16


@pytest.mark.parametrize(
    ("metrics", "message"),
    [(lambda p: {"right": (p.logits == 0).mean()}, "AttributeError"), (lambda p: {}, "name: number"), (lambda p: {"a": None}, "TypeError")],
)  # fmt: skip
def test_own_metrics_that_cannot_work_are_refused_before_any_work(
    tuned: Path, tmp_path: Path, metrics: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tuned, tmp_path / "out", SHORT, compute_metrics=metrics)
    assert not any((tmp_path / "out").glob("*distill*"))


def test_metrics_of_a_trainer_work_as_they_are(tuned: Path, tmp_path: Path) -> None:
    def metrics(p: EvalPrediction) -> dict[str, float]:
        return {"right": float((p.predictions.argmax(1) == p.label_ids).mean())}

    assert run(tuned, tmp_path, SHORT, compute_metrics=metrics).report.rows[0].metric_name == "right"


def test_learning_rates_of_training_arguments_are_not_dropped_in_silence(tuned: Path, tmp_path: Path) -> None:
    options = TrainingArguments(str(tmp_path / "x"), learning_rate=3e-4, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="learning_rate, which the stages set"):
        run(tuned, tmp_path / "out", args=options)


def test_a_new_head_replaces_one_that_would_fit(tuned: Path, tmp_path: Path) -> None:
    run(
        tuned,
        tmp_path,
        Recipe(stages=tiny_recipe().stages[:1], teacher=Finetune(**{**FAST, "learning_rate": 1e-12})),
        new_head=True,
    )
    fresh, old = state_of(tmp_path / "00-teacher"), state_of(tuned)
    assert not torch.allclose(fresh["classifier.weight"], old["classifier.weight"], atol=1e-3)
    torch.testing.assert_close(fresh["bert.pooler.dense.weight"], old["bert.pooler.dense.weight"], atol=1e-6, rtol=0)


def test_training_arguments_reach_every_stage(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train = SmbertTrainer.train

    def spy(self: SmbertTrainer, **kwargs: Any) -> Any:
        seen.append(
            (
                self.args.gradient_accumulation_steps,
                self.args.per_device_train_batch_size,
                self.args.lr_scheduler_type.value,
            )
        )
        return train(self, **kwargs)

    monkeypatch.setattr(SmbertTrainer, "train", spy)
    options = TrainingArguments(
        str(tmp_path / "x"), gradient_accumulation_steps=2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, report_to="none"
    )  # fmt: skip
    run(tuned, tmp_path / "out", args=options)
    assert seen == [(2, 4, "constant")] * 3  # 8 rows a step, as the recipe says


def test_a_model_with_few_positions_is_timed_within_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHAPES", ((1, 128),))
    place = checkpoint(tmp_path / "model", max_position_embeddings=32)
    result = run(place, tmp_path / "out", Recipe(stages=tiny_recipe().stages[:1]))
    assert set(result.report.rows[0].latency_ms) == {"1x32"}


# -------------------------------------------------------------------------------------------------------------------- resume


def run_all(model: str, out: str, stage: str = "", file: str = "") -> int:
    """A whole compress() with a teacher to be made and a baseline; in a child it pauses in the training of a stage."""
    if file:
        pause_training(stage, 5, Path(file))
        module.SHAPES = ((1, 16),)
    long = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-3}
    recipe = Recipe(
        max_length=32, teacher=Finetune(**long), stages=(DepthReduction(layers=2, **long), WidthPruning(samples=8))
    )
    run(model, Path(out), recipe, baseline=True, args={**QUIET, "save_steps": 4})
    return 0


def test_killed_twice_and_run_again(raw: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_all(str(raw), str(whole))
    for number, stage in enumerate(["00-teacher", "undistilled"]):
        process = child(run_all, str(raw), str(out), stage, str(tmp_path / f"paused{number}"))
        wait_for((tmp_path / f"paused{number}").exists, process)
        kill(process)
    assert not (out / "model").exists()
    killed = Report.read(out)  # rewritten after every stage, and it says that it is not the last word
    assert [s["name"] for s in killed.stages] == ["01-depth_reduction", "02-width_pruning"] and killed.rows == []
    assert killed.notes and killed.notes[0].startswith("Not finished: 2 of 2 stages")
    run_all(str(raw), str(out))
    assert Report.read(out).notes == []
    weights = sorted(str(p.parent.relative_to(whole)) for p in whole.rglob("model.safetensors"))
    assert len(weights) == 7 and weights == sorted(
        str(p.parent.relative_to(out)) for p in out.rglob("model.safetensors")
    )
    for place in weights:
        assert same_weights(whole / place, out / place), place
    one, two = ({row.name: row.metrics for row in Report.read(p).rows} for p in (whole, out))
    assert one == two


# ------------------------------------------------------------------------------------------------------ refused before any work


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls compress(), which has to raise before it trains or prunes; gives the message."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work was done")

    monkeypatch.setattr(SmbertTrainer, "train", fail)
    for stage in (WidthPruning, DepthReduction, Distill, Finetune):
        monkeypatch.setattr(stage, "run", fail)
    out = tmp_path / "refused"

    def call(model: Any, recipe: Any = None, **changes: Any) -> str:
        with pytest.raises((ValueError, TypeError)) as error:
            run(model, out, recipe, **changes)
        assert stage_folders(out) == []
        message = str(error.value)
        assert "To resolve" in message, message
        return message

    return call


def contains(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    contains(refused(tmp_path / "nowhere"), "nowhere")
    contains(refused(str(tmp_path / "nowhere"), tokenizer=tiny_tokenizer()), "no folder", "nowhere")


def damaged(tuned: Path, tmp_path: Path, change: Callable[[Path], Any]) -> Path:
    place = tmp_path / "damaged"
    shutil.copytree(tuned, place)
    change(place)
    return place


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: (p / "model.safetensors").unlink(), ["damaged", "weights", "save_pretrained"]),
        (lambda p: (p / "config.json").unlink(), ["config.json"]),
        (lambda p: (p / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-64]), ["model.safetensors", "damaged"]),
        (lambda p: (p / "model.safetensors").write_bytes(b"x"), ["model.safetensors", "damaged"]),
        (lambda p: [(p / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")], ["no tokenizer", "--tokenizer"]),
        (lambda p: (p / "tokenizer.json").write_text("{}"), ["no tokenizer could be loaded", "--tokenizer"]),
    ],
)  # fmt: skip
def test_damaged_checkpoints(
    refused: Callable[..., str], tuned: Path, tmp_path: Path, change: Any, words: list[str]
) -> None:
    contains(refused(damaged(tuned, tmp_path, change)), *words)


def test_a_layer_missing_from_the_weights(refused: Callable[..., str], tuned: Path, tmp_path: Path) -> None:
    def more_layers(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))

    contains(refused(damaged(tuned, tmp_path, more_layers)), "6 layers", "missing")


def test_unknown_family(refused: Callable[..., str], tuned: Path, tmp_path: Path) -> None:
    def rename(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))

    contains(refused(damaged(tuned, tmp_path, rename)), "t5", "modernbert", "Family(")


def rows(labels: Any, text: Any = None, **kwargs: Any) -> Dataset:
    n = len(labels)
    return Dataset.from_dict({"text": ["word1 word2"] * n if text is None else text, "label": labels}, **kwargs)


CLASSES = Task("classes", ("text",), label_names=("down", "up"))
SCORES = Task("scores", ("text",), kind="regression")


@pytest.mark.parametrize(
    ("task", "train", "words"),
    [
        (CLASSES, rows([0, 1, 2, 0]), ["label column 'label' of the train split", "row 2", "0 (down), 1 (up)"]),
        (CLASSES, rows([0, -7, 1]), ["row 1", "-7"]),
        (CLASSES, rows([0, None, 1]), ["must have a label in every row", "row 1"]),
        (CLASSES, rows([0, 1, -1]), ["must have a label in every row", "row 2"]),
        (CLASSES, rows([0, 0, 0]), ["one label only"]),
        (SCORES, rows(["0.5", "high", "1"]), ["must hold numbers", "row 1", "high"]),
        (SCORES, rows([0.5, None]), ["must have a label in every row", "row 1"]),
        (CLASSES, rows([], []), ["no rows"]),
        (CLASSES, rows([0, 1], ["word1", None]), ["column 'text'", "row 1"]),
        (CLASSES, rows([0, 1]).rename_column("text", "words"), ["'text'", "'words', 'label'"]),
        (CLASSES, rows([0, 1]).rename_column("label", "stars"), ["'label'", "'text', 'stars'"]),
        (None, rows([0, 1]).rename_column("label", "stars"), ["neither 'label' nor 'labels'", "'text', 'stars'", "label_column"]),
        (None, rows([1, 1]), ["at least 2 classes"]),
        (None, rows([], []), ["no rows"]),
    ],
)  # fmt: skip
def test_bad_rows(refused: Callable[..., str], tuned: Path, task: Any, train: Dataset, words: list[str]) -> None:
    contains(refused(tuned, task=task, train_dataset=train), *words)


def test_absent_named_columns_list_those_there(refused: Callable[..., str], tuned: Path) -> None:
    contains(refused(tuned, label_column="stars"), "stars", "'text', 'label'")
    contains(refused(tuned, text_columns=("sentence",)), "sentence", "'text', 'label'")


def test_bad_rows_of_the_other_data_sets(refused: Callable[..., str], tuned: Path) -> None:
    contains(refused(tuned, eval_dataset=rows([], [])), "validation", "no rows")
    contains(refused(tuned, eval_dataset=rows([0, 5])), "validation", "5")
    contains(refused(tuned, unlabelled_dataset=Dataset.from_dict({"body": ["word1"]})), "'text'", "'body'")
    contains(refused(tuned, unlabelled_dataset=Dataset.from_dict({"text": ["word1", None]})), "'text'", "row 1")
    bad = {"nli": {"train": rows([0, 1]), "validation": rows([0, 9])}}
    contains(refused(tuned, tiny_recipe().through("nli"), intermediate=bad), "'nli'", "9")


def test_data_that_are_not_given(refused: Callable[..., str], tuned: Path, tmp_path: Path) -> None:
    contains(refused(tuned, train_dataset=None, eval_dataset=None), "`task`")
    contains(refused(tuned, eval_dataset=None), "`eval_dataset`")
    contains(refused(tuned, train_dataset=None), "`train_dataset`")
    nothing = {"train_dataset": None, "eval_dataset": None}
    contains(refused(tuned, task="nope", **nothing), "mrpc", "nope")
    contains(refused(tuned, task="mrpc", data_dir=tmp_path / "none", **nothing), "`data_dir`", "none")


def test_a_student_that_cannot_read_the_rows(refused: Callable[..., str], tuned: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", tiny("bert", vocab_size=20, max_position_embeddings=132))
    for stage in (Distill(student=str(other)), Distill(teacher=str(other))):
        contains(refused(tuned, Recipe(stages=(stage,))), "01-distill", "20 embeddings")


def test_labels_that_disagree(refused: Callable[..., str], tuned: Path, tmp_path: Path) -> None:
    three = rows([0, 1, 2])
    contains(refused(tuned, train_dataset=three, eval_dataset=three), "2 labels", "have 3", "new_head")
    model = tiny("bert", max_position_embeddings=132)
    model.config.id2label, model.config.label2id = {0: "up", 1: "down"}, {"up": 0, "down": 1}
    place = checkpoint(tmp_path / "named", model)
    named = rows(["good", "bad"])
    contains(
        refused(place, train_dataset=named, eval_dataset=named), "in this order", "['up', 'down']", "['bad', 'good']"
    )
    contains(
        refused(tuned, train_dataset=three, eval_dataset=three, teacher=tuned, new_head=True), "2 labels", "have 3"
    )


def test_a_checkpoint_keeps_the_names_and_the_order_of_its_classes(tmp_path: Path) -> None:
    model = tiny("bert", max_position_embeddings=132)
    model.config.id2label, model.config.label2id = {0: "UP", 1: "DOWN"}, {"UP": 0, "DOWN": 1}
    place = checkpoint(tmp_path / "named", model)
    recipe = Recipe(stages=(WidthPruning(heads=4, ffn=64, samples=8),))  # nothing is cut, nothing is learned
    for name, data in (("words", rows(["up", "down"] * 4)), ("numbers", rows([0, 1] * 4))):
        result = run(place, tmp_path / name, recipe, train_dataset=data, eval_dataset=data)
        assert result.model.config.id2label == {0: "UP", 1: "DOWN"}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((DepthReduction(layers=4),), ["stage 01-depth_reduction", "`layers`", "between 1 and 3", "got 4"]),
        ((DepthReduction(layers=9),), ["at most 4", "got 9"]),
        ((DepthReduction(keep=(0, 7)),), ["`keep`", "0 to 3", "7"]),
        ((WidthPruning(heads=5),), ["`heads`", "at most 4", "got 5"]),
        ((WidthPruning(ffn=65),), ["`ffn`", "at most 64", "got 65"]),
        ((WidthPruning(heads=(4, 4)),), ["`heads`"]),
        ((WidthPruning(params=100),), ["`params`", "100"]),
        ((WidthPruning(macs="0.1%"),), ["`macs`", "0.1%"]),
        ((WidthPruning(heads="1/2", ffn=None), Distill()), ["stage 02-distill", "equal head counts", "relation"]),
        ((WidthPruning(params="80%"), Distill()), ["stage 02-distill", "relation"]),
        ((Distill(data="pool"),), ["`unlabelled_dataset`"]),
        ((Distill(teacher="07-finetune"),), ["07-finetune", "00-teacher"]),
        ((Distill(task="mnli"),), ["`task`", "mnli"]),
        ((DepthReduction(layers=4), WidthPruning(heads=5)), ["2 faults", "stage 01-depth_reduction", "stage 02-width_pruning"]),
    ],
)  # fmt: skip
def test_stages_that_cannot_work(refused: Callable[..., str], tuned: Path, stages: Any, words: list[str]) -> None:
    contains(refused(tuned, stages), *words)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("stages:\n- {kind: depth_reduction, layers: 1.5}", ["`layers`", "1.5"]),
        ("stages:\n- {kind: depth_reduction, layers: 0/3}", ["`layers`", "0/3"]),
        ("stages:\n- {kind: width_pruning, heads: -1}", ["`heads`", "-1"]),
        ("stages:\n- {kind: width_pruning, params: 120%}", ["`params`", "120%"]),
        ("stages:\n- {kind: width_pruning, params: 50%, macs: 50%}", ["`params` and `macs`"]),
        ("stages:\n- {kind: prune}", ["depth_reduction", "prune"]),
        ("stages:\n- {kind: finetune, epoch: 3}", ["epoch", "epochs"]),
        ("stages:\n- {kind: finetune, learning_rate: 0}", ["`learning_rate`", "0"]),
        ("stages: []\nname: empty", ["at least one stage"]),
        ("stages:\n- {kind: finetune}\nwidth: 3", ["width", "max_length"]),
        ("stages:\n- {kind: [", ["not YAML"]),
        ("no-such-recipe", ["smbert", "two_cores"]),
        ("no-such-file.yaml", ["no-such-file.yaml"]),
    ],
)
def test_recipes_that_cannot_be_read(
    refused: Callable[..., str], tuned: Path, yaml: str, words: list[str], tmp_path: Path
) -> None:
    if "\n" in yaml or ":" in yaml:
        (tmp_path / "recipe.yaml").write_text(yaml)
        yaml = str(tmp_path / "recipe.yaml")
    contains(refused(tuned, yaml), *words)


def test_a_teacher_of_a_stage_with_its_labels_in_another_order(refused: Callable[..., str], tmp_path: Path) -> None:
    names = {"up": 0, "down": 1}
    turned = {"id2label": {1: "up", 0: "down"}, "label2id": {"up": 1, "down": 0}}
    model = checkpoint(
        tmp_path / "model", tiny("bert", max_position_embeddings=132, label2id=names, id2label={0: "up", 1: "down"})
    )
    other = checkpoint(tmp_path / "other", tiny("bert", max_position_embeddings=132, **turned))
    named = {n: d.cast_column("label", ClassLabel(names=["up", "down"])) for n, d in splits().items()}
    told = refused(model, [Distill(teacher=str(other))], train_dataset=named["train"], eval_dataset=named["validation"])
    contains(told, "in this order, ['up', 'down'], got", "with ['down', 'up']")


def test_a_head_that_nothing_has_trained(refused: Callable[..., str], raw: Path, tuned: Path) -> None:
    raw_start = replace(tiny_recipe(), start="checkpoint")
    contains(refused(raw, raw_start), "stage 01-depth_reduction", "finetune stage")
    contains(refused(raw, tiny_recipe(), teacher=tuned), "stage 01-depth_reduction", "finetune stage")
    only = Recipe(stages=(DepthReduction(layers=2, method="truncate"),), start="checkpoint")
    contains(refused(raw, only), "last stage", "finetune or distill")


def test_teachers_that_do_not_fit(refused: Callable[..., str], raw: Path, tuned: Path, tmp_path: Path) -> None:
    contains(refused(tuned, teacher=raw), "`teacher` must be fine-tuned")
    wide = checkpoint(tmp_path / "wide", hidden_size=48, num_attention_heads=6)
    contains(refused(tuned, teacher=wide), "stage 02-distill", "equal head counts", "relation")
    small = checkpoint(tmp_path / "vocabulary", vocab_size=20)
    contains(refused(tuned, teacher=small), "tokenizer", "teacher", "20 embeddings")


def test_a_tokenizer_of_another_model(refused: Callable[..., str], tmp_path: Path) -> None:
    contains(refused(checkpoint(tmp_path / "m", vocab_size=20)), "tokenizer", "20 embeddings", "--tokenizer")


def test_rows_that_are_too_long(refused: Callable[..., str], tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "short", max_position_embeddings=8)
    contains(refused(place), "`max_length`", "8 positions", "set it to 8")
    contains(refused(place, replace(tiny_recipe(), max_length=1000)), "`max_length`", "128")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"speed": 2}, ["speedup", "speed"]),
        ({"speedup": 2, "params": "50%"}, ["`target`"]),
        ({}, ["`target`"]),
        ({"speedup": 0.5}, ["`speedup`", "above 1"]),
        ({"params": "0%"}, ["`params`"]),
        ({"params": 200}, ["out of reach", "Sizes(layers=1"]),
        ({"latency_ms": -3}, ["`latency_ms`", "above 0"]),
        ({"speedup": 2, "shape": "big"}, ["`shape`", "32x128"]),
        ({"speedup": 500, "shape": "1x8"}, ["out of reach", "speedup = 500", "the smallest shape"]),
        ({"latency_ms": 1e-6, "shape": "1x8"}, ["out of reach", "latency_ms"]),
    ],
)
def test_targets_that_cannot_be_met(refused: Callable[..., str], tuned: Path, target: Any, words: list[str]) -> None:
    contains(refused(tuned, target=target), *words)


def test_a_target_without_the_stages_for_it(refused: Callable[..., str], tuned: Path) -> None:
    contains(refused(tuned, (Finetune(**FAST),), target={"params": "60%"}), "stage to reach", "has none")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"fp61": True}, ["fp61", "TrainingArguments"]),
        ({"learning_rate": 1e-3}, ["learning_rate"]),
        ({"output_dir": "x", "seed": 3}, ["output_dir of compress()", "seed of compress()"]),
        ({"per_device_train_batch_size": 4}, ["batch_size"]),
        ({"lr_scheduler_type": "wavy"}, ["wavy"]),
        ({"optim": "none-such"}, ["none-such"]),
        ({"run_name": object()}, ["`args`"]),
        (
            {"eval_strategy": "epoch", "label_smoothing_factor": 0.1},
            ["eval_strategy, label_smoothing_factor", "keep_best"],
        ),
    ],
)
def test_arguments_that_do_not_exist_or_belong_to_stages(
    refused: Callable[..., str], tuned: Path, args: Any, words: list[str]
) -> None:
    contains(refused(tuned, args=args), *words)
    assert not Path("unused").exists()


def test_recipe_and_output_of_the_wrong_kind(refused: Callable[..., str], tuned: Path, tmp_path: Path) -> None:
    contains(refused(tuned, [Finetune(), "prune"]), "`stages`", "prune")
    (tmp_path / "file").write_text("mine")
    contains(refused(tuned, output_dir=tmp_path / "file"), "`output_dir`", "is a file")


def test_a_refused_run_costs_nothing_that_is_there(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(tuned, out)
    with pytest.raises(ValueError, match="between 1 and 3"):
        run(tuned, out, (DepthReduction(layers=4),), resume=False)
    with pytest.raises(ValueError, match="is of another recipe"):
        run(tuned, out, tiny_recipe().stages[1:])
    with pytest.raises(ValueError, match=r"01-depth_reduction was made with other settings: `stage.batch_size`"):
        run(tuned, out, tiny_recipe(batch_size=4))
    with pytest.raises(ValueError, match="`seed` was 42 and is 1"):
        run(tuned, out, seed=1)
    assert stage_folders(out) == NAMES and Report.read(out) == first.report
    second = run(tuned, out, tiny_recipe(batch_size=4), resume=False)
    assert model_fingerprint(second.model) != model_fingerprint(first.model)


def test_an_interrupted_restart_goes_on_without_the_old_control(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tiny_recipe(batch_size=4)
    run(tuned, out, baseline=True)
    module: Any = importlib.import_module("smbert.compress")
    monkeypatch.setattr(module, "undistilled", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(tuned, out, other, resume=False, baseline=True)
    monkeypatch.undo()
    assert stage_folders(out) == NAMES
    result = run(tuned, out, other, baseline=True)
    assert module.UNDISTILLED in [row.name for row in result.report.rows]


def test_the_control_of_a_start_with_uneven_layers_is_no_wider_than_that(tuned: Path) -> None:
    module: Any = importlib.import_module("smbert.compress")
    start = load_model(tuned)
    heads = tuple(tuple(range(n)) for n in (1, 4, 1, 4)[: structure_of(start).num_layers])
    uneven = keep_units(start, PruningPlan(heads, PruningPlan.full(start).ffn))
    small = keep_layers(uneven, [1, 2])
    pruning = next(
        s for s in module.undistilled(Recipe((Distill(),)), small, uneven, 100).stages if isinstance(s, WidthPruning)
    )
    assert pruning.heads == (1, 1)


def test_several_labels_are_judged_as_such_whatever_the_checkpoint_says(raw: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(raw, num_labels=3)
    assert model.config.problem_type is None
    rows = {
        n: d.remove_columns("label").add_column("labels", [[1, 0, 1], [0, 1, 0]] * (len(d) // 2))
        for n, d in splits().items()
    }
    result = compress(
        model, [DepthReduction(layers=2, method="truncate", keep="importance")], train_dataset=rows["train"], eval_dataset=rows["validation"],
        tokenizer=AutoTokenizer.from_pretrained(raw), output_dir=tmp_path / "out", args=QUIET, baseline=False, int8_teacher=False,
    )  # fmt: skip
    assert result.model.config.problem_type == "multi_label_classification" and model.config.problem_type is None


def test_another_recipe_is_refused_before_the_teacher_is_made(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(raw, out, SHORT)
    shutil.rmtree(out / "00-teacher")
    with pytest.raises(ValueError, match=r"02-distill was made with other settings: `stage.max_steps` was 2 and is 3"):
        run(raw, out, replace(SHORT, stages=(SHORT.stages[0], replace(SHORT.stages[1], max_steps=3))))  # type: ignore[call-arg]
    assert stage_folders(out) == ["01-depth_reduction", "02-distill"]


def test_everything_that_the_package_names_is_there() -> None:
    assert all(hasattr(smbert, name) for name in smbert.__all__)
    assert AutoModel is not None
