"""How a classical student learns from rows: all at once, or chunk by chunk from a stream that is larger than memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset
from sklearn.model_selection import ParameterGrid, StratifiedKFold
from sklearn.naive_bayes import ComplementNB, MultinomialNB
from sklearn.pipeline import Pipeline

from ..processes import process_state
from .features import TextFeatures, unknown_texts, vectorizer
from .kinds import Kind, fit, fit_chunk, fit_temperature, new_stream, scores
from .rows import Taught, TeacherSource, pool_rows

logger = logging.getLogger(__name__)

_MOST_HELD_BACK = 2_000


@dataclass(frozen=True)
class Settings:
    """How a classical student is taught.

    Attributes:
        temperature: of the teacher's soft labels.
        gold_weight: share of the gold label in the targets of labelled rows; 1 for a student of gold labels alone. "auto" fits
            one with a half and one of gold labels alone, without the pool, and keeps the one that is better on rows that it
            was not fitted on: a teacher that is no better than the student has nothing to teach.
        logit_clip: bound of the centred logits that an SVM regresses on.
        features: what the student sees; several are tried; None for the student's own.
        grid: estimator parameter -> values to try; None for the student's own.
        folds: of the labelled rows, for choosing among them and for calibration; 0 takes the first of everything.
        epochs: passes over a stream, or of a static student.
        learning_rate: of a static student.
        chunk_rows: rows of a stream in memory at once.
        seed: of folds, orders and trees.
        max_length: most tokens that the teacher reads of a text; None for 512 or its limit.
        batch_size: rows per batch of the teacher.
        bf16: the teacher in bfloat16.
        disable_tqdm: no progress bars.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    gold_weight: float | Literal["auto"] = 0.5
    logit_clip: float = 3.0
    features: TextFeatures | Sequence[TextFeatures] | None = None
    grid: Mapping[str, Sequence[Any]] | None = None
    folds: int = 3
    epochs: int = 5
    learning_rate: float = 2e-3
    chunk_rows: int = 10_000
    seed: int = 42
    max_length: int | None = None
    batch_size: int = 64
    bf16: bool = False
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        for name, sound, rule in (
            ("temperature", self.temperature > 0, "above 0"),
            ("gold_weight", _is_share(self.gold_weight) or self.gold_weight == "auto", "from 0 to 1, or auto"),
            ("logit_clip", self.logit_clip > 0, "above 0"),
            ("folds", self.folds == 0 or self.folds >= 2, "0, or at least 2"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("chunk_rows", self.chunk_rows >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        ):
            if not sound:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)}. To resolve, correct it.")

    def features_for(self, kind: Kind) -> list[TextFeatures]:
        """What to try, in order."""
        if self.features is None:
            return [kind.features]
        return [self.features] if isinstance(self.features, TextFeatures) else list(self.features)

    def candidates(self, kind: Kind) -> list[dict[str, Any]]:
        """All combinations of the grid.

        Raises:
            ValueError: a parameter that the estimator does not have, or no values for one.
        """
        grid = kind.grid if self.grid is None else self.grid
        known = kind.build(self.seed).get_params()
        if bad := [name for name, values in grid.items() if name not in known or len(values) == 0]:
            raise ValueError(
                f"`grid` must hold values for parameters among {', '.join(known)}, got {', '.join(bad)}. "
                "To resolve, correct the names."
            )
        return list(ParameterGrid(grid))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def fit_in_memory(kind: Kind, rows: Taught, settings: Settings) -> tuple[Pipeline, float, dict[str, Any]]:
    """Chooses features and parameters out of fold, calibrates on the same scores, and fits once more on all rows.

    Rows of the pool are in the training part of every fold. Where nothing is labelled, agreement with the teacher
    takes the place of accuracy.

    Returns:
        The pipeline, its temperature, and what was tried and chosen.

    Raises:
        ValueError: no text has an n-gram that counts.
    """
    classes = rows.targets.shape[1]
    judged = np.flatnonzero(rows.gold >= 0)
    judged = judged if len(judged) else np.arange(len(rows.gold))
    truth = np.where(rows.gold >= 0, rows.gold, rows.targets.argmax(axis=1))
    folds = _folds(truth[judged], judged, len(truth), settings)
    tried: list[dict[str, Any]] = []
    best: tuple[float, Any, Any, dict[str, Any], np.ndarray | None] | None = None
    for features in settings.features_for(kind):
        transformer = vectorizer(features, not isinstance(rows.texts[0], str))
        matrix = _fit_features(transformer, rows.texts, features)
        for parameters in settings.candidates(kind):
            values, accuracy = None, 0.0
            if folds:
                values = np.empty((len(truth), classes))
                for train, test in folds:
                    estimator = fit(
                        kind, matrix[train], rows.targets[train], settings.seed, settings.logit_clip, **parameters
                    )
                    values[test] = scores(estimator, matrix[test], classes)
                values = values[judged]
                accuracy = float((values.argmax(axis=1) == truth[judged]).mean())
                tried.append({"features": asdict(features), "parameters": parameters, "accuracy": accuracy})
            if best is None or accuracy > best[0]:
                best = (accuracy, transformer, matrix, parameters, values)
            if not folds:
                break
        if not folds:
            break
    assert best is not None  # there are features and parameters to try
    accuracy, transformer, matrix, parameters, values = best
    temperature = 1.0
    if values is not None:
        gold = (rows.gold[judged] >= 0)[:, None]
        temperature = fit_temperature(values, np.where(gold, np.eye(classes)[truth[judged]], rows.targets[judged]))
    estimator = fit(kind, matrix, rows.targets, settings.seed, settings.logit_clip, **parameters)
    done = {
        "parameters": parameters,
        "out_of_fold_accuracy": accuracy if folds else None,
        "tried": tried,
        "texts_without_features": int(unknown_texts(transformer, matrix).sum()),
    }
    return Pipeline([("features", transformer), ("student", estimator)]), temperature, done


