"""The metrics of `smbert.tasks`: scikit-learn and scipy behind one signature, equal to the `evaluate` modules of the
same names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


@dataclass(frozen=True)
class Metric:
    """A metric: `function(labels, decided)`, where `decided` are class numbers, multi-hot rows or scores, shaped as the
    labels.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    kinds: tuple[str, ...]
    higher_is_better: bool = True


def _f1(average: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda labels, decided: float(f1_score(labels, decided, average=average, zero_division=0))


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, decided: np.ndarray) -> float:
        if len(labels) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            value = float(function(labels, decided)[0])
        # NaN would make a report invalid JSON, and a constant answer explains nothing.
        return 0.0 if np.isnan(value) else value

    return score


_CLASSES = ("single_label",)
METRICS: dict[str, Metric] = {
    "accuracy": Metric(lambda labels, decided: float(accuracy_score(labels, decided)), ("single_label", "multi_label")),
    "f1": Metric(_f1("binary"), _CLASSES),
    "f1_macro": Metric(_f1("macro"), ("single_label", "multi_label")),
    "f1_micro": Metric(_f1("micro"), ("single_label", "multi_label")),
    "matthews_correlation": Metric(lambda labels, decided: float(matthews_corrcoef(labels, decided)), _CLASSES),
    "pearson": Metric(_correlation(pearsonr), ("regression",)),
    "spearmanr": Metric(_correlation(spearmanr), ("regression",)),
    "mse": Metric(
        lambda labels, decided: float(mean_squared_error(labels, decided)), ("regression",), higher_is_better=False
    ),
}
