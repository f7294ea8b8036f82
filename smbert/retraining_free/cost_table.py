"""What a sub-layer of each size costs, in parameters, MACs or milliseconds: one small interface for every kind of budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from .._costs import Widths, costs_of


@dataclass(frozen=True)
class CostTable:
    """Cost of a whole model as a sum over its sub-layers.

    Attributes:
        name: "params", "macs" or "latency_ms".
        fixed: cost of all that stays whatever the sizes: embeddings, norms, task head.
        heads: cost of an attention sub-layer by its number of heads.
        ffn: cost of a feed-forward sub-layer by its number of neurons.
    """

    name: str
    fixed: float
    heads: Mapping[int, float]
    ffn: Mapping[int, float]

    def total(self, widths: Widths) -> float:
        """Cost of a model of these (heads, neurons) per layer.

        Raises:
            ValueError: a size that the table does not hold.
        """
        return self.fixed + sum(self.of(0, heads) + self.of(1, ffn) for heads, ffn in widths)

    def of(self, kind: int, size: int) -> float:
        """Cost of one sub-layer: kind 0 is attention with `size` heads, 1 feed-forward with `size` neurons."""
        table = (self.heads, self.ffn)[kind]
        if size not in table:
            what = ("heads", "neurons")[kind]
            raise ValueError(
                f"the table of {self.name} must hold the size of {size} {what}, it holds {sorted(table)}. To resolve, make the "
                "table anew for these sizes."
            )
        return table[size]


def counted_costs(
    model: PreTrainedModel, name: str, heads: Iterable[int], ffn: Iterable[int], seq_len: int = 128
) -> CostTable:
    """Parameters ("params") or MACs ("macs") by formula, exactly as `measure` counts them.

    Args:
        model: any known family.
        name: "params": all of the model's; "macs": the encoder's, for one sequence.
        heads, ffn: the sizes that the table shall hold.
        seq_len: tokens of that sequence.
    """
    costs = costs_of(model, name, seq_len)
    return CostTable(
        name, costs.fixed, {n: n * costs.head for n in set(heads)}, {n: n * costs.neuron for n in set(ffn)}
    )
