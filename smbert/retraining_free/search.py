"""Sizes under a budget: dynamic programming over error and cost, and a search for what each sub-layer's error matters.

A sub-layer i of size s has an error p_is and a cost t_is. Dynamic programming finds the sizes with the least sum of c_i p_is among
those with sum t_is <= budget. The coefficients c_i say how much of a sub-layer's error reaches the answers: they begin as the
measured effect of pruning that sub-layer alone and are refined by a local search on the calibration loss (SPDY, Frantar and Alistarh
2022; ZipLM, Kurtic et al. 2023).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .._costs import Widths
from .cost_table import CostTable

logger = logging.getLogger(__name__)

_BUCKETS = 20_000  # resolution of costs that are not small integers
_SPREAD = 0.7  # standard deviation of a coefficient's change, in natural logarithms
_SHARE = 0.2  # of the coefficients that change at a time
_FINALISTS = 4  # of a search by a rough loss, which the real one judges

Loss = Callable[[Widths], float]
RoughLoss = Callable[[Widths, float], float]  # exact up to the second argument; beyond, any number beyond will do


class BudgetOutOfReach(ValueError):
    """No sizes of this model fit the budget."""


@dataclass(frozen=True)
class Options:
    """The sizes that one sub-layer can have.

    Attributes:
        sizes: numbers of units, ascending; the last is all of them.
        errors: what each size loses; 0 at the last.
        costs: what each size costs.
    """

    sizes: Sequence[int]
    errors: Sequence[float]
    costs: Sequence[float]


@dataclass(frozen=True)
class Found:
    """Sizes that fit a budget.

    Attributes:
        widths: (heads, neurons) of each layer.
        cost: as the table says.
        loss: on the calibration sample; None where nothing was measured.
        evaluations: how many sizes the loss was measured for, beside those that tell what each sub-layer alone does.
        coefficients: of each sub-layer.
    """

    widths: list[tuple[int, int]]
    cost: float
    loss: float | None = None
    evaluations: int = 0
    coefficients: list[float] = field(default_factory=list)


def options_of(sublayers: Sequence[tuple[Sequence[int], Sequence[float]]], table: CostTable) -> list[Options]:
    """Options from (sizes, errors) of attention and feed-forward part of each layer in turn."""
    return [
        Options(sizes, errors, [table.of(number % 2, size) for size in sizes])
        for number, (sizes, errors) in enumerate(sublayers)
    ]


def fit(options: Sequence[Options], coefficients: Sequence[float], budget: float) -> list[int]:
    """The size of each sub-layer, with the least sum of coefficient * error among those that cost at most `budget` in all.

    Exact where the costs are integers with at most 20,000 common steps below the budget; else costs are rounded up to
    such steps, so that the budget is never exceeded.

    Raises:
        ValueError: the cheapest sizes cost more than the budget.
    """
    least = sum(min(option.costs) for option in options)
    if least > budget:
        raise ValueError(f"the cheapest sizes cost {least:,.6g}, more than {budget:,.6g}.")
    step = _step([cost for option in options for cost in option.costs], budget)
    costs = [[math.ceil(cost / step - 1e-9) for cost in option.costs] for option in options]
    room = math.floor(budget / step + 1e-9)
    chosen = [min(range(len(o.sizes)), key=lambda i, o=o: (o.costs[i], o.errors[i])) for o in options]  # type: ignore[misc]
    if sum(map(min, costs)) <= room:  # else only by rounding up, and the cheapest are all that fits
        chosen = _programme(options, coefficients, costs, room)
    return [option.sizes[i] for option, i in zip(options, _fill(options, coefficients, chosen, budget))]


def _programme(
    options: Sequence[Options], coefficients: Sequence[float], costs: Sequence[Sequence[int]], room: int
) -> list[int]:
    """The index of each sub-layer's size by dynamic programming, for costs in whole steps."""
    best = np.zeros(room + 1)  # least loss of the sub-layers so far, by steps spent at most
    taken: list[np.ndarray] = []
    for option, factor, own in zip(options, coefficients, costs, strict=True):
        table = np.full((len(own), room + 1), np.inf)
        for row, (cost, error) in enumerate(zip(own, option.errors)):
            if cost <= room:
                table[row, cost:] = best[: room + 1 - cost] + factor * error
        # Of equal losses the larger size: it costs nothing that matters.
        choice = len(own) - 1 - np.argmin(table[::-1], axis=0)
        taken.append(choice)
        best = np.take_along_axis(table, choice[None], 0)[0]
    chosen: list[int] = []
    for own, choice in zip(reversed(costs), reversed(taken)):
        chosen.append(int(choice[room]))
        room -= own[chosen[-1]]
    return chosen[::-1]


def _fill(options: Sequence[Options], coefficients: Sequence[float], chosen: list[int], budget: float) -> list[int]:
    """Spends what rounding the costs up has left over, on whatever gains most."""
    while True:
        left = budget - sum(option.costs[i] for option, i in zip(options, chosen))
        gains = [
            (factor * (option.errors[i] - option.errors[j]), number, j)
            for number, (option, factor, i) in enumerate(zip(options, coefficients, chosen))
            for j in range(len(option.sizes))
            if option.costs[j] - option.costs[i] <= left + 1e-12 * budget  # sums of floats
        ]
        gain, number, j = max(gains, default=(0.0, 0, 0))
        if gain <= 0:
            return chosen
        chosen = [*chosen[:number], j, *chosen[number + 1 :]]


