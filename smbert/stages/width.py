"""Structured pruning of attention heads and FFN neurons by importance."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .._costs import costs_of
from .._sizes import Size, parse, round_up
from ..allocate import Budget, plan_for
from ..context import Context, device_of_run, on_device
from ..importance import SCORERS, Scores, score, sum_over_ranks
from ..measure import count_parameters
from ..surgery import Structure, keep_units, structure_of
from ..trainer import training_attention
from .base import Outline, Stage, as_text, batches_of_rank, known_task


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
        for name in ("heads", "ffn", "params", "macs"):
            value = as_text(getattr(self, name))
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        for name in ("heads", "ffn"):
            if getattr(self, name) == "2/3" and (self.params is not None or self.macs is not None):
                # A budget takes the place of the paper's widths.
                object.__setattr__(self, name, None)
        if self.scorer not in SCORERS:
            raise ValueError(
                f"`scorer` must be one of {', '.join(SCORERS)}, got {self.scorer!r}. To resolve, choose one."
            )
        for name in ("samples", "batch_size", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}. To resolve, correct it.")
        _ = self.budget  # its checks

    @property
    def budget(self) -> Budget:
        return Budget(**{f.name: getattr(self, f.name) for f in fields(Budget)})

    def outline(self, before: Outline, context: Context) -> Outline:
        known_task(self.task, context)
        budget = self.budget
        widths = budget.widths_within(before.structure.layer_widths)
        if context.teacher is not None and before.heads_known and before.outer_known:
            _check_reachable(budget, before.structure, context.teacher)
        budgeted = self.params is not None or self.macs is not None
        # Known are counts that hold in each layer, and what nothing takes away.
        heads_known, ffn_known = (
            not budgeted if asked is None else self.scope == "uniform" for asked in (self.heads, self.ffn)
        )
        after = [
            (new[0] if heads_known else old[0], new[1] if ffn_known else old[1])
            for old, new in zip(before.structure.layer_widths, widths)
        ]
        return replace(
            before,
            structure=replace(before.structure, layer_widths=tuple(after)),
            heads_known=before.heads_known and heads_known,
        )

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        start = time.perf_counter()
        original = model = on_device(model)
        for step in range(1, self.iterations + 1):
            budget = self.budget.between(original, step / self.iterations)
            model = keep_units(model, plan_for(model, self.scores(model, context), budget))
        rows = min(self.samples, len(context.data_for(self.task).train))
        return model, {"scored_rows": rows, "pruning_seconds": round(time.perf_counter() - start, 1)}

    def scores(self, model: PreTrainedModel, context: Context) -> Scores:
        """Scores of all heads and neurons, which depend on scorer and rows and not on any budget."""
        data, device = context.data_for(self.task), device_of_run()
        rows = data.train.shuffle(seed=context.seed).select(range(min(self.samples, len(data.train))))
        batches = [{k: v.to(device) for k, v in b.items()} for b in batches_of_rank(rows, context, self.batch_size)]
        autocast = torch.bfloat16 if context.bf16 else None
        with training_attention(model):
            return score(model, batches, self.scorer, autocast=autocast, reduce=sum_over_ranks)


def _check_reachable(budget: Budget, structure: Structure, teacher: PreTrainedModel) -> None:
    """ValueError if a budget of parameters or MACs is below what stays when every layer keeps its minimum.

    The sizes of what comes in are computed from the teacher's, whose layers and outer parts it shares; of another family or width
    nothing is known before the run.
    """
    name = "params" if budget.params is not None else "macs"
    asked = getattr(budget, name)
    own = structure_of(teacher)
    if asked is None or (own.family, own.hidden_size) != (structure.family, structure.hidden_size):
        return
    costs = costs_of(teacher, name, 128)
    # Norms and output biases, which stay whatever is pruned.
    per_layer = 0
    if name == "params":
        units = replace(costs, fixed=0).total(own.layer_widths)
        per_layer = (count_parameters(teacher).encoder - units) // own.num_layers
    costs = replace(costs, fixed=costs.fixed - per_layer * (own.num_layers - structure.num_layers))
    number = parse(asked, name)
    limit = number if isinstance(number, int) else math.floor(number * costs.total(structure.layer_widths))
    kept = budget.widths_within(structure.layer_widths)
    least = costs.total(
        [
            (
                min(h, budget.min_heads) if budget.heads is None else h,
                min(f, round_up(budget.min_ffn, budget.multiple_of)) if budget.ffn is None else f,
            )
            for h, f in kept
        ]
    )
    if least > limit:
        raise ValueError(
            f"`{name}` must be at least {least:,}, the smallest that this model reaches by its heads and neurons, got {asked!r} = "
            f"{limit:,}. To resolve, allow more, lower `min_heads` and `min_ffn`, or remove layers first."
        )
