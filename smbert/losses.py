"""The distillation losses: what `smbert.objectives` configures.

Every loss is computed in float32 (`AttentionLoss` says where not), reads real tokens only (more padding changes nothing)
and is 0, but for rounding, when teacher and student agree. A loss over several layer pairs is the mean over them, so a
weight keeps its meaning when the layer map changes.

Papers: Hinton et al. 2015 (logits), TinyBERT 2020 (hidden, attention, embedding), DistilBERT 2019 (cosine),
MiniLMv2 2021 (relation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Features


class Loss(nn.Module, ABC):
    """Base of the losses: float32 whatever the autocast, and a clear error where the two models cannot be compared."""

    def forward(self, student: Features, teacher: Features, labels: Tensor | None = None) -> Tensor:
        with torch.autocast(student.mask.device.type, enabled=False):
            return self.compute(student, teacher, labels)

    @abstractmethod
    def compute(self, student: Features, teacher: Features, labels: Tensor | None) -> Tensor:
        """The loss of one batch, a float32 scalar."""


def _pick(student: Features, teacher: Features, what: str, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The student's and the detached teacher's feature of one (teacher layer, student layer) pair."""
    if student.mask.shape != teacher.mask.shape:
        raise ValueError(
            f"student and teacher must see the same tokens, got batches of {tuple(student.mask.shape)} and "
            f"{tuple(teacher.mask.shape)} tokens. To resolve, give both the same input, or distil logits only."
        )
    found = []
    for owner, features, layer in (("student", student, pair[1]), ("teacher", teacher, pair[0])):
        if layer not in getattr(features, what):
            raise ValueError(
                f"the {owner}'s {what} of layer {layer} were not captured. To resolve, capture all of `needs`."
            )
        found.append(getattr(features, what)[layer])
    return found[0], found[1].detach()


def _two_logits(student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
    """Float32 logits of one shape, (rows, classes); of token classification only the real tokens' rows."""
    if student.logits is None or teacher.logits is None:
        raise ValueError("the logits objective needs the logits of student and teacher, got a model without a head.")
    if student.logits.shape != teacher.logits.shape:
        raise ValueError(
            f"student and teacher logits must have one shape, got {tuple(student.logits.shape)} and "
            f"{tuple(teacher.logits.shape)}. To resolve, train the teacher on the student's labels."
        )
    per_token = student.logits.ndim == 3
    s, t = (student.real(x) if per_token else x.float() for x in (student.logits, teacher.logits.detach()))
    return s, t


class LogitsLoss(Loss):
    """T^2 KL(softmax(z_T / T) || softmax(z_S / T)), mean over rows; see `LogitsObjective`."""

    def __init__(self, kind: str, temperature: float) -> None:
        super().__init__()
        self.kind, self.temperature = kind, temperature

    def compute(self, student: Features, teacher: Features, labels: Tensor | None) -> Tensor:
        s, t = _two_logits(student, teacher)
        if self.kind == "regression":
            return F.mse_loss(s, t)
        if self.kind == "single_label" and s.shape[-1] < 2:
            raise ValueError(
                "a softmax needs at least two classes, got one logit per row. To resolve, make it a regression task."
            )
        s, t = s / self.temperature, t / self.temperature
        if self.kind == "multi_label":
            # A Bernoulli distribution is the softmax over (z, 0).
            s, t = (torch.stack((F.logsigmoid(z), F.logsigmoid(-z)), dim=-1) for z in (s, t))  # (rows, labels, 2)
        else:
            s, t = F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1)
        rows = s.numel() // s.shape[-1]
        return self.temperature**2 * F.kl_div(s, t, reduction="sum", log_target=True) / rows


