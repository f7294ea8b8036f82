"""K-prune (Park et al. 2024, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models").

For each sub-layer from bottom to top:

1. Score all units of this and the later sub-layers by the knowledge that they carry: 1/2 (dKL / dmask)^2 of the answers, KL from the
   original's at temperature 2, and 2.5e-4 times sum x^2 * mean(w^2) of the representations, both per cost. A head counts the sum
   over its columns, which is what the paper's mean over 64 columns times mu = 64 comes to; it has one mask, and not one for each.
2. One threshold for all these units spends what is left of the budget; only this sub-layer's units below it are removed.
3. Its output projection is fitted to the original's residual stream in closed form.

The paper's gradients are of batches; here they are of single samples, so that the batch size does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..surgery import PruningPlan, keep_units, structure_of
from ..trainer import training_attention
from .calibration import divergence, problem_kind
from .cost_table import CostTable
from .masksearch import mask_gradients
from .reconstruct import Reduce, refit
from .sequential import moments_towards
from .stream import PARTS, Calls, Stream, masks_of_chunks, record
from .working_copy import output_projection, put, working_copy

logger = logging.getLogger(__name__)

TEMPERATURE = 2.0
REPRESENTATION = 2.5e-4  # weight of what representations know against what answers know


def prune_by_knowledge(
    model: PreTrainedModel,
    calls: Calls,
    batches: Sequence[Mapping[str, Any]],
    table: CostTable,
    budget: float,
    *,
    multiple_of: int = 8,
    damping: float = 1e-2,
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A smaller model within a budget, and what is worth recording.

    Args:
        model: left as it is.
        calls: this process's share of the calibration rows, recorded with `model`.
        batches: the same rows.
        table: "macs" or "params": each unit must cost the same.
        budget: in the table's unit.
        multiple_of: numbers of neurons are rounded down to multiples of it.
        damping: of the fits, see `reconstruct.refit`.
        autocast: of the forward and backward passes, for example torch.bfloat16.
        reduce: sums a tensor over all ranks.

    Raises:
        ValueError: milliseconds, or a budget below what can be reached.
    """
    check_linear(table)
    structure = structure_of(model)
    widths, left = structure.layer_widths, budget - table.fixed
    if left < 0:
        raise ValueError(
            f"`{table.name}` must be at least {table.fixed:,.0f}, the smallest that this model reaches by its heads and neurons, got "
            f"{budget:,.0f}. To resolve, allow more, or remove layers or vocabulary first."
        )
    copy = working_copy(model)
    original, student = Stream(model, calls), Stream(copy, calls)
    price = {part: max(costs.values()) / max(1, max(costs)) for part, costs in zip(PARTS, (table.heads, table.ffn))}
    keys = [(part, layer) for layer in range(len(widths)) for part in PARTS]
    units = {(part, layer): count for layer, pair in enumerate(widths) for part, count in zip(PARTS, pair)}
    kept: dict[tuple[str, int], tuple[int, ...]] = {}
    # Under what the passes run under, or the first scores would be the difference in rounding.
    with training_attention(copy):
        answers = record(copy, batches, autocast).outputs
    for number, (part, layer) in enumerate(keys):
        # The streams stay on the back end that recorded `calls`, whose masks are its own.
        with training_attention(copy):
            scores = knowledge(copy, answers, batches, keys[number:], autocast, reduce)
        step = 1 if part == "attention_output" else multiple_of
        kept[part, layer] = _above_threshold(scores, price, (part, layer), left, step)
        left -= price[part] * len(kept[part, layer])
        columns = _columns(kept[part, layer], structure.head_dim if part == "attention_output" else 1)
        moments = moments_towards(original, student, part, columns, reduce)
        linear = output_projection(copy, part, layer)
        if any(len(kept[key]) < units[key] for key in kept):
            put(linear, columns, *refit(linear.weight[:, columns].detach(), linear.bias, moments, damping))
        if part == PARTS[-1]:
            student.advance()
        logger.info("%s of layer %d keeps %d of %d", part, layer, len(kept[part, layer]), units[part, layer])
    plan = PruningPlan(*(tuple(kept[part, layer] for layer in range(len(widths))) for part in PARTS))
    return keep_units(copy, plan), {"cost": table.fixed + sum(price[part] * len(k) for (part, _), k in kept.items())}


