"""Each stage does what it says with the model that comes in, and leaves that model, the teacher and the data as they were."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import batch, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from smbert.context import Context, TaskData
from smbert.features import capture_features
from smbert.importance import SCORERS
from smbert.measure import count_parameters, macs
from smbert.modeling import encoder_layers
from smbert.objectives import (
    AttentionObjective,
    CosineObjective,
    GoldObjective,
    HiddenObjective,
    LogitsObjective,
    RelationObjective,
)
from smbert.stages import DepthReduction, Distill, EmbeddingFactorisation, Finetune, Outline, Stage, WidthPruning
from smbert.stages.depth import most_important_layers
from smbert.stages.distill import nearest_between
from smbert.surgery import keep_layers, save_model, structure_of
from smbert.teacher import freeze, predict_logits
from smbert.teacher_states import TeacherStates
from smbert.trainer import Distillation, SmbertTrainer

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    """The names of the tensors that are no longer the same."""
    now = after.state_dict()
    assert before.keys() == now.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


def answer(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@contextmanager
def left_alone(model: PreTrainedModel) -> Iterator[None]:
    """Weights, config, gradient flags and modes are the same after the block."""

    def state() -> Any:
        flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
        return flags, [m.training for m in model.modules()], model.config.to_dict(), model.config._attn_implementation

    kept, before = weights(model), state()
    yield
    assert changed(kept, model) == set()
    assert state() == before


def log_of(info: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in info["loss_log"] if key in entry]


@pytest.fixture(scope="module")
def tuned(tiny_data: TaskData, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A 4-layer BERT that has learned the tiny task. Tests copy it."""
    folder = tmp_path_factory.mktemp("tuned")
    context = Context(tokenizer, tiny_data, folder / "cache", args={"bf16": False, "disable_tqdm": True})
    stage = Finetune(epochs=10, batch_size=8, learning_rate=2e-3, dropout=0.0)
    model, _ = stage.run(tiny("bert"), context, folder / "work")
    assert context.evaluate(model)["accuracy"] >= 0.9
    return model


