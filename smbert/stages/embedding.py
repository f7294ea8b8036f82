"""Embedding factorisation: the word embedding as a product of a narrow table and a projection."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from .._sizes import Size, count_from, parse
from .._surgery_embedding import factorise_embedding
from ..context import Context
from ..measure import count_parameters
from ..surgery import structure_of
from ..vocab import count_pieces
from .base import Outline, Stage, as_text


@dataclass(frozen=True, kw_only=True)
class EmbeddingFactorisation(Stage):
    """Replaces the (V, d) word embedding by (V, r) times (r, d), with the smallest error that rank r allows.

    The error of each piece counts as often as the piece occurs in the run's texts (a weighted SVD; ALBERT, Lan et al. 2020, trains such a
    product from scratch). Follow it with a short distill stage.

    Attributes:
        rank: r: a number, or a share of d such as "1/3".
        smoothing: occurrences that are added to every piece, so that unseen ones count a little.
    """

    kind: ClassVar[str] = "embedding_factorisation"
    rank: Size = 128
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", as_text(self.rank))
        if parse(self.rank, "rank") == 0:
            raise ValueError(f"`rank` must be at least 1, got {self.rank!r}. To resolve, try 128.")
        value = self.smoothing
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"`smoothing` must be a number above 0, got {value!r}. To resolve, try 1.0.")

    def outline(self, before: Outline, context: Context) -> Outline:
        if before.structure.factorised:
            raise ValueError(
                "embedding_factorisation needs a plain word embedding, and that of the model is factorised already. "
                "To resolve, leave the stage out, or factorise once with the smaller `rank`."
            )
        rank = self._rank(before.structure.embedding_size)
        structure = replace(before.structure, embedding_size=rank, factorised=True)
        return replace(before, structure=structure, outer_known=False)

    def _rank(self, width: int) -> int:
        rank = count_from(self.rank, width, "rank")
        if rank >= width:
            raise ValueError(
                f"`rank` must be below {width}, the width of the embedding, got {self.rank!r}. To resolve, lower it."
            )
        return rank

    def looks_at_pool(self, context: Context) -> bool:
        return True

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        start = time.perf_counter()
        structure = structure_of(model)
        rank = self._rank(structure.embedding_size)
        corpus = [context.data.train, *([context.pool] if context.pool is not None else [])]
        counts = count_pieces(corpus, structure.vocab_size)
        weights: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
        table, projection, lost = low_rank(weights, counts + self.smoothing, rank)
        result = factorise_embedding(model, table, projection)
        return result, {
            "rank": rank,
            "lost_share": round(lost, 6),
            "parameters": {"before": count_parameters(model).total, "after": count_parameters(result).total},
            "factorisation_seconds": round(time.perf_counter() - start, 1),
        }


def low_rank(table: torch.Tensor, weights: np.ndarray, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The product of rank `rank` that is nearest to a table, each row's squared error counting `weights[row]` times.

    Returns:
        (V, rank), (d, rank), and the share of the table's weighted squared length that is lost.
    """
    rows = table.detach().double().cpu()
    frequency = torch.from_numpy(np.asarray(weights, dtype=np.float64))[:, None]
    # Its eigenvectors are the right singular vectors of the weighted table, and it is only (d, d).
    values, vectors = torch.linalg.eigh(rows.T @ (frequency * rows))
    basis = vectors[:, -rank:].flip(1)  # (d, rank), the strongest direction first
    lost = float(values[:-rank].clamp(min=0).sum() / values.clamp(min=0).sum())
    return (rows @ basis).to(table), basis.to(table), lost
