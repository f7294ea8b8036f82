"""The projections of a pruned model, fitted from bottom to top to what the original's residual stream carries.

A sub-layer of the pruned model reads what the pruned ones below it have left. Its best output is therefore not the original's own, but
that which brings the residual stream back to the original's: target = original output + original residual - pruned residual
(Kwon et al. 2022; K-prune, Park et al. 2024). What it reads is mapped back too, by the matrix that comes closest to the original's
from what the pruned model has; the projections that a sub-layer begins with take it up, so that it costs nothing when served. Both
models go through the layers side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .reconstruct import Moments, Reduce, refit
from .stream import FIRST, PARTS, Calls, Stream
from .working_copy import output_projection


def moments_towards(
    original: Stream, student: Stream, part: str, columns: Tensor | None = None, reduce: Reduce | None = None
) -> Moments:
    """Moments of what a pruned sub-layer reads and of what it should put out.

    Args:
        original: in front of the layer; goes on to the next with the last part.
        student: in front of the same layer of the pruned model; stays there.
        part: of `PARTS`.
        columns: of the student's inputs; None: all.
        reduce: sums a tensor over all ranks.
    """
    pairs = (
        (
            other[part].inputs if columns is None else other[part].inputs[:, columns],
            one[part].total - other[part].residual,
        )
        for one, other in zip(original.see(part, advance=part == PARTS[-1]), student.see(part), strict=True)
    )
    return _moments(pairs, reduce)


def _moments(pairs: Iterable[tuple[Tensor, Tensor]], reduce: Reduce | None) -> Moments:
    moments: Moments | None = None
    for inputs, target in pairs:
        if moments is None:
            moments = Moments(inputs.shape[1], target.shape[1], inputs.device)
        moments.add(inputs, target)
    assert moments is not None  # `record` refuses to record nothing
    return moments.reduced(reduce)


@torch.no_grad()
def fit_to_original(
    model: PreTrainedModel, student: PreTrainedModel, calls: Calls, damping: float, reduce: Reduce | None = None
) -> None:
    """Fits the projections of `student` in place, from the first sub-layer that has lost units on.

    Takes (tokens, 5 * hidden) of memory beside the hidden states of both.

    Args:
        model: the original.
        student: cut from it by `keep_units`.
        calls: this process's share of the calibration rows, recorded with `model`.
        damping: towards the student's present weights, see `reconstruct.refit`.
        reduce: sums a tensor over all ranks.
    """
    original, pruned, touched = Stream(model, calls), Stream(student, calls), False
    for layer in range(len(original.layers)):
        seen = [
            {part: (one[part].read, one[part].total) for part in PARTS} for one in original.see(*PARTS, advance=True)
        ]
        for part in PARTS:
            linear = output_projection(student, part, layer)
            if touched and linear.in_features:
                reads = zip(pruned.reads(part), (one[part][0] for one in seen), strict=True)
                _map_back(pruned, part, _moments(reads, reduce), damping)
            touched = touched or linear.in_features < output_projection(model, part, layer).in_features
            if touched:
                pairs = (
                    (other[part].inputs, one[part][1] - other[part].residual)
                    for other, one in zip(pruned.see(part), seen, strict=True)
                )
                _write(linear, *refit(linear.weight, linear.bias, _moments(pairs, reduce), damping))
        del seen  # before the next layer's is there
        pruned.advance()


def _map_back(student: Stream, part: str, moments: Moments, damping: float) -> None:
    """Lets the projections that a part begins with read what is closest to the original's.

    Args:
        student: in front of the layer.
        part: of `PARTS`.
        moments: of what they read (hidden), and of what the original's do (hidden).
        damping: towards reading what is there.
    """
    layer, same = student.layers[student.layer], torch.eye(len(moments.x), device=moments.x.device)
    linears = dict.fromkeys(student.family.get(layer, name) for name in FIRST[part])  # a fused one has three names
    biased = all(linear.bias is not None for linear in linears)
    matrix, shift = refit(same, torch.zeros_like(moments.x) if biased else None, moments, damping)
    for linear in linears:
        assert isinstance(linear, nn.Linear)  # by construction of the families
        weight = linear.weight.double()
        _write(linear, weight @ matrix, None if shift is None else linear.bias.double() + weight @ shift)


def _write(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
