"""Structured pruning of attention heads and FFN neurons by importance."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .._sizes import Size
from ..allocate import Budget, plan_for
from ..context import Context, device_of_run, on_device
from ..importance import SCORERS, score, sum_over_ranks
from ..processes import process_state
from ..surgery import keep_units
from .base import Outline, Stage, known_task


@dataclass(frozen=True, kw_only=True)
class WidthPruning(Stage):
    """Structured pruning of attention heads and FFN neurons by importance.

    Papers: TextPruner (2022) as used by the SmBERT paper (heads 12 -> 8, FFN 3072 -> 2048); Michel et al. (2019).

    Attributes:
        heads: heads that stay per layer: a number, a share such as "2/3", or one number for each layer.
        ffn: FFN neurons that stay per layer, likewise.
        params: budget of all parameters, a number or a share of what comes in ("60%").
        macs: budget of multiply-accumulates of the encoder, likewise.
        scope: "uniform" keeps the same share in every layer, "global" lets importance decide.
        multiple_of: FFN sizes are rounded up to it, since odd sizes cost speed.
        min_heads, min_ffn: what every layer keeps at least; 0 lets whole sub-layers go.
        scorer: entry of `smbert.importance.SCORERS`.
        samples: training rows that are scored.
        batch_size: rows of one scoring batch; the scores do not depend on it.
        iterations: prune in this many equal steps and score anew before each.
        task: an intermediate task's name whose rows are scored.
    """

    kind: ClassVar[str] = "width_pruning"
    heads: Size | tuple[int, ...] | None = "2/3"
    ffn: Size | tuple[int, ...] | None = "2/3"
    params: Size | None = None
    macs: Size | None = None
    scope: str = "uniform"
    multiple_of: int = 8
    min_heads: int = 1
    min_ffn: int = 1
    scorer: str = "taylor"
    samples: int = 1024
    batch_size: int = 32
    iterations: int = 1
    task: str | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "ffn"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif value == "2/3" and (self.params is not None or self.macs is not None):
                # A budget takes the place of the paper's widths.
                object.__setattr__(self, name, None)
        if self.scorer not in SCORERS:
            raise ValueError(
                f"`scorer` must be one of {', '.join(SCORERS)}, got {self.scorer!r}. To resolve, choose one."
            )
        for name in ("samples", "batch_size", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}. To resolve, correct it.")
        Budget(**self._limits())

    def _limits(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Budget)}

    def outline(self, before: Outline, context: Context) -> Outline:
        known_task(self.task, context)
        if self.scope == "global" or self.params is not None or self.macs is not None:
            return replace(before, heads_known=False)
        widths = Budget(**self._limits()).widths_within(before.structure.layer_widths)
        return replace(before, structure=replace(before.structure, layer_widths=tuple(widths)))

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        start = time.perf_counter()
        data = context.data_for(self.task)
        rows = data.train.shuffle(seed=context.seed).select(range(min(self.samples, len(data.train))))
        original = model = on_device(model)
        for step in range(1, self.iterations + 1):
            scores = score(model, self._batches(rows, context), self.scorer, reduce=sum_over_ranks)
            budget = Budget(**self._limits()).between(original, step / self.iterations)
            model = keep_units(model, plan_for(model, scores, budget))
        return model, {"scored_rows": len(rows), "pruning_seconds": round(time.perf_counter() - start, 1)}

    def _batches(self, rows: Dataset, context: Context) -> list[dict[str, torch.Tensor]]:
        """This process's share of the rows, in batches of similar length."""
        state = process_state()
        lengths = [len(ids) for ids in rows["input_ids"][:]]
        mine = sorted(range(len(rows)), key=lengths.__getitem__)[state.process_index :: state.num_processes]
        return [
            {
                k: v.to(device_of_run())
                for k, v in context.collator([rows[i] for i in mine[a : a + self.batch_size]]).items()
            }
            for a in range(0, len(mine), self.batch_size)
        ]