def _step(costs: Sequence[float], budget: float) -> float:
    if all(float(cost).is_integer() for cost in costs):
        common = math.gcd(*(int(cost) for cost in costs)) or 1
        if budget / common <= _BUCKETS:
            return common
    return budget / _BUCKETS if budget > 0 else 1.0


def find_sizes(
    options: Sequence[Options],
    table: CostTable,
    budget: float,
    loss: Loss | None = None,
    coarse: RoughLoss | None = None,
    *,
    steps: int = 90,
    seed: int = 0,
    start: Sequence[float] | None = None,
) -> Found:
    """Sizes with a small loss that cost at most `budget`.

    Args:
        options: of attention and feed-forward part of each layer in turn.
        table: with the same costs; its fixed part counts.
        budget: in the table's unit.
        loss: calibration loss of a model of given widths; None: coefficients of one, and no search.
        coarse: a cheaper one, which says what each sub-layer alone does and by which the search goes, before `loss` judges its
            finalists: more sizes that are judged roughly end better than fewer judged well. None: `loss`.
        steps: sizes that the search tries beside the measurement of each sub-layer alone; 0: only the latter.
        seed: of the search.
        start: coefficients of an earlier search, from which this one goes on; what each sub-layer alone does is not measured then.

    Raises:
        BudgetOutOfReach: no sizes fit; the message says the smallest cost that can be reached.
    """
    check_reachable(options, table, budget)
    room = budget - table.fixed
    count = len(options)
    if loss is None:
        widths = _pairs(fit(options, [1.0] * count, room))
        return Found(widths, table.total(widths), coefficients=[1.0] * count)
    rough: RoughLoss = coarse or (lambda widths, enough: loss(widths))
    known: dict[tuple[tuple[int, int], ...], tuple[float, list[float]]] = {}  # the loss of sizes, what led to them

    def attempt(coefficients: Sequence[float]) -> tuple[float, list[float]]:
        widths = tuple(_pairs(fit(options, coefficients, room)))
        if widths not in known:
            # What is beyond all finalists so far leads nowhere, however far beyond it is.
            least = sorted(value for value, _ in known.values())[:_FINALISTS]
            known[widths] = rough(widths, least[-1] if len(least) == _FINALISTS else math.inf), list(coefficients)
        return known[widths][0], list(coefficients)

    # Not everywhere is a sub-layer's own effect what counts once others are pruned too, hence the plain start beside it.
    starts = [start] if start is not None else [_sensitivities(options, rough), [1.0] * count]
    best = min(map(attempt, starts), key=lambda found: found[0])
    logger.info("calibration loss %.5f before the search", best[0])
    rng, tried = np.random.default_rng(seed), 0
    for _ in range(20 * steps):  # many changes of the coefficients lead to sizes that are known already
        if tried >= steps:
            break
        changed = rng.random(count) < _SHARE
        coefficients = np.asarray(best[1]) * np.exp(np.where(changed, rng.normal(0, _SPREAD, count), 0))
        before = len(known)
        found = attempt(coefficients.tolist())
        tried += len(known) - before
        if found[0] < best[0]:
            best = found
    finalists = sorted(known, key=lambda sizes: known[sizes][0])[: _FINALISTS if coarse else 1]
    judged = {sizes: loss(sizes) if coarse else known[sizes][0] for sizes in finalists}
    winner = min(finalists, key=judged.__getitem__)
    logger.info("calibration loss %.5f after %d evaluations", judged[winner], len(known))
    return Found(list(winner), table.total(winner), judged[winner], len(known), known[winner][1])


def check_reachable(options: Sequence[Options], table: CostTable, budget: float) -> None:
    """Raises BudgetOutOfReach with the smallest reachable cost where the budget is below it."""
    least = table.fixed + sum(min(option.costs) for option in options)
    if least > budget:
        shown = (
            (f"{math.ceil(least):,}", f"{budget:,.0f}")
            if table.name != "latency_ms"
            else (f"{least:.4g}", f"{budget:.4g}")
        )
        raise BudgetOutOfReach(
            f"`{table.name}` must be at least {shown[0]}, the smallest that this model reaches by its heads and neurons, got "
            f"{shown[1]}. To resolve, allow more, or remove layers or vocabulary first."
        )


def _sensitivities(options: Sequence[Options], rough: RoughLoss) -> list[float]:
    """For each sub-layer, the loss that pruning it alone to about half causes, per unit of its error there."""
    full = [option.sizes[-1] for option in options]
    base = rough(_pairs(full), math.inf)
    factors = []
    for number, option in enumerate(options):
        half = min(range(len(option.sizes)), key=lambda i: abs(2 * option.sizes[i] - full[number]))
        if option.errors[half] <= 0:
            factors.append(0.0)
            continue
        sizes = [*full[:number], option.sizes[half], *full[number + 1 :]]
        factors.append(max(rough(_pairs(sizes), math.inf) - base, 0.0) / option.errors[half])
    # One effect beyond all bounds would make every other count for nothing.
    most = max((factor for factor in factors if math.isfinite(factor)), default=1.0)
    factors = [factor if math.isfinite(factor) else 10 * most for factor in factors]
    # Noise can make an effect vanish, yet an error is never for free.
    floor = 0.01 * (sum(factors) / max(1, len(factors))) or 1.0
    return [max(factor, floor) for factor in factors]


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))
