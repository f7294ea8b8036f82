"""The classical students one by one: their estimators, what is tuned, and how each learns from soft labels.

A new student is one entry of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, SGDClassifier, SGDRegressor
from sklearn.multioutput import MultiOutputRegressor
from sklearn.naive_bayes import ComplementNB, MultinomialNB
from sklearn.svm import LinearSVC, LinearSVR
from sklearn.tree import DecisionTreeClassifier

from .features import TextFeatures

# Smaller weights change nothing but would double the rows of every gold label.
_NEGLIGIBLE = 1e-6
# The log probability of a class that an estimator rules out or has never seen.
_FLOOR = -30.0


@dataclass(frozen=True)
class Kind:
    """How one kind of student is built.

    Attributes:
        build: (seed, **parameters) -> estimator, not fitted.
        grid: parameter -> values to try.
        features: what it sees unless the user says otherwise.
        regressor: (seed, **parameters) -> estimator of logits, where soft labels are learned by regression.
        stream: (seed) -> estimator with `partial_fit`; None where the kind has none.
        stream_regressor: the same for logits.
    """

    build: Callable[..., Any]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    features: TextFeatures = field(default_factory=TextFeatures)
    regressor: Callable[..., Any] | None = None
    stream: Callable[[int], Any] | None = None
    stream_regressor: Callable[[int], Any] | None = None


def _sgd(loss: str) -> Callable[[int], Any]:
    return lambda seed: SGDClassifier(loss=loss, alpha=1e-6, average=True, random_state=seed)


def _svr(seed: int, **parameters: Any) -> Any:
    # Primal: as fast as the dual where rows are fewer than features, and the same on every run.
    one = LinearSVR(loss="squared_epsilon_insensitive", dual=False, epsilon=0.1, max_iter=2000, **parameters)
    return MultiOutputRegressor(one)


def _sgd_regressor(seed: int) -> Any:
    one = SGDRegressor(loss="squared_epsilon_insensitive", epsilon=0.1, alpha=1e-6, average=True, random_state=seed)
    return MultiOutputRegressor(one)


# A tree splits on one n-gram at a time: rare ones cost it time and give it nothing.
_FREQUENT = TextFeatures(words=(1, 1), min_df=5, max_features=10_000)

KINDS: dict[str, Kind] = {
    "multinomial_nb": Kind(
        lambda seed, **p: MultinomialNB(**p), {"alpha": (0.05, 0.3, 1.0)}, stream=lambda seed: MultinomialNB(alpha=0.3)
    ),
    "complement_nb": Kind(
        lambda seed, **p: ComplementNB(**p), {"alpha": (0.05, 0.3, 1.0)}, stream=lambda seed: ComplementNB(alpha=0.3)
    ),
    "logistic_regression": Kind(
        lambda seed, **p: LogisticRegression(max_iter=1000, **p), {"C": (1.0, 5.0, 25.0)}, stream=_sgd("log_loss")
    ),
    "linear_svm": Kind(
        lambda seed, **p: LinearSVC(random_state=seed, **p),
        {"C": (0.05, 0.2, 1.0)},
        regressor=_svr,
        stream=_sgd("hinge"),
        stream_regressor=_sgd_regressor,
    ),
    "decision_tree": Kind(
        lambda seed, **p: DecisionTreeClassifier(random_state=seed, **p),
        {"max_depth": (12, 24), "min_samples_leaf": (5, 25)},
        _FREQUENT,
    ),
    "random_forest": Kind(
        lambda seed, **p: RandomForestClassifier(random_state=seed, **p),
        {"min_samples_leaf": (2,)},
        _FREQUENT,
    ),
}


def is_soft(targets: np.ndarray) -> bool:
    """Whether some row (of (rows, classes)) is shared between classes."""
    return bool((targets.max(axis=1) < 1 - _NEGLIGIBLE).any())


def stacked(matrix: Any, targets: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """Rows once for each class, with the target probability as their weight.

    Minimising a weighted loss over them is minimising its expectation under the soft labels: soft cross-entropy for
    logistic regression, fractional counts for Naive Bayes, weighted Gini for trees. Rows without weight are left out,
    so that gold labels give back the plain data set.

    Args:
        matrix: (rows, features), sparse.
        targets: (rows, classes), rows sum to 1.

    Returns:
        Matrix (stacked, features), classes (stacked,), weights (stacked,).
    """
    rows, classes = np.nonzero(targets > _NEGLIGIBLE)
    order = np.lexsort((rows, classes))
    rows, classes = rows[order], classes[order]
    return matrix[rows], classes, targets[rows, classes].astype(np.float64)


def logits_of_targets(targets: np.ndarray, clip: float) -> np.ndarray:
    """Centred log probabilities within [-clip, clip]: what a regressor learns in place of (rows, classes) probabilities.

    For a pure soft label these are the teacher's own logits over its temperature, centred. Clipping keeps a handful of
    very sure rows from ruling the squares. Two classes need one column, the other is its mirror image.
    """
    logs = np.log(np.maximum(targets, 1e-12))
    centred = np.clip(logs - logs.mean(axis=1, keepdims=True), -clip, clip)
    return centred[:, 1:] if targets.shape[1] == 2 else centred


def fit(kind: Kind, matrix: Any, targets: np.ndarray, seed: int, clip: float, **parameters: Any) -> Any:
    """An estimator of this kind, taught by (rows, classes) probabilities."""
    if kind.regressor is not None and is_soft(targets):
        return kind.regressor(seed, **parameters).fit(matrix, logits_of_targets(targets, clip))
    rows, classes, weights = stacked(matrix, targets)
    return kind.build(seed, **parameters).fit(rows, classes, sample_weight=weights)


def new_stream(kind: Kind, soft: bool, seed: int) -> Any:
    """An estimator of this kind that learns chunk by chunk."""
    factory = kind.stream_regressor if soft and kind.stream_regressor is not None else kind.stream
    assert factory is not None  # checked before
    return factory(seed)


def fit_chunk(estimator: Any, matrix: Any, targets: np.ndarray, clip: float) -> None:
    """One step of an estimator from `new_stream` on (rows, classes) probabilities."""
    if isinstance(estimator, MultiOutputRegressor):
        estimator.partial_fit(matrix, logits_of_targets(targets, clip))
    else:
        rows, classes, weights = stacked(matrix, targets)
        order = np.random.default_rng(0).permutation(len(classes))  # stacked by class; SGD wants them mixed
        known = np.arange(targets.shape[1])
        estimator.partial_fit(rows[order], classes[order], classes=known, sample_weight=weights[order])


def scores(estimator: Any, matrix: Any, classes: int) -> np.ndarray:
    """(rows, classes) numbers whose softmax, at a temperature of its own, is the student's probability."""
    if isinstance(estimator, MultiOutputRegressor):
        return _mirrored(estimator.predict(matrix))
    if isinstance(estimator, MultinomialNB | ComplementNB):
        found = estimator.predict_joint_log_proba(matrix)
        found = found - found.mean(axis=1, keepdims=True)
    elif hasattr(estimator, "decision_function"):
        found = _share(estimator) * _mirrored(estimator.decision_function(matrix))
    else:
        with np.errstate(divide="ignore"):  # a leaf may hold one class only
            found = np.maximum(estimator.predict_log_proba(matrix), _FLOOR)
    out = np.full((matrix.shape[0], classes), _FLOOR)
    out[:, np.asarray(estimator.classes_, dtype=int)] = found
    return out


