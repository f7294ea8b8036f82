"""What every student that is no transformer can do: predict on raw strings, say how sure it is, be saved."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn import config_context
from sklearn.pipeline import Pipeline

from .features import count_vectorizers, unknown_texts
from .files import read_pipeline, write_pipeline, write_student
from .kinds import linear_weights, num_parameters, scores

logger = logging.getLogger(__name__)


class Student(ABC):
    """A classifier of texts, or of pairs of texts.

    Attributes:
        kind: such as "logistic_regression".
        label_names: the classes in the order of their numbers.
        text_columns: one column of the task, or two for pairs.
        temperature: divides the scores, so that probabilities are calibrated; it does not change which class wins.
        training: how it was taught: rows, what was left out of the pool, chosen parameters, accuracy out of fold.
    """

    def __init__(
        self,
        kind: str,
        label_names: Sequence[str],
        text_columns: Sequence[str],
        temperature: float = 1.0,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.label_names = tuple(label_names)
        self.text_columns = tuple(text_columns)
        self.temperature = float(temperature)
        self.training = dict(training or {})

    @abstractmethod
    def scores(self, texts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Checked texts -> (texts, classes) scores before calibration, and (texts,) bool: nothing in it is known."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Numbers that a prediction depends on, beside the vocabulary."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Puts everything but `about` into a folder."""

    @property
    def pairs(self) -> bool:
        return len(self.text_columns) == 2

    def predict_logits(self, texts: Any, warn: bool = True) -> np.ndarray:
        """(texts, classes) calibrated scores, as `Task.compute` takes them.

        Args:
            texts: a text or a list of texts; for pairs (text, text) or a list of them.
            warn: log a warning where a text has nothing that the student knows, such as one in another script: all it
                can answer then is the share that each class had in training.

        Raises:
            TypeError: something else than texts, or pairs where single texts are due.
        """
        texts = self.as_texts(texts)
        if not texts:
            return np.empty((0, len(self.label_names)))
        values, unknown = self.scores(texts)
        if warn and unknown.any():
            logger.warning(
                "%d of %d texts have no word that this %s student knows (empty, or another language or script)",
                unknown.sum(),
                len(unknown),
                self.kind,
            )
        return values / self.temperature

    def predict_proba(self, texts: Any, warn: bool = True) -> np.ndarray:
        """(texts, classes) calibrated probabilities; arguments and errors as `predict_logits`."""
        return softmax(self.predict_logits(texts, warn), axis=1)

    def predict(self, texts: Any) -> np.ndarray:
        """(texts,) class numbers."""
        return self.predict_logits(texts).argmax(axis=1)

    def __call__(self, inputs: Any, top_k: int | None = 1) -> list[Any]:
        """Like a transformers text-classification pipeline: [{"label", "score"}, ...], one for each text.

        Args:
            inputs: a text or a list of texts; for pairs {"text": ..., "text_pair": ...}, (text, text), or a list of them.
            top_k: 1 for the best label of each text, else a list of so many per text, best first; None for all.
        """
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(
                f"`top_k` must be at least 1, or None for all labels, got {top_k!r}. To resolve, correct it."
            )
        answers = []
        for row in self.predict_proba(inputs):
            best = np.argsort(-row, kind="stable")[:top_k]
            answers.append([{"label": self.label_names[i], "score": float(row[i])} for i in best])
        return [answer[0] for answer in answers] if top_k == 1 else answers

    def save(self, folder: str | Path) -> None:
        """Saves to a folder, without pickle; `smbert.load_student` reads it.

        Raises:
            ValueError: the folder holds something else than a student.
            OSError: it could not be written; an earlier student in it is intact.
        """
        write_student(folder, self.about(), self._write)

    def about(self) -> dict[str, Any]:
        """What student.json says."""
        return {
            "kind": self.kind,
            "label_names": list(self.label_names),
            "text_columns": list(self.text_columns),
            "temperature": self.temperature,
            "num_parameters": self.num_parameters,
            "training": self.training,
        }

    def as_texts(self, inputs: Any) -> list[Any]:
        """One input or many -> a list of texts, or of (text, text)."""
        if isinstance(inputs, str | Mapping) or (self.pairs and isinstance(inputs, tuple)):
            inputs = [inputs]
        texts = [(t["text"], t.get("text_pair")) if isinstance(t, Mapping) else t for t in inputs]
        if not self.pairs:
            texts = [t[0] if isinstance(t, tuple) and len(t) == 2 and t[1] is None else t for t in texts]
        for number, text in enumerate(texts):
            parts = text if self.pairs else (text,)
            if not isinstance(parts, tuple | list) or len(parts) != len(self.text_columns):
                wrong = True
            else:
                wrong = not all(isinstance(part, str) for part in parts)
            if wrong:
                wanted = "pairs (text, text)" if self.pairs else "texts"
                raise TypeError(
                    f"`texts` must be {wanted}, got {text!r} at position {number}. To resolve, pass strings for "
                    f"{', '.join(self.text_columns)}."
                )
        return [tuple(text) for text in texts] if self.pairs else texts


class ClassicalStudent(Student):
    """A scikit-learn Pipeline: text features, then an estimator of `smbert.classical.kinds.KINDS`."""

    def __init__(self, pipeline: Pipeline, **about: Any) -> None:
        super().__init__(**about)
        self.pipeline = pipeline

    def scores(self, texts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        # Of a single text, scikit-learn's checks and its copies of the weights would take longer than all the rest.
        with config_context(assume_finite=True, skip_parameter_validation=True):
            matrix = self.pipeline[0].transform(texts)
            if self._linear is None:
                found = scores(self.pipeline[1], matrix, len(self.label_names))
            else:
                found = matrix @ self._linear[0] + self._linear[1]
        return found, unknown_texts(self.pipeline[0], matrix)

    @cached_property
    def _linear(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(features, classes) weights, row by row in memory, and (classes,) intercepts before calibration; None for trees."""
        found = linear_weights(self.pipeline[1], len(self.label_names))
        return None if found is None else (np.ascontiguousarray(found[0].T), found[1])

    def features(self, texts: Any) -> Any:
        """(texts, features) sparse: what the estimator sees."""
        return self.pipeline[0].transform(self.as_texts(texts))

    def linear_weights(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(classes, features) weights and (classes,) intercepts of a linear student, calibrated; None for trees.

        softmax(features @ weights.T + intercepts) is `predict_proba`.
        """
        found = self._linear
        return None if found is None else (found[0].T / self.temperature, found[1] / self.temperature)

    def feature_names(self) -> np.ndarray | None:
        """(features,) n-grams; None where they are hashed."""
        if not any(True for _ in count_vectorizers(self.pipeline[0])):
            return None
        return self.pipeline[0].get_feature_names_out()

    @property
    def num_parameters(self) -> int:
        idf = sum(len(one.idf_) for one in count_vectorizers(self.pipeline[0]) if hasattr(one, "idf_"))
        return num_parameters(self.pipeline[1]) + idf

    def _write(self, folder: Path) -> None:
        write_pipeline(folder, self.pipeline)

    @classmethod
    def read(cls, folder: Path, about: dict[str, Any]) -> ClassicalStudent:
        """The student whose student.json is `about`."""
        pipeline = read_pipeline(folder, about["scikit_learn"])
        names = ("kind", "label_names", "text_columns", "temperature", "training")
        return cls(pipeline, **{name: about[name] for name in names})
