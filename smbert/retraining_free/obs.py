"""Structured optimal brain surgery to a budget: sizes from the database, weights from least squares (ZipLM, Kurtic et al. 2023)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers import PreTrainedModel

from .._costs import Widths
from ..surgery import keep_units, structure_of
from .calibration import CalibrationLoss
from .cost_table import CostTable
from .database import Database
from .reconstruct import Reduce
from .search import BudgetOutOfReach, Found, find_sizes, options_of
from .sequential import fit_to_original
from .stream import Calls
from .working_copy import working_copy

logger = logging.getLogger(__name__)

CORRECTIONS = 2  # of sizes that take longer, or less long, than the sum over their sub-layers
PACE_TOLERANCE = 0.02


def prune_by_obs(
    model: PreTrainedModel,
    calls: Calls,
    database: Database,
    table: CostTable,
    budget: float,
    loss: CalibrationLoss,
    coarse: CalibrationLoss,
    *,
    steps: int = 90,
    seed: int = 0,
    damping: float | None = 1e-2,
    reduce: Reduce | None = None,
    pace: Callable[[PreTrainedModel], float] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A smaller model within a budget, and what is worth recording.

    Args:
        model: left as it is.
        calls: this process's share of the calibration rows, recorded with `model`.
        database: of `model`.
        table: costs of the database's sizes.
        budget: in the table's unit.
        loss: the calibration loss on rows of its own, which judges what the search has found; their hidden states judge the fit.
        coarse: the same on others again, which tells what each sub-layer alone does and leads the search: 92 sizes are enough for some
            of them to suit these few rows alone.
        steps: of the search.
        seed: of the search.
        damping: of the last fit from bottom to top; None leaves that out.
        reduce: sums a tensor over all ranks.
        pace: how many times as much as the table says a pruned model really costs; the search begins, and goes on, by what it says. None:
            the table is exact.

    Raises:
        ValueError: the budget is below what can be reached.
    """
    copy, dim = working_copy(model), structure_of(model).head_dim
    present = list(structure_of(model).layer_widths)

    def pruned_to(widths: Widths) -> PreTrainedModel:
        for number, (sublayer, old, new) in enumerate(zip(database.sublayers, _flat(present), _flat(widths))):
            if old != new:
                database.apply_one(copy, model, sublayer, new, dim)
                pair = list(present[number // 2])
                pair[number % 2] = new
                present[number // 2] = (pair[0], pair[1])
        return keep_units(copy, database.plan(widths))

    def roughly(widths: Widths, enough: float) -> float:
        kept = [tuple(new) == tuple(old) for new, old in zip(widths, structure_of(model).layer_widths)]
        return coarse(pruned_to(widths), enough, same=[*kept, False].index(False))

    options = options_of([(s.sizes, s.errors) for s in database.sublayers], table)

    def searched(limit: float, steps: int, start: Sequence[float] | None = None) -> Found:
        return find_sizes(
            options, table, limit, lambda widths: loss(pruned_to(widths)), roughly, steps=steps, seed=seed, start=start
        )

    # Plain sizes say already how the whole relates to the sum of its parts, so that the search looks at what will be within the budget.
    factor = 1.0 if pace is None else pace(pruned_to(find_sizes(options, table, budget).widths))
    try:
        found = searched(budget / factor, steps)
    except BudgetOutOfReach:  # it was within reach by the table itself, and the record says what it really costs
        found = searched(budget, steps)
    evaluations = found.evaluations
    for _ in range(CORRECTIONS):
        if pace is None or abs((now := pace(pruned_to(found.widths))) / factor - 1) <= PACE_TOLERANCE:
            break
        logger.info("sizes of %.4g take %.3f times as much, searched on", found.cost, now)
        factor = now
        try:
            found = searched(budget / factor, steps // 6, found.coefficients)
        except BudgetOutOfReach:
            break
        evaluations += found.evaluations
    pruned = pruned_to(found.widths)
    info: dict[str, Any] = {
        "evaluations": evaluations,
        "cost": found.cost * factor,
        "pace": factor,
        "calibration_loss": {"pruned": found.loss},
    }
    if damping is not None:
        fitted = pruned_to(found.widths)
        fit_to_original(model, fitted, calls, damping, reduce)
        # On few tokens the fit may learn their noise, which the rows of `loss` do not share. Their hidden states tell, one error for each
        # token; of answers that training has made sure, whatever blurs them is the loser, though it gains on texts never seen.
        plain, one, other = (cast(PreTrainedModel, m.base_model) for m in (model, pruned, fitted))
        error = CalibrationLoss(plain, loss.batches, reduce=reduce)
        errors = {"pruned": error(one), "fitted": error(other)}
        if errors["fitted"] <= errors["pruned"]:
            pruned = fitted
        info["hidden_error"] = errors
        info["calibration_loss"]["fitted"] = after = loss(fitted)
        logger.info(
            "calibration loss %.5f after the fit from bottom to top, error of hidden states %.5f -> %.5f",
            after,
            *errors.values(),
        )
    return pruned, info


def _flat(widths: Sequence[tuple[int, int]]) -> list[int]:
    return [size for pair in widths for size in pair]
