"""What all stages share: the outline of a model, the YAML form, and training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ..context import Context, TaskData
from ..processes import process_state
from ..surgery import Structure
from ..trainer import (
    Distillation,
    SmbertTrainer,
    Theseus,
    check_finite,
    dropout_set_to,
    gradient_checkpointing_ended,
    last_checkpoint,
    training_arguments,
    training_attention,
)


@dataclass(frozen=True)
class Outline:
    """What is known of the model between two stages before anything has run.

    Attributes:
        structure: the sizes; after a pruning to a budget, those that the model had before it.
        heads_known: False after a pruning that decides the number of heads by budget.
        outer_known: False after a stage that shrinks what lies outside the layers by an amount that only its run knows.
        task: name of the task whose head the model carries, None for the target task.
        done: folder names of the stages so far.
        results: what those stages leave, by folder name, as far as it is known.
    """

    structure: Structure
    heads_known: bool = True
    outer_known: bool = True
    task: str | None = None
    done: tuple[str, ...] = ()
    results: Mapping[str, Outline] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Base of all stages."""

    kind: ClassVar[str] = ""

    def outline(self, before: Outline, context: Context) -> Outline:
        """What would come out; ValueError where the stage cannot work on what comes in."""
        return before

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The resulting model, and what is worth recording in stage.json. `workdir` survives a kill."""
        raise TypeError(f"{type(self).__name__} has no run()")

    def looks_at_pool(self, context: Context) -> bool:
        """Whether the result may depend on the unlabelled texts, if there are any."""
        return False

    def context_after(self, context: Context, folder: Path) -> Context:
        """The surroundings of the stages that follow; `folder` is the `workdir` of `run`, or the folder of the finished stage."""
        return context

    def to_dict(self) -> dict[str, Any]:
        """YAML form, with every value written out, so that it means the same under other defaults."""
        return _plain(self)


@dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage):
    """What every stage that trains can be told.

    Attributes:
        task: an intermediate task's name; None trains on the target task.
        epochs: passes over the data; ignored where `max_steps` is set.
        max_steps: optimiser steps, -1 for none.
        learning_rate: peak of a linear schedule.
        batch_size: rows of one optimiser step, over all processes, each of which gets as many; what does not divide is dropped.
        warmup_ratio: share of the steps that warm up.
        weight_decay: AdamW's.
        max_train_samples: a fixed random subset of the training rows.
        dropout: in place of the checkpoint's own; None keeps it.
        freeze_embeddings: leave the embedding tables as they are (much faster on a CPU).
        keep_best: evaluate after each epoch and keep the best one; else the last one stays.
    """

    task: str | None = None
    epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 2e-5
    batch_size: int = 32
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    max_train_samples: int | None = None
    dropout: float | None = None
    freeze_embeddings: bool = False
    keep_best: bool = False

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "learning_rate": self.learning_rate, "batch_size": self.batch_size}
        for name, value in positive.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                hint = " (YAML takes 1e-5 for text and 1.0e-5 for a number)" if isinstance(value, str) else ""
                raise ValueError(
                    f"`{name}` must be a number above 0, got {value!r}{hint}. To resolve, set it in the {self.kind} stage."
                )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"`warmup_ratio` must be at least 0 and below 1, got {self.warmup_ratio!r}. To resolve, try 0.06."
            )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(
                f"`dropout` must be at least 0 and below 1, got {self.dropout!r}. To resolve, leave it out."
            )
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(
                f"`max_train_samples` must be at least 1, got {self.max_train_samples!r}. To resolve, leave it out."
            )

    def outline(self, before: Outline, context: Context) -> Outline:
        known_task(self.task, context)
        return replace(before, task=None if self.task == context.data.task.name else self.task)

    def rows(self, data: Dataset, context: Context) -> Dataset:
        """The training rows of this stage."""
        if self.max_train_samples is None or self.max_train_samples >= len(data):
            return data
        return data.shuffle(seed=context.seed).select(range(self.max_train_samples))

    def train(
        self, holder: Distillation | Theseus, rows: Dataset, context: Context, workdir: Path, data: TaskData
    ) -> dict[str, Any]:
        """Train `holder` on `rows`, going on from the newest checkpoint in `workdir`; returns what to record."""
        rows_at_once = process_state().num_processes * int(context.args.get("gradient_accumulation_steps", 1))
        student, needs = holder.student, holder.objective.needs
        frozen = []
        if self.freeze_embeddings:
            frozen = [
                p for m in student.modules() if isinstance(m, nn.Embedding) for p in m.parameters() if p.requires_grad
            ]
        for p in frozen:
            p.requires_grad_(False)
        args = training_arguments(
            workdir / "checkpoints",
            context.args,
            per_device_train_batch_size=max(1, self.batch_size // rows_at_once),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_ratio,
            weight_decay=self.weight_decay,
            seed=context.seed,
            # Without a loss on the logits the head learns nothing, nor does what lies above the highest layer that is compared.
            ddp_find_unused_parameters=isinstance(holder, Theseus) or not (needs.teacher_logits or needs.labels),
        )
        best = BestEpoch(student, context, data.task.name, workdir) if self.keep_best else None
        trainer = SmbertTrainer(
            holder, args, train_dataset=rows, data_collator=context.collator, callbacks=[best] if best else None
        )
        start = time.perf_counter()
        with (
            training_attention(*holder.differentiated),
            dropout_set_to(student, self.dropout),
            gradient_checkpointing_ended(student),
        ):
            result = trainer.train(resume_from_checkpoint=last_checkpoint(workdir / "checkpoints"))
        check_finite(student, result.global_step)
        seconds = time.perf_counter() - start
        if best:
            best.restore()
        student.requires_grad_(True)
        student.eval()
        return {
            "train_rows": len(rows),
            "optimiser_steps": result.global_step,
            "train_seconds": round(seconds, 1),
            "train_loss": round(result.training_loss, 5),
            "loss_log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }


def batches_of_rank(rows: Dataset, context: Context, batch_size: int, tokens: int = 0) -> list[dict[str, Tensor]]:
    """This process's share of the rows, in padded batches of similar length, where the collator leaves them (the CPU).

    Short rows come more than `batch_size` at once, as long as these hold at most `tokens`, each taken for as long as the longest.
    """
    state = process_state()
    lengths = [len(ids) for ids in rows["input_ids"][:]]
    parts: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lengths.__getitem__)[state.process_index :: state.num_processes]:
        if parts and (len(parts[-1]) < batch_size or (len(parts[-1]) + 1) * lengths[i] <= tokens):
            parts[-1].append(i)
        else:
            parts.append([i])
    return [dict(context.collator([rows[i] for i in part])) for part in parts]


def known_task(task: str | None, context: Context) -> None:
    """ValueError unless there is data for the task."""
    known = [context.data.task.name, *context.other]
    if task is not None and task not in known:
        raise ValueError(
            f"`task` must be one of the tasks that have data ({', '.join(known)}), got {task!r}. "
            "To resolve, give its data as an intermediate task."
        )


class BestEpoch(TrainerCallback):
    """Evaluates the student after each epoch and keeps the weights of the best one, in `workdir`."""

    def __init__(self, student: PreTrainedModel, context: Context, task: str, workdir: Path):
        self.student, self.context, self.task = student, context, task
        self.file = workdir / "best_epoch.safetensors"
        self.best = float("-inf")
        if self.file.exists():
            with safe_open(self.file, framework="pt") as kept:
                self.best = float(kept.metadata()["metric"])

    def on_step_end(self, args, state, control, **kwargs):
        # Not on_epoch_end, before which the last step of the epoch is saved: a run killed between the two would miss this epoch.
        if state.epoch % 1 and state.global_step < state.max_steps:
            return
        training = self.student.training
        metrics = self.context.evaluate(self.student.eval(), self.task)
        self.student.train(training)
        value = next(iter(metrics.values()))
        if value > self.best:
            self.best = value
            if state.is_world_process_zero:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                part = self.file.with_suffix(".part")
                tensors = {k: v.detach().clone().contiguous() for k, v in self.student.state_dict().items()}
                save_file(tensors, part, metadata={"metric": repr(value)})
                part.replace(self.file)

    def restore(self) -> None:
        process_state().wait_for_everyone()
        if self.file.exists():
            self.student.load_state_dict(load_file(self.file))


def as_text(value: Any) -> Any:
    """A `Fraction` or `Path` as YAML can say it, everything else as it is."""
    return str(value) if isinstance(value, Fraction | Path) else value


def _plain(value: Any) -> Any:
    """YAML form of a field's value."""
    if is_dataclass(value):
        entries = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        unset = {f.name for f in fields(value) if entries[f.name] is None and f.default is None}
        if entries.get("name") == value.kind:  # type: ignore[union-attr]
            unset.add("name")
        return {"kind": value.kind, **{k: v for k, v in entries.items() if k not in unset}}  # type: ignore[union-attr]
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def build(kinds: Mapping[str, Any], values: Any, what: str) -> Any:
    """A dataclass of `kinds` from its YAML form; unknown kinds and keys are errors that name the known ones."""
    if not isinstance(values, Mapping):
        return values
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"`kind` of a {what} must be one of {', '.join(kinds)}, got {kind!r}. To resolve, correct it.")
    known = [f.name for f in fields(kinds[kind])]
    given = {k: v for k, v in values.items() if k != "kind"}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"unknown key {', '.join(unknown)} in {what} {kind!r}; known keys are {', '.join(known)}. To resolve, correct or drop it."
        )
    return kinds[kind](**given)
