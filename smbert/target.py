"""From what the user asks for (a speed-up, a size, a latency) to the sizes of a recipe, measured on this device."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PreTrainedModel

from ._sizes import count_from, parse
from .context import on_device
from .measure import count_parameters, encoder_macs, latency
from .modeling import encoder_layers
from .recipe import Recipe
from .report import Row
from .stages import DepthReduction, Stage, WidthPruning
from .surgery import PruningPlan, keep_layers, keep_units, structure_of

logger = logging.getLogger(__name__)

WIDTHS = (Fraction(1), Fraction(5, 6), Fraction(2, 3), Fraction(1, 2), Fraction(1, 3))
GOALS = ("speedup", "params", "latency_ms")
# Two measurements of one model differ by this much on a quiet machine.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Target:
    """One goal: {"speedup": 6}, {"params": "35%"} or {"latency_ms": 12}, the latter two optionally with "shape": "1x128".

    Attributes:
        goal: one of `GOALS`.
        value: the number asked for; for params a number or a share of the teacher's parameters in all.
        shape: (batch, seq) at which time is measured.
    """

    goal: str
    value: Any
    shape: tuple[int, int] = (32, 128)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Target:
        """Raises ValueError for anything but one goal with a number above 0."""
        goals = [key for key in values if key != "shape"]
        if len(goals) != 1 or goals[0] not in GOALS:
            raise ValueError(
                f"`target` must have one of the keys {', '.join(GOALS)}, got {sorted(values)}. To resolve, keep one."
            )
        goal, value = goals[0], values[goals[0]]
        if goal == "params":
            parse(value, "params")
        elif (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (1 if goal == "speedup" else 0) < value < math.inf
        ):
            least = "above 1" if goal == "speedup" else "above 0"
            raise ValueError(f"`{goal}` must be a number {least}, got {value!r}. To resolve, correct it.")
        try:
            batch, _, seq = str(values.get("shape", "32x128")).partition("x")
            shape = (int(batch), int(seq))
            if min(shape) < 1:
                raise ValueError
            return cls(goal, value, shape)
        except ValueError:
            raise ValueError(
                f'`shape` must look like "32x128", got {values["shape"]!r}. To resolve, correct it.'
            ) from None

    @property
    def shape_name(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}"

    def outcome(self, teacher: Row, student: Row) -> dict[str, Any]:
        """Asked, measured and whether it was met, from two rows of one report (time within the measuring noise of 5 %)."""
        if self.goal == "params":
            wanted = parse(self.value, "params")
            limit = wanted if isinstance(wanted, int) else float(wanted) * (teacher.params_total or 0)
            measured = float(student.params_total or 0)
            met = measured <= limit
        elif self.goal == "speedup":
            measured = teacher.latency_ms[self.shape_name]["p50"] / student.latency_ms[self.shape_name]["p50"]
            met = measured >= self.value * (1 - TOLERANCE)
        else:
            measured = student.latency_ms[self.shape_name]["p50"]
            met = measured <= self.value * (1 + TOLERANCE)
        at = {} if self.goal == "params" else {"shape": self.shape_name}
        return {"goal": self.goal, "asked": self.value, "measured": round(measured, 3), "met": bool(met), **at}


@dataclass(frozen=True)
class Sizes:
    """A uniform shape: `layers` layers of `heads` heads and `ffn` neurons."""

    layers: int
    heads: int
    ffn: int


def candidates(model: PreTrainedModel) -> list[Sizes]:
    """Uniform shapes of all depths and a few widths, by falling encoder MACs; of equal ones the deepest.

    In a model of uneven layers the narrowest gives the full width.
    """
    structure = structure_of(model)
    heads, ffn = map(min, zip(*structure.layer_widths))
    gated = structure.family.gated
    found: dict[int, Sizes] = {}
    for layers in range(structure.num_layers, 0, -1):
        for share in WIDTHS:
            sizes = Sizes(layers, count_from(share, heads, "heads"), count_from(share, ffn, "ffn", 8))
            cost = encoder_macs(
                [(sizes.heads, sizes.ffn)] * layers, structure.hidden_size, structure.head_dim, 128, gated
            )
            found.setdefault(cost, sizes)
    return [found[cost] for cost in sorted(found, reverse=True)]


def cut_to(model: PreTrainedModel, sizes: Sizes) -> PreTrainedModel:
    """A model of these sizes with some of the model's units: for measuring, not for answering."""
    shallow = keep_layers(model, list(range(sizes.layers)))
    plan = PruningPlan(heads=(tuple(range(sizes.heads)),) * sizes.layers, ffn=(tuple(range(sizes.ffn)),) * sizes.layers)
    return keep_units(shallow, plan)


