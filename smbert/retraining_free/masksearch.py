"""Fisher mask search with rearrangement and least-squares rescaling (Kwon et al. 2022, "A Fast Post-Training Pruning Framework").

1. The importance of a unit is the diagonal Fisher information of its mask: the mean over samples of (d loss_i / d mask)^2. Here the
   loss is the divergence from the model's own answers, so that no gold label is needed.
2. The sizes are those that lose the least importance in all within the budget.
3. Within each sub-layer of these sizes, units are exchanged as the block of the Fisher matrix that belongs to it suggests: what
   several units lose together is not the sum of what each loses, since they may cancel each other or do the same.
4. From bottom to top, each unit that stays gets a factor with which the sub-layer comes closest to the original's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._sample_losses import kl_probes
from ..importance import frozen, unit_masks
from ..surgery import PruningPlan, keep_units, structure_of
from ..trainer import training_attention
from .cost_table import CostTable
from .reconstruct import Reduce, rescale
from .search import find_sizes, options_of
from .sequential import moments_towards
from .stream import PARTS, Calls, Stream, autocast_to, inputs_of
from .working_copy import output_projection

logger = logging.getLogger(__name__)

Gradients = dict[tuple[str, int], Tensor]  # (part, layer) -> (batch, units)


def prune_by_fisher(
    model: PreTrainedModel,
    calls: Calls,
    batches: Sequence[Mapping[str, Any]],
    table: CostTable,
    budget: float,
    *,
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A smaller model within a budget, and what is worth recording.

    Args:
        model: left as it is.
        calls: this process's share of the calibration rows, recorded with `model`.
        batches: the same rows.
        table: costs of the sizes that sub-layers may have.
        budget: in the table's unit.
        autocast: of the forward and backward passes, for example torch.bfloat16.
        reduce: sums a tensor over all ranks.

    Raises:
        ValueError: the budget is below what can be reached.
    """
    widths = structure_of(model).layer_widths
    with training_attention(model):
        blocks = fisher_blocks(model, batches, autocast, reduce)
    keys = [(part, layer) for layer in range(len(widths)) for part in PARTS]
    sublayers = []
    for (part, layer), allowed in zip(keys, [table.heads, table.ffn] * len(widths)):
        lost = torch.cat([torch.zeros(1).double(), blocks[part, layer].diagonal().sort().values.cumsum(0)])
        units = len(lost) - 1
        sizes = sorted({size for size in allowed if size < units} | {units})
        sublayers.append((sizes, [float(lost[units - size]) for size in sizes]))
    found = find_sizes(options_of(sublayers, table), table, budget)
    kept = {
        key: rearranged(blocks[key], size)
        for key, size in zip(keys, (size for pair in found.widths for size in pair), strict=True)
    }
    plan = PruningPlan(*(tuple(kept[part, layer] for layer in range(len(widths))) for part in PARTS))
    pruned = keep_units(model, plan)
    rescaled = rescale_to_original(model, pruned, calls, reduce)
    return pruned, {"cost": found.cost, "rescaled_sublayers": rescaled}


def fisher_blocks(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> Gradients:
    """The Fisher information between the masks of each sub-layer's units, (part, layer) -> (units, units), float64."""

    def objective(inputs: dict[str, Tensor]) -> Tensor:
        return kl_probes("fisher", model, inputs, {}, 1.0)

    blocks: Gradients = {}
    samples = torch.zeros(1, dtype=torch.float64)
    for _, gradients in mask_gradients(model, batches, objective, autocast):
        samples += len(next(iter(gradients.values())))
        for key, rows in gradients.items():
            product = (rows.T @ rows).double()
            blocks[key] = blocks[key] + product if key in blocks else product
    total = reduce(samples) if reduce else samples
    for layer, pair in enumerate(structure_of(model).layer_widths):
        for part, units in zip(PARTS, pair):
            block = blocks.get((part, layer), torch.zeros(units, units, dtype=torch.float64))
            blocks[part, layer] = (reduce(block) if reduce else block) / total.item()
    return blocks


def mask_gradients(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    objective: Callable[[dict[str, Tensor]], Tensor],
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[dict[str, Tensor], Gradients]]:
    """For each batch, its inputs and d objective_i / d mask_u of all units u and samples i, on the CPU.

    Args:
        model: is in eval mode and takes no gradients between two batches; afterwards it is as it was.
        batches: model inputs; labels are left out.
        objective: one number for each sample of a batch, (batch,).
        autocast: for example torch.bfloat16.
    """
    with frozen(model), unit_masks(model) as masks:
        for batch in batches:
            masks.clear()
            inputs = inputs_of(batch, model.device)
            with torch.enable_grad(), autocast_to(model.device, autocast):
                values = objective(inputs)
            found = torch.autograd.grad(values.sum(), list(masks.values())) if masks else ()
            yield inputs, {key: rows.float().cpu() for key, rows in zip(masks, found)}


def rearranged(block: Tensor, size: int) -> tuple[int, ...]:
    """The `size` units that stay, so that the others lose little together: greedy exchanges over the Fisher block.

    Begins with the units of least importance as the removed ones. Each further unit in turn joins them, and the one without which
    they would then lose least comes back.
    """
    order = block.diagonal().argsort(stable=True).tolist()
    removed = torch.zeros(len(order), dtype=torch.bool)
    removed[order[: len(order) - size]] = True
    if 0 < size < len(order):
        together = block[:, removed].sum(1)  # of each unit with all the removed ones
        for unit in order[len(order) - size :]:
            removed[unit] = True
            together = together + block[:, unit]
            lost = together[removed].sum() - 2 * together + block.diagonal()
            back = int(lost.masked_fill(~removed, torch.inf).argmin())
            removed[back] = False
            together = together - block[:, back]
    return tuple((~removed).nonzero().flatten().tolist())


def rescale_to_original(
    model: PreTrainedModel, student: PreTrainedModel, calls: Calls, reduce: Reduce | None = None
) -> int:
    """Rescales the units of `student` in place, from the first sub-layer that has lost units on.

    Ends at the first sub-layer whose factors are refused, since those above build on it.

    Returns:
        The number of sub-layers that were rescaled.
    """
    original, pruned, touched, done = Stream(model, calls), Stream(student, calls), False, 0
    for layer in range(len(original.layers)):
        for part in PARTS:
            linear = output_projection(student, part, layer)
            touched = touched or linear.in_features < output_projection(model, part, layer).in_features
            if not touched:
                continue
            moments = moments_towards(original, pruned, part, reduce=reduce)
            if linear.in_features == 0:
                continue
            dim = structure_of(model).head_dim if part == "attention_output" else 1
            factors = rescale(linear.weight.detach(), linear.bias, moments, dim)
            if factors is None:
                logger.info("rescaling ends at %s of layer %d, whose factors are out of range", part, layer)
                return done
            with torch.no_grad():
                linear.weight.mul_(factors.repeat_interleave(dim).to(linear.weight))
            done += 1
        if original.layer == layer:
            original.advance()
        pruned.advance()
    return done
