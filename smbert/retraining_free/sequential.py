"""Output projections of a pruned model, fitted from bottom to top to what the original's residual stream carries.

A sub-layer of the pruned model reads what the pruned ones below it have left. Its best output is therefore not the original's own, but
that which brings the residual stream back to the original's: target = original output + original residual - pruned residual
(Kwon et al. 2022; K-prune, Park et al. 2024). Both models go through the layers side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .reconstruct import Moments, Reduce, refit
from .stream import PARTS, Calls, Stream
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
    moments: Moments | None = None
    for one, other in zip(original.see(part, advance=part == PARTS[-1]), student.see(part), strict=True):
        inputs = other[part].inputs if columns is None else other[part].inputs[:, columns]
        target = one[part].outputs + one[part].residual - other[part].residual
        if moments is None:
            moments = Moments(inputs.shape[1], target.shape[1], inputs.device)
        moments.add(inputs, target)
    assert moments is not None  # `record` refuses to record nothing
    return moments.reduced(reduce)


def fit_to_original(
    model: PreTrainedModel, student: PreTrainedModel, calls: Calls, damping: float, reduce: Reduce | None = None
) -> None:
    """Fits all output projections of `student` in place, from the first sub-layer that has lost units on.

    Args:
        model: the original.
        student: cut from it by `keep_units`.
        calls: this process's share of the calibration rows, recorded with `model`.
        damping: towards the student's present weights, see `reconstruct.refit`.
        reduce: sums a tensor over all ranks.
    """
    original, pruned, touched = Stream(model, calls), Stream(student, calls), False
    for layer in range(len(original.layers)):
        for part in PARTS:
            linear = output_projection(student, part, layer)
            touched = touched or linear.in_features < output_projection(model, part, layer).in_features
            if touched:
                moments = moments_towards(original, pruned, part, reduce=reduce)
                weight, bias = refit(linear.weight, linear.bias, moments, damping)
                with torch.no_grad():
                    linear.weight.copy_(weight)
                    if bias is not None:
                        linear.bias.copy_(bias)
        if original.layer == layer:
            original.advance()
        pruned.advance()
