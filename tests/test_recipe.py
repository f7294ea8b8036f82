"""A recipe is the same in YAML and in Python, tells all its faults at once, and refuses what cannot work before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_models import tiny
from transformers import BertConfig, BertForSequenceClassification

from smbert.context import Context, TaskData
from smbert.modeling import FAMILIES
from smbert.objectives import (
    OBJECTIVES,
    AttentionObjective,
    CosineObjective,
    EmbeddingObjective,
    GoldObjective,
    HiddenObjective,
    LogitsObjective,
    Objective,
    RelationObjective,
)
from smbert.recipe import Recipe
from smbert.stages import (
    STAGES,
    DepthReduction,
    Distill,
    EmbeddingFactorisation,
    Finetune,
    Outline,
    RetrainingFreePruning,
    Stage,
    VocabPruning,
    WidthPruning,
)
from smbert.surgery import Structure, save_model, structure_of

# Not one field has its default, in sum over the stages of a kind.
TRAINING: dict[str, Any] = {
    "task": "three",
    "epochs": 1.5,
    "max_steps": 7,
    "learning_rate": 3e-4,
    "batch_size": 8,
    "warmup_ratio": 0.2,
    "weight_decay": 0.1,
    "max_train_samples": 40,
    "dropout": 0.0,
    "freeze_embeddings": True,
    "keep_best": True,
}
OBJECTIVE_VALUES: tuple[Objective, ...] = (
    LogitsObjective(weight=5.0, name="soft", temperature=3.0),
    HiddenObjective(weight=2.0, name="states", layer_map=((2, 1), (4, 2))),
    AttentionObjective(weight=0.5, name="scores", layer_map="last", heads="mean"),
    RelationObjective(weight=0.25, name="relations", layer_map="uniform", relation_heads=2),
    EmbeddingObjective(weight=0.75, name="tables"),
    CosineObjective(weight=0.1, name="angles", layer_map="uniform"),
    GoldObjective(weight=0.2, name="labels"),
)
STAGE_VALUES: dict[str, list[Stage]] = {
    "finetune": [Finetune(**TRAINING)],
    "depth_reduction": [
        DepthReduction(**TRAINING, layers=3, method="truncate", keep=(0, 2, 3), base=0.5, slope=None, importance_samples=9),
        DepthReduction(layers="2/3", keep="importance", slope=0.01),
    ],
    "distill": [
        Distill(**TRAINING, objectives=OBJECTIVE_VALUES, teacher="01-finetune", student="some/checkpoint", data="both", full_rate_at=0.1, interpolate=True)
    ],
    "width_pruning": [
        WidthPruning(
            heads=3, ffn=0.5, scope="global", multiple_of=4, min_heads=2, min_ffn=16, scorer="fisher",
            samples=10, batch_size=4, iterations=3, task="three",
        ),
        WidthPruning(heads=(1, 2, 3, 4), ffn=(8, 16, 24, 32)),
        WidthPruning(params="60%"),
        WidthPruning(macs=123_456, heads="1/2"),
    ],
    "vocab_pruning": [
        VocabPruning(coverage=0.9, pieces=500, params="60%", corpus="texts.txt", min_class_coverage=0.5),
        VocabPruning(pieces="1/2", params=1_000_000),
    ],
    "embedding_factorisation": [EmbeddingFactorisation(rank="1/3", smoothing=0.5)],
    "retraining_free": [
        RetrainingFreePruning(
            method="fisher", speedup=2.5, shape="1x16", samples=64, tokens=900, batch_size=4, calibration=8, search_steps=3, ffn_levels=4,
            damping=1e-3, database="somewhere", multiple_of=4, fit_damping=0.1, latency_table="table.json", force_table=True, engine="onnx",
            threads=2, task="three",
        ),
        RetrainingFreePruning(latency_ms=3.5),
        RetrainingFreePruning(macs="50%"),
        RetrainingFreePruning(method="kprune", params=123_456),
    ],
}  # fmt: skip


def outline_of(model: Any) -> Outline:
    return Outline(structure_of(model))


# --- YAML and Python ---------------------------------------------------------------------------------------------------


def test_the_values_of_the_round_trip_are_no_defaults() -> None:
    assert STAGE_VALUES.keys() == STAGES.keys()
    assert {type(o) for o in OBJECTIVE_VALUES} == set(OBJECTIVES.values())
    groups: list[list[Any]] = [*STAGE_VALUES.values(), *([o] for o in OBJECTIVE_VALUES)]
    for examples in groups:
        for f in fields(examples[0]):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            assert any(getattr(e, f.name) != default for e in examples), f"{type(examples[0]).__name__}.{f.name}"


@pytest.mark.parametrize("kind", STAGES)
def test_yaml_and_python_are_the_same_thing(kind: str) -> None:
    recipe = Recipe(
        stages=tuple(STAGE_VALUES[kind]),
        name="wörter: all",
        teacher=Finetune(**{**TRAINING, "task": None}),
        start="checkpoint",
        max_length=77,
    )
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert [type(stage) for stage in again.stages] == [type(stage) for stage in recipe.stages]
    assert again.to_dict() == recipe.to_dict() == yaml.safe_load(recipe.to_yaml())


def test_defaults_survive_the_round_trip_and_are_written_out() -> None:
    asked: dict[str, Any] = {"retraining_free": {"macs": "50%"}}  # has no default budget
    recipe = Recipe(stages=tuple(stage(**asked.get(kind, {})) for kind, stage in STAGES.items()))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    written = recipe.to_dict()["stages"]
    assert [stage["kind"] for stage in written] == list(STAGES)
    assert written[0]["learning_rate"] == 2e-5
    assert written[2]["objectives"][0] == {"kind": "logits", "weight": 5.0, "temperature": 3.0}


def test_fractions_and_paths_are_written_as_text(tmp_path: Path) -> None:
    width = WidthPruning(heads=Fraction(2, 3), ffn=Fraction(1, 2))
    stages = (DepthReduction(layers=Fraction(1, 2)), Distill(student=tmp_path, teacher=tmp_path), width)  # type: ignore[arg-type]
    recipe = Recipe(stages=stages)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.stages[2] == WidthPruning(heads="2/3", ffn="1/2")


def test_a_recipe_comes_from_a_file_a_text_or_a_name(tmp_path: Path) -> None:
    recipe = Recipe(stages=(Finetune(epochs=2),))
    (tmp_path / "own.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "own.yaml") == Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.named("smbert").name == "smbert"
    with pytest.raises(ValueError, match=r"one of .*smbert.* got 'smbart'. To resolve"):
        Recipe.named("smbart")
    with pytest.raises(ValueError, match=r"there is no file .*nowhere.yaml. To resolve"):
        Recipe.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=r"the recipe is not YAML: .* To resolve"):
        Recipe.from_yaml("stages: [\n")
    with pytest.raises(ValueError, match=r"must be a mapping with the key `stages`, got list"):
        Recipe.from_yaml("- kind: finetune\n- kind: distill\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stagse": []}, r"unknown key stagse; known keys are stages, name, "),
        ({"stages": [{"kind": "finetune", "epoch": 1}]}, r"stage 1: unknown key epoch in stage 'finetune'; known keys are .*epochs"),
        ({"stages": [{"kind": "finetuning"}]}, r"stage 1: `kind` of a stage must be one of finetune, .* got 'finetuning'"),
        ({"stages": [{"kind": "distill", "objectives": [{"kind": "logits", "temp": 2}]}]}, r"unknown key temp in objective 'logits'"),
        ({"stages": [{"kind": "distill", "objectives": [{"kind": "logit"}]}]}, r"`kind` of a objective must be one of logits, .* got 'logit'"),
        ({"teacher": {"epoch": 1}}, r"teacher: unknown key epoch in teacher 'finetune'"),
        ({"teacher": None}, r"teacher: it must be a mapping .* got None"),
        ({"stages": ["distill"]}, r"stage 1: `stages` must hold stages, got 'distill'"),
        ({"stages": {"kind": "distill"}}, r"`stages` must be a list of at least one stage"),
        ({"stages": []}, r"`stages` must be a list of at least one stage"),
        ({"start": "student"}, r"`start` must be teacher or checkpoint, got 'student'"),
        ({"max_length": 0}, r"`max_length` must be a whole number above 0, got 0"),
        ({"stages": [{"kind": "finetune", "learning_rate": "1e-5"}]}, r"above 0, got '1e-5' \(YAML takes 1e-5 for text"),
        ({"stages": [{"kind": "finetune", "epochs": -1}]}, r"`epochs` must be a number above 0, got -1"),
        ({"stages": [{"kind": "finetune", "learning_rate": float("nan")}]}, r"`learning_rate` must be a number above 0, got nan"),
        ({"stages": [{"kind": "distill", "full_rate_at": 0}]}, r"`full_rate_at` must be a number above 0, got 0. To resolve"),
        ({"stages": [{"kind": "distill", "interpolate": 0.5}]}, r"`interpolate` must be true or false, got 0.5. To resolve"),
        ({"stages": [{"kind": "finetune", "warmup_ratio": 1}]}, r"`warmup_ratio` must be at least 0 and below 1"),
        ({"stages": [{"kind": "finetune", "dropout": 1.0}]}, r"`dropout` must be at least 0 and below 1"),
        ({"stages": [{"kind": "finetune", "max_train_samples": 0}]}, r"`max_train_samples` must be at least 1"),
        ({"stages": [{"kind": "depth_reduction", "method": "prune"}]}, r"`method` must be theseus or truncate"),
        ({"stages": [{"kind": "depth_reduction", "keep": "middle"}]}, r"`keep` must be first, uniform, last, importance or a list"),
        ({"stages": [{"kind": "depth_reduction", "keep": 3}]}, r"`keep` must be first, uniform, last, importance or a list"),
        ({"stages": [{"kind": "depth_reduction", "base": 1.1}]}, r"`base` must be from 0 to 1"),
        ({"stages": [{"kind": "depth_reduction", "importance_samples": 0}]}, r"`importance_samples` must be at least 1"),
        ({"stages": [{"kind": "distill", "data": "labels"}]}, r"`data` must be auto, task, pool or both"),
        ({"stages": [{"kind": "distill", "objectives": "logits"}]}, r"`objectives` must hold objectives, got 'logits'"),
        ({"stages": [{"kind": "width_pruning", "scorer": "luck"}]}, r"`scorer` must be one of magnitude, .* got 'luck'"),
        ({"stages": [{"kind": "width_pruning", "heads": "3/2"}]}, r"`heads` as a share must be above 0 and at most 1"),
        ({"stages": [{"kind": "width_pruning", "ffn": -8}]}, r"`ffn` must not be negative"),
        ({"stages": [{"kind": "width_pruning", "params": "120%"}]}, r"`params` as a share must be above 0 and at most 1"),
        ({"stages": [{"kind": "width_pruning", "iterations": 0}]}, r"`iterations` must be at least 1"),
    ],
)  # fmt: skip
def test_bad_values_and_unknown_keys_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_dict({"stages": [{"kind": "finetune"}], **changes})
    assert "To resolve" in str(caught.value)


def test_all_faults_of_a_recipe_come_in_one_message() -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_yaml("""
            nmae: x
            start: nowhere
            max_length: ten
            teacher: {epochs: 0}
            stages:
              - {kind: finetune, epoch: 1}
              - {kind: distill, objectives: [{kind: logit}, {kind: hidden}, {kind: gold, weight: -1}]}
              - {kind: width_pruning, heads: 2}
              - distill
        """)
    text = str(caught.value)
    assert text.startswith("the recipe has 7 faults:")
    for part in (
        "nmae",
        "`start`",
        "`max_length`",
        "teacher: `epochs`",
        "stage 1: unknown key epoch",
        "'logit'",
        "`weight`",
        "stage 4:",
    ):
        assert part in text
    assert "stage 3" not in text


def test_stages_must_be_stages() -> None:
    with pytest.raises(TypeError, match="`stages` must hold stages, got 'finetune'"):
        Recipe(stages=("finetune",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`start` must be"):
        Recipe(stages=(Finetune(),), start="here")


# --- changes -----------------------------------------------------------------------------------------------------------


def test_override_sets_keys_by_path() -> None:
    recipe = Recipe(stages=(Finetune(), Distill(), WidthPruning(), Distill()))
    changed = recipe.override(
        {
            "max_length": 64,
            "teacher.epochs": 1,
            "stages.1.learning_rate": 1e-3,
            "distill.epochs": 9,
            "stages.4.epochs": 2,
            "width_pruning.heads": [1, 2],
        }
    )
    assert changed == replace(
        recipe,
        max_length=64,
        teacher=Finetune(epochs=1),
        stages=(Finetune(learning_rate=1e-3), Distill(epochs=9), WidthPruning(heads=(1, 2)), Distill(epochs=2)),
    )
    assert recipe == Recipe(stages=(Finetune(), Distill(), WidthPruning(), Distill()))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("stages.5.epochs", "names no stage of this recipe. To resolve, use one of 01-finetune"),
        ("stages.0.epochs", "names no stage of this recipe"),
        ("depth_reduction.layers", "names no stage of this recipe"),
        ("distill.temperature", "unknown key temperature in stage 'distill'"),
        ("teacher.temperature", "teacher: unknown key temperature"),
        ("maximum", "unknown key maximum"),
        ("finetuning.epochs", "unknown key finetuning.epochs"),
    ],
)
def test_override_refuses_paths_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(stages=(Finetune(), Distill(), Distill(), WidthPruning())).override({path: 1})


def test_through_takes_the_stages_that_belong_to_no_task() -> None:
    stages = (VocabPruning(), EmbeddingFactorisation(rank=8), Distill())
    assert Recipe(stages=stages).through("mnli").stages[1:4] == (
        *stages[:2],
        replace(stages[2], task="mnli", teacher="01-finetune"),
    )


def test_through_moves_the_chain_to_the_intermediate_task_and_repeats_its_last_stage() -> None:
    last = Distill(epochs=2, objectives=(GoldObjective(),))
    own = Distill(teacher="01-depth_reduction")
    teacher = Finetune(epochs=4)
    recipe = Recipe(stages=(DepthReduction(), Distill(), own, WidthPruning(), last), teacher=teacher, start="teacher")
    moved = recipe.through("mnli")
    assert moved.start == "checkpoint"
    assert moved.stages == (
        replace(teacher, task="mnli"),
        DepthReduction(task="mnli"),
        Distill(task="mnli", teacher="01-finetune"),
        # The stage that it names has another number now.
        Distill(task="mnli", teacher="02-depth_reduction"),
        WidthPruning(task="mnli"),
        replace(last, task="mnli", teacher="01-finetune"),
        last,
    )
    assert moved.tasks == ["mnli"]
    assert recipe.tasks == []


# --- the paper ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_base() -> BertForSequenceClassification:
    """The paper's shape, without any weights."""
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


