"""Which words made a classifier decide: LIME for text, for transformers and for classical students, side by side.

    teacher, student = as_classifier(model, tokenizer), as_classifier(load_student("student"))
    print(explain(teacher, "a fine film").weights)
    explain_all([teacher, student], texts).save("explanations")   # explanations.json, explanations.html

LIME: words are left out at random, and a ridge regression weighted by closeness to the whole text says how much each
word adds to the probability of a label. Ribeiro et al., "Why Should I Trust You?", KDD 2016.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._model_card import write_whole
from ..classical.students import ClassicalStudent, Student
from ..heads import is_finetuned
from ..measure import max_positions
from .comparison import report
from .html import page
from .lime import LimeSettings, Unit, masks_of, ridge, units_of, without

__all__ = [
    "Classifier",
    "Explanation",
    "Explanations",
    "LimeSettings",
    "as_classifier",
    "exact_weights",
    "explain",
    "explain_all",
]

Inputs = list[Any]  # of str, or of (str, str) for pairs


@dataclass(frozen=True)
class Classifier:
    """What LIME needs of a model.

    Attributes:
        name: shown in the output.
        label_names: the classes in the order of their numbers.
        predict_proba: texts, or pairs -> (texts, classes).
        student: the classical student behind it, whose exact weights can be shown; None for other models.
    """

    name: str
    label_names: tuple[str, ...]
    predict_proba: Callable[[Inputs], np.ndarray]
    student: ClassicalStudent | None = None


@dataclass(frozen=True)
class Explanation:
    """Why one classifier gives one text its probability of one label.

    Attributes:
        model: the classifier's name.
        texts: the text, or the two of a pair.
        label: number of the label that is explained.
        probabilities: of all labels for the whole text.
        units: what was left out.
        weights: one per unit: how much its presence adds to the probability of the label.
        intercept: of the linear model.
        r2: how well the linear model follows the classifier on the samples, weighted as they are; None where the
            probability never moves.
        seed: of the samples.
        exact: n-grams and what they add to the label's centred log probability, largest first; linear students only.
    """

    model: str
    texts: tuple[str, ...]
    label: int
    probabilities: tuple[float, ...]
    units: tuple[Unit, ...]
    weights: tuple[float, ...]
    intercept: float
    r2: float | None
    seed: int
    exact: tuple[tuple[str, float], ...] | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k units with the largest weights, by absolute value."""
        order = sorted(range(len(self.units)), key=lambda i: -abs(self.weights[i]))
        return [(self.units[i].text, self.weights[i]) for i in order[:k]]


