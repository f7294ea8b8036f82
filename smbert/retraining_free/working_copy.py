"""A copy of a model whose output projections can be overwritten: how retraining-free methods try out what they prune.

Removed units keep their place in the copy, with columns of zeros, so that indices mean the same all the way; `keep_units` then cuts
them out. Only the output projections take memory of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling import encoder_layers, family_of
from .stream import PARTS


def working_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in eval mode that shares all parameters with the model, except for the output projections."""
    family = family_of(model)
    own = {
        id(parameter)
        for layer in encoder_layers(model)
        for part in PARTS
        for parameter in family.get(layer, part).parameters()
    }
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own}
    return copy.deepcopy(model, dict(shared)).eval()


def output_projection(model: PreTrainedModel, part: str, layer: int) -> nn.Linear:
    """The output projection `part` of a layer."""
    found = family_of(model).get(encoder_layers(model)[layer], part)
    assert isinstance(found, nn.Linear)  # by construction of the families
    return found


@torch.no_grad()
def put(linear: nn.Linear, columns: Tensor | Sequence[int], weight: Tensor, bias: Tensor | None) -> None:
    """Writes a weight (hidden, len(columns)) into its columns, zeros into all others, and the bias."""
    linear.weight.zero_()
    linear.weight[:, torch.as_tensor(columns, dtype=torch.long, device=linear.weight.device)] = weight.to(linear.weight)
    if bias is not None:
        linear.bias.copy_(bias)
