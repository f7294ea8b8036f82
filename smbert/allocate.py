"""From scores and a budget to a plan: which heads and neurons of each layer stay.

Everything here is integers, exact fractions and stable sorting: equal scores give the same plan on every rank, and of
units with equal scores the first ones stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._costs import Costs, Widths, costs_of, encoder_parameter_costs, mac_costs
from ._sizes import Size, count_from, parse, round_up
from .importance import Scores
from .surgery import PruningPlan, Structure, structure_of


@dataclass(frozen=True)
class Budget:
    """What may stay of a model. A float, a fraction or text such as "2/3" and "35%" is a share of what the model has now.

    Counts are never undercut, totals are never exceeded: a share of heads or neurons is rounded up, while the parameters
    or MACs of the result are at most those asked for.

    Attributes:
        heads: heads per layer: an exact number, one number for each layer, or a share. None: all, unless `params` or
            `macs` decide.
        ffn: FFN neurons per layer, likewise. A share is rounded up to `multiple_of`; exact numbers are kept as they are.
        params: most parameters in all, embeddings and task head included: a number or a share.
        macs: most multiply-accumulates of the encoder, as `measure.macs` counts them: a number or a share.
        scope: "uniform" takes the best units of each layer, in the same share everywhere. "global" lets all units
            compete, by score per parameter or MAC; counts are then means per layer.
        multiple_of: FFN sizes are multiples of it wherever a share, a total or the competition decides them.
        min_heads, min_ffn: what every layer that has as many keeps at least; 0 lets whole sub-layers go.

    Raises:
        ValueError, TypeError: a field out of range, fields that leave nothing to decide, or no field at all.
    """

    heads: Size | Sequence[int] | None = None
    ffn: Size | Sequence[int] | None = None
    params: Size | None = None
    macs: Size | None = None
    scope: str = "uniform"
    multiple_of: int = 8
    min_heads: int = 1
    min_ffn: int = 1

    def __post_init__(self) -> None:
        if self.scope not in ("uniform", "global"):
            raise ValueError(f"`scope` must be uniform or global, got {self.scope!r}. To resolve, choose one of them.")
        for name, least in (("multiple_of", 1), ("min_heads", 0), ("min_ffn", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, got {value!r}. To resolve, correct it."
                )
        for name, least in (("heads", self.min_heads), ("ffn", self.min_ffn)):
            value = getattr(self, name)
            several = isinstance(value, list | tuple)
            if several:
                object.__setattr__(self, name, tuple(value))
            for number in [parse(v, name) for v in value] if several else [] if value is None else [parse(value, name)]:
                if several and isinstance(number, Fraction):
                    raise ValueError(f"`{name}` must hold an integer per layer, got {value!r}. To resolve, correct it.")
                if not several and isinstance(number, int) and number < least:
                    raise ValueError(
                        f"`{name}` must be at least `min_{name}` = {least}, got {value!r}. To resolve, ask for more, or set "
                        f"min_{name}=0 if whole sub-layers may go."
                    )
        for name in ("params", "macs"):
            if getattr(self, name) is not None:
                parse(getattr(self, name), name)
        if self.params is not None and self.macs is not None:
            raise ValueError("`params` and `macs` exclude each other, got both. To resolve, leave one of them out.")
        total = next((name for name in ("params", "macs") if getattr(self, name) is not None), None)
        if total and self.heads is not None and self.ffn is not None:
            raise ValueError(
                f"`{total}` must be left a choice, but `heads` and `ffn` fix everything. To resolve, leave out one of the three."
            )
        if not total and self.heads is None and self.ffn is None:
            raise ValueError(
                "a budget must have at least one of `heads`, `ffn`, `params`, `macs`, got none. To resolve, add one."
            )

    def between(self, model: PreTrainedModel, progress: float, seq_len: int = 128) -> Budget:
        """The budget in absolute numbers at some point on the way to it, for pruning in steps with new scores at each.

        Args:
            model: the model before the first step, to which shares refer.
            progress: above 0, linear in what stays; 1 is the budget itself.
            seq_len: tokens per sequence, for `macs`.

        Raises:
            ValueError: `progress` out of range, or a budget that this model cannot meet.
        """
        if not 0 < progress <= 1:
            raise ValueError(f"`progress` must be above 0 and at most 1, got {progress}. To resolve, use step / steps.")
        widths, part = structure_of(model).layer_widths, Fraction(progress).limit_denominator(10_000)
        found: dict[str, Any] = {}
        for name, sizes in zip(("heads", "ffn"), zip(*widths)):
            if getattr(self, name) is not None:
                way = [size - math.floor((size - n) * part) for n, size in zip(self._counts(name, sizes), sizes)]
                if name == "ffn" and part < 1:
                    way = [min(max(n, size), round_up(n, self.multiple_of)) for n, size in zip(way, sizes)]
                found[name] = tuple(way)
        for name in ("params", "macs"):
            if getattr(self, name) is not None:
                now = costs_of(model, name, seq_len).total(widths)
                found[name] = now - math.floor((now - min(now, _total(getattr(self, name), name, now))) * part)
        return replace(self, **found)

    def widths_within(self, widths: Widths) -> list[tuple[int, int]]:
        """What the counts and shares of `heads` and `ffn` leave of each layer's (heads, neurons), at scope "uniform".

        Raises:
            ValueError: more than there are, or not one number for each layer.
        """
        kinds = zip(("heads", "ffn"), zip(*widths))
        heads, ffn = (sizes if getattr(self, name) is None else self._counts(name, sizes) for name, sizes in kinds)
        return list(zip(heads, ffn))

    def _counts(self, name: str, sizes: Sequence[int]) -> list[int]:
        """The number asked for in each layer; with scope "global" only their sum counts."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            if len(value) != len(sizes):
                raise ValueError(
                    f"`{name}` must have one number for each of the {len(sizes)} layers, got {len(value)}. To resolve, "
                    "correct it, or give one number for all layers."
                )
            counts = list(value)
            if self.scope == "uniform":
                counts = [count_from(n, size, name) for n, size in zip(value, sizes)]
        elif self.scope == "global" and isinstance(number := parse(value, name), int):
            counts = [number] * len(sizes)
        else:
            counts = [count_from(value, size, name, self.multiple_of if name == "ffn" else 1) for size in sizes]
        if sum(counts) > sum(sizes):
            raise ValueError(
                f"`{name}` must not exceed the {sum(sizes)} that all layers have, got {sum(counts)}. To resolve, ask for less."
            )
        return counts


