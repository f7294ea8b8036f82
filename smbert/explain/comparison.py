"""How far explanations can be believed: fidelity, stability over seeds, and overlap of two classifiers.

    {"texts": 20, "k": 10, "seeds": 3,
     "fidelity": {"teacher": 0.81, "student": 0.95},      # mean weighted R^2 of the linear models
     "stability": {"teacher": {"jaccard": 0.71, "spearman": 0.8}, ...},   # between seeds, same classifier
     "overlap": {"jaccard": 0.42, "spearman": 0.5, "chance": 0.06, "same_label": 0.9}}   # between classifiers, same seed

Jaccard compares the k words with the largest absolute weights (at most half of a text's words: among all of them every
two rankings agree); Spearman compares all weights with their signs. Texts whose probability never moves have no ranking
and are left out; null where none is left.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

if TYPE_CHECKING:
    from . import Explanation


def report(rows: Sequence[Sequence[Sequence[Explanation]]], k: int) -> dict[str, Any]:
    """The report on explanations[text][classifier][seed]."""
    models = [per_seed[0].model for per_seed in rows[0]]
    found: dict[str, Any] = {"texts": len(rows), "k": k, "seeds": len(rows[0][0]), "fidelity": {}, "stability": {}}
    for number, model in enumerate(models):
        # Two models may go by the same name.
        name = model if models.count(model) == 1 else f"{model} ({number + 1})"
        found["fidelity"][name] = _mean(one.r2 for row in rows for one in row[number])
        found["stability"][name] = _agreement(
            [pair for row in rows for pair in itertools.combinations(row[number], 2)], k
        )
    if len(models) == 2:
        pairs = [pair for row in rows for pair in zip(*row)]
        same = [int(np.argmax(a.probabilities)) == int(np.argmax(b.probabilities)) for a, b in pairs]
        chance = _mean(
            _compared(len(a.units), k) / (2 * len(a.units) - _compared(len(a.units), k)) for a, _ in pairs if a.units
        )
        found["overlap"] = {**_agreement(pairs, k), "chance": chance, "same_label": statistics.fmean(same)}
    return found


def _agreement(pairs: Sequence[tuple[Explanation, Explanation]], k: int) -> dict[str, float | None]:
    """Means over pairs of explanations of the same text."""
    return {
        "jaccard": _mean(jaccard(a.weights, b.weights, k) for a, b in pairs),
        "spearman": _mean(spearman(a.weights, b.weights) for a, b in pairs),
    }


def jaccard(first: Sequence[float], second: Sequence[float], k: int) -> float | None:
    """Shared share of the k largest absolute weights; None where one has none."""
    if not any(first) or not any(second):
        return None
    k = _compared(len(first), k)
    one, two = (set(np.argsort(-np.abs(weights), kind="stable")[:k].tolist()) for weights in (first, second))
    return len(one & two) / len(one | two)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of all weights; None where one is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def _compared(units: int, k: int) -> int:
    return min(k, max(1, units // 2))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
