"""Fewer layers, by progressive module replacing or by truncation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .._sizes import Size, count_from
from ..context import Context, TaskData, on_device
from ..modeling import encoder_layers
from ..objectives import GoldObjective, build_objectives
from ..retraining_free.calibration import divergence, problem_kind
from ..surgery import Structure, keep_layers, structure_of
from ..teacher import predict_logits
from ..trainer import ReplacingSchedule, Theseus
from .base import Outline, TrainingStage, as_text


@dataclass(frozen=True, kw_only=True)
class DepthReduction(TrainingStage):
    """Fewer layers: by progressive module replacing, or by truncation alone.

    Paper: BERT-of-Theseus (2020), as used twice (12 -> 6 -> 3) by the SmBERT paper with the values of its Tab. 1.

    Attributes:
        layers: how many stay: a number, or a share such as "1/2" (rounded up).
        method: "theseus" trains each kept layer to replace the layers that it stands for; "truncate" does not train.
        keep: which layers start the successor: "first" (the reference), "uniform" (every n/M-th), "last", "importance" (those
            whose skipping raises the loss most), or a list of 0-based layer numbers.
        base: replacing rate b at step 0.
        slope: growth k of the replacing rate per optimiser step; None reaches 1 at half of the steps.
        importance_samples: training rows that measure the importance of layers.
    """

    kind: ClassVar[str] = "depth_reduction"
    layers: Size = "1/2"
    method: str = "theseus"
    keep: str | tuple[int, ...] = "first"
    base: float = 0.3
    slope: float | None = 0.0006
    importance_samples: int = 256
    epochs: float = 15.0
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("theseus", "truncate"):
            raise ValueError(
                f"`method` must be theseus or truncate, got {self.method!r}. To resolve, choose one of them."
            )
        object.__setattr__(self, "layers", as_text(self.layers))
        if isinstance(self.keep, list | tuple):
            object.__setattr__(self, "keep", tuple(self.keep))
        elif self.keep not in ("first", "uniform", "last", "importance"):
            raise ValueError(
                f"`keep` must be first, uniform, last, importance or a list of layer numbers, got {self.keep!r}. "
                "To resolve, choose one of them."
            )
        if not 0 <= self.base <= 1 or (self.slope is not None and self.slope < 0):
            raise ValueError(
                f"`base` must be from 0 to 1 and `slope` at least 0, got {self.base!r} and {self.slope!r}. "
                "To resolve, use the paper's 0.3 and 0.0006."
            )
        if self.importance_samples < 1:
            raise ValueError(
                f"`importance_samples` must be at least 1, got {self.importance_samples!r}. To resolve, try 256."
            )

    def target(self, n_layers: int) -> int:
        """How many of `n_layers` stay."""
        wanted = len(self.keep) if not isinstance(self.keep, str) else count_from(self.layers, n_layers, "layers")
        if not 1 <= wanted < n_layers:
            raise ValueError(
                f"`layers` must be between 1 and {n_layers - 1} for this {n_layers}-layer model, got {self.layers!r}"
                f"{'' if wanted == self.layers else f' ({wanted} layers)'}. To resolve, keep fewer layers, or drop the stage."
            )
        if not isinstance(self.keep, str) and not (
            all(0 <= i < n_layers for i in self.keep) and list(self.keep) == sorted(set(self.keep))
        ):
            raise ValueError(
                f"`keep` must hold ascending, distinct numbers from 0 to {n_layers - 1}, got {list(self.keep)}. To resolve, correct it."
            )
        return wanted

    def kept(self, structure: Structure) -> list[int] | None:
        """The 0-based layers that stay; None where measuring decides.

        Raises:
            ValueError: too many, not there, or without layer 0 in a family that cannot do without it.
        """
        n_layers = structure.num_layers
        n = self.target(n_layers)
        if self.keep == "importance":
            return None
        named = {
            "first": list(range(n)),
            "last": list(range(n_layers - n, n_layers)),
            "uniform": [round((i + 1) * n_layers / n) - 1 for i in range(n)],
        }
        kept = named[self.keep] if isinstance(self.keep, str) else list(self.keep)
        if structure.family.fixed_first_layer and kept[0] != 0:
            raise ValueError(
                f"`keep` must begin with layer 0 for {structure.family.model_type}, whose first layer has no norm before its attention, "
                f"got {self.keep!r} = {kept}. To resolve, use `keep: first`, `keep: importance`, or a list that begins with 0."
            )
        return kept

    def outline(self, before: Outline, context: Context) -> Outline:
        after = super().outline(before, context)
        if self.method == "theseus" and after.task != before.task:
            raise ValueError(
                f"depth_reduction by theseus on task {self.task or context.data.task.name!r} needs a predecessor that is fine-tuned on it. "
                "To resolve, put a finetune stage with the same `task` before it."
            )
        widths, kept = before.structure.layer_widths, self.kept(before.structure)
        if kept is None:
            kept = list(range(self.target(len(widths))))
            after = replace(after, heads_known=before.heads_known and len({heads for heads, _ in widths}) == 1)
        passed = before.structure.passed_by
        return replace(
            after,
            structure=replace(
                before.structure,
                layer_widths=tuple(widths[i] for i in kept),
                passed_by=tuple(passed[i] for i in kept if passed),
            ),
            task=before.task if self.method == "truncate" else after.task,  # nothing is trained, the head stays
        )

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        data = context.data_for(self.task)
        chosen = self.kept(structure_of(model))
        if chosen is None:
            n = self.target(len(encoder_layers(model)))
            chosen = most_important_layers(on_device(model), n, self._sample(data, context), context)
        successor = keep_layers(model, chosen)
        if self.method == "truncate":
            return successor, {"layers_kept": chosen}

        structure = structure_of(successor)
        objective = build_objectives([GoldObjective()], structure, structure, data.task.kind)
        rows = self.rows(data.train, context)
        steps = self.max_steps if self.max_steps > 0 else max(1, round(self.epochs * len(rows) / self.batch_size))
        slope = self.slope if self.slope is not None else (1 - self.base) / max(1, steps / 2)
        predecessor = copy.deepcopy(model)  # it is frozen, and the model that came in is left alone
        holder = Theseus(on_device(successor), on_device(predecessor), objective, ReplacingSchedule(self.base, slope))
        info = self.train(holder, rows, context, workdir, data)
        return successor, {
            "layers_kept": chosen,
            "final_replacing_rate": holder.schedule(info["optimiser_steps"]),
            **info,
        }

    def _sample(self, data: TaskData, context: Context) -> Dataset:
        return data.train.shuffle(seed=context.seed).select(range(min(self.importance_samples, len(data.train))))


def most_important_layers(model: PreTrainedModel, n: int, rows: Dataset, context: Context) -> list[int]:
    """Drop, one after the other, the layer whose skipping leaves the outputs closest to the model's own; n stay.

    Measured by `divergence`: KL(full || skipped) of the class probabilities, or what is its like for the task; needs no labels.
    """
    layers = list(range(len(encoder_layers(model))))
    full = torch.from_numpy(predict_logits(model, rows, context.collator, disable_tqdm=True))
    while len(layers) > n:
        losses = {}
        for layer in layers:
            try:
                skipped = keep_layers(model, [i for i in layers if i != layer])
            except ValueError:  # a family's first layer may have to stay
                continue
            logits = torch.from_numpy(predict_logits(skipped, rows, context.collator, disable_tqdm=True))
            losses[layer] = divergence(logits, full, problem_kind(model)).mean().item()
        layers.remove(min(losses, key=lambda layer: losses[layer]))
    return layers