def plan_for(model: PreTrainedModel, scores: Scores, budget: Budget, seq_len: int = 128) -> PruningPlan:
    """Chooses the heads and neurons that stay.

    Args:
        model: the model that was scored.
        scores: importance of all its units.
        budget: what may stay; shares are shares of this model.
        seq_len: tokens per sequence, for `budget.macs`.

    Raises:
        ValueError: scores of another model or not finite, a budget that cannot be reached, or nothing would stay.
    """
    widths = structure_of(model).layer_widths
    _check(scores, widths)
    name = next((name for name in ("params", "macs") if getattr(budget, name) is not None), None)
    costs = costs_of(model, name or "params", seq_len)
    limit = None if name is None else _total(getattr(budget, name), name, costs.total(widths))
    if budget.scope == "global":
        plan = _compete(scores, budget, widths, costs, limit)
    else:
        sizes = budget.widths_within(widths)
        if limit is not None:
            sizes = _largest_share(widths, sizes, budget, costs, limit)
        plan = PruningPlan(
            heads=tuple(_best(layer, size[0]) for layer, size in zip(scores.heads, sizes)),
            ffn=tuple(_best(layer, size[1]) for layer, size in zip(scores.ffn, sizes)),
        )
    if not any(heads or ffn for heads, ffn in plan.layer_widths):
        raise ValueError(
            "the plan must keep at least one unit, got an encoder without heads and neurons. To resolve, ask for more, or set "
            "`min_heads` and `min_ffn` above 0."
        )
    return plan