@dataclass(frozen=True)
class Explanations:
    """One or two classifiers on the same texts.

    Attributes:
        models: their names.
        label_names: the classes.
        rows: for each text one explanation per classifier, for the same label and the same samples.
        report: fidelity, stability over seeds, and overlap of two classifiers; see `smbert.explain.comparison`.
        settings: how texts were probed.
    """

    models: tuple[str, ...]
    label_names: tuple[str, ...]
    rows: tuple[tuple[Explanation, ...], ...]
    report: dict[str, Any]
    settings: LimeSettings = field(default_factory=LimeSettings)

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}

    def html(self) -> str:
        """One page that needs nothing else."""
        return page(self.to_dict())

    def save(self, folder: str | Path) -> None:
        """Writes explanations.json and explanations.html, each whole or not at all.

        Raises:
            OSError: they could not be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / "explanations.json", content.encode("utf-8", "replace"))
        write_whole(folder / "explanations.html", self.html().encode("utf-8", "replace"))


def as_classifier(
    model: Student | PreTrainedModel | Callable[[Inputs], np.ndarray],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> Classifier:
    """A student, a transformers or smbert sequence classifier, or any function, in the form that LIME calls.

    Args:
        model: a function takes texts (or pairs) and gives (texts, classes) probabilities.
        tokenizer: of a transformers model.
        name: shown in the output; None: the kind of the model.
        label_names: of a function; of other models they are known.
        max_length: most tokens of a text; None for 512 or the model's limit.
        batch_size: texts per call of a transformers model.

    Raises:
        ValueError: a tokenizer, label names or a classification head is missing, or the model gives scores.
        TypeError: none of the three.
    """
    if isinstance(model, Student):
        student = model if isinstance(model, ClassicalStudent) else None
        # Leaving out words leaves nothing at times, which is no news.
        return Classifier(name or model.kind, model.label_names, partial(model.predict_proba, warn=False), student)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("`tokenizer` must be given for a transformers model, got none. To resolve, pass its own.")
        config: Any = model.config
        if not is_finetuned(model) or config.num_labels < 2 or config.problem_type == "regression":
            raise ValueError(
                f"`model` must be a sequence classifier of at least 2 labels, got {type(model).__name__} with "
                f"{config.num_labels}. To resolve, pass a fine-tuned classifier."
            )
        longest = int(min(512, tokenizer.model_max_length, max_positions(model)))
        names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        probabilities = _Transformer(model, tokenizer, max_length or longest, batch_size)
        return Classifier(name or type(model).__name__, names, probabilities)
    if callable(model):
        if label_names is None:
            raise ValueError("`label_names` must be given for a function, got none. To resolve, pass the classes.")
        return Classifier(name or "function", tuple(label_names), model)
    raise TypeError(
        f"`model` must be a student, a transformers model or a function, got {type(model).__name__}. "
        "To resolve, load it with smbert.load_student or smbert.load_model."
    )


@dataclass(frozen=True)
class _Transformer:
    """Probabilities of a transformers classifier, in batches of similar length."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch_size: int

    def __call__(self, texts: Inputs) -> np.ndarray:
        sides = [list(texts)] if isinstance(texts[0], str) else [list(side) for side in zip(*texts)]
        tokens = self.tokenizer(*sides, truncation=True, max_length=self.max_length)
        order = sorted(range(len(texts)), key=lambda i: -len(tokens["input_ids"][i]))
        config: Any = self.model.config
        logits = np.empty((len(texts), config.num_labels))
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for start in range(0, len(order), self.batch_size):
                    rows = order[start : start + self.batch_size]
                    batch = self.tokenizer.pad({k: [tokens[k][i] for i in rows] for k in tokens}, return_tensors="pt")
                    logits[rows] = self.model(**batch.to(self.model.device)).logits.float().cpu().numpy()
        finally:
            self.model.train(was_training)
        several = config.problem_type == "multi_label_classification"
        return expit(logits) if several else softmax(logits, axis=1)


def explain(
    classifier: Classifier, text: Any, label: int | None = None, settings: LimeSettings | None = None
) -> Explanation:
    """LIME for one text, or one pair of texts.

    Args:
        classifier: see `as_classifier`.
        text: a string, or (string, string).
        label: number of the label to explain; None: the one that the classifier finds most probable.
        settings: how to probe.

    Raises:
        ValueError: no such label.
        TypeError: no text.
    """
    settings = settings or LimeSettings()
    texts = _as_pair(text)
    units = units_of(texts, settings.ngram)
    masks = masks_of(len(units), settings)
    # A short text has fewer different remainders than samples: each is asked about once.
    variants = [without(texts, units, mask) for mask in masks]
    unique = list(dict.fromkeys(variants))
    asked = np.asarray(classifier.predict_proba([v[0] if len(v) == 1 else v for v in unique]), dtype=np.float64)
    number = {variant: i for i, variant in enumerate(unique)}
    whole = asked[number[variants[0]]]  # the first mask leaves nothing out
    if label is None:
        label = int(whole.argmax())
    if not 0 <= label < len(whole):
        raise ValueError(f"`label` must be from 0 to {len(whole) - 1}, got {label}. To resolve, choose a class.")
    wanted = asked[[number[variant] for variant in variants], label]
    weights, intercept, r2 = ridge(masks, wanted, settings)
    return Explanation(
        classifier.name,
        texts,
        label,
        tuple(whole.tolist()),
        units,
        tuple(weights.tolist()),
        intercept,
        r2,
        settings.seed,
        exact_weights(classifier.student, text, label) if classifier.student is not None else None,
    )