def test_smbert_yaml_holds_the_papers_numbers() -> None:
    one, two, kd, width, recovery = Recipe.named("smbert").stages
    assert isinstance(one, DepthReduction) and isinstance(two, DepthReduction)
    assert (one.method, two.method, one.keep, two.keep) == ("theseus", "theseus", "first", "first")
    assert (one.base, two.base) == (0.3, 0.4)
    assert (one.slope, two.slope) == (0.0006, 0.0008)
    assert (one.learning_rate, two.learning_rate) == (1e-5, 1e-5)
    assert (one.epochs, two.epochs) == (15, 15)
    assert isinstance(kd, Distill)
    assert [(o.kind, o.weight) for o in kd.objectives] == [("logits", 5.0), ("hidden", 2.0), ("attention", 1.0)]
    assert (kd.epochs, kd.objectives[0].temperature, kd.learning_rate) == (3, 3.0, 2e-5)  # type: ignore[attr-defined]
    assert isinstance(width, WidthPruning)
    assert (width.heads, width.ffn, width.scope) == ("2/3", "2/3", "uniform")
    assert isinstance(recovery, Distill) and recovery.learning_rate == 1e-5
    assert Recipe.named("smbert").max_length == 128


@pytest.mark.parametrize("name", ["smbert", "two_cores"])
def test_recipes_make_the_papers_shape_of_bert_base(name: str, context: Context, bert_base: Any) -> None:
    context = replace(context, teacher=bert_base)
    before, recipe = outline_of(bert_base), Recipe.named(name)
    assert before.structure.layer_widths == ((12, 3072),) * 12
    depths, now = [], before
    for stage in recipe.stages:
        now = stage.outline(now, context)
        depths.append(now.structure.num_layers)
    assert depths == [6, 3, 3, 3, 3]
    after = recipe.check(before, context)
    assert after.structure.layer_widths == ((8, 2048),) * 3
    assert after.heads_known and after.task is None
    assert after.done == ("00-teacher", *recipe.folder_names)