def _folds(truth: np.ndarray, judged: np.ndarray, rows: int, settings: Settings) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) row numbers; every test row is judged, and all other rows are trained on. Empty: cannot be done."""
    smallest = int(np.unique(truth, return_counts=True)[1].min())
    number = min(settings.folds, smallest)
    if settings.folds and number < 2:
        logger.warning("a class has one row only: nothing is tuned or calibrated")
    if number < 2:
        return []
    split = StratifiedKFold(number, shuffle=True, random_state=settings.seed).split(judged, truth)
    return [(np.setdiff1d(np.arange(rows), judged[test]), judged[test]) for _, test in split]


def _fit_features(transformer: Any, texts: list[Any], features: TextFeatures) -> Any:
    try:
        return transformer.fit(texts).transform(texts)
    except ValueError as error:  # scikit-learn's message does not say what to do about it
        raise ValueError(
            f"at least one n-gram must stand in {features.min_df} of the {len(texts)} texts, got none ({error}). "
            "To resolve, check that the texts are not empty, lower `min_df`, or use character n-grams (`chars`)."
        ) from error


# ---------------------------------------------------------------------------------------------------------------- streams


def fit_stream(
    kind: Kind,
    labelled: Taught | None,
    pool: IterableDataset,
    source: TeacherSource,
    left_out: tuple[set[tuple[str, ...]], set[tuple[str, ...]]],
    settings: Settings,
) -> tuple[Pipeline, float, dict[str, Any]]:
    """Hashed features and `partial_fit`; memory is bounded by a chunk, whatever the length of the stream.

    A tenth of the labelled rows (2,000 at most) waits until the end: the temperature is fitted on it, then the student
    learns from it too. Nothing is tuned.

    Args:
        left_out: keys of the evaluation rows and of the labelled rows, which the pool may not repeat.

    Returns:
        As `fit_in_memory`.

    Raises:
        ValueError: rows that are no texts, or no row is left.
    """
    task = source.task
    pairs = len(task.text_columns) == 2
    transformer = vectorizer(replace(settings.features_for(kind)[0], hashed=True), pairs)
    transformer.fit([("", "")] if pairs else [""])  # hashing learns nothing from texts
    estimator = new_stream(kind, soft=True, seed=settings.seed)
    # Naive Bayes counts: a second pass would count everything twice.
    epochs = 1 if isinstance(estimator, MultinomialNB | ComplementNB) else settings.epochs
    train, held = (None, None) if labelled is None else _held_back(labelled, settings.seed)
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        # Each epoch would ask the teacher anew. Several processes share a cache, and this folder is of one.
        alone = process_state().num_processes == 1
        if source.cache_dir is None and source.model is not None and epochs > 1 and alone:
            source = replace(source, cache_dir=stack.enter_context(TemporaryDirectory()))
        for _ in range(epochs):
            counts = {"pool": 0, "pool_also_held_out": 0, "pool_also_labelled": 0}
            for rows in chain(
                _slices(train, settings.chunk_rows), _taught_chunks(pool, source, left_out, settings, counts)
            ):
                fit_chunk(estimator, transformer.transform(rows.texts), rows.targets, settings.logit_clip)
    if labelled is None and counts["pool"] == 0:
        raise ValueError("the pool has no rows that may be learned from. To resolve, pass other texts.")
    temperature, accuracy = 1.0, None
    if held is None:
        logger.warning("there are no labelled rows: the probabilities of a streamed student are not calibrated then")
    else:
        values = scores(estimator, transformer.transform(held.texts), task.num_labels)
        temperature = fit_temperature(values, np.eye(task.num_labels)[held.gold])
        accuracy = float((values.argmax(axis=1) == held.gold).mean())
        fit_chunk(estimator, transformer.transform(held.texts), held.targets, settings.logit_clip)
    done = {**counts, "streamed": True, "epochs": epochs, "held_back_accuracy": accuracy}
    return Pipeline([("features", transformer), ("student", estimator)]), temperature, done


def _held_back(labelled: Taught, seed: int) -> tuple[Taught, Taught]:
    """Rows to train on, and a tenth to calibrate on."""
    order = np.random.default_rng(seed).permutation(len(labelled.gold))
    number = min(max(len(order) // 10, 1), _MOST_HELD_BACK)
    return labelled.select(order[number:]), labelled.select(order[:number])


def _slices(rows: Taught | None, size: int) -> Iterator[Taught]:
    for start in range(0, 0 if rows is None else len(rows.gold), size):
        yield rows.select(np.arange(start, min(start + size, len(rows.gold))))  # type: ignore[union-attr]


def _taught_chunks(
    pool: IterableDataset,
    source: TeacherSource,
    left_out: tuple[set[tuple[str, ...]], set[tuple[str, ...]]],
    settings: Settings,
    counts: dict[str, int],
) -> Iterator[Taught]:
    """Chunks of a stream with the teacher's targets; adds to the counts of rows used and left out."""
    for batch in pool.iter(batch_size=settings.chunk_rows):
        rows = Dataset.from_dict({c: batch[c] for c in (*source.task.text_columns, "teacher_logits") if c in batch})
        taught = pool_rows(rows, source, left_out, settings.temperature, counts)
        if len(taught.gold):
            yield taught
