"""The loop: it draws modules as it says, stops where a loss goes wrong, resumes to the same bits, and leaves no switch behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import batch, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from smbert.context import Context
from smbert.modeling import FAMILIES, encoder_layers
from smbert.objectives import GoldObjective, HiddenObjective, LogitsObjective, ObjectiveSet, build_objectives
from smbert.stages import DepthReduction, Distill, Finetune, Stage, TrainingStage
from smbert.surgery import PruningPlan, keep_layers, keep_units, structure_of
from smbert.trainer import (
    Distillation,
    LengthGroups,
    ReplacingSchedule,
    SmbertTrainer,
    Theseus,
    TrainingDiverged,
    contiguous_modules,
    dropout_set_to,
    last_checkpoint,
    training_arguments,
    training_attention,
)


def gold(model: PreTrainedModel) -> ObjectiveSet:
    structure = structure_of(model)
    return build_objectives([GoldObjective()], structure, structure)


def other_weights(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """The model with all layers changed, so that a successor is no part of its predecessor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in encoder_layers(model).parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


def theseus(predecessor: PreTrainedModel, kept: list[int], base: float) -> Theseus:
    successor = other_weights(keep_layers(predecessor, kept))
    return Theseus(successor, copy.deepcopy(predecessor), gold(successor), ReplacingSchedule(base, 0.0)).train()


def logits_of(holder: Theseus, inputs: dict[str, Tensor]) -> Tensor:
    """What the student answers inside one forward of the holder, without dropout."""
    seen: list[Tensor] = []
    hook = holder.student.register_forward_hook(lambda _m, _a, output: seen.append(output.logits.detach()))
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    with dropout_set_to(holder.student, 0.0):
        holder({**inputs, "labels": labels})
    hook.remove()
    return seen[0]