@pytest.mark.parametrize(
    ("layers", "heads", "ffn", "result"), [(6, 6, 1536, (2, 4, 1024)), (24, 16, 4096, (6, 11, 2736))]
)
def test_smbert_generalises_by_ratio(
    layers: int, heads: int, ffn: int, result: tuple[int, int, int], context: Context
) -> None:
    structure = Structure(FAMILIES["bert"], heads * 64, 64, 30_522, heads * 64, ((heads, ffn),) * layers)
    after = Recipe.named("smbert").check(Outline(structure), context)
    assert after.structure.layer_widths == (result[1:],) * result[0]


def test_the_papers_way_through_an_intermediate_task_passes_the_check(
    context: Context, three_way: TaskData, bert_base: Any
) -> None:
    context = replace(context, other={"three": three_way}, teacher=bert_base)
    recipe = Recipe.named("smbert").through("three")
    after = recipe.check(outline_of(bert_base), context)
    assert after.structure.layer_widths == ((8, 2048),) * 3
    assert after.task is None
    assert recipe.folder_names == [
        "01-finetune", "02-depth_reduction", "03-depth_reduction", "04-distill", "05-width_pruning", "06-distill", "07-distill",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["smbert", "two_cores", "demo"])
def test_the_recipes_that_ship_are_whole(name: str) -> None:
    recipe = Recipe.named(name)
    assert recipe.stages
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


