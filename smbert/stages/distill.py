"""Multi-objective knowledge distillation."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints import load_model
from ..context import Context, TaskData, on_device
from ..heads import other_names, with_head
from ..importance import sum_over_ranks
from ..objectives import (
    OBJECTIVES,
    AttentionObjective,
    HiddenObjective,
    LogitsObjective,
    Objective,
    RelationObjective,
    build_objectives,
)
from ..retraining_free.calibration import CalibrationLoss
from ..surgery import structure_of
from ..teacher import cached_logits, join_unlabelled, with_teacher_logits
from ..teacher_states import ROW, TeacherStates, shared_folder
from ..trainer import Distillation
from ..vocab import with_pieces_of
from .base import Outline, TrainingStage, as_text, batches_of_rank, build

logger = logging.getLogger(__name__)

# The name, and the folder that a run gives it where it has to make it.
TARGET_TEACHER = ("teacher", "00-teacher")

JUDGED_ROWS = 256  # tell how near a student is
SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # of the way from the student before to the student after
INDISTINCT = 1.1  # times the least loss
SMALLEST_DIVERGENCE = 1e-5  # a student that is its teacher still gets a rate above zero


@dataclass(frozen=True, kw_only=True)
class Distill(TrainingStage):
    """Multi-objective knowledge distillation into the model that flows (or another checkpoint).

    Teacher logits are computed once, cached on disk and reused, and so are its hidden states where rows are seen several times and
    the disk has room; it runs live for what is left, above all attention. Papers: Hinton (2015), TinyBERT (2020), MiniLMv2 (2021),
    WiSE-FT (Wortsman 2022) for `interpolate`; the default mix is the SmBERT paper's.

    Attributes:
        objectives: the losses and their weights; see `smbert.objectives`.
        teacher: "teacher" (the target task's), the folder name of an earlier stage ("01-finetune"), or a checkpoint.
        student: a checkpoint that takes the place of the model that flows.
        data: "task" (labelled rows), "pool" (unlabelled texts), or "both"; "auto" is both where there is a pool.
        full_rate_at: mean divergence of the student's answers from the teacher's, before the first step, from which on
            `learning_rate` holds; a student that is nearer learns at that share of it. None: always the whole rate.
        interpolate: the result is that of the models between the student before and after its training whose answers diverge least
            from the teacher's, as far as a few rows that are kept out of the training can tell, so that harm is taken back.
    """

    kind: ClassVar[str] = "distill"
    objectives: tuple[Objective, ...] = field(
        default_factory=lambda: (
            LogitsObjective(weight=5.0, temperature=3.0),
            HiddenObjective(weight=2.0),
            AttentionObjective(weight=1.0),
        )
    )
    teacher: str = "teacher"
    student: str | None = None
    data: str = "auto"
    full_rate_at: float | None = None
    interpolate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        full = self.full_rate_at
        if full is not None and (
            isinstance(full, bool) or not isinstance(full, int | float) or not 0 < full < math.inf
        ):
            raise ValueError(
                f"`full_rate_at` must be a number above 0, got {full!r}. To resolve, leave it out, or try 0.4."
            )
        if not isinstance(self.interpolate, bool):
            raise ValueError(
                f"`interpolate` must be true or false, got {self.interpolate!r}. To resolve, write one of them."
            )
        for name in ("teacher", "student"):
            object.__setattr__(self, name, as_text(getattr(self, name)))
        object.__setattr__(self, "objectives", _objectives(self.objectives))
        if self.data not in ("auto", "task", "pool", "both"):
            raise ValueError(
                f"`data` must be auto, task, pool or both, got {self.data!r}. To resolve, choose one of them."
            )

    def outline(self, before: Outline, context: Context) -> Outline:
        after = super().outline(before, context)
        if self.data in ("pool", "both") and context.pool is None:
            raise ValueError(
                f"`data: {self.data}` needs unlabelled texts. To resolve, pass `unlabelled_dataset`, or use `data: task`."
            )
        if self.data == "pool" and any(o.kind == "gold" for o in self.objectives):
            raise ValueError(
                "`data: pool` has no labels for the gold objective. To resolve, drop the objective, or use `data: both`."
            )
        teacher = self._teacher_outline(before, after, context)
        if self.student is not None:
            student = load_model(self.student)
            context.check_fits(student, f"student {self.student}")
            after = replace(after, structure=structure_of(student), heads_known=True, outer_known=True)
        untaught = context.teacher is None and "teacher_logits" in context.data_for(self.task).train.column_names
        if untaught and (others := [o.name for o in self.objectives if o.kind not in ("logits", "gold")]):
            raise ValueError(
                f"rows with teacher logits and no teacher allow the logits and gold objectives only, got {', '.join(others)}. "
                "To resolve, pass the teacher, or drop the others."
            )
        for name in ("full_rate_at", "interpolate"):
            if untaught and (value := getattr(self, name)):
                raise ValueError(
                    f"`{name}` compares the student with its teacher, and there is none, got {value!r}. "
                    "To resolve, pass the teacher, or leave it out."
                )
        task = None if self.teacher in TARGET_TEACHER else after.task if teacher is None else teacher.task
        if task != after.task:
            target = context.data.task.name
            raise ValueError(
                f"distill on task {after.task or target!r} needs a teacher of that task, and {self.teacher!r} is of {task or target!r}. "
                "To resolve, set `teacher` to the folder name of a stage that was fine-tuned on it."
            )
        if teacher is None:
            return after
        objectives = self.objectives
        if not (after.heads_known and teacher.heads_known):
            if any(isinstance(o, AttentionObjective) and o.heads != "mean" for o in objectives):
                raise ValueError(
                    "an attention objective needs equal head counts, and a pruning before it decides them by budget. "
                    "To resolve, use the relation objective, or put this stage before the pruning."
                )
            objectives = tuple(o for o in objectives if not isinstance(o, AttentionObjective | RelationObjective))
        if objectives or not self.objectives:
            build_objectives(objectives, after.structure, teacher.structure, context.data_for(self.task).task.kind)
        return after

    def _teacher_outline(self, before: Outline, after: Outline, context: Context) -> Outline | None:
        """What is known of the teacher before the run; None for one that is still to be made."""
        if self.teacher in TARGET_TEACHER:
            return None if context.teacher is None else Outline(structure_of(context.teacher))
        if re.fullmatch(r"\d\d-[a-z_]+", self.teacher):
            if self.teacher not in before.done:
                raise ValueError(
                    f"`teacher` must name a stage before this one ({', '.join(before.done) or 'none'}), got {self.teacher!r}. "
                    "To resolve, correct it."
                )
            return before.results.get(self.teacher)
        model, task = load_model(self.teacher), context.data_for(self.task).task
        if model.config.num_labels != task.num_labels:
            raise ValueError(
                f"`teacher` must have the {task.num_labels} labels of task {task.name!r}, got {self.teacher} with "
                f"{model.config.num_labels}. To resolve, give a checkpoint that was fine-tuned on this task."
            )
        if own := other_names(model, task):
            raise ValueError(
                f"`teacher` must have the labels of task {task.name!r} in this order, {list(task.label_names)}, got {self.teacher} with "
                f"{own}. To resolve, rename or reorder the labels of the data."
            )
        context.check_fits(model, f"teacher {self.teacher}")
        return Outline(structure_of(model), task=after.task)

    def looks_at_pool(self, context: Context) -> bool:
        return self.data != "task"

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        data = context.data_for(self.task)
        student = on_device(with_head(load_model(self.student) if self.student else copy.deepcopy(model), data.task))
        rows = self._rows(data, context)
        labelled_before = "teacher_logits" in rows.column_names
        # Without a teacher at hand there are no layers to compare; the check before the run has seen to that.
        teacher = student if labelled_before and context.teacher is None else self._teacher(context)
        objective = build_objectives(self.objectives, structure_of(student), structure_of(teacher), data.task.kind)
        told: dict[str, Any] = {}
        stage, before = self, {}
        if self.interpolate or self.full_rate_at is not None:
            rows, loss = self._judged(rows, on_device(teacher), context)
        if self.interpolate:
            before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        if self.full_rate_at is not None:
            divergence = max(loss(student), SMALLEST_DIVERGENCE)
            stage = replace(self, learning_rate=self.learning_rate * min(1.0, divergence / self.full_rate_at))
            told = {"divergence": round(divergence, 5), "learning_rate": stage.learning_rate}
            logger.info("divergence from the teacher %.5f, so the learning rate is %.2g", *told.values())
        live, states = objective.needs.live_teacher, None
        collator, bf16 = context.collator, context.bf16
        if live and not labelled_before and not objective.needs.teacher_qkv:
            steps = self.max_steps if self.max_steps > 0 else self.epochs * len(rows) / self.batch_size
            layers, passes = objective.needs.teacher_hidden, steps * self.batch_size / len(rows)
            if passes > 1 or context.states_dir is not None:
                folder = workdir / "states"
                if context.states_dir is not None:
                    folder = shared_folder(context.states_dir, teacher, rows, layers, bf16)
                states = TeacherStates.compute(
                    on_device(teacher), rows, collator, layers, folder, bf16=bf16, disable_tqdm=context.disable_tqdm
                )
        if states is not None:
            live = False
            rows = with_teacher_logits(rows, states.logits).add_column(ROW, np.arange(len(rows)))
        elif objective.needs.teacher_logits and not live and not labelled_before:
            logits = cached_logits(
                on_device(teacher), rows, collator, context.cache_dir, bf16=bf16, disable_tqdm=context.disable_tqdm
            )
            rows = with_teacher_logits(rows, logits)
        holder = Distillation(student, on_device(objective), on_device(teacher) if live else None, states)
        info = stage.train(holder, rows, context, workdir, data)
        if self.interpolate:
            told["interpolated"] = nearest_between(before, student, loss)
        return student, {"teacher_ran_live": live, **told, **info}

    def _judged(
        self, rows: Dataset, teacher: PreTrainedModel, context: Context
    ) -> tuple[Dataset, Callable[[PreTrainedModel], float]]:
        """What is left to learn from, and the divergence of a student's answers from the teacher's on a random sample.

        The sample is kept out of the training only where its result is to be judged.
        """
        shuffled = rows.shuffle(seed=context.seed)
        few = min(JUDGED_ROWS, max(1, len(rows) // 10) if self.interpolate else len(rows))
        batches = batches_of_rank(shuffled.select(range(few)), context, self.batch_size)
        autocast = torch.bfloat16 if context.bf16 else None
        loss = CalibrationLoss(teacher, batches, autocast, sum_over_ranks)
        return shuffled.select(range(few, len(rows))) if self.interpolate else rows, loss

    def _teacher(self, context: Context) -> PreTrainedModel:
        if self.teacher in TARGET_TEACHER:
            if context.teacher is None:
                raise ValueError(
                    "distill needs a teacher. To resolve, pass `teacher`, or begin the recipe with finetune."
                )
            return context.teacher
        place = context.results.get(self.teacher, self.teacher)
        return with_pieces_of(load_model(place), place, context.tokenizer)

    def _rows(self, data: TaskData, context: Context) -> Dataset:
        labelled = data.train if self.data != "pool" else None
        pool = context.pool if self.looks_at_pool(context) else None
        return self.rows(join_unlabelled(labelled, pool, data.task), context)


def nearest_between(
    before: Mapping[str, Tensor], model: PreTrainedModel, loss: Callable[[PreTrainedModel], float]
) -> dict[str, Any]:
    """Moves a model to the point of least loss between the weights `before` and its own; the share of the way, and each point's loss.

    Where a model begins near its goal, training may cost more than it gains. Of points that a few hundred rows cannot tell apart it
    is the last, since training saw many more.

    Args:
        before: state dict of the model before its training, on the same device.
        model: after it; changed in place.
        loss: mean divergence per row from the teacher's answers.
    """
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def at(share: float) -> float:
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(before[name].lerp(after[name], share))
        return loss(model)

    losses = {share: at(share) for share in SHARES}
    best = max(share for share in SHARES if losses[share] <= INDISTINCT * min(losses.values()))
    at(best)
    logger.info("divergence %.5f before, %.5f after, %.5f at %g of the way", losses[0], losses[1], losses[best], best)
    return {"share": best, "divergence": {str(share): round(value, 6) for share, value in losses.items()}}


def _objectives(values: Any) -> tuple[Objective, ...]:
    """The objectives of their YAML form; the faults of all in one ValueError."""
    out, faults = [], []
    for value in values if isinstance(values, list | tuple) else [values]:
        try:
            out.append(build(OBJECTIVES, value, "objective"))
            if not isinstance(out[-1], Objective):
                raise TypeError(
                    f"`objectives` must hold objectives, got {value!r}. To resolve, write {{kind: logits, weight: 1.0}}."
                )
        except (ValueError, TypeError) as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return tuple(out)
