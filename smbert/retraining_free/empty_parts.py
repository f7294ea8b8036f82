"""Parts without units are passed by: each would still add its bias and norm the residual stream, at a tenth of a full part's time.

What such a part does to the residual stream, y = norm(x + bias), is nearly one factor and one shift for each hidden unit, since the
statistics of a norm vary little between tokens. Both go into the norm of the part before, whose output nothing else reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling import ADD_NORMS, encoder_layers, family_of
from ..surgery import empty_parts, pass_by, structure_of
from .reconstruct import Reduce
from .stream import PARTS, inputs_of, masks_of_chunks


@torch.no_grad()
def without_empty_parts(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], reduce: Reduce | None = None
) -> PreTrainedModel:
    """The model with all `surgery.empty_parts` passed by, and the norms before them fitted to what they did; itself if there are none.

    Args:
        model: stays as it is.
        batches: this process's share of calibration rows; model inputs (batch, seq), padding does not count.
        reduce: sums a tensor over all ranks.
    """
    parts = empty_parts(model)
    if not parts:
        return model
    sums = {part: torch.zeros(5, structure_of(model).hidden_size, dtype=torch.float64) for part in parts}
    mask: list[Tensor] = []

    def watch(part: tuple[int, int]) -> Any:
        mask_of = masks_of_chunks(mask)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            real = mask_of(output)
            x, y = (t[real].double().cpu() for t in (args[0], output))  # (tokens, hidden)
            sums[part] += torch.stack([torch.ones_like(x), x, y, x * x, x * y]).sum(1)

        return hook

    training = model.training
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.callback(_norm(model, part).register_forward_hook(watch(part)).remove)
        stack.callback(model.train, training)
        model.eval()
        for batch in batches:
            inputs = inputs_of(batch, model.device)
            mask[:] = [inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()]
            model(**inputs)
    slim = pass_by(model, parts)
    passed = structure_of(slim).passed_by
    for part in parts:
        count, x, y, xx, xy = reduce(sums[part]) if reduce else sums[part]
        mean_x, mean_y = x / count, y / count
        spread = (xx / count - mean_x**2).clamp(min=0)
        # A unit that never changes is a shift alone.
        factor = torch.where(spread > 1e-12, (xy / count - mean_x * mean_y) / spread.clamp(min=1e-12), 0)
        layer, kind = part
        bias = family_of(model).get(encoder_layers(model)[layer], PARTS[kind]).bias.double().cpu()
        shift = mean_y - factor * (mean_x - bias)
        before = max(p for p in _all_parts(slim) if p < part and not passed[p[0]][p[1]])
        norm = _norm(slim, before)
        norm.weight.copy_(norm.weight.double().cpu() * factor)
        norm.bias.copy_(norm.bias.double().cpu() * factor + shift)
    return slim


def _all_parts(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(layer, part) for layer in range(len(encoder_layers(model))) for part in range(len(PARTS))]


def _norm(model: PreTrainedModel, part: tuple[int, int]) -> Any:
    layer, kind = part
    return family_of(model).get(encoder_layers(model)[layer], list(ADD_NORMS)[kind]).LayerNorm