def _share(estimator: Any) -> float:
    """Two-class logistic regression has one column of log odds, of which each class's score is half."""
    logistic = isinstance(estimator, LogisticRegression) or estimator.loss == "log_loss"
    return 0.5 if logistic and len(estimator.classes_) == 2 else 1.0


def _mirrored(values: np.ndarray) -> np.ndarray:
    """One column of two classes -> both, centred; more columns as they are."""
    values = values.reshape(len(values), -1)
    return np.hstack([-values, values]) if values.shape[1] == 1 else values


def linear_weights(estimator: Any, classes: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(classes, features) weights and (classes,) intercepts whose scores equal `scores` up to a constant per row.

    None for trees.
    """
    if isinstance(estimator, MultinomialNB | ComplementNB):
        weights = estimator.feature_log_prob_
        # Complement NB ignores the prior when there are several classes, as scikit-learn does.
        prior = estimator.class_log_prior_ if isinstance(estimator, MultinomialNB) else np.zeros(len(weights))
        weights, intercepts = weights - weights.mean(axis=0), prior - prior.mean()
    elif isinstance(estimator, MultiOutputRegressor):
        weights = _mirrored(np.stack([one.coef_ for one in estimator.estimators_], axis=1)).T
        intercepts = _mirrored(np.array([[float(np.ravel(one.intercept_)[0]) for one in estimator.estimators_]]))[0]
    elif hasattr(estimator, "coef_"):
        share = _share(estimator)
        weights, intercepts = share * _mirrored(estimator.coef_.T).T, share * _mirrored(estimator.intercept_[None])[0]
    else:
        return None
    if len(weights) != classes:  # a class without training rows has no weights
        return None
    return weights, intercepts


def num_parameters(estimator: Any) -> int:
    """Numbers that a prediction depends on: weights of linear models; of trees, two per split and the leaves' values."""
    if isinstance(estimator, RandomForestClassifier):
        return sum(num_parameters(tree) for tree in estimator.estimators_)
    if isinstance(estimator, DecisionTreeClassifier):
        splits = estimator.tree_.node_count - estimator.tree_.n_leaves
        return int(2 * splits + estimator.tree_.n_leaves * estimator.n_classes_)
    if isinstance(estimator, MultiOutputRegressor):
        return sum(one.coef_.size + np.size(one.intercept_) for one in estimator.estimators_)
    if isinstance(estimator, MultinomialNB | ComplementNB):
        return int(estimator.feature_log_prob_.size + estimator.class_log_prior_.size)
    return int(estimator.coef_.size + estimator.intercept_.size)


def fit_temperature(values: np.ndarray, targets: np.ndarray) -> float:
    """The T > 0 that makes softmax(values / T) fit the targets best, by log loss; the order of classes stays.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        values: (rows, classes) scores of rows that the student was not trained on.
        targets: (rows, classes) probabilities, one-hot for gold labels.
    """
    # Nobody is infinitely sure from n rows, though the likelihood of n right answers says so (the smoothing of Platt, 1999).
    rows, classes = targets.shape
    targets = (rows * targets + 1 / classes) / (rows + 1)

    def loss(log_temperature: float) -> float:
        return float(-(targets * log_softmax(values / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-5.0, 7.0), method="bounded").x))