def sizes_for(target: Target, model: PreTrainedModel, baseline: PreTrainedModel | None = None) -> Sizes:
    """The largest of `candidates` that meets the target, found by bisection; time is measured on the run's device, not computed.

    Args:
        target: the goal.
        model: what is to be cut.
        baseline: what speed-ups and shares of parameters refer to: the teacher; default: `model`.

    Raises:
        ValueError: none meets it; the message says what the smallest reaches.
    """
    options = candidates(model)
    whole = model if baseline is None else baseline
    meets = (_by_parameters if target.goal == "params" else _by_time)(target, model, whole)
    low, high = 0, len(options) - 1
    reached, enough = meets(options[high])
    if not enough:
        raise ValueError(
            f"`target` {target.goal} = {target.value} is out of reach: the smallest shape ({options[high]}) reaches {reached}. "
            "To resolve, ask for less, or start from a smaller checkpoint."
        )
    while low < high:
        middle = (low + high) // 2
        reached, enough = meets(options[middle])
        logger.info("%s reaches %s %s", options[middle], target.goal, reached)
        low, high = (low, middle) if enough else (middle + 1, high)
    return options[high]


def _by_parameters(
    target: Target, model: PreTrainedModel, whole: PreTrainedModel
) -> Callable[[Sizes], tuple[str, bool]]:
    wanted = parse(target.value, "params")
    limit = wanted if isinstance(wanted, int) else int(wanted * count_parameters(whole).total)

    def meets(sizes: Sizes) -> tuple[str, bool]:
        total = count_parameters(cut_to(model, sizes)).total
        return f"{total / 1e6:.2f} M", total <= limit

    return meets


def _by_time(target: Target, model: PreTrainedModel, whole: PreTrainedModel) -> Callable[[Sizes], tuple[str, bool]]:
    whole = on_device(copy.deepcopy(whole))  # the caller's stays where it is

    def meets(sizes: Sizes) -> tuple[str, bool]:
        timed = latency(
            {"teacher": whole, "candidate": on_device(cut_to(model, sizes))},
            [target.shape], warmup=3, min_runs=15, min_seconds=2.0, disable_tqdm=True,
        )  # fmt: skip
        base, own = (timed[name][target.shape_name]["p50"] for name in ("teacher", "candidate"))
        if target.goal == "speedup":
            return f"{base / own:.2f}x", base / own >= target.value
        return f"{own:.1f} ms", own <= target.value

    return meets


def with_sizes(recipe: Recipe, model: PreTrainedModel, sizes: Sizes) -> Recipe:
    """The recipe with its depth and width stages set to `sizes`; a stage that would have nothing to do is left out.

    Raises:
        ValueError: the recipe has no stage of a kind that the sizes need, or names its layers itself.
    """
    n_layers = len(encoder_layers(model))
    depth = [i for i, s in enumerate(recipe.stages) if isinstance(s, DepthReduction)]
    width = [i for i, s in enumerate(recipe.stages) if isinstance(s, WidthPruning)]
    needs_width = set(structure_of(model).layer_widths) != {(sizes.heads, sizes.ffn)}
    for needed, found, kind in (
        (sizes.layers < n_layers, depth, "depth_reduction"),
        (needs_width, width, "width_pruning"),
    ):
        if needed and not found:
            raise ValueError(
                f"`target` needs a {kind} stage to reach {sizes}, and recipe {recipe.name!r} has none. To resolve, add one, or use "
                'recipe="smbert".'
            )
    new: dict[int, Stage | None] = {}
    for place, layers in zip(depth, _steps(n_layers, sizes.layers, len(depth))):
        stage = recipe.stages[place]
        assert isinstance(stage, DepthReduction)
        if not isinstance(stage.keep, str):
            raise ValueError(
                f"`target` decides how many layers stay, but `keep` of a depth_reduction stage lists them: {list(stage.keep)}. "
                "To resolve, use a name such as `keep: uniform`, or leave `target` out."
            )
        new[place] = None if layers is None else replace(stage, layers=layers)
    for number, place in enumerate(width):
        stage = recipe.stages[place]
        assert isinstance(stage, WidthPruning)
        last = number == len(width) - 1 and needs_width
        new[place] = replace(stage, heads=sizes.heads, ffn=sizes.ffn, params=None, macs=None) if last else None
    stages = [new.get(i, stage) for i, stage in enumerate(recipe.stages)]
    return replace(recipe, stages=tuple(stage for stage in stages if stage is not None))


def _steps(start: int, end: int, n: int) -> Sequence[int | None]:
    """Depths after each of n stages, falling geometrically; None where a stage would remove nothing."""
    out: list[int | None] = []
    now = start
    for i in range(1, n + 1):
        depth = end if i == n else max(end, round(start * (end / start) ** (i / n)))
        out.append(depth if depth < now else None)
        now = min(now, depth)
    return out