# --- orders that cannot work -------------------------------------------------------------------------------------------

ATTENTION = (LogitsObjective(), AttentionObjective())
MEAN = (AttentionObjective(heads="mean"), RelationObjective())
REFUSED: dict[str, tuple[Sequence[Stage], str]] = {
    "theseus on another task without finetune": (
        [DepthReduction(task="three"), Finetune()], "01-depth_reduction: .*'three' needs a predecessor that is fine-tuned on it"),
    "theseus back on the target task": (
        [Finetune(task="three"), DepthReduction()], "02-depth_reduction: .*'tiny' needs a predecessor that is fine-tuned on it"),
    "attention after heads went by count": (
        [WidthPruning(heads=2, ffn=None), Distill(objectives=ATTENTION)], r"02-distill: the attention objective needs equal head counts, got .*\(4, 2\)"),
    "attention after heads went by list": (
        [WidthPruning(heads=(4, 4, 4, 3), ffn=None), Distill(objectives=ATTENTION)], r"02-distill: the attention objective needs equal head counts"),
    "attention after heads went by parameters": (
        [WidthPruning(params="80%"), Distill(objectives=ATTENTION)], "02-distill: an attention objective .* a pruning before it decides them by budget"),
    "attention after heads went by MACs": (
        [WidthPruning(macs="60%"), Distill(objectives=ATTENTION)], "02-distill: an attention objective .* a pruning before it decides them by budget"),
    "attention after heads competed": (
        [WidthPruning(heads=2, scope="global"), Distill(objectives=ATTENTION)], "02-distill: an attention objective .* decides them by budget"),
    "attention after importance chose among uneven layers": (
        [WidthPruning(heads=(4, 4, 3, 3)), DepthReduction(layers=2, keep="importance"), Distill(objectives=ATTENTION)], "03-distill: an attention objective"),
    "attention when uneven layers were cut from the end": (
        [WidthPruning(heads=(4, 4, 3, 3)), DepthReduction(layers=2, keep="last"), Distill(objectives=ATTENTION)], r"03-distill: .*\(4, 3\)"),
    "attention against a stage that still has all heads": (
        [Finetune(task="three"), WidthPruning(heads=2, task="three"), Distill(task="three", teacher="01-finetune", objectives=ATTENTION), Finetune()],
        r"03-distill: the attention objective needs equal head counts"),
    "teacher names a later stage": (
        [Distill(teacher="02-finetune"), Finetune()], r"01-distill: `teacher` must name a stage before this one \(00-teacher\), got '02-finetune'"),
    "teacher names itself": ([Finetune(), Distill(teacher="02-distill")], r"02-distill: `teacher` must name a stage before this one \(00-teacher, 01-finetune\)"),
    "the target's teacher on another task": ([Distill(task="three"), Finetune()], "01-distill: .*'three' needs a teacher of that task"),
    "a stage of another task as teacher": (
        [Finetune(task="three"), Distill(teacher="01-finetune")], "02-distill: .*'tiny' needs a teacher of that task, and '01-finetune' is of 'three'"),
    "teacher that is no folder": ([Distill(teacher="./nowhere")], "01-distill: .*no folder ./nowhere is there"),
    "student that is no folder": ([Distill(student="./nowhere")], "01-distill: .*no folder ./nowhere is there"),
    "all layers stay": ([DepthReduction(layers=4)], r"01-depth_reduction: `layers` must be between 1 and 3 for this 4-layer model, got 4"),
    "more layers than there are": ([DepthReduction(layers=9)], r"`layers` must be at most 4"),
    "more layers than are left": ([DepthReduction(layers=2), DepthReduction(layers=3)], r"02-depth_reduction: `layers` must be at most 2"),
    "a share of layers above one": ([DepthReduction(layers="150%")], r"`layers` as a share must be above 0 and at most 1"),
    "no layers": ([DepthReduction(layers=0)], r"`layers` must be between 1 and 3"),
    "layers that are no number": ([DepthReduction(layers=[1])], r"`layers` must be a number or a share"),  # type: ignore[arg-type]
    "a layer that is not there": ([DepthReduction(keep=(0, 4))], r"`keep` must hold ascending, distinct numbers from 0 to 3, got \[0, 4\]"),
    "layers in disorder": ([DepthReduction(keep=(2, 0))], r"`keep` must hold ascending, distinct numbers from 0 to 3, got \[2, 0\]"),
    "more heads than there are": ([WidthPruning(heads=5)], r"01-width_pruning: `heads` must be at most 4"),
    "more neurons than there are": ([WidthPruning(ffn=65)], r"01-width_pruning: `ffn` must be at most 64"),
    "more heads than there are, in competition": ([WidthPruning(heads=5, scope="global")], r"`heads` must not exceed the 16"),
    "a list for other layers": ([DepthReduction(layers=2), WidthPruning(heads=(1, 2, 3))], r"02-width_pruning: `heads` must have one number for each of the 2 layers"),
    "parameters out of reach": ([WidthPruning(params="1%")], r"01-width_pruning: `params` must be at least [\d,]+, the smallest .* got '1%'"),
    "parameters out of reach in competition": ([WidthPruning(params=100, scope="global")], r"`params` must be at least"),
    "MACs out of reach": ([WidthPruning(macs="1%")], r"01-width_pruning: `macs` must be at least"),
    "pool without a pool": ([Distill(data="pool")], r"01-distill: `data: pool` needs unlabelled texts"),
    "both without a pool": ([Distill(data="both")], r"01-distill: `data: both` needs unlabelled texts"),
    "a task without data": ([Finetune(task="mnli")], r"01-finetune: `task` must be one of the tasks that have data \(tiny, three\), got 'mnli'"),
    "scoring on a task without data": ([WidthPruning(task="mnli")], r"01-width_pruning: `task` must be one of the tasks that have data"),
    "the last stage leaves another head": ([Finetune(task="three")], "the last stage leaves a model with the head of 'three', not of 'tiny'"),
    "pruning does not bring the head back": ([Finetune(task="three"), WidthPruning()], "the last stage leaves a model with the head of 'three'"),
    "truncation does not bring the head back": (
        [Finetune(task="three"), DepthReduction(method="truncate")], "the last stage leaves a model with the head of 'three'"),
    "a layer map beyond the layers": ([Distill(objectives=(HiddenObjective(layer_map=((5, 1),)),))], r"the teacher has 4 layers and the student 4, got \[5, 1\]"),
    "a layer map beyond the layers after a budget": (
        [WidthPruning(params="80%"), Distill(objectives=(HiddenObjective(layer_map=((5, 1),)),))], r"02-distill: .*the teacher has 4 layers"),
    "two objectives of one name": ([Distill(objectives=(GoldObjective(), GoldObjective()))], "objective names must differ, got 'gold' 2 times"),
    "no objective": ([Distill(objectives=())], "`objectives` must not be empty"),
}  # fmt: skip