@pytest.fixture
def teacher(tuned: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(tuned)


class Steps:
    """Records what every training step saw and gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[dict[str, Tensor]] = []
        self.terms: list[dict[str, Tensor]] = []
        original = SmbertTrainer.compute_loss

        def compute_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.inputs.append({k: v.clone() for k, v in inputs.items()})
            return original(trainer, model, inputs, *args, **kwargs)

        monkeypatch.setattr(SmbertTrainer, "compute_loss", compute_loss)
        forward = Distillation.forward

        def recorded(holder: Any, inputs: Any) -> Any:
            loss, terms = forward(holder, inputs)
            self.terms.append(terms)
            return loss, terms

        monkeypatch.setattr(Distillation, "forward", recorded)


# --- all stages --------------------------------------------------------------------------------------------------------

OUTLINED: list[Stage] = [
    Finetune(**QUICK),
    DepthReduction(layers="1/2", **QUICK),
    DepthReduction(layers=3, method="truncate", keep="uniform"),
    DepthReduction(layers=2, method="truncate", keep="last"),
    DepthReduction(keep=(0, 3), method="truncate"),
    Distill(objectives=(LogitsObjective(),), **QUICK),
    WidthPruning(scorer="magnitude", samples=1),
    WidthPruning(heads=(1, 2, 3, 4), ffn=None, scorer="magnitude", samples=1),
    WidthPruning(heads=None, ffn="1/3", scorer="magnitude", samples=1),
    WidthPruning(heads=(4, 3, 2, 1), ffn=(64, 48, 40, 7), scorer="magnitude", samples=1),
]


@pytest.mark.parametrize("stage", OUTLINED, ids=lambda s: s.kind)
def test_what_comes_out_is_what_the_outline_says(
    stage: Stage, context: Context, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    context, model = replace(context, teacher=freeze(teacher)), tiny("bert")
    before = Outline(structure_of(model))
    with left_alone(model), left_alone(teacher):
        result, _ = stage.run(model, context, tmp_path / "work")
    outline = stage.outline(before, context)
    assert outline.heads_known
    assert structure_of(result) == outline.structure
    assert not result.training
    assert all(p.requires_grad for p in result.parameters())


def test_uneven_layers_keep_their_own_widths_in_outline_and_result(context: Context, tmp_path: Path) -> None:
    model = tiny("bert")
    outline, stages = Outline(structure_of(model)), (OUTLINED[-1], DepthReduction(layers=2, keep="last", **QUICK))
    for number, stage in enumerate(stages):
        outline = stage.outline(outline, context)
        model, _ = stage.run(model, context, tmp_path / str(number))
    assert structure_of(model).layer_widths == outline.structure.layer_widths == ((2, 40), (1, 7))


def test_a_frozen_model_can_be_trained(context: Context, teacher: PreTrainedModel, tmp_path: Path) -> None:
    context, model = replace(context, teacher=teacher), freeze(tiny("bert"))
    kept = weights(model)
    for number, stage in enumerate((Finetune(**QUICK), Distill(objectives=(LogitsObjective(),), **QUICK))):
        result, _ = stage.run(model, context, tmp_path / str(number))
        assert changed(kept, result) == set(kept)


def test_training_rows_can_be_a_fixed_random_subset(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for run, seed in enumerate((7, 7, 8)):
        with monkeypatch.context() as patch:
            steps = Steps(patch)
            stage = Finetune(**{**QUICK, "batch_size": 8}, max_train_samples=16)
            _, info = stage.run(tiny("bert", layers=1), replace(context, seed=seed), tmp_path / str(run))
        assert (info["train_rows"], info["optimiser_steps"]) == (16, 2)
        seen.append(
            {
                tuple(ids[mask.bool()].tolist())
                for s in steps.inputs
                for ids, mask in zip(s["input_ids"], s["attention_mask"])
            }
        )
    assert seen[0] == seen[1] != seen[2]
    rows = [tuple(ids) for ids in context.data.train["input_ids"][:]]
    assert seen[0] <= set(rows)
    assert seen[0] != set(rows[:16])


# --- depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "keep", "kept"),
    [
        (2, "first", [0, 1]),
        ("1/2", "last", [2, 3]),
        (2, "uniform", [1, 3]),
        (3, "uniform", [0, 2, 3]),
        (1, "uniform", [3]),
        ("50%", (0, 3), [0, 3]),
    ],
)
def test_truncation_keeps_the_chosen_layers_as_they_are(
    layers: Any, keep: Any, kept: list[int], context: Context, tmp_path: Path
) -> None:
    model = tiny("bert")
    result, info = DepthReduction(layers=layers, keep=keep, method="truncate").run(model, context, tmp_path)
    assert info == {"layers_kept": kept}
    assert changed(weights(keep_layers(model, kept)), result) == set()
    inputs = batch(model)
    assert torch.equal(answer(result, inputs), answer(keep_layers(model, kept), inputs))


def only_layer(family: str, essential: int, **config: Any) -> PreTrainedModel:
    """A model whose other layers pass on what they get."""
    model = tiny(family, **config)
    with torch.no_grad():
        for module in model.base_model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                if module.bias is not None:
                    module.bias.zero_()
        for i, layer in enumerate(encoder_layers(model)):
            for part in ("attention_output", "ffn_out"):
                linear = structure_of(model).family.get(layer, part)
                for p in linear.parameters():
                    p.mul_(10.0 if i == essential else 0.0)
    return model


@pytest.mark.parametrize("essential", range(4))
def test_importance_keeps_the_layer_that_does_the_work(essential: int, context: Context, tmp_path: Path) -> None:
    model = only_layer("bert", essential)
    stage = DepthReduction(layers=1, keep="importance", method="truncate", importance_samples=16)
    result, info = stage.run(model, context, tmp_path)
    assert info["layers_kept"] == [essential]
    inputs = batch(model)
    assert torch.allclose(answer(result, inputs), answer(model, inputs), atol=1e-4)


def test_importance_never_drops_layer_0_of_modernbert(context: Context) -> None:
    rows = context.data.train.select(range(16))
    assert most_important_layers(only_layer("modernbert", 2), 2, rows, context) == [0, 2]


def test_importance_of_a_regression_is_measured_too(context: Context) -> None:
    rows = context.data.train.select(range(16))
    assert most_important_layers(only_layer("bert", 3, num_labels=1), 1, rows, context) == [3]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_theseus_trains_the_successors_layers_and_nothing_else(family: str, context: Context, tmp_path: Path) -> None:
    predecessor = tiny(family)
    predecessor.train()
    stage = DepthReduction(layers=2, base=0.5, slope=0.1, **{**QUICK, "batch_size": 8})
    with left_alone(predecessor):
        result, info = stage.run(predecessor, context, tmp_path)
    start = weights(keep_layers(predecessor, [0, 1]))
    layers = {name for name in start if ".layer." in name or ".layers." in name}
    assert changed(start, result) == layers
    assert info["layers_kept"] == [0, 1]
    assert info["optimiser_steps"] == 8
    assert info["final_replacing_rate"] == 1.0


def test_draws_and_rates_are_logged(context: Context, tmp_path: Path) -> None:
    stage = DepthReduction(layers=2, base=0.2, slope=0.01, **{**QUICK, "batch_size": 8})
    _, info = stage.run(tiny("bert"), context, tmp_path)
    assert log_of(info, "replacing_rate") == [round(0.2 + 0.01 * step, 4) for step in (2, 4, 6, 8)]
    assert len(log_of(info, "loss/gold")) == 4
    # Two steps of two modules each.
    assert set(log_of(info, "replaced")) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert info["final_replacing_rate"] == pytest.approx(0.28)
    # A rate of 0 at step 0 and of 1 from then on.
    _, info = replace(stage, base=0.0, slope=1.0).run(tiny("bert"), context, tmp_path / "steep")
    assert log_of(info, "replaced") == [0.5, 1.0, 1.0, 1.0]


def test_nothing_is_learned_where_no_successor_is_drawn(context: Context, tmp_path: Path) -> None:
    model = tiny("bert")
    result, _ = DepthReduction(layers=2, base=0.0, slope=0.0, weight_decay=0.0, **QUICK).run(model, context, tmp_path)
    assert changed(weights(keep_layers(model, [0, 1])), result) == set()


def test_without_a_slope_the_rate_reaches_one_at_half_of_the_steps(context: Context, tmp_path: Path) -> None:
    stage = DepthReduction(layers=2, base=0.4, slope=None, **{**QUICK, "batch_size": 8})
    _, info = stage.run(tiny("bert"), context, tmp_path)
    assert log_of(info, "replacing_rate") == [0.7, 1.0, 1.0, 1.0]


def test_twelve_layers_become_five(context: Context, tmp_path: Path) -> None:
    model = tiny("bert", layers=12)
    result, info = DepthReduction(layers=5, keep="uniform", **QUICK).run(model, context, tmp_path)
    assert info["layers_kept"] == [1, 4, 6, 9, 11]
    assert structure_of(result).num_layers == 5
    assert torch.isfinite(answer(result, batch(model))).all()


def test_theseus_hands_the_task_on(context: Context, tuned: PreTrainedModel, tmp_path: Path) -> None:
    stage = DepthReduction(layers=2, base=0.5, slope=0.05, epochs=4, batch_size=8, learning_rate=1e-3, dropout=0.0)
    result, info = stage.run(tuned, context, tmp_path)
    assert context.evaluate(result)["accuracy"] >= 0.85
    assert log_of(info, "loss")[-1] < 0.4


# --- distillation ------------------------------------------------------------------------------------------------------


def counted(model: PreTrainedModel) -> list[int]:
    """The batch sizes of all forwards from now on."""
    calls: list[int] = []
    model.register_forward_hook(lambda _m, _a, kwargs, _o: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    return calls


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_and_the_scores_obey_bf16_as_the_training_does(
    bf16: bool, context: Context, teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill, width = (importlib.import_module(f"smbert.stages.{name}") for name in ("distill", "width"))
    seen: list[Any] = []
    logits, score = distill.cached_logits, width.score
    monkeypatch.setattr(distill, "cached_logits", lambda *a, **k: seen.append(k["bf16"]) or logits(*a, **k))
    monkeypatch.setattr(width, "score", lambda *a, **k: seen.append(k["autocast"] is not None) or score(*a, **k))
    context = replace(context, teacher=teacher, args={**context.args, "bf16": bf16})
    Distill(objectives=(LogitsObjective(),), **QUICK).run(copy.deepcopy(teacher), context, tmp_path / "distill")
    WidthPruning(heads=3, ffn=48, samples=8).run(copy.deepcopy(teacher), context, tmp_path / "width")
    assert seen == [bf16, bf16]


def test_cached_logits_spare_the_teacher_the_second_run(
    context: Context, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    calls = counted(teacher)
    context = replace(context, teacher=teacher)
    stage = Distill(objectives=(LogitsObjective(), GoldObjective()), **QUICK)
    first, info = stage.run(tiny("bert"), context, tmp_path / "first")
    # Once for each row, however many epochs and batches there are.
    assert sum(calls) == len(context.data.train)
    assert info["teacher_ran_live"] is False
    calls.clear()
    second, _ = stage.run(tiny("bert"), context, tmp_path / "second")
    assert calls == []
    assert changed(weights(first), second) == set()
    # Another seed asks for the same rows.
    replace(stage, epochs=2).run(tiny("bert"), replace(context, seed=1), tmp_path / "third")
    assert calls == []


def test_the_teacher_is_judged_once_whoever_asks(context: Context, teacher: PreTrainedModel, tmp_path: Path) -> None:
    calls, student = counted(teacher), tiny("bert")
    first = replace(context, teacher=teacher).evaluate(teacher)
    assert sum(calls) == len(context.data.validation)
    # Another run reads it as well, where both have a folder for what the teacher answers.
    assert replace(context, teacher=teacher).evaluate(teacher) == first
    shared = replace(context, teacher=teacher, states_dir=tmp_path / "states")
    assert shared.evaluate(teacher) == first
    calls.clear()
    assert replace(shared, cache_dir=tmp_path / "elsewhere").evaluate(teacher) == first
    assert calls == []
    # A student changes from one call to the next, so nothing of it is kept.
    before = len(list(context.cache_dir.glob("*")))
    assert replace(context, teacher=teacher).evaluate(student) == context.evaluate(student)
    assert len(list(context.cache_dir.glob("*"))) == before


def test_a_live_teacher_runs_beside_every_step(
    context: Context, teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(teacher)
    context = replace(context, teacher=teacher)
    looks_inside = Distill(objectives=(LogitsObjective(), AttentionObjective()), **{**QUICK, "epochs": 2})
    _, info = looks_inside.run(tiny("bert"), context, tmp_path / "attention")
    assert calls == [16] * 8
    assert info["teacher_ran_live"] is True
    assert not list(context.cache_dir.glob("*")) if context.cache_dir.exists() else True
    # So it does where rows are seen once, or where the disk has no room for its states.
    calls.clear()
    hidden = Distill(objectives=(LogitsObjective(), HiddenObjective()), **{**QUICK, "epochs": 1})
    assert hidden.run(tiny("bert"), context, tmp_path / "once")[1]["teacher_ran_live"] is True
    monkeypatch.setattr("smbert.teacher_states.SHARE_OF_DISK", 0.0)
    assert replace(hidden, epochs=2).run(tiny("bert"), context, tmp_path / "full")[1]["teacher_ran_live"] is True
    assert calls == [16] * 12


def test_kept_hidden_states_spare_the_teacher_the_second_epoch(
    context: Context, teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = replace(context, teacher=teacher)
    stage = Distill(objectives=(LogitsObjective(), HiddenObjective()), **{**QUICK, "epochs": 2})
    calls = counted(teacher)
    kept, info = stage.run(tiny("bert"), context, tmp_path / "kept")
    assert sum(calls) == len(context.data.train) and info["teacher_ran_live"] is False
    calls.clear()
    again, _ = stage.run(tiny("bert"), context, tmp_path / "kept" / "again")
    shutil.copytree(tmp_path / "kept" / "states", tmp_path / "resumed" / "states")
    calls.clear()
    resumed, _ = stage.run(tiny("bert"), context, tmp_path / "resumed")
    assert calls == []  # what the killed run had computed is used
    assert changed(weights(kept), again) == changed(weights(kept), resumed) == set()
    monkeypatch.setattr("smbert.teacher_states.SHARE_OF_DISK", 0.0)
    live, info = stage.run(tiny("bert"), context, tmp_path / "live")
    assert info["teacher_ran_live"] is True
    flat = [torch.cat([t.flatten() for t in weights(m).values()]) for m in (tiny("bert"), kept, live)]
    start, with_states, with_teacher = flat
    # Half precision and other batches of the teacher: much less than what training moves.
    assert (with_states - with_teacher).norm() < 0.05 * (with_teacher - start).norm()


def test_stages_share_hidden_states_in_a_folder_of_their_own(
    context: Context, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    context = replace(context, teacher=teacher, states_dir=tmp_path / "states")
    stage = Distill(objectives=(LogitsObjective(), HiddenObjective()), **{**QUICK, "epochs": 1})
    calls = counted(teacher)
    first, info = stage.run(tiny("bert"), context, tmp_path / "first")
    # Though this stage sees its rows once, the next will see them again.
    assert sum(calls) == len(context.data.train) and info["teacher_ran_live"] is False
    assert not (tmp_path / "first" / "states").exists()
    calls.clear()
    second, _ = stage.run(tiny("bert"), context, tmp_path / "second")
    assert calls == [] and changed(weights(first), second) == set()
    few = replace(context, data=replace(context.data, train=context.data.train.select(range(8))))
    stage.run(tiny("bert"), few, tmp_path / "few")
    shared = tmp_path / "states"
    for folder in list(shared.iterdir()):
        folder.with_name(f"{folder.name}.part").mkdir()  # a killed run's
    last = replace(stage, objectives=(HiddenObjective(layer_map="last"),))
    last.run(tiny("bert"), context, tmp_path / "last")  # its layer is among those that are kept
    with torch.no_grad():
        teacher.classifier.bias.add_(1)
    last.run(tiny("bert"), context, tmp_path / "another")
    stage.run(tiny("bert"), context, tmp_path / "more")  # its layers are not
    kept = [folder for folder in shared.iterdir() if folder.suffix != ".part"]
    assert sum(calls) == 8 + 2 * len(context.data.train) and len(kept) == 4


def test_kept_hidden_states_belong_to_their_rows(
    context: Context, teacher: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = context.data.train
    states = TeacherStates.compute(teacher, rows, context.collator, {0, 2, 4}, tmp_path / "s", 8, disable_tqdm=True)
    assert states is not None and states.layers == [0, 2, 4]
    chosen = [5, 0, 11, 3]
    batch = context.collator([rows[i] for i in chosen])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        expected = capture_features(teacher, inputs, hidden={0, 2, 4})
    got = states.features(torch.tensor(chosen), expected.mask)
    assert expected.mask.sum() < expected.mask.numel()  # there is padding
    for layer in (0, 2, 4):
        torch.testing.assert_close(
            got.real(got.hidden[layer]), expected.real(expected.hidden[layer]), atol=4e-3, rtol=0
        )
    np.testing.assert_allclose(states.logits[chosen], expected.logits, atol=1e-5)

    with torch.no_grad():
        encoder_layers(teacher)[0].output.LayerNorm.bias.fill_(1e5)
    assert TeacherStates.compute(teacher, rows, context.collator, {1}, tmp_path / "t", disable_tqdm=True) is None
    assert not (tmp_path / "t").exists() and not list(tmp_path.glob("*.part"))


def test_cached_and_live_logits_are_the_same(
    context: Context, teacher: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    Distill(objectives=(LogitsObjective(),), **QUICK).run(tiny("bert"), replace(context, teacher=teacher), tmp_path)
    assert len(steps.inputs) == 4
    for inputs in steps.inputs:
        plain = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        assert torch.allclose(inputs["teacher_logits"], answer(teacher, plain), atol=1e-5)


ALL_KINDS = (
    LogitsObjective(weight=5.0, temperature=3.0),
    HiddenObjective(weight=2.0),
    AttentionObjective(weight=1.0),
    RelationObjective(weight=0.5),
    CosineObjective(weight=0.5),
    GoldObjective(weight=0.5, name="labels"),
)


def test_every_loss_falls_and_is_logged_under_its_name(
    context: Context, tuned: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    student = keep_layers(tuned, [0, 3])
    stage = Distill(objectives=ALL_KINDS, epochs=5, batch_size=8, learning_rate=2e-3, dropout=0.0)
    context = replace(context, teacher=freeze(teacher), args={**context.args, "logging_steps": 8})
    with left_alone(teacher), left_alone(student):
        _, info = stage.run(student, context, tmp_path)
    terms = {key.removeprefix("loss/") for entry in info["loss_log"] for key in entry if key.startswith("loss/")}
    assert terms == {"logits", "hidden", "attention", "relation", "cosine", "labels"}
    for name in terms:
        losses = log_of(info, f"loss/{name}")
        assert len(losses) == 5
        assert losses[-1] < 0.8 * losses[0], name
    # The total is the weighted sum of what is logged.
    last = info["loss_log"][-1]
    total = sum(o.weight * last[f"loss/{o.name}"] for o in ALL_KINDS)
    assert last["loss"] == pytest.approx(total, rel=1e-2)


def test_a_distilled_student_learns_the_task_without_labels(
    context: Context, tuned: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    student = keep_layers(tuned, [0, 1])
    stage = Distill(objectives=ALL_KINDS[:2], epochs=6, batch_size=8, learning_rate=2e-3, dropout=0.0)
    result, _ = stage.run(student, replace(context, teacher=teacher), tmp_path)
    assert context.evaluate(result)["accuracy"] >= 0.85


def test_a_student_near_its_teacher_learns_slower_in_proportion(
    context: Context, tuned: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    context = replace(context, teacher=freeze(teacher), args={**context.args, "bf16": False})
    stage = Distill(objectives=ALL_KINDS[:2], max_steps=4, batch_size=8, learning_rate=1e-3, full_rate_at=0.5)
    student = keep_layers(tuned, [0, 1])
    rows = context.data.train
    answers, targets = (
        torch.tensor(predict_logits(m, rows, context.collator, disable_tqdm=True)).log_softmax(-1)
        for m in (student, teacher)
    )
    divergence = float((targets.exp() * (targets - answers)).sum(-1).mean())
    assert 0 < divergence < 0.5
    _, info = stage.run(student, context, tmp_path / "near")
    assert info["divergence"] == pytest.approx(divergence, abs=1e-4)
    assert info["learning_rate"] == pytest.approx(1e-3 * divergence / 0.5, rel=1e-3)
    assert info["loss_log"][0]["learning_rate"] <= info["learning_rate"]  # of the schedule, and not only told
    _, far = replace(stage, full_rate_at=divergence / 2).run(student, context, tmp_path / "far")
    assert far["learning_rate"] == 1e-3
    # Nothing to learn, and still a rate that a schedule can have.
    _, same = stage.run(teacher, context, tmp_path / "same")
    assert 0 < same["learning_rate"] < 1e-6
    assert "learning_rate" not in replace(stage, full_rate_at=None).run(student, context, tmp_path / "none")[1]


def test_training_that_did_harm_is_taken_back_as_far_as_other_rows_say(
    context: Context, tuned: PreTrainedModel, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    context = replace(context, teacher=freeze(teacher), args={**context.args, "bf16": False})
    student = keep_layers(tuned, [0, 1])
    stage = Distill(objectives=ALL_KINDS[:2], max_steps=6, batch_size=8, learning_rate=1e-3, interpolate=True)
    result, info = stage.run(student, context, tmp_path / "useful")
    told, held_out = info["interpolated"], len(context.data.train) // 10
    assert info["train_rows"] == len(context.data.train) - held_out
    assert list(told["divergence"]) == ["0.0", "0.125", "0.25", "0.5", "0.75", "1.0"]
    assert told["divergence"][str(told["share"])] <= 1.1 * min(told["divergence"].values()) < told["divergence"]["0.0"]
    kept = context.data.train.shuffle(seed=context.seed).select(range(held_out))
    answers, targets = (
        torch.tensor(predict_logits(m, kept, context.collator, disable_tqdm=True)).log_softmax(-1)
        for m in (result, teacher)
    )
    divergence = float((targets.exp() * (targets - answers)).sum(-1).mean())
    assert divergence == pytest.approx(told["divergence"][str(told["share"])], abs=1e-5)
    # What no step could better comes back as it was.
    ruined, info = replace(stage, learning_rate=10.0).run(teacher, context, tmp_path / "harmful")
    assert info["interpolated"]["share"] == 0 and changed(weights(teacher), ruined) == set()


def test_the_nearest_point_may_lie_between() -> None:
    model = tiny("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    told = nearest_between(
        before, model, lambda m: abs(float((m.classifier.bias - before["classifier.bias"]).detach().mean()) - 0.6)
    )
    assert told["share"] == 0.5 and told["divergence"]["1.0"] == pytest.approx(0.4)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, before[name] + 0.5)
    # What a few rows cannot tell apart goes to the training, which saw more.
    flat = {0.0: 9.0, 0.125: 5.0, 0.25: 1.0, 0.5: 1.2, 0.75: 1.09, 1.0: 1.11}
    values = iter([*flat.values(), 1.09])
    assert nearest_between(before, model, lambda _: next(values))["share"] == 0.75


def test_projections_serve_the_loss_and_stay_out_of_the_result(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tiny("roberta", seed=1, hidden_size=48, num_attention_heads=6)
    student = tiny("bert", layers=2)
    held: list[Any] = []
    original = SmbertTrainer.compute_loss

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        held.append(model)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(SmbertTrainer, "compute_loss", compute_loss)
    stage = Distill(objectives=(HiddenObjective(), RelationObjective()), **QUICK)
    result, _ = stage.run(student, replace(context, teacher=wide), tmp_path)
    assert [tuple(p.shape) for p in held[0].objective.parameters()] == [(48, 32)]
    assert type(result) is type(student)
    assert result.state_dict().keys() == student.state_dict().keys()
    save_model(result, tmp_path / "saved")


def test_pool_rows_bring_soft_labels_and_no_gold_loss(
    context: Context, teacher: PreTrainedModel, pool: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, train = pool.select(range(8)), context.data.train.select(range(16))
    context = replace(context, teacher=teacher, pool=pool, data=replace(context.data, train=train))
    soft = predict_logits(teacher, pool, context.collator, disable_tqdm=True)
    expected = {tuple(ids): logits for ids, logits in zip(pool["input_ids"][:], soft)}
    objectives = (LogitsObjective(), GoldObjective())

    def unlabelled(stage: Distill, name: str) -> tuple[int, int]:
        """(all rows, rows without a label) of one epoch; checks the terms on the way."""
        with monkeypatch.context() as patch:
            steps = Steps(patch)
            # Single rows, so that the terms of each are seen; the student does not move.
            replace(stage, batch_size=1, epochs=1, learning_rate=1e-12).run(teacher, context, tmp_path / name)
        count = 0
        for inputs, terms in zip(steps.inputs, steps.terms):
            ids = tuple(inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist())
            if "labels" not in inputs or inputs["labels"].item() == -100:
                count += 1
                np.testing.assert_allclose(inputs["teacher_logits"][0], expected[ids], atol=1e-5)
                assert terms.get("gold", torch.zeros(())).item() == 0.0
            else:
                assert terms["gold"].item() > 0
        return len(steps.inputs), count

    stage = Distill(objectives=objectives)
    assert unlabelled(stage, "auto") == (24, 8)
    assert unlabelled(replace(stage, data="task"), "task") == (16, 0)
    assert unlabelled(replace(stage, data="pool", objectives=objectives[:1]), "pool") == (8, 8)


def test_the_teacher_may_be_an_earlier_stage_or_a_checkpoint(
    context: Context, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    save_model(teacher, tmp_path / "01-finetune")
    stage = Distill(objectives=(LogitsObjective(),), **QUICK)
    want, _ = stage.run(tiny("bert"), replace(context, teacher=teacher), tmp_path / "0")
    named = replace(context, results={"01-finetune": tmp_path / "01-finetune", "00-teacher": tmp_path / "not made"})
    for number, (name, around) in enumerate(
        [
            ("01-finetune", named),
            (str(tmp_path / "01-finetune"), context),
            ("00-teacher", replace(named, teacher=teacher)),
        ]
    ):
        result, _ = replace(stage, teacher=name).run(tiny("bert"), around, tmp_path / f"work{number}")
        assert changed(weights(want), result) == set()
    with pytest.raises(ValueError, match=r"distill needs a teacher. To resolve"):
        stage.run(tiny("bert"), context, tmp_path / "none")


def test_another_checkpoint_can_be_the_student(context: Context, teacher: PreTrainedModel, tmp_path: Path) -> None:
    other = tiny("distilbert", layers=2, num_labels=3)
    save_model(other, tmp_path / "other")
    stage = Distill(objectives=(LogitsObjective(),), student=str(tmp_path / "other"), **QUICK)
    result, _ = stage.run(tiny("bert"), replace(context, teacher=teacher), tmp_path / "work")
    assert result.config.model_type == "distilbert"
    assert (structure_of(result).num_layers, result.config.num_labels) == (2, 2)


# --- fine-tuning -------------------------------------------------------------------------------------------------------

STILL: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "batch_size": 8}


def test_another_label_set_gets_a_fresh_head_on_the_same_encoder(
    context: Context, three_way: TaskData, tmp_path: Path
) -> None:
    context, model = replace(context, other={"three": three_way}), tiny("bert")
    with left_alone(model):
        result, _ = Finetune(task="three", **STILL).run(model, context, tmp_path)
    assert result.config.num_labels == 3
    assert result.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert tuple(result.get_parameter("classifier.weight").shape) == (3, 32)
    body = model.base_model.state_dict()
    assert all(torch.allclose(t, body[name], atol=1e-6) for name, t in result.base_model.state_dict().items())


def test_a_fitting_head_stays(context: Context, tuned: PreTrainedModel, tmp_path: Path) -> None:
    result, _ = Finetune(**STILL).run(tuned, context, tmp_path)
    assert torch.allclose(
        result.get_parameter("classifier.weight"), tuned.get_parameter("classifier.weight"), atol=1e-6
    )


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_bare_encoder_gets_a_head(family: str, context: Context, tmp_path: Path) -> None:
    encoder = tiny(family, head="encoder")
    result, _ = Finetune(**STILL).run(encoder, context, tmp_path)
    assert type(result).__name__.endswith("ForSequenceClassification")
    inputs = batch(encoder)
    with torch.no_grad():
        want = encoder(**inputs).last_hidden_state
        assert torch.allclose(result.base_model(**inputs).last_hidden_state, want, atol=1e-5)


def test_finetuning_learns(context: Context, tmp_path: Path) -> None:
    model = tiny("bert")
    stage = Finetune(epochs=8, batch_size=8, learning_rate=2e-3, dropout=0.0)
    result, info = stage.run(model, context, tmp_path)
    assert context.evaluate(model)["accuracy"] < 0.7 < 0.9 <= context.evaluate(result)["accuracy"]
    assert info["optimiser_steps"] == 64
    assert info["train_loss"] > log_of(info, "loss/gold")[-1]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_frozen_embeddings_stay_and_thaw(family: str, context: Context, tmp_path: Path) -> None:
    model = tiny(family)
    tables = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    frozen, free = (
        Finetune(**QUICK, freeze_embeddings=freeze_them).run(model, context, tmp_path / str(freeze_them))[0]
        for freeze_them in (True, False)
    )
    moved = {name.removesuffix(".weight") for name in changed(weights(model), frozen)}
    assert moved and not moved & tables
    assert any("embeddings" in name for name in moved)  # their norm learns on
    assert tables <= {name.removesuffix(".weight") for name in changed(weights(model), free)}
    assert all(p.requires_grad for p in frozen.parameters())


def test_the_result_keeps_the_checkpoints_dropout(context: Context, tmp_path: Path) -> None:
    result, _ = Finetune(**QUICK, dropout=0.4).run(tiny("bert"), context, tmp_path)
    assert {m.p for m in result.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert result.config._attn_implementation == tiny("bert").config._attn_implementation


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[dict[str, Tensor]]:
    """Evaluation gives these values in turn; the list gets the weights that it saw."""
    seen: list[dict[str, Tensor]] = []
    rest = iter(values)

    def evaluate(self: Context, model: PreTrainedModel, task: str | None = None) -> dict[str, float]:
        assert not model.training
        seen.append(weights(model))
        return {"accuracy": next(rest)}

    monkeypatch.setattr(Context, "evaluate", evaluate)
    return seen


def test_keep_best_keeps_the_best_epoch(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [0.2, 0.9, 0.5])
    stage = Finetune(**{**QUICK, "epochs": 3}, keep_best=True)
    best, _ = stage.run(tiny("bert"), context, tmp_path / "best")
    assert len(seen) == 3
    assert changed(seen[1], best) == set()
    last, _ = replace(stage, keep_best=False).run(tiny("bert"), context, tmp_path / "last")
    assert changed(seen[2], last) == set()
    assert changed(seen[1], last)


def test_the_best_epoch_survives_a_kill(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = replace(context, args={**context.args, "save_steps": 4})
    stage = Finetune(**{**QUICK, "epochs": 3}, keep_best=True)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        seen = scripted(patch, [0.2, 0.9])  # the third evaluation ends the run
        stage.run(tiny("bert"), context, tmp_path)
    with monkeypatch.context() as patch:
        late = scripted(patch, [0.5])
        best, info = stage.run(tiny("bert"), context, tmp_path)
    assert info["optimiser_steps"] == 12
    assert len(late) == 1
    assert changed(seen[1], best) == set()


# --- width -------------------------------------------------------------------------------------------------------------


def widths(model: PreTrainedModel) -> list[tuple[int, int]]:
    return list(structure_of(model).layer_widths)


@pytest.mark.parametrize(
    ("asked", "result"),
    [
        ({}, [(3, 48)] * 4),  # 2/3 of 4 and of 64, rounded up: to a head, to a multiple of 8
        ({"heads": 2, "ffn": 20}, [(2, 20)] * 4),
        ({"heads": "50%", "ffn": 0.25}, [(2, 16)] * 4),
        ({"heads": None, "ffn": "1/2"}, [(4, 32)] * 4),
        ({"heads": 1, "ffn": None}, [(1, 64)] * 4),
        ({"heads": [4, 3, 2, 1], "ffn": [64, 1, 30, 8]}, [(4, 64), (3, 1), (2, 30), (1, 8)]),
        ({"heads": [0, 1, 2, 3], "ffn": 8, "min_heads": 0}, [(0, 8), (1, 8), (2, 8), (3, 8)]),
        ({"ffn": "1/3", "multiple_of": 1}, [(3, 22)] * 4),
    ],
)
@pytest.mark.parametrize("iterations", [1, 3])
def test_counts_shares_and_lists_are_met_exactly_in_one_go_or_in_steps(
    asked: dict[str, Any], result: list[tuple[int, int]], iterations: int, context: Context, tmp_path: Path
) -> None:
    model = tiny("bert")
    stage = WidthPruning(**asked, scorer="magnitude", samples=8, iterations=iterations)
    with left_alone(model):
        pruned, info = stage.run(model, context, tmp_path)
    assert widths(pruned) == result
    assert info["scored_rows"] == 8
    assert torch.isfinite(answer(pruned, batch(model))).all()


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("total", ["params", "macs"])
def test_budgets_are_met_and_used(total: str, scope: str, iterations: int, context: Context, tmp_path: Path) -> None:
    model = tiny("bert")
    size = {"params": lambda m: count_parameters(m).total, "macs": lambda m: macs(m, 128)}[total]
    stage = WidthPruning(**{total: "70%"}, scope=scope, iterations=iterations, samples=16)  # type: ignore[arg-type]
    pruned, _ = stage.run(model, context, tmp_path)
    assert 0.5 * size(model) < size(pruned) <= 0.7 * size(model)
    assert (len(set(widths(pruned))) == 1) == (scope == "uniform")
    assert not stage.outline(Outline(structure_of(model)), context).heads_known


def with_useless_units(family: str) -> PreTrainedModel:
    """In each layer another head and 8 other neurons have no way out."""
    model = tiny(family)
    structure = structure_of(model)
    with torch.no_grad():
        for i, layer in enumerate(encoder_layers(model)):
            size = structure.head_dim
            heads, ffn = (structure.family.get(layer, part) for part in ("attention_output", "ffn_out"))
            heads.get_parameter("weight")[:, i * size : (i + 1) * size] = 0
            ffn.get_parameter("weight")[:, i + 3 :: 8] = 0
    return model


@pytest.mark.parametrize(
    ("family", "scorer"),
    [*(("bert", scorer) for scorer in SCORERS), *((f, "taylor") for f in ("distilbert", "mpnet", "modernbert"))],
)
def test_planted_useless_units_go_first(family: str, scorer: str, context: Context, tmp_path: Path) -> None:
    model = with_useless_units(family)
    pruned, _ = WidthPruning(heads=3, ffn=56, scorer=scorer, samples=16).run(model, context, tmp_path)
    assert widths(pruned) == [(3, 56)] * 4
    inputs = batch(model)
    assert torch.allclose(answer(pruned, inputs), answer(model, inputs), atol=1e-5)
    # One head more is missed.
    fewer, _ = WidthPruning(heads=2, ffn=56, scorer=scorer, samples=16).run(model, context, tmp_path)
    assert not torch.allclose(answer(fewer, inputs), answer(model, inputs), atol=1e-3)


def test_the_choice_does_not_depend_on_the_batch_size(context: Context, tmp_path: Path) -> None:
    model = tiny("bert")
    results = [WidthPruning(batch_size=n, samples=32).run(model, context, tmp_path)[0] for n in (1, 5, 32)]
    for other in results[1:]:
        assert changed(weights(results[0]), other) == set()


def test_scores_are_taken_anew_at_each_step(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import smbert.stages.width as width

    scored = []
    original = width.score

    def score(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        scored.append(widths(model)[0])
        return original(model, *args, **kwargs)

    monkeypatch.setattr(width, "score", score)
    WidthPruning(heads=1, ffn=16, iterations=3, samples=8).run(tiny("bert"), context, tmp_path)
    assert scored == [(4, 64), (3, 48), (2, 32)]


def test_scoring_can_use_another_tasks_rows(context: Context, three_way: TaskData, tmp_path: Path) -> None:
    context = replace(context, other={"three": three_way})
    model = tiny("bert", num_labels=3)
    stage = WidthPruning(task="three")
    pruned, info = stage.run(model, context, tmp_path)
    assert info["scored_rows"] == 48  # all there are
    assert widths(pruned) == [(3, 48)] * 4
    assert stage.outline(Outline(structure_of(model), task="three"), context).task == "three"


def test_a_params_budget_after_a_smaller_embedding_is_left_to_the_run(context: Context, tmp_path: Path) -> None:
    teacher, small = tiny("bert"), EmbeddingFactorisation(rank=1)
    taught, before = replace(context, teacher=freeze(copy.deepcopy(teacher))), Outline(structure_of(teacher))
    smaller, _ = small.run(teacher, context, tmp_path)
    least, _ = WidthPruning(heads=1, ffn=8, samples=8).run(smaller, context, tmp_path)
    budget = count_parameters(least).total
    stage = WidthPruning(params=budget, scope="global", samples=8)
    with pytest.raises(ValueError, match="`params` must be at least"):
        stage.outline(before, taught)  # with the whole embedding
    after = small.outline(before, taught)
    stage.outline(after, taught)
    assert count_parameters(stage.run(smaller, context, tmp_path)[0]).total <= budget
    # Another student brings its own outer parts.
    save_model(teacher, tmp_path / "student")
    assert (
        Distill(student=str(tmp_path / "student"), objectives=(LogitsObjective(),)).outline(after, taught).outer_known
    )