def answer(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- module replacing ------------------------------------------------------------------------------------------------


def test_modules_cover_all_layers_in_runs_of_nearly_equal_length() -> None:
    for n in range(1, 25):
        for m in range(1, n + 1):
            runs = contiguous_modules(n, m)
            assert [i for run in runs for i in run] == list(range(n))
            assert {len(run) for run in runs} <= {n // m, -(-n // m)}
    assert [len(run) for run in contiguous_modules(12, 5)] == [2, 3, 2, 3, 2]


def test_schedule_is_the_papers_formula() -> None:
    schedule = ReplacingSchedule(0.3, 0.0006)
    for step in (0, 1, 500, 1166, 1167, 10_000):
        assert schedule(step) == min(1.0, 0.0006 * step + 0.3)
    assert schedule(1166) < 1.0 == schedule(1167)


CUTS = [*((family, [0, 1]) for family in FAMILIES), ("modernbert", [0]), ("modernbert", [0, 2])]


@pytest.mark.parametrize(("family", "kept"), CUTS, ids=str)
def test_no_replaced_module_is_the_predecessor_and_all_are_the_successor(family: str, kept: list[int]) -> None:
    # ModernBERT [0] and [0, 2]: all layers of the successor are of one attention type, the predecessor's are of two.
    predecessor = tiny(family)
    inputs = batch(predecessor)
    holder = theseus(predecessor, kept, base=0.0)
    before, config = list(encoder_layers(holder.student)), holder.student.config.to_dict()
    assert torch.equal(logits_of(holder, inputs), answer(predecessor, inputs))
    assert list(encoder_layers(holder.student)) == before
    assert holder.student.config.to_dict() == config

    holder = theseus(predecessor, kept, base=1.0)
    alone = copy.deepcopy(holder.student)
    assert torch.equal(logits_of(holder, inputs), answer(alone, inputs))
    assert not torch.allclose(answer(alone, inputs), answer(predecessor, inputs), atol=1e-3)


@pytest.mark.parametrize("family", ["mpnet", "modernbert"])
def test_a_pruned_predecessor_is_replaced_too(family: str) -> None:
    model = tiny(family)
    plan = PruningPlan(heads=((0, 2), (1,), (0, 1, 2, 3), (3,)), ffn=((*range(20),), (*range(64),), (1,), (2, 5)))
    predecessor = keep_units(model, plan)
    inputs = batch(predecessor)
    with torch.no_grad():  # MPNet's attention takes another kernel with gradients
        assert torch.equal(logits_of(theseus(predecessor, [0, 2], 0.0), inputs), answer(predecessor, inputs))


def test_a_draw_replaces_its_own_module() -> None:
    predecessor = tiny("bert", layers=5)
    inputs = batch(predecessor)
    holder = theseus(predecessor, [0, 1], base=0.5)
    old, new = encoder_layers(predecessor), list(encoder_layers(holder.student))
    runs = contiguous_modules(5, 2)
    expected = {}
    for draws in ((0, 0), (0, 1), (1, 0), (1, 1)):
        mixed = copy.deepcopy(predecessor)
        chosen = [
            layer for i, drawn in enumerate(draws) for layer in ([new[i]] if drawn else [old[j] for j in runs[i]])
        ]
        encoder_layers(mixed)._modules.clear()
        encoder_layers(mixed).extend(copy.deepcopy(chosen))
        expected[draws] = answer(mixed, inputs)
    torch.manual_seed(0)
    found = set()
    for _ in range(24):
        logits = logits_of(holder, inputs)
        found |= {draws for draws, want in expected.items() if torch.equal(want, logits)}
        assert any(torch.equal(want, logits) for want in expected.values())
    assert found == set(expected)


def test_the_successor_runs_alone_in_evaluation() -> None:
    predecessor = tiny("roberta")
    inputs = batch(predecessor)
    holder = theseus(predecessor, [0, 1], base=0.0).eval()
    assert torch.equal(logits_of(holder, inputs), answer(copy.deepcopy(holder.student), inputs))
    assert holder.draws.sum() == 0


def test_modules_are_replaced_at_the_scheduled_rate() -> None:
    predecessor = tiny("bert", layers=6)
    inputs = batch(predecessor, n=1, length=4)
    holder = theseus(predecessor, [0, 1, 2], base=0.1)
    holder.schedule = ReplacingSchedule(0.1, 0.01)
    torch.manual_seed(0)
    for step, rate in ((0, 0.1), (70, 0.8)):
        holder.step = step
        holder.draws.zero_()
        for _ in range(100):
            logits_of(holder, inputs)
        assert holder.draws[1] == 300
        # 3.5 standard deviations of 300 draws
        assert abs(holder.draws[0] / 300 - rate) < 3.5 * (rate * (1 - rate) / 300) ** 0.5


def test_only_successor_layers_get_gradients() -> None:
    predecessor = tiny("mpnet")
    inputs = {**batch(predecessor), "labels": torch.tensor([0, 1, 0])}
    holder = theseus(predecessor, [0, 1], base=1.0)
    holder(inputs)[0].backward()
    learning = {name for name, p in holder.student.named_parameters() if p.grad is not None}
    assert learning
    assert all(".layer." in name for name in learning)
    assert {name for name, p in holder.student.named_parameters() if p.requires_grad} == learning
    assert not any(p.requires_grad for p in holder._predecessor[0].parameters())
    assert not any("predecessor" in name for name in holder.state_dict())


def test_a_step_without_any_successor_is_possible() -> None:
    predecessor = tiny("bert")
    holder = theseus(predecessor, [0, 1], base=0.0)
    loss, _ = holder({**batch(predecessor), "labels": torch.tensor([0, 1, 0])})
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in holder.parameters())


def test_the_teacher_is_no_part_of_what_is_trained_or_saved() -> None:
    student, teacher = tiny("bert", layers=2), tiny("bert", seed=1)
    teacher.train()
    student.requires_grad_(False)
    structures = structure_of(student), structure_of(teacher)
    holder = Distillation(student, build_objectives([LogitsObjective(), HiddenObjective()], *structures), teacher)
    holder.train()
    assert {name.split(".")[0] for name in holder.state_dict()} == {"student"}
    assert all(p.requires_grad for p in holder.parameters())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


# --- stopping ----------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """An objective that calls `then(call number, loss)` and lets it replace the loss."""

    def __init__(self, inner: ObjectiveSet, then: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.needs, self.then, self.calls = inner, inner.needs, then, 0

    def forward(self, student: Any, teacher: Any, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = self.inner(student, teacher, labels)
        self.calls += 1
        return self.then(self.calls, loss), terms


def train(
    model: PreTrainedModel, then: Callable[[int, Tensor], Tensor], context: Context, workdir: Path, **stage: Any
) -> Any:
    """Finetune's own training, with an eye on each step."""
    objective: Any = Watched(gold(model), then)
    values = {"batch_size": 8, "learning_rate": 1e-3, "epochs": 1, **stage}
    return Finetune(**values).train(Distillation(model, objective), context.data.train, context, workdir, context.data)


def saving(context: Context, steps: int, **args: Any) -> Context:
    return replace(context, args={**context.args, "save_steps": steps, **args})


def test_a_nan_loss_stops_with_its_step_and_keeps_the_last_checkpoint(context: Context, tmp_path: Path) -> None:
    model = tiny("bert", layers=2)
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 6 .*To resolve, lower `learning_rate`"):
        train(model, lambda call, loss: loss * float("nan") if call == 6 else loss, saving(context, 2), tmp_path)
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None and kept.endswith("checkpoint-4")
    tensors = load_file(f"{kept}/model.safetensors")
    assert tensors.keys() == {f"student.{name}" for name in model.state_dict()}
    assert all(t.isfinite().all() for t in tensors.values())
    # It can be gone on from.
    assert train(model, lambda _call, loss: loss, saving(context, 2), tmp_path)["optimiser_steps"] == 8


@pytest.mark.parametrize(
    ("broken", "save_steps", "args", "kept"),
    [(4, 2, {}, "checkpoint-2"), (8, 3, {}, "checkpoint-6"), (8, 3, {"save_strategy": "no"}, None)],
    ids=["at a save", "at the end", "without saves"],
)
def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(
    context: Context, tmp_path: Path, broken: int, save_steps: int, args: dict[str, Any], kept: str | None
) -> None:
    model = tiny("bert", layers=2)

    def then(call: int, loss: Tensor) -> Tensor:
        if call == broken:  # a finite loss whose gradient is not
            loss.register_hook(lambda g: g * float("nan"))
        return loss

    with pytest.raises(TrainingDiverged, match=f"weights are not finite after step {broken} "):
        train(model, then, saving(context, save_steps, **args), tmp_path)
    found = last_checkpoint(tmp_path / "checkpoints")
    assert found == (kept and str(tmp_path / "checkpoints" / kept))
    if found is not None:
        assert all(t.isfinite().all() for t in load_file(f"{found}/model.safetensors").values())


@pytest.mark.parametrize("fails", [False, True], ids=["done", "raised"])
def test_attention_and_dropout_are_as_before_after_training(context: Context, tmp_path: Path, fails: bool) -> None:
    model = tiny("bert", layers=2)
    assert model.config._attn_implementation == "sdpa"
    dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert set(dropouts.values()) == {0.1}
    inside = []

    def then(call: int, loss: Tensor) -> Tensor:
        inside.append((model.config._attn_implementation, {m.p for m in model.modules() if isinstance(m, nn.Dropout)}))
        if fails and call == 2:
            raise RuntimeError("enough")
        return loss

    if fails:
        with pytest.raises(RuntimeError, match="enough"):
            train(model, then, context, tmp_path, dropout=0.3)
    else:
        train(model, then, context, tmp_path, dropout=0.3)
        assert not model.training
    # Eager is for CPUs only.
    assert inside[0] == ("sdpa" if torch.cuda.is_available() else "eager", {0.3})
    assert model.config._attn_implementation == "sdpa"
    assert {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)} == dropouts


@pytest.mark.parametrize("family", ["mpnet", "modernbert"])
def test_training_attention_keeps_the_answers(family: str) -> None:
    model = tiny(family)
    inputs, before = batch(model), model.config._attn_implementation
    want = answer(model, inputs)
    with training_attention(model):
        assert torch.allclose(answer(model, inputs), want, atol=1e-5)
    assert model.config._attn_implementation == before


def test_dropout_of_modernberts_attention_is_set_and_restored() -> None:
    model = tiny("modernbert", attention_dropout=0.25, mlp_dropout=0.5)
    inputs = batch(model)
    model.train()
    with dropout_set_to(model, 0.0):
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    attention = encoder_layers(model)[1].get_submodule("attn")
    assert (attention.attention_dropout, attention.get_submodule("out_drop").p) == (0.25, 0.25)
    with dropout_set_to(model, None):
        assert attention.attention_dropout == 0.25


# --- resume ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> list[int]:
    """From now on the given step raises `Killed`; the list gets the number of every step that ran."""
    ran: list[int] = []
    original = SmbertTrainer.compute_loss

    def compute_loss(self: SmbertTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise Killed
        ran.append(self.state.global_step + 1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SmbertTrainer, "compute_loss", compute_loss)
    return ran


COMMON: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-3, "epochs": 2}
TRAINED: dict[str, TrainingStage] = {
    "finetune": Finetune(**COMMON),
    "distill": Distill(objectives=(LogitsObjective(), HiddenObjective()), **COMMON),
    "theseus": DepthReduction(layers=2, base=0.3, slope=0.05, **COMMON),
}


def result_of(stage: Stage, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    return stage.run(tiny("bert"), context, workdir)


# 64 rows, 4 steps an epoch: killed between two epochs, and inside the second.
@pytest.mark.parametrize("kind", TRAINED)
def test_a_resumed_training_equals_the_uninterrupted_one(
    kind: str, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A teacher of another width makes the projection, which learns beside the student, part of the checkpoint.
    teacher = tiny("bert", seed=1, hidden_size=16, num_attention_heads=2) if kind == "distill" else None
    context = saving(replace(context, teacher=teacher), 2)
    torch.manual_seed(11)
    with monkeypatch.context() as patch:
        ran = kill_at(patch, None)
        whole, about = result_of(TRAINED[kind], context, tmp_path / "whole")
        assert ran == list(range(1, 9))
        ran.clear()  # killed after the last step: nothing is left to be trained
        again, info = result_of(TRAINED[kind], context, tmp_path / "whole")
        assert ran == []
        assert same(weights(again), weights(whole))
        assert info["optimiser_steps"] == 8
    for killed in (5, 7):
        torch.manual_seed(11)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, killed)
            result_of(TRAINED[kind], context, tmp_path / f"{killed}")
        torch.manual_seed(99)  # what another process would begin with
        with monkeypatch.context() as patch:
            ran = kill_at(patch, None)
            resumed, info = result_of(TRAINED[kind], context, tmp_path / f"{killed}")
        first = (killed - 1) // 2 * 2 + 1
        assert ran == list(range(first, 9))
        assert same(weights(resumed), weights(whole)), f"killed at step {killed}"
        assert info["optimiser_steps"] == about["optimiser_steps"] == 8
    assert not same(weights(whole), weights(tiny("bert", layers=len(encoder_layers(whole)))))


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((2, {"global_step": 2}), (10, {"global_step": 10})):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 1')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_the_order_of_rows_depends_on_seed_and_epoch_alone() -> None:
    lengths = [3 + i * 7 % 20 for i in range(64)]

    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(epoch + 1)  # the global generator is somewhere else each time
        return list(LengthGroups(lengths, 8, seed, lambda: epoch))

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(64))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    spread = [max(part) - min(part) for part in ([lengths[i] for i in order(0, 0)[a : a + 8]] for a in range(0, 64, 8))]
    mixed = [max(part) - min(part) for part in (lengths[a : a + 8] for a in range(0, 64, 8))]
    assert sum(spread) < 0.75 * sum(mixed)


# --- arguments ---------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_equal_those_of_the_larger_batch(context: Context, tmp_path: Path) -> None:
    stage = Finetune(batch_size=8, max_steps=4, learning_rate=0.1, dropout=0.0)
    inputs = batch(tiny("bert"), n=8)
    found = []
    for parts in (1, 2):
        args = {**context.args, "gradient_accumulation_steps": parts, "optim": "sgd"}
        model, info = stage.run(tiny("bert"), replace(context, args=args), tmp_path / str(parts))
        assert info["optimiser_steps"] == 4
        found.append(answer(model, inputs))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], answer(tiny("bert"), inputs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", TRAINED)
def test_gradient_checkpointing_changes_no_result(
    kind: str, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Adam would blow the last bit of a vanishing gradient up to a whole step.
    context = replace(context, teacher=tiny("bert", seed=1), args={**context.args, "optim": "sgd"})
    stage = replace(TRAINED[kind], epochs=1, dropout=0.0, learning_rate=0.1)
    checkpointing: list[bool] = []
    original = SmbertTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        checkpointing.append(any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SmbertTrainer, "compute_loss", compute_loss)
    inputs = batch(tiny("bert"))
    plain = answer(result_of(stage, context, tmp_path / "plain")[0], inputs)
    assert not any(checkpointing)
    checkpointing.clear()
    model, _ = result_of(
        stage, replace(context, args={**context.args, "gradient_checkpointing": True}), tmp_path / "saving"
    )
    assert checkpointing and all(checkpointing)
    assert torch.allclose(answer(model, inputs), plain, rtol=0, atol=1e-5)
    assert not torch.allclose(answer(tiny("bert", layers=len(encoder_layers(model))), inputs), plain, rtol=0, atol=1e-3)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_arguments_come_from_the_defaults_then_the_user_then_the_stage(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, {"save_steps": 5, "learning_rate": 1.0, "bf16": False}, learning_rate=0.5)
    assert (args.save_steps, args.learning_rate, args.bf16) == (5, 0.5, False)
    assert args.train_sampling_strategy == "group_by_length"
    assert args.report_to == []
    assert args.save_total_limit == 1


def test_fp16_takes_the_place_of_bf16(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, {"fp16": True})
    assert (args.fp16, args.bf16) == (True, False)


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the Trainer wraps the model in nn.DataParallel.
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: vars(self).get("_n_gpu") or 4))
    assert training_arguments(tmp_path, {}).n_gpu == 1
