"""Capture of what the distillation losses compare: hidden states, and the queries, keys and values of attention.

Forward hooks take the tensors from the modules that make them, under any attention back end: under `sdpa`,
`output_attentions=True` yields an empty tuple and attention distillation would be zero in silence.

`hidden[0]` is the embedding output and `hidden[i]` the output of layer i (for ModernBERT before the final norm).
Queries, keys and values are the outputs of the projections, so ModernBERT's are those before RoPE, and MPNet's scores
lack the relative position bias that all its layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .modeling import encoder_layers, family_of, head_dim

QKV = ("query", "key", "value")


@dataclass
class Features:
    """What one forward pass showed; made by `capture_features`, or by hand around cached teacher logits.

    Attributes:
        mask: (batch, seq) bool, true at real tokens.
        logits: (batch, classes) or (batch, seq, classes).
        hidden: layer -> (batch, seq, hidden); 0 is the embedding output, i the output of layer i.
        queries, keys, values: layer (from 1) -> (batch, heads, seq, head_dim).
    """

    mask: Tensor
    logits: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def real_rows(self) -> Tensor:
        """Indices of the real tokens in the flattened batch, (real tokens,): found once, used by every loss."""
        return self.mask.flatten().nonzero().squeeze(-1)

    def real(self, x: Tensor) -> Tensor:
        """(batch, seq, d) of any dtype -> (real tokens, d) in float32."""
        flat = x.flatten(0, 1)
        return (flat if len(self.real_rows) == len(flat) else flat.index_select(0, self.real_rows)).float()


def capture_features(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    hidden: Collection[int] = (),
    qkv: Collection[int] = (),
    call: Callable[..., Any] | None = None,
) -> Features:
    """Run one forward pass and keep the features asked for, and nothing else. The hooks never outlive the call.

    Gradients flow through what is captured; wrap the call in `torch.no_grad()` for the teacher. Leave the labels out of
    `inputs`, or the model computes a loss that nobody reads.

    Args:
        model: the bare model, whose layers get the hooks.
        inputs: arguments of the forward; `attention_mask` (batch, seq) tells the real tokens, without it all are real.
        hidden: hidden states to keep, 0 (embedding output) to n (last layer).
        qkv: layers, 1 to n, whose queries, keys and values to keep.
        call: what to run in place of `model`, such as the DistributedDataParallel wrapper around it.

    Raises:
        ValueError: for a layer that does not exist; for reentrant gradient checkpointing, which hides the gradients of
            what happens inside a layer; for `nn.DataParallel`, whose replicas would overwrite each other's features.
    """
    if isinstance(call, nn.DataParallel):
        raise ValueError(
            "features cannot be captured under nn.DataParallel, whose replicas share the hooks. "
            "To resolve, start one process per GPU with `accelerate launch` or `torchrun`."
        )
    layers, family = encoder_layers(model), family_of(model)
    for label, asked, lowest in (("hidden", hidden, 0), ("qkv", qkv, 1)):
        if outside := sorted(i for i in asked if not lowest <= i <= len(layers)):
            raise ValueError(f"`{label}` must lie between {lowest} and {len(layers)} for this model, got {outside}.")

    kept: dict[tuple[str, int], Tensor] = {}
    watched: dict[tuple[str, int], nn.Module] = {}

    def keep(key: tuple[str, int], output: Any) -> None:
        kept[key] = output[0] if isinstance(output, tuple) else output

    def watch(key: tuple[str, int], module: nn.Module) -> Any:
        watched[key] = module
        return module.register_forward_hook(lambda _module, _args, output: keep(key, output))

    handles: list[Any] = []
    try:
        for i in sorted(hidden):
            if i == 0:
                handles.append(
                    layers[0].register_forward_pre_hook(
                        lambda _module, args, kwargs: keep(("hidden", 0), args or kwargs["hidden_states"]),
                        with_kwargs=True,
                    )
                )
            else:
                handles.append(watch(("hidden", i), layers[i - 1]))
        for i in sorted(qkv):
            for part in QKV[:1] if family.fused_qkv else QKV:
                handles.append(watch((part, i), family.get(layers[i - 1], part)))
        output = (model if call is None else call)(**inputs)
    finally:
        for handle in handles:
            handle.remove()

    _check_gradients(kept, watched)
    return _features(kept, _token_mask(inputs), getattr(output, "logits", None), hidden, qkv, model, family.fused_qkv)


def _check_gradients(kept: dict[tuple[str, int], Tensor], watched: dict[tuple[str, int], nn.Module]) -> None:
    for (part, i), module in watched.items():
        if (part, i) not in kept:
            raise ValueError(
                f"the forward bypassed the {part} module of layer {i}, so there is nothing to capture. "
                "To resolve, map the objective to another layer, or pass the `model` that `call` really runs."
            )
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        if learns and not kept[part, i].requires_grad:
            raise ValueError(
                f"the {part} output of layer {i} carries no gradient although its weights are being trained. "
                "To resolve, set `gradient_checkpointing_kwargs={'use_reentrant': False}`, or checkpoint no gradients."
            )


def _token_mask(inputs: dict[str, Any]) -> Tensor:
    if (mask := inputs.get("attention_mask")) is not None:
        if mask.ndim != 2:
            raise ValueError(f"`attention_mask` must have the shape (batch, seq), got {tuple(mask.shape)}.")
        return mask.bool()
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _features(
    kept: dict[tuple[str, int], Tensor],
    mask: Tensor,
    logits: Tensor | None,
    hidden: Collection[int],
    qkv: Collection[int],
    model: Any,
    fused: bool,
) -> Features:
    # All reshaping happens here and not in the hooks: with gradient checkpointing a hook runs inside the region that
    # the backward pass computes again without it, and the two runs have to do the same.
    features = Features(mask=mask, logits=logits, hidden={i: kept["hidden", i] for i in hidden})
    for i in qkv:
        size = head_dim(model.config)
        if fused:
            parts = kept["query", i].unflatten(-1, (3, -1, size)).unbind(-3)  # 3 x (batch, seq, heads, head_dim)
        else:
            parts = tuple(kept[part, i].unflatten(-1, (-1, size)) for part in QKV)
        features.queries[i], features.keys[i], features.values[i] = (x.transpose(1, 2) for x in parts)
    return features