class HiddenLoss(Loss):
    """MSE or cosine distance of hidden states over real tokens, mean over the layer pairs.

    The student's states go through one bias-free `projection`, shared by all pairs, if the widths differ.
    """

    def __init__(
        self, pairs: list[tuple[int, int]], student_size: int, teacher_size: int, cosine: bool = False
    ) -> None:
        super().__init__()
        self.pairs, self.cosine = pairs, cosine
        self.projection = None if student_size == teacher_size else nn.Linear(student_size, teacher_size, bias=False)

    def compute(self, student: Features, teacher: Features, labels: Tensor | None) -> Tensor:
        return torch.stack([self._distance(student, *_pick(student, teacher, "hidden", p)) for p in self.pairs]).mean()

    def _distance(self, student: Features, s: Tensor, t: Tensor) -> Tensor:
        s, t = student.real(s), student.real(t)  # (real tokens, d)
        if self.projection is not None:
            s = self.projection(s)
        if self.cosine:
            # 1 - cos(s, t) = |s/|s| - t/|t||^2 / 2, and this form is exactly 0 for equal vectors.
            return (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean() / 2
        return F.mse_loss(s, t)


class AttentionLoss(Loss):
    """MSE of the scores Q K^T / sqrt(head_dim) before the softmax, over all pairs of real tokens of a sequence.

    The two score matrices are never made: their difference is the one product (Q_S | Q_T) (K_S | -K_T)^T. Where both models
    run in bfloat16 it is a bfloat16 product, which sums in float32 and rounds the small difference, not the large scores.
    """

    def __init__(self, pairs: list[tuple[int, int]], heads: str) -> None:
        super().__init__()
        self.pairs, self.heads = pairs, heads

    def compute(self, student: Features, teacher: Features, labels: Tensor | None) -> Tensor:
        n_scores = student.mask.sum(-1).square().sum().clamp(min=1)
        total = student.mask.new_zeros((), dtype=torch.float32)
        for pair in self.pairs:
            queries, keys = (_pick(student, teacher, what, pair) for what in ("queries", "keys"))
            total = total + self._mean_over_heads(queries, keys, student.mask) / n_scores
        return total / len(self.pairs)

    def _mean_over_heads(self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """The squared differences of student's and teacher's scores, summed over the pairs of tokens, mean over the heads."""
        (s_scale, t_scale), (s_q, t_q), (s_k, t_k) = [q.shape[-1] ** -0.5 for q in queries], queries, keys
        if self.heads == "mean":
            # The mean over heads of q k^T is one product of the concatenated heads.
            s_scale, t_scale = s_scale / s_q.shape[1], t_scale / t_q.shape[1]
            s_q, t_q, s_k, t_k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (s_q, t_q, s_k, t_k))
        dtype = s_q.dtype if s_q.dtype == t_q.dtype == torch.bfloat16 else torch.float32
        # Padded rows set to 0 have the score 0 with every token, in both models, so nothing is left to mask in the sum.
        q, k = (
            torch.cat((s.to(dtype), t.to(dtype)), dim=-1).masked_fill(~mask[:, None, :, None], 0.0)
            for s, t in ((s_q, t_q), (s_k, t_k * (-t_scale / s_scale)))
        )
        gap = q @ k.transpose(-1, -2)  # (batch, heads, seq, seq)
        # A norm passes over the large matrix once in each direction and keeps no second one.
        return (s_scale * torch.linalg.vector_norm(gap, dtype=torch.float32)).square() / gap.shape[1]


class RelationLoss(Loss):
    """KL between the relations softmax(A A^T / sqrt(d_r)) of queries, keys and values; see `RelationObjective`."""

    def __init__(self, pairs: list[tuple[int, int]], heads: list[int]) -> None:
        super().__init__()
        self.pairs, self.heads = pairs, heads

    def compute(self, student: Features, teacher: Features, labels: Tensor | None) -> Tensor:
        n_rows = student.mask.sum().clamp(min=1)
        total = student.mask.new_zeros((), dtype=torch.float32)
        for pair, heads in zip(self.pairs, self.heads, strict=True):
            for what in ("queries", "keys", "values"):
                both = _pick(student, teacher, what, pair)
                s, t = (self._log_relation(x, heads, student.mask) for x in both)  # (batch, relation heads, seq, seq)
                total = total + F.kl_div(s, t, reduction="sum", log_target=True) / (n_rows * heads)
        return total / len(self.pairs)

    @staticmethod
    def _log_relation(x: Tensor, heads: int, mask: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2).float()
        # Padded rows become 0 in both models: their relations agree, so they add nothing to the sum.
        x = x.masked_fill(~mask[:, None, :, None], 0.0)  # (batch, relation heads, seq, d_r)
        scores = (x * x.shape[-1] ** -0.5) @ x.transpose(-1, -2)
        # Not -inf, whose differences would be nan.
        return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(-1)


class GoldLoss(Loss):
    """The task's own loss on the student's logits; see `GoldObjective`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def compute(self, student: Features, teacher: Features, labels: Tensor | None) -> Tensor:
        if student.logits is None or labels is None:
            raise ValueError(
                "the gold objective needs labels and a student with a head. To resolve, drop it or add labels."
            )
        logits = student.logits.float()
        if self.kind == "single_label":
            logits, labels = logits.flatten(0, -2), labels.flatten()
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            return loss / (labels != -100).sum().clamp(min=1)
        if logits.numel() != labels.numel():
            raise ValueError(f"labels must match the logits {tuple(logits.shape)}, got {tuple(labels.shape)}.")
        logits, known = logits.view_as(labels), ~labels.isnan()
        loss_of = F.mse_loss if self.kind == "regression" else F.binary_cross_entropy_with_logits
        # Where a label is missing, any finite one will do: its loss is thrown away.
        each = loss_of(logits, labels.float().nan_to_num(), reduction="none")
        return each.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)