def uniform_widths_for(
    structure: Structure,
    *,
    params: Size | None = None,
    macs: Size | None = None,
    seq_len: int = 128,
    multiple_of: int = 8,
    min_heads: int = 1,
    min_ffn: int = 1,
) -> tuple[int, int]:
    """The largest (heads, neurons) per layer, in the structure's own proportion, that fit a budget of the encoder layers.

    Args:
        structure: the layers before pruning, all of the same widths.
        params: most parameters of the encoder layers alone (biases and norms counted as in BERT): a number or a share.
        macs: most multiply-accumulates of the encoder layers for one sequence: a number or a share.
        seq_len: tokens of that sequence.
        multiple_of, min_heads, min_ffn: as in `Budget`.

    Raises:
        ValueError: uneven widths, not exactly one of `params` and `macs`, or out of reach.
    """
    if len(set(structure.layer_widths)) != 1:
        raise ValueError(
            f"`structure` must have layers of the same widths, got {list(structure.layer_widths)}. To resolve, prune with "
            'Budget(..., scope="global").'
        )
    if (params is None) == (macs is None):
        raise ValueError("exactly one of `params` and `macs` must be given. To resolve, leave one of them out.")
    budget = Budget(params=params, macs=macs, multiple_of=multiple_of, min_heads=min_heads, min_ffn=min_ffn)
    costs = mac_costs(structure, seq_len) if macs is not None else encoder_parameter_costs(structure)
    widths, value = structure.layer_widths, params if params is not None else macs
    assert value is not None  # one of the two, by the check above
    limit = _total(value, costs.name, costs.total(widths))
    return _largest_share(widths, list(widths), budget, costs, limit)[0]


# ----------------------------------------------------------------------------------------------------------------- choices


def _unreachable(name: str, limit: int, least: int) -> ValueError:
    return ValueError(
        f"`{name}` must be at least {least:,}, the smallest that this model reaches by its heads and neurons, got {limit:,}. To "
        "resolve, allow more, lower `min_heads` and `min_ffn`, or remove layers or vocabulary first."
    )


def _largest_share(widths: Widths, sizes: Widths, budget: Budget, costs: Costs, limit: int) -> list[tuple[int, int]]:
    """The largest share of all layers' widths within the limit; a kind that the budget fixes keeps its `sizes`."""
    step, least_ffn = budget.multiple_of, round_up(budget.min_ffn, budget.multiple_of)

    def at(share: Fraction) -> list[tuple[int, int]]:
        found = []
        for (heads, ffn), fixed in zip(widths, sizes):
            h = min(heads, max(budget.min_heads, math.floor(share * heads)))
            f = ffn if share == 1 else min(ffn, max(least_ffn, math.floor(share * ffn / step) * step))
            found.append((h if budget.heads is None else fixed[0], f if budget.ffn is None else fixed[1]))
        return found

    # Between these shares nothing changes, and the cost grows with the share: bisection finds the last that fits.
    marks = {Fraction(n, heads) for heads, _ in set(widths) for n in range(heads + 1) if heads}
    marks |= {Fraction(n, ffn) for _, ffn in set(widths) for n in range(0, ffn + 1, step) if ffn}
    shares = sorted(marks | {Fraction(0), Fraction(1)})
    low, high = 0, len(shares)
    if costs.total(at(shares[0])) > limit:
        raise _unreachable(costs.name, limit, costs.total(at(shares[0])))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs.total(at(shares[middle])) <= limit else (low, middle)
    return at(shares[low])


