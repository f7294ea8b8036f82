"""What one head and one neuron cost, in parameters or in MACs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from . import measure
from .modeling import encoder_layers
from .surgery import Structure, structure_of

Widths = Sequence[tuple[int, int]]  # (heads, FFN neurons) of each layer


@dataclass(frozen=True)
class Costs:
    """Parameters or MACs of one head, of one neuron, and of all that stays whatever the plan."""

    name: str
    head: int
    neuron: int
    fixed: int

    def total(self, widths: Widths) -> int:
        return self.fixed + sum(heads * self.head + ffn * self.neuron for heads, ffn in widths)


def costs_of(model: PreTrainedModel, name: str, seq_len: int) -> Costs:
    """Costs of a model's units, "params" counted from its tensors or "macs" by formula; `total` is what `measure` says."""
    structure = structure_of(model)
    if name == "macs":
        costs, now = mac_costs(structure, seq_len), measure.macs(model, seq_len)
    else:
        head = neuron = 0
        family = structure.family
        for layer, (heads, ffn) in zip(encoder_layers(model), structure.layer_widths):
            if heads:
                made = {id(m): m for m in (family.get(layer, part) for part in ("query", "key", "value"))}.values()
                head = (sum(map(_numel, made)) + _numel(family.get(layer, "attention_output"), bias=False)) // heads
            if ffn:
                read, write = family.get(layer, "ffn_in"), family.get(layer, "ffn_out")
                neuron = (_numel(read) + _numel(write, bias=False)) // ffn
        costs, now = Costs("params", head, neuron, 0), measure.count_parameters(model).total
    return replace(costs, fixed=now - costs.total(structure.layer_widths))


def mac_costs(structure: Structure, seq_len: int) -> Costs:
    """MACs of the encoder layers for one sequence."""

    def one(widths: tuple[int, int]) -> int:
        return measure.encoder_macs(
            [widths], structure.hidden_size, structure.head_dim, seq_len, structure.family.gated
        )

    return Costs("macs", one((1, 0)), one((0, 1)), 0)


def encoder_parameter_costs(structure: Structure) -> Costs:
    """Parameters of the encoder layers, with biases and norms as in BERT; families without some of them have fewer."""
    hidden = structure.hidden_size
    neuron = 3 * hidden + 2 if structure.family.gated else 2 * hidden + 1
    outside = 6 * hidden  # the biases of both output projections and two norms
    return Costs("params", (4 * hidden + 3) * structure.head_dim, neuron, outside * structure.num_layers)


def _numel(module: nn.Module, bias: bool = True) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if bias or name != "bias")