@pytest.fixture
def checking(context: Context, three_way: TaskData) -> Context:
    """Two tasks and a stand-in for the teacher, as compress() checks a recipe."""
    return replace(context, other={"three": three_way}, teacher=tiny("bert", seed=1))


@pytest.mark.parametrize("case", REFUSED)
def test_orders_that_cannot_work_are_refused(case: str, checking: Context, tmp_path: Path) -> None:
    stages, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        Recipe(stages=tuple(stages)).check(outline_of(tiny("bert")), checking)
    assert "To resolve" in str(caught.value) or "`layer_map`" in str(caught.value)
    assert not list(tmp_path.iterdir())


ACCEPTED: dict[str, list[Stage]] = {
    "attention before the heads go": [Distill(objectives=ATTENTION), WidthPruning(heads=2)],
    "mean attention and relations after it": [WidthPruning(heads=2), Distill(objectives=MEAN)],
    "the same after a budget": [WidthPruning(params="80%"), Distill(objectives=MEAN)],
    "attention after neurons competed": [WidthPruning(heads=None, ffn="1/2", scope="global"), Distill(objectives=ATTENTION)],
    "attention after a budget that leaves the heads alone": [WidthPruning(heads=4, params="90%"), Distill(objectives=ATTENTION)],
    "a stage that has lost the same heads as teacher": [WidthPruning(heads=2), Distill(teacher="01-width_pruning", objectives=ATTENTION)],
    "theseus on another task after finetune": [Finetune(task="three"), DepthReduction(task="three"), Finetune()],
    "the target by its own name": [Finetune(task="tiny"), DepthReduction(task="tiny")],
    "the teacher's folder": [Distill(teacher="00-teacher", objectives=ATTENTION)],
    "truncated before a new head": [DepthReduction(method="truncate", task="three"), Finetune(task="three"), Finetune()],
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_orders_that_can_work_are_not_refused(case: str, checking: Context) -> None:
    assert Recipe(stages=tuple(ACCEPTED[case])).check(outline_of(tiny("bert")), checking).task is None


def test_a_pool_allows_what_needs_one_but_has_no_gold_labels(checking: Context, pool: Dataset) -> None:
    context, before = replace(checking, pool=pool), outline_of(tiny("bert"))
    for data in ("pool", "both"):
        Recipe(stages=(Distill(data=data, objectives=(LogitsObjective(),)),)).check(before, context)
    with pytest.raises(ValueError, match="`data: pool` has no labels for the gold objective"):
        Recipe(stages=(Distill(data="pool", objectives=(GoldObjective(),)),)).check(before, context)


@pytest.mark.parametrize("keep", ["last", "uniform", (1, 2)])
def test_layer_0_of_modernbert_must_stay(keep: Any, checking: Context) -> None:
    model = tiny("modernbert")
    context = replace(checking, teacher=model)
    with pytest.raises(ValueError, match="`keep` must begin with layer 0 for modernbert"):
        Recipe(stages=(DepthReduction(layers=2, keep=keep),)).check(outline_of(model), context)
    Recipe(stages=(DepthReduction(layers=2, keep="importance"),)).check(outline_of(model), context)


def test_a_teacher_of_other_labels_is_refused(checking: Context, tmp_path: Path) -> None:
    save_model(tiny("bert", num_labels=3), tmp_path / "other")
    with pytest.raises(ValueError, match=r"`teacher` must have the 2 labels of task 'tiny', got .*other with 3"):
        Recipe(stages=(Distill(teacher=str(tmp_path / "other")),)).check(outline_of(tiny("bert")), checking)


def test_a_student_of_another_shape_is_checked_as_it_is(checking: Context, tmp_path: Path) -> None:
    save_model(tiny("distilbert", layers=2, hidden_size=16, num_attention_heads=2), tmp_path / "student")
    stage = Distill(student=str(tmp_path / "student"), objectives=(HiddenObjective(),))
    after = Recipe(stages=(stage,)).check(outline_of(tiny("bert")), checking)
    assert (after.structure.family.model_type, after.structure.hidden_size) == ("distilbert", 16)
    with pytest.raises(ValueError, match="the attention objective needs equal head counts"):
        Recipe(stages=(replace(stage, objectives=ATTENTION),)).check(outline_of(tiny("bert")), checking)


def test_all_stages_that_cannot_work_are_named_in_one_message(checking: Context) -> None:
    stages = (DepthReduction(layers=9), Distill(data="pool"), WidthPruning(heads=5), Finetune(task="mnli"), Finetune())
    with pytest.raises(ValueError) as caught:
        Recipe(stages=stages).check(outline_of(tiny("bert")), checking)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe has 4 faults:"
    assert [line.split(":")[0].strip(" -") for line in lines[1:]] == [
        "stage 01-depth_reduction", "stage 02-distill", "stage 03-width_pruning", "stage 04-finetune",
    ]  # fmt: skip