@dataclass(frozen=True)
class _Block:
    """Units of one layer that are taken together: one head, or `multiple_of` neurons of neighbouring rank."""

    kind: int  # 0: heads, 1: neurons
    layer: int
    units: tuple[int, ...]
    value: float
    cost: int
    must: bool  # needed for the layer's minimum

    @property
    def order(self) -> tuple[bool, float, int, int, tuple[int, ...]]:
        return (not self.must, -self.value / self.cost, self.kind, self.layer, self.units)


def _compete(scores: Scores, budget: Budget, widths: Widths, costs: Costs, limit: int | None) -> PruningPlan:
    """All units compete by what they lose per cost; within a layer and kind the better ones always go first.

    What several units lose together is the sum of their squared first-order scores rather than of their absolute ones,
    because gradients of different signs cancel: added up as they are, a layer's neurons would outweigh its heads.
    """
    kept: list[list[list[int]]] = [[[] for _ in widths] for _ in range(2)]
    spent = costs.fixed

    def take(blocks: Iterable[_Block], fits: Callable[[_Block], bool]) -> None:
        nonlocal spent
        ended = set()  # a layer's last block may be cheaper than a better one that was too much
        for block in sorted(blocks, key=lambda block: block.order):
            place = (block.kind, block.layer)
            if place not in ended and fits(block):
                kept[block.kind][block.layer] += block.units
                spent += block.cost
            else:
                ended.add(place)

    free: list[_Block] = []
    for kind, (name, part, cost) in enumerate((("heads", scores.heads, costs.head), ("ffn", scores.ffn, costs.neuron))):
        step = budget.multiple_of if kind else 1
        least = budget.min_ffn if kind else budget.min_heads
        blocks = []
        for number, layer in enumerate(part):
            values, ranked = layer.double().cpu() ** scores.exponent, _ranking(layer)
            for start in range(0, len(ranked), step):
                units = ranked[start : start + step]
                value = float(values[units].sum())
                blocks.append(_Block(kind, number, tuple(units), value, len(units) * cost, start < least))
        if getattr(budget, name) is not None:
            want = sum(budget._counts(name, [width[kind] for width in widths]))
            must = sum(len(block.units) for block in blocks if block.must)
            if must > want:
                raise ValueError(
                    f"`{name}` must leave every layer its `min_{name}`, {must} in all, got {want}. To resolve, ask for more, or "
                    f"lower `min_{name}`."
                )
            take(blocks, lambda block, kind=kind, want=want: sum(map(len, kept[kind])) < want)  # type: ignore[misc]
        elif limit is None:
            take(blocks, lambda block: True)
        else:
            free += blocks
    if limit is not None:
        least_cost = spent + sum(block.cost for block in free if block.must)
        if least_cost > limit:
            raise _unreachable(costs.name, limit, least_cost)
        take(free, lambda block: spent + block.cost <= limit)
    heads, ffn = (tuple(tuple(sorted(layer)) for layer in kind) for kind in kept)
    return PruningPlan(heads=heads, ffn=ffn)


def _ranking(layer: Tensor) -> list[int]:
    return torch.sort(layer.double().cpu(), descending=True, stable=True).indices.tolist()


def _best(layer: Tensor, n: int) -> tuple[int, ...]:
    return tuple(sorted(_ranking(layer)[:n]))


# ------------------------------------------------------------------------------------------------------------------ checks


def _check(scores: Scores, widths: Widths) -> None:
    found = [(len(heads), len(ffn)) for heads, ffn in zip(scores.heads, scores.ffn)]
    if len(scores.heads) != len(scores.ffn) or found != list(widths):
        raise ValueError(
            f"`scores` must be of this model with widths {list(widths)}, got {found}. To resolve, score it anew."
        )
    for number, layer in enumerate(zip(scores.heads, scores.ffn)):
        if not all(part.isfinite().all() for part in layer):
            raise ValueError(
                f"`scores` must be finite, got NaN or infinity in layer {number}. To resolve, check the data."
            )


def _total(value: Size, name: str, now: int) -> int:
    number = parse(value, name)
    return number if isinstance(number, int) else math.floor(number * now)