def explain_all(
    classifiers: Sequence[Classifier],
    texts: Sequence[Any],
    label: int | None = None,
    settings: LimeSettings | None = None,
    seeds: int = 3,
    k: int = 10,
    disable_tqdm: bool = False,
) -> Explanations:
    """Explains texts by one classifier, or by two and how far they agree.

    Args:
        classifiers: one or two, of the same labels; the first decides which label is explained.
        texts: strings, or pairs.
        label: number of the label; None: for each text the one that the first classifier finds most probable.
        settings: how to probe; further seeds follow its own.
        seeds: how many seeds stability is measured over; the explanations shown are those of the first.
        k: words that are compared.
        disable_tqdm: no progress line.

    Raises:
        ValueError: classifiers of different labels, no texts, or numbers out of range.
    """
    settings = settings or LimeSettings()
    if len(classifiers) not in (1, 2) or not texts or seeds < 1 or k < 1:
        raise ValueError(
            "`classifiers` must be 1 or 2, `texts` at least 1, `seeds` and `k` at least 1, got "
            f"{len(classifiers)}, {len(texts)}, {seeds} and {k}. To resolve, correct them."
        )
    names = [classifier.label_names for classifier in classifiers]
    if (
        len({tuple(n.casefold() for n in own) for own in names if not _numbered(own)}) > 1
        or len({*map(len, names)}) > 1
    ):
        raise ValueError(
            f"both classifiers must have the same labels in the same order, got {' and '.join(str(list(n)) for n in names)}. "
            "To resolve, explain classifiers of the same task."
        )
    rows: list[list[list[Explanation]]] = []  # text, classifier, seed
    for text in tqdm(texts, desc="explanations", unit="text", disable=disable_tqdm):
        first = label
        found: list[list[Explanation]] = []
        for classifier in classifiers:
            found.append([])
            for seed in range(settings.seed, settings.seed + seeds):
                one = explain(classifier, text, first, LimeSettings(**{**asdict(settings), "seed": seed}))
                first = one.label
                found[-1].append(one)
        rows.append(found)
    shown = tuple(tuple(per_seed[0] for per_seed in row) for row in rows)
    labels = next((own for own in names if not _numbered(own)), names[0])
    models = tuple(classifier.name for classifier in classifiers)
    return Explanations(models, labels, shown, report(rows, k), settings)


def exact_weights(student: ClassicalStudent, text: Any, label: int) -> tuple[tuple[str, float], ...] | None:
    """What every n-gram of a text adds to the centred, calibrated log probability of a label, largest first.

    Their sum and the entry "(intercept)" is that log probability, less its mean over the labels. None for students
    that are not linear and for hashed n-grams, whose names are not known.
    """
    found, names = student.linear_weights(), student.feature_names()
    if found is None or names is None:
        return None
    weights, intercepts = (values - values.mean(axis=0) for values in found)
    row = student.features([text]).tocoo()
    parts = [(str(names[i]), float(value * weights[label, i])) for i, value in zip(row.col, row.data)]
    parts.append(("(intercept)", float(intercepts[label])))
    return tuple(sorted(parts, key=lambda part: -abs(part[1])))


def _numbered(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+|\d+", name) for name in names)


def _as_pair(text: Any) -> tuple[str, ...]:
    texts = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, tuple | list) else ()
    if len(texts) not in (1, 2) or not all(isinstance(part, str) for part in texts):
        raise TypeError(f"`text` must be a string, or two of them for a pair, got {text!r}. To resolve, correct it.")
    return texts
