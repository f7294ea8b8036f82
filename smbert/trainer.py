"""What is trained, and the loop that trains it.

`Distillation` and `Theseus` are the two things that smbert trains. Each holds the student as its only child (beside what the
losses learn) and computes its own loss, so the loop does not know which of them it runs, a checkpoint holds the student alone,
and accelerate wraps the holder and leaves the student's own `forward` untouched. The loop is `transformers.Trainer`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from .features import Features, capture_features
from .measure import supports_bf16
from .modeling import encoder_layers
from .objectives import ObjectiveSet
from .teacher import freeze
from .teacher_states import ROW, TeacherStates

FORWARD_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TrainingDiverged(RuntimeError):
    """A loss that is NaN or infinite; the checkpoints written before it are still there."""


def check_finite(model: nn.Module, step: int) -> None:
    """TrainingDiverged if an update has left weights that are NaN or infinite, which the next loss alone would tell."""
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise TrainingDiverged(
            f"the weights are not finite after step {step} ({len(bad)} tensors, such as {bad[0]}). The last good checkpoint is kept. "
            "To resolve, lower `learning_rate`, set args={'bf16': False}, or look for inputs that are not finite."
        )


class _Holder(nn.Module):
    """Lets the loop reach the student's own switches; the newer of the two names is the one that transformers 5.23 calls."""

    student: PreTrainedModel

    @property
    def differentiated(self) -> tuple[PreTrainedModel, ...]:
        """The models that gradients flow through."""
        return (self.student,)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.student.activation_checkpointing_enable(**kwargs)


class Distillation(_Holder):
    """A student, the losses it learns from and, where they need it, the live teacher.

    Args:
        student: the model that learns.
        objective: the losses, as built by `build_objectives`.
        teacher: frozen; None where the losses read labels or cached teacher logits only.
        states: the teacher's hidden states of the rows, in its place.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        objective: ObjectiveSet,
        teacher: PreTrainedModel | None = None,
        states: TeacherStates | None = None,
    ):
        super().__init__()
        self.student = student.requires_grad_(True)  # it may be a copy of a frozen teacher
        self.objective = objective
        # In a tuple the teacher is no child: it is neither saved, nor counted, nor put into training mode.
        self._teacher = () if teacher is None else (freeze(teacher),)
        self._states = states

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One padded batch -> (loss, its terms by name), scalars."""
        needs = self.objective.needs
        features = {k: inputs[k] for k in FORWARD_INPUTS if k in inputs}
        student = capture_features(self.student, features, hidden=needs.student_hidden, qkv=needs.student_qkv)
        mask = features["attention_mask"].bool()
        teacher = Features(mask=mask) if self._states is None else self._states.features(inputs[ROW], mask)
        teacher.logits = inputs.get("teacher_logits")
        if self._teacher and (needs.live_teacher or (needs.teacher_logits and teacher.logits is None)):
            self._teacher[0].to(mask.device)
            with torch.no_grad():
                teacher = capture_features(
                    self._teacher[0], features, hidden=needs.teacher_hidden, qkv=needs.teacher_qkv
                )
        return self.objective(student, teacher, inputs.get("labels"))


