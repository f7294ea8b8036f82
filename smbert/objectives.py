"""Distillation objectives: which losses, between which layers, with which weights.

An `Objective` is a frozen dataclass: pure configuration, the same in Python and in YAML. `build_objectives` checks a
mix of them against the two models and returns one module that owns whatever the losses learn (projections) and says, in
`needs`, which layers have to be captured:

    loss = build_objectives([LogitsObjective(5.0), RelationObjective()], structure_of(student), structure_of(teacher))
    seen = capture_features(student, inputs, hidden=loss.needs.student_hidden, qkv=loss.needs.student_qkv)
    total, terms = loss(seen, teacher_features, labels)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .features import Features, capture_features
from .losses import AttentionLoss, GoldLoss, HiddenLoss, LogitsLoss, Loss, RelationLoss

if TYPE_CHECKING:
    from .surgery import Structure

__all__ = [
    "OBJECTIVES",
    "AttentionObjective",
    "CosineObjective",
    "EmbeddingObjective",
    "Features",
    "GoldObjective",
    "HiddenObjective",
    "LogitsObjective",
    "Needs",
    "Objective",
    "ObjectiveSet",
    "RelationObjective",
    "build_objectives",
    "capture_features",
    "layer_pairs",
]

KINDS = ("single_label", "multi_label", "regression")


@dataclass(frozen=True)
class Needs:
    """Which layers of which model have to be captured, and what else the losses read. `a | b` merges."""

    student_hidden: frozenset[int] = frozenset()
    teacher_hidden: frozenset[int] = frozenset()
    student_qkv: frozenset[int] = frozenset()
    teacher_qkv: frozenset[int] = frozenset()
    teacher_logits: bool = False
    labels: bool = False

    @property
    def live_teacher(self) -> bool:
        """True if the teacher has to run beside the student: cached logits are not enough."""
        return bool(self.teacher_hidden or self.teacher_qkv)

    def __or__(self, other: Needs) -> Needs:
        return Needs(**{name: getattr(self, name) | getattr(other, name) for name in self.__dataclass_fields__})


def layer_pairs(layer_map: str | Sequence[Sequence[int]], n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """(teacher layer, student layer) pairs, counted from 1, of a declarative layer map.

    Args:
        layer_map: "uniform": student layer m learns from teacher layer ceil(m * n_teacher / n_student), TinyBERT's
            g(m); "last": last from last; or explicit pairs `[[teacher, student], ...]`.
        n_student, n_teacher: numbers of layers.

    Raises:
        ValueError: unknown name, empty or malformed map, layer out of range, pair given twice.
    """
    if layer_map == "uniform":
        return [(-(-m * n_teacher // n_student), m) for m in range(1, n_student + 1)]
    if layer_map == "last":
        return [(n_teacher, n_student)]
    rule = '`layer_map` must be "uniform", "last" or a list of [teacher layer, student layer] pairs'
    if isinstance(layer_map, str) or not isinstance(layer_map, Sequence) or not layer_map:
        raise ValueError(f"{rule}, got {layer_map!r}.")
    pairs: list[tuple[int, int]] = []
    for pair in layer_map:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or [type(i) for i in pair] != [int, int]:
            raise ValueError(f"{rule}, got the element {pair!r}.")
        teacher, student = (int(i) for i in pair)
        if not (1 <= teacher <= n_teacher and 1 <= student <= n_student):
            raise ValueError(
                f"{rule}, counted from 1: the teacher has {n_teacher} layers and the student {n_student}, "
                f"got {list(pair)}."
            )
        pairs.append((teacher, student))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"{rule}, each pair once, got {[list(pair) for pair in pairs]}.")
    return pairs


@dataclass(frozen=True)
class Objective(ABC):
    """One term of the distillation loss: configuration only.

    Attributes:
        weight: factor of the term in the total, above 0.
        name: key of the term in the logs; its kind unless given.
    """

    weight: float = 1.0
    name: str = ""
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.kind)
        _check_positive("weight", self.weight)

    @abstractmethod
    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        """The loss for two models and a task kind of `KINDS`. Raises ValueError if the models do not go together."""

    @abstractmethod
    def needs(self, student: Structure, teacher: Structure) -> Needs:
        """What has to be captured for it."""


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")


@dataclass(frozen=True)
class LogitsObjective(Objective):
    """Soft labels (Hinton et al. 2015): T^2 KL(softmax(z_T / T) || softmax(z_S / T)), mean over rows.

    Multi-label tasks: the same with one Bernoulli distribution per label, mean over rows and labels. Regression: MSE.

    Attributes:
        temperature: T; above 1 it softens the teacher's distribution. Regression ignores it.
    """

    temperature: float = 2.0
    kind: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("temperature", self.temperature)

    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        return LogitsLoss(kind, self.temperature)

    def needs(self, student: Structure, teacher: Structure) -> Needs:
        return Needs(teacher_logits=True)


@dataclass(frozen=True)
class GoldObjective(Objective):
    """Gold labels: cross-entropy, MSE for scores, binary cross-entropy for multi-label tasks.

    Rows without a label (-100 for classes, nan for scores and multi-label rows) are left out of the mean.
    """

    kind: ClassVar[str] = "gold"

    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        return GoldLoss(kind)

    def needs(self, student: Structure, teacher: Structure) -> Needs:
        return Needs(labels=True)


@dataclass(frozen=True)
class _LayerObjective(Objective):
    """A term that compares layers.

    Attributes:
        layer_map: "uniform" pairs student layer j with every n/m-th teacher layer, "last" the two last layers; or a list of
            [teacher, student] pairs, counted from 1.
    """

    layer_map: str | tuple[tuple[int, int], ...] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer_map, list):  # YAML has no tuples
            pairs = tuple(tuple(p) if isinstance(p, list) else p for p in self.layer_map)
            object.__setattr__(self, "layer_map", pairs)

    def pairs(self, student: Structure, teacher: Structure) -> list[tuple[int, int]]:
        return layer_pairs(self.layer_map, len(student.layer_widths), len(teacher.layer_widths))

    def _split(self, student: Structure, teacher: Structure) -> tuple[frozenset[int], frozenset[int]]:
        pairs = self.pairs(student, teacher)
        return frozenset(s for _, s in pairs), frozenset(t for t, _ in pairs)


@dataclass(frozen=True)
class HiddenObjective(_LayerObjective):
    """Hidden states (TinyBERT): mean over real tokens of ||H_S W - H_T||^2 / d; W is learned, if the widths differ."""

    kind: ClassVar[str] = "hidden"
    cosine: ClassVar[bool] = False

    def pairs(self, student: Structure, teacher: Structure) -> list[tuple[int, int]]:
        pairs = super().pairs(student, teacher)
        if not isinstance(self.layer_map, str):
            return pairs
        # Where the next attention is passed by, a layer's state stands for what that one's norm had made of it.
        return [(t, s) for t, s in pairs if not any(attention for attention, _ in student.passed_by[s : s + 1])]

    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        return HiddenLoss(self.pairs(student, teacher), student.hidden_size, teacher.hidden_size, self.cosine)

    def needs(self, student: Structure, teacher: Structure) -> Needs:
        student_layers, teacher_layers = self._split(student, teacher)
        return Needs(student_hidden=student_layers, teacher_hidden=teacher_layers)


@dataclass(frozen=True)
class CosineObjective(HiddenObjective):
    """Directions of the hidden states (DistilBERT): mean over real tokens of 1 - cos(H_S W, H_T), W as for "hidden"."""

    layer_map: str | tuple[tuple[int, int], ...] = "last"
    kind: ClassVar[str] = "cosine"
    cosine: ClassVar[bool] = True


@dataclass(frozen=True)
class EmbeddingObjective(Objective):
    """Embedding outputs (TinyBERT): like `HiddenObjective`, between the inputs of the first layers."""

    kind: ClassVar[str] = "embedding"

    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        return HiddenLoss([(0, 0)], student.hidden_size, teacher.hidden_size)

    def needs(self, student: Structure, teacher: Structure) -> Needs:
        return Needs(student_hidden=frozenset({0}), teacher_hidden=frozenset({0}))


@dataclass(frozen=True)
class _AttentionBase(_LayerObjective):
    def needs(self, student: Structure, teacher: Structure) -> Needs:
        student_layers, teacher_layers = self._split(student, teacher)
        return Needs(student_qkv=student_layers, teacher_qkv=teacher_layers)

    def head_counts(self, student: Structure, teacher: Structure) -> list[tuple[int, int]]:
        """(teacher heads, student heads) of each layer pair, all above 0."""
        pairs = self.pairs(student, teacher)
        counts = [(teacher.layer_widths[t - 1][0], student.layer_widths[s - 1][0]) for t, s in pairs]
        empty = [list(pair) for pair, heads in zip(pairs, counts, strict=True) if 0 in heads]
        if empty:
            raise ValueError(
                f"`layer_map` of the {self.name} objective leads to layers without attention heads: {empty} "
                "(teacher, student). To resolve, give explicit pairs of layers that have heads."
            )
        return counts


@dataclass(frozen=True)
class AttentionObjective(_AttentionBase):
    """Attention scores before the softmax (TinyBERT): MSE of Q K^T / sqrt(head_dim), head by head.

    Attributes:
        heads: "match" compares head i with head i and needs equal head counts; "mean" compares the means over heads.
    """

    heads: str = "match"
    kind: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads not in ("match", "mean"):
            raise ValueError(f'`heads` must be "match" or "mean", got {self.heads!r}.')

    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        pairs, counts = self.pairs(student, teacher), self.head_counts(student, teacher)
        if self.heads == "match" and any(t != s for t, s in counts):
            raise ValueError(
                f"the {self.name} objective needs equal head counts, got (teacher, student) heads {counts} for "
                f"layers {pairs}. To resolve, use the relation objective, which takes any head counts, or heads='mean'."
            )
        return AttentionLoss(pairs, self.heads)


@dataclass(frozen=True)
class RelationObjective(_AttentionBase):
    """Self-attention relations (MiniLMv2): needs no equal widths, no equal head counts and no projection.

    Queries, keys and values are concatenated over the heads and split again into `relation_heads` heads of size d_r,
    and R = softmax(A A^T / sqrt(d_r)). The loss is the mean over heads and real tokens of KL(R_T || R_S), summed over
    the three.

    Attributes:
        relation_heads: must divide heads * head_dim of both layers of every pair. By default the largest such number up
            to the teacher's number of heads.
    """

    layer_map: str | tuple[tuple[int, int], ...] = "last"
    relation_heads: int | None = None
    kind: ClassVar[str] = "relation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relation_heads is not None and (type(self.relation_heads) is not int or self.relation_heads < 1):
            raise ValueError(f"`relation_heads` must be a whole number above 0, got {self.relation_heads!r}.")

    def build(self, student: Structure, teacher: Structure, kind: str = "single_label") -> Loss:
        chosen = []
        for t, s in self.head_counts(student, teacher):
            widths = (t * teacher.head_dim, s * student.head_dim)
            common = [n for n in range(1, math.gcd(*widths) + 1) if math.gcd(*widths) % n == 0]
            if self.relation_heads is None:
                chosen.append(max(n for n in common if n <= t))
            elif self.relation_heads in common:
                chosen.append(self.relation_heads)
            else:
                raise ValueError(
                    f"`relation_heads` must divide the attention widths {widths[0]} of the teacher and {widths[1]} of "
                    f"the student, got {self.relation_heads}. To resolve, leave it out or use one of {common}."
                )
        return RelationLoss(self.pairs(student, teacher), chosen)


OBJECTIVES: dict[str, type[Objective]] = {
    cls.kind: cls
    for cls in (
        LogitsObjective,
        HiddenObjective,
        AttentionObjective,
        RelationObjective,
        EmbeddingObjective,
        CosineObjective,
        GoldObjective,
    )
}


class ObjectiveSet(nn.Module):
    """The weighted sum of several losses. Its parameters, if any, are the projections: train them beside the student's.

    Attributes:
        needs: what to capture for all of them.
    """

    def __init__(self, objectives: Sequence[Objective], losses: Sequence[Loss], needs: Needs) -> None:
        super().__init__()
        self.names = [objective.name for objective in objectives]
        self.weights = [objective.weight for objective in objectives]
        self.losses = nn.ModuleList(losses)
        self.needs = needs

    def forward(
        self, student: Features, teacher: Features, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each term by its name, without its weight and detached (all float32 scalars)."""
        terms = [loss(student, teacher, labels) for loss in self.losses]
        total = torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum()
        return total, {name: term.detach() for name, term in zip(self.names, terms, strict=True)}


def build_objectives(
    objectives: Sequence[Objective], student: Structure, teacher: Structure, kind: str = "single_label"
) -> ObjectiveSet:
    """Check a mix of objectives against two models and build it.

    Args:
        objectives: at least one; two of a kind need names of their own.
        student, teacher: from `structure_of`.
        kind: kind of the task, one of "single_label", "multi_label", "regression".

    Raises:
        ValueError: all faults of all objectives, in one message.
    """
    names = [objective.name for objective in objectives]
    faults = []
    if not objectives:
        faults.append(f"`objectives` must not be empty. To resolve, name one or more of {', '.join(OBJECTIVES)}.")
    if kind not in KINDS:
        faults.append(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(
            f"objective names must differ, got {name!r} {names.count(name)} times. To resolve, set `name` on each."
        )
    losses, needs = [], Needs()
    for objective in objectives:
        try:
            losses.append(objective.build(student, teacher, kind))
            needs = needs | objective.needs(student, teacher)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return ObjectiveSet(objectives, losses, needs)
