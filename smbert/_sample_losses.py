"""One number per sample from a model's outputs, so that one backward of their sum keeps the samples apart."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def label_losses(
    name: str, model: PreTrainedModel, inputs: dict[str, Tensor], labels: dict[str, Tensor], temperature: float = 1.0
) -> Tensor:
    """The loss of each sample (batch,). Token tasks: mean over the sample's labelled tokens, not over the batch's."""
    outputs = model(**inputs)
    if "start_logits" in outputs:
        ends = [_need(labels, key, name) for key in ("start_positions", "end_positions")]
        total = torch.zeros(())
        for logits, position in zip(_span_logits(outputs, inputs), ends):
            length = logits.shape[1]
            position = position.reshape(-1).clamp(0, length)  # as transformers: beyond the text means ignored
            total = total.to(logits) + F.cross_entropy(logits, position, ignore_index=length, reduction="none") / 2
        return total
    if "logits" not in outputs:
        raise ValueError(
            f"`{name}` needs a model with a task head, got {type(model).__name__}. To resolve, load it with its head, or "
            "use taylor_kl or magnitude, which do without labels."
        )
    logits, target = outputs.logits.float(), _need(labels, "labels", name)
    kind = _kind(model, target)
    if kind == "regression":
        return F.mse_loss(logits, target.to(logits).reshape(logits.shape), reduction="none").flatten(1).mean(1)
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").flatten(1).mean(1)
    target = target.long().reshape(logits.shape[:-1])
    counted = target != -100 if target.dim() > 1 else torch.ones_like(target, dtype=torch.bool)
    bad = target[counted & ((target < 0) | (target >= logits.shape[-1]))]
    if len(bad):
        raise ValueError(
            f"`labels` must lie between 0 and {logits.shape[-1] - 1} for `{name}`, got {bad[0].item()}. To resolve, score on "
            "a labelled split, or use taylor_kl, which needs no labels."
        )
    losses = F.cross_entropy(logits.flatten(0, -2), target.masked_fill(~counted, -100).flatten(), reduction="none")
    losses = losses.reshape(len(logits), -1)  # (batch, 1) or (batch, seq)
    return losses.sum(1) / counted.reshape(len(logits), -1).sum(1).clamp(min=1)


def kl_probes(
    name: str, model: PreTrainedModel, inputs: dict[str, Tensor], labels: dict[str, Tensor], temperature: float
) -> Tensor:
    """v . logits of each sample (batch,), with E[v v'] the curvature of its KL divergence at the model's own prediction."""
    outputs = model(**inputs)
    real = _token_mask(inputs)  # (batch, seq)
    seeds = [zlib.crc32(row[keep].long().cpu().numpy().tobytes()) for row, keep in zip(inputs["input_ids"], real)]
    if "start_logits" in outputs:
        total = torch.zeros(())
        for shift, logits in enumerate(_span_logits(outputs, inputs)):
            signs = _signs([seed + shift for seed in seeds], real, 1).squeeze(-1).to(logits)
            total = total.to(logits) + (_softmax_root(logits / temperature, signs) * logits).sum(1) / math.sqrt(2)
        return total
    logits = (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float()
    tokens = real if logits.dim() == 3 else real.new_ones(len(logits), 1)  # (batch, seq) or (batch, 1)
    logits = logits.reshape(*tokens.shape, logits.shape[-1])
    signs = _signs(seeds, tokens, logits.shape[-1]).to(logits)
    kind = _kind(model, None) if "logits" in outputs else "regression"
    if kind == "regression":
        probe = signs / math.sqrt(logits.shape[-1])
    elif kind == "multi_label_classification":
        p = torch.sigmoid(logits.detach() / temperature)
        probe = (p * (1 - p) / logits.shape[-1]).sqrt() * signs
    else:
        probe = _softmax_root(logits / temperature, signs)
    return (probe * logits * tokens[..., None]).flatten(1).sum(1) / tokens.sum(1).clamp(min=1).sqrt()


def _softmax_root(logits: Tensor, signs: Tensor) -> Tensor:
    """v with E[v v'] = diag(p) - p p' over random signs; for two classes v v' itself is that, whatever the signs.

    diag(p) - p p' = D (I - u u') D with D = diag(sqrt(p)), u = sqrt(p). A reflection takes the axis of the likeliest class
    to -u, hence the other axes to a basis of what is orthogonal to u: v = D . reflection . (signs, 0 on that axis).
    """
    u = torch.softmax(logits.detach(), -1).sqrt()  # (..., classes)
    axis = F.one_hot(u.argmax(-1), u.shape[-1]).to(u)
    w, s = u + axis, signs * (1 - axis)
    return u * (s - 2 * w * (w * s).sum(-1, keepdim=True) / (w * w).sum(-1, keepdim=True))


def _signs(seeds: list[int], tokens: Tensor, n: int) -> Tensor:
    """Random signs (batch, seq, n), drawn for each sample from its own seed, in order of its real tokens only."""
    signs = torch.zeros(*tokens.shape, n)
    for row, keep, seed in zip(signs, tokens.cpu(), seeds):
        drawn = torch.randint(0, 2, (int(keep.sum()), n), generator=torch.Generator().manual_seed(seed))
        row[keep] = drawn.float() * 2 - 1
    return signs.to(tokens.device)


def _need(labels: dict[str, Tensor], key: str, name: str) -> Tensor:
    if key not in labels:
        raise ValueError(
            f"`{name}` needs `{key}` in every batch, got {', '.join(labels) or 'no labels at all'}. To resolve, score on "
            "labelled data, or use taylor_kl or magnitude, which need no labels."
        )
    return labels[key]


def _kind(model: PreTrainedModel, target: Tensor | None) -> str:
    """The problem type, guessed as transformers does, but without writing the guess into the config."""
    kind = getattr(model.config, "problem_type", None)
    if kind is None and model.config.num_labels == 1:
        return "regression"
    if kind is None and target is not None and target.is_floating_point():
        return "multi_label_classification"
    return kind or "single_label_classification"


def _token_mask(inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()


def _span_logits(outputs: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Start and end logits (batch, seq), where padding cannot be an answer: else it would change the loss."""
    padding = ~_token_mask(inputs)
    return [o.float().masked_fill(padding, -1e4) for o in (outputs.start_logits, outputs.end_logits)]