def check_linear(table: CostTable) -> None:
    """ValueError for a table of latencies, whose units do not all cost the same."""
    if table.name == "latency_ms":
        raise ValueError(
            'K-prune needs a budget of `macs` or `params`, got one in time. To resolve, give one of these, or use method="obs".'
        )


def knowledge(
    copy: PreTrainedModel,
    answers: Sequence[Tensor],
    batches: Sequence[Mapping[str, Any]],
    keys: Sequence[tuple[str, int]],
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> dict[tuple[str, int], Tensor]:
    """What each unit of the sub-layers `keys` of a partly pruned copy knows, (units,) each; not yet per cost.

    Args:
        copy: a working copy of the original.
        answers: the original's on each batch.
    """
    kind, targets = problem_kind(copy), iter(answers)
    mask: list[Tensor] = []  # of the batch that runs

    def objective(inputs: dict[str, Tensor]) -> Tensor:
        mask[:] = [inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))]
        out = copy(**inputs)
        found = (out.logits if "logits" in out else out.last_hidden_state).float()
        return divergence(found, next(targets), kind, inputs.get("attention_mask"), TEMPERATURE)

    dim = structure_of(copy).head_dim
    squares = {key: torch.zeros(_linear(copy, key).in_features, dtype=torch.float64) for key in keys}
    gradients = {
        key: torch.zeros(len(squares[key]) // (dim if key[0] == "attention_output" else 1), dtype=torch.float64)
        for key in keys
    }
    counts = torch.zeros(2, dtype=torch.float64)  # samples, tokens
    with _input_squares(copy, squares, mask):
        for _, found in mask_gradients(copy, batches, objective, autocast):
            counts += torch.tensor([float(len(mask[0])), float(mask[0].sum())])
            for key in keys:
                if key in found:
                    gradients[key] += found[key].double().square().sum(0)
    flat = torch.cat([counts, *gradients.values(), *squares.values()])
    flat = reduce(flat) if reduce else flat
    parts = flat[2:].split([*map(len, gradients.values()), *map(len, squares.values())])
    scores = {}
    for key, gradient, square in zip(keys, parts[: len(keys)], parts[len(keys) :]):
        weight = _linear(copy, key).weight.detach().double().cpu()
        rows = (square / flat[1] * weight.square().mean(0)).reshape(len(gradient), -1 if len(gradient) else 0)
        scores[key] = gradient / flat[0] / 2 + REPRESENTATION * rows.sum(1)
    return scores


@contextmanager
def _input_squares(copy: PreTrainedModel, squares: dict[tuple[str, int], Tensor], mask: list[Tensor]) -> Iterator[None]:
    """Within the context, forwards add to `squares` the sum over real tokens of each projection's squared inputs."""

    def watch(key: tuple[str, int]) -> Any:
        mask_of = masks_of_chunks(mask)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            real = args[0].detach().float() * mask_of(args[0])[..., None]
            squares[key] += real.square().sum((0, 1)).double().cpu()

        return hook

    with ExitStack() as stack:
        for key in squares:
            stack.callback(_linear(copy, key).register_forward_pre_hook(watch(key)).remove)
        yield


def _above_threshold(
    scores: Mapping[tuple[str, int], Tensor],
    price: Mapping[str, float],
    now: tuple[str, int],
    left: float,
    step: int,
) -> tuple[int, ...]:
    """The units of the sub-layer `now` that stay where all units of `scores` compete, by score per cost, for what is left."""
    ranked = sorted(
        (
            (float(value) / price[key[0]], key == now, key, unit)
            for key, values in scores.items()
            for unit, value in enumerate(values)
        ),
        key=lambda entry: (-entry[0], not entry[1], entry[2], entry[3]),
    )
    kept: list[int] = []
    for _, own, key, unit in ranked:
        if price[key[0]] > left:
            break
        left -= price[key[0]]
        if own:
            kept.append(unit)
    if len(kept) < len(scores[now]):
        kept = kept[: len(kept) // step * step]  # they come best first
    return tuple(sorted(kept))


def _linear(copy: PreTrainedModel, key: tuple[str, int]) -> nn.Linear:
    return output_projection(copy, *key)


def _columns(units: Sequence[int], dim: int) -> Tensor:
    return (torch.tensor(list(units), dtype=torch.long)[:, None] * dim + torch.arange(dim)).flatten()