def contiguous_modules(n_layers: int, n_modules: int) -> list[list[int]]:
    """Split `n_layers` predecessor layers into `n_modules` runs whose lengths differ by one at most (n/M where that is whole)."""
    bounds = [round(i * n_layers / n_modules) for i in range(n_modules + 1)]
    return [list(range(a, b)) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class ReplacingSchedule:
    """p_t = min(1, k t + b), t in optimiser steps (BERT-of-Theseus, 2020)."""

    base: float
    slope: float

    def __call__(self, step: int) -> float:
        return min(1.0, self.slope * step + self.base)


class Theseus(_Holder):
    """Progressive module replacing: a successor layer learns to stand in for each run of predecessor layers.

    Each training forward draws r_i ~ Bernoulli(p_t) per module; r_i = 1 runs the successor's layer i, r_i = 0 the frozen
    predecessor layers that it replaces. Only successor layers learn. In evaluation the successor runs alone.

    Args:
        successor: model with one layer per module; its layers are trained, everything else is frozen.
        predecessor: the model whose layers are replaced; frozen.
        objective: the task's own loss, as built by `build_objectives`.
        schedule: optimiser step -> replacing probability.
    """

    def __init__(
        self,
        successor: PreTrainedModel,
        predecessor: PreTrainedModel,
        objective: ObjectiveSet,
        schedule: ReplacingSchedule,
    ):
        super().__init__()
        self.student = successor
        self.objective = objective
        self.schedule = schedule
        self.step = 0
        self.draws = torch.zeros(2)  # successors drawn, modules seen
        self._predecessor = (freeze(predecessor),)
        self._modules_of_layers = contiguous_modules(len(encoder_layers(predecessor)), len(encoder_layers(successor)))
        successor.requires_grad_(False)
        encoder_layers(successor).requires_grad_(True)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One padded batch -> (loss, its terms by name), scalars."""
        features = {k: inputs[k] for k in FORWARD_INPUTS if k in inputs}
        if self.training:
            replaced = torch.rand(len(self._modules_of_layers)) < self.schedule(self.step)
            self.draws += torch.tensor([float(replaced.sum()), float(len(replaced))])
            with self._assembled(replaced.tolist()):
                logits = self.student(**features).logits
        else:
            logits = self.student(**features).logits
        mask = features["attention_mask"].bool()
        loss, terms = self.objective(Features(mask=mask, logits=logits), Features(mask=mask), inputs.get("labels"))
        if self.training and not loss.requires_grad:
            # No successor was drawn: the step happens, so that the schedule counts it, with a gradient of zero for one tensor,
            # without which neither DistributedDataParallel nor a gradient scaler gets through.
            loss = loss + 0 * next(encoder_layers(self.student).parameters()).sum()
        return loss, terms

    @contextmanager
    def _assembled(self, replaced: Sequence[bool]) -> Iterator[None]:
        """The student's layer list, for one forward, made of successor layers and predecessor runs."""
        own = encoder_layers(self.student)
        self._predecessor[0].to(next(own.parameters()).device)
        old = encoder_layers(self._predecessor[0])
        kept = list(own)
        chosen: list[nn.Module] = []
        for layer, run, is_replaced in zip(kept, self._modules_of_layers, replaced, strict=True):
            chosen += [layer] if is_replaced else [old[i] for i in run]
        config: Any = self.student.config
        body: Any = self.student.base_model
        types, angles = getattr(config, "layer_types", None), getattr(body, "rotary_emb", None)
        own._modules.clear()
        own.extend(chosen)
        if types is not None:
            # ModernBERT prepares rotary angles for the types that its config lists, and predecessor runs may add one, for which
            # the successor may have no frequencies.
            config.layer_types = [layer.attention_type for layer in chosen]
            body.rotary_emb = self._predecessor[0].base_model.rotary_emb
        try:
            yield
        finally:
            own._modules.clear()
            own.extend(kept)
            if types is not None:
                config.layer_types, body.rotary_emb = types, angles

    @property
    def differentiated(self) -> tuple[PreTrainedModel, ...]:
        """The models that gradients flow through."""
        return (self.student, *self._predecessor)


class LengthGroups(Sampler[int]):
    """Batches of similar length in an order that seed and epoch alone decide.

    transformers' own sampler draws from the global generator: after a resume inside a later epoch, and on ranks whose dropout has
    drawn differently, it would give another order.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimiser step of this process.
        seed: of the run.
        epoch: the epoch that is about to begin, from 0.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 16) + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class SmbertTrainer(Trainer):
    """`transformers.Trainer` over a `Distillation` or a `Theseus`: logs every loss term and stops at a loss that is not finite."""

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._terms: dict[str, Tensor] = {}
        self._n_terms = 0

    def _get_train_sampler(self, train_dataset=None):
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in rows.with_format(None)["input_ids"][:]]
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups(lengths, rows_per_step, self.args.seed, lambda: int(self.state.epoch or 0))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # The checkpoint before it is deleted once it is there.
        check_finite(self.accelerator.unwrap_model(self.model), self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        holder = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        if isinstance(holder, Theseus):
            holder.step = self.state.global_step
        loss, terms = model(inputs)
        if not math.isfinite(loss.item()):
            values = ", ".join(f"{k} {v.item():.4g}" for k, v in terms.items())
            raise TrainingDiverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} ({values}). The last good checkpoint is kept. "
                "To resolve, lower `learning_rate`, set args={'bf16': False}, or look for inputs that are not finite."
            )
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
        self._n_terms += 1
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._n_terms:
            logs = {**logs, **{f"loss/{k}": round(v.item() / self._n_terms, 5) for k, v in self._terms.items()}}
            holder = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
            if isinstance(holder, Theseus) and holder.draws[1] > 0:
                logs["replacing_rate"] = round(holder.schedule(self.state.global_step), 4)
                logs["replaced"] = round((holder.draws[0] / holder.draws[1]).item(), 4)
                holder.draws.zero_()
            self._terms, self._n_terms = {}, 0
        super().log(logs, start_time)


def uses_bf16(args: Mapping[str, Any]) -> bool:
    """Whether a run with these `TrainingArguments` fields computes under bf16 autocast: as they say, else where the hardware has it."""
    return bool(args.get("bf16", supports_bf16() and not args.get("fp16")))


def training_arguments(output_dir: Path, overrides: Mapping[str, Any], **stage_values: Any) -> TrainingArguments:
    """The Trainer's arguments: our defaults, then the user's `args`, then what the stage itself fixes.

    bf16 autocast is on where the hardware has it, batches are grouped by length, nothing is reported anywhere unless asked. A process
    trains on one GPU; several take `accelerate launch`.
    """
    defaults: dict[str, Any] = {
        # bf16 on a CPU is refused unless the CPU is asked for by name.
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": uses_bf16(overrides),
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "lr_scheduler_type": "linear",
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 200,
        "save_total_limit": 1,
        "logging_steps": 20,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    args = TrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides, **stage_values})
    if args.n_gpu > 1:
        # A process that sees several GPUs would split its batches by nn.DataParallel, whose replicas share hooks and teacher.
        args._n_gpu = 1
    return args


@contextmanager
def training_attention(*models: PreTrainedModel) -> Iterator[None]:
    """Run backward passes on a CPU under eager attention: at sentence lengths 1.2x faster there than the fused kernel's."""
    switched = [m for m in models if m.config._attn_implementation == "sdpa" and not torch.cuda.is_available()]
    for model in switched:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model in switched:
            model.set_attn_implementation("sdpa")


@contextmanager
def dropout_set_to(model: nn.Module, p: float | None) -> Iterator[None]:
    """Train with another dropout than the checkpoint's own; None keeps it."""
    places: list[tuple[Any, str]] = []
    for module in model.modules() if p is not None else ():
        if isinstance(module, nn.Dropout):
            places.append((module, "p"))
        elif isinstance(getattr(module, "attention_dropout", None), int | float):
            places.append((module, "attention_dropout"))  # ModernBERT's attention has a number and no module
    before = [getattr(*place) for place in places]
    for module, name in places:
        setattr(module, name, p)
    try:
        yield
    finally:
        for (module, name), old in zip(places, before, strict=True):
            setattr(module, name, old)


@contextmanager
def gradient_checkpointing_ended(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing that the training switches on does not outlive it."""
    before = _checkpoints_gradients(model)
    try:
        yield
    finally:
        if _checkpoints_gradients(model) and not before:
            switch = getattr(model, "activation_checkpointing_disable", None)  # its name since transformers 5.23
            (switch or model.gradient_checkpointing_disable)()


def _checkpoints_gradients(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of an interrupted run, if there is one; a kill may have left a part of a newer one."""
    found = {
        int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()
    }
    for _, checkpoint in sorted(found.items(), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # what the loop writes last
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None
