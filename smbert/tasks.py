"""Tasks: which columns hold the texts and the labels, what the labels mean, and how GLUE or the user scores them.

    task, data = load_task("mrpc", data_dir="glue")                       # GLUE, from a folder or from the Hub
    task, data = load_files("train.csv", "dev.csv", label_column="stars")  # one's own files
    task = custom_task_from(dataset); data = prepare(task, dataset)        # one's own datasets.Dataset

All three check every row before any work and return a `DatasetDict` of one shape: splits named train, validation, test
(and validation_mismatched, test_mismatched), the task's text columns, and labels as class numbers, floats, or multi-hot
rows. A test split without labels comes back without its label column.

GLUE: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from smbert import _prepare, _rows
from smbert._prepare import prepare
from smbert._tokenize import data_fingerprint, tokenize, tokenizer_fingerprint
from smbert.metrics import METRICS
from smbert.submission import write_submission

__all__ = [
    "GLUE",
    "Task",
    "custom_task_from",
    "data_fingerprint",
    "glue_task",
    "load_files",
    "load_task",
    "majority_baseline",
    "prepare",
    "tokenize",
    "tokenizer_fingerprint",
    "turned_pairs",
    "write_submission",
]

KINDS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
DEFAULT_METRICS = {
    "single_label": ("accuracy", "f1_macro"),
    "multi_label": ("f1_micro", "f1_macro"),
    "regression": ("pearson", "spearmanr", "mse"),
}


@dataclass(frozen=True)
class Task:
    """What a data set asks for.

    Attributes:
        name: such as "mrpc"; also the folder looked for below a `data_dir`.
        text_columns: one column, or two for pairs.
        kind: "single_label", "multi_label" or "regression".
        label_names: the classes in the order of their numbers; empty for regression.
        metrics: keys of `smbert.metrics.METRICS`, all reported; empty means the default of the kind.
        headline: the one of `metrics` that retention is computed from (higher is better); empty means the first.
        label_column: name of the label column.
        label_range: smallest and largest score of a regression task, None for any.
        splits: canonical split -> its name in the source; only where the two differ.
    """

    name: str
    text_columns: tuple[str, ...]
    kind: str = "single_label"
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    headline: str = ""
    label_column: str = "label"
    label_range: tuple[float, float] | None = None
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}. To resolve, choose one of them."
            )
        for name in ("text_columns", "label_names", "metrics"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "metrics", self.metrics or DEFAULT_METRICS[self.kind])
        object.__setattr__(self, "headline", self.headline or self.metrics[0])
        columns = (*self.text_columns, self.label_column)
        if len(self.text_columns) not in (1, 2) or len(set(columns)) != len(columns):
            raise ValueError(
                f"`text_columns` must be one or two columns, none of them the label column {self.label_column!r}, got "
                f"{self.text_columns}. To resolve, name the column of the text, or the two of a pair."
            )
        least = {"single_label": 2, "multi_label": 1, "regression": 0}[self.kind]
        distinct = len(set(self.label_names)) == len(self.label_names)
        if len(self.label_names) < least or not distinct or (self.kind == "regression" and self.label_names):
            raise ValueError(
                f"`label_names` must be {f'at least {least} different names' if least else 'empty'} for a {self.kind} "
                f"task, got "
                f"{self.label_names}. To resolve, correct them, or choose another `kind`."
            )
        unknown = [m for m in self.metrics if m not in METRICS or self.kind not in METRICS[m].kinds]
        fitting = [m for m, metric in METRICS.items() if self.kind in metric.kinds]
        if unknown or self.headline not in self.metrics or not METRICS[self.headline].higher_is_better:
            raise ValueError(
                f"`metrics` must be among {', '.join(fitting)} for a {self.kind} task and `headline` one of them that "
                f"grows with "
                f"quality, got {self.metrics} and {self.headline!r}. To resolve, choose others."
            )
        if "f1" in self.metrics and len(self.label_names) != 2:
            raise ValueError(f"metric 'f1' needs 2 classes, got {len(self.label_names)}. To resolve, use 'f1_macro'.")

    @property
    def num_labels(self) -> int:
        """Width of the logits: number of classes, 1 for regression."""
        return len(self.label_names) or 1

    @property
    def problem_type(self) -> str:
        """The name of `kind` in a transformers config."""
        return KINDS[self.kind]

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """The canonical splits to score: "validation", for MNLI "validation_mismatched" too."""
        return ("validation", *(s for s in self.splits if s == "validation_mismatched"))

    def compute(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Score predictions with every metric of the task.

        Args:
            predictions: logits (rows, num_labels); regression also (rows,).
            labels: class numbers (rows,), scores (rows,), or multi-hot rows (rows, num_labels).

        Returns:
            Metric name -> value. A correlation that is undefined (constant predictions) is 0.0.

        Raises:
            ValueError: shapes that do not fit, NaN, no rows, or labels outside the classes.
        """
        logits, gold = np.asarray(predictions, dtype=np.float64), np.asarray(labels)
        if self.kind == "regression" and logits.ndim == 2 and logits.shape[1] == 1:
            logits = logits[:, 0]
        wanted = (len(gold),) if self.kind == "regression" else (len(gold), self.num_labels)
        if (
            len(gold) == 0
            or logits.shape != wanted
            or gold.shape != (wanted if self.kind == "multi_label" else (len(gold),))
        ):
            raise ValueError(
                f"`predictions` must have shape {wanted} for task {self.name!r} with labels of shape {gold.shape} (at "
                f"least one row), "
                f"got {logits.shape}. To resolve, pass the logits and the labels of the same rows."
            )
        if not np.isfinite(logits).all():
            row = int(np.argwhere(~np.isfinite(logits))[0][0])
            raise ValueError(
                f"`predictions` must be finite, got {logits[row]} in row {row}. To resolve, check the model's weights."
            )
        if self.kind == "single_label":
            _rows.raise_first(
                gold.tolist(),
                lambda v: not (0 <= v < self.num_labels),
                f"`labels` must be from 0 to {self.num_labels - 1}",
                "score a labelled split",
            )
            decided = logits.argmax(axis=1)
        else:
            decided = (logits > 0).astype(np.int64) if self.kind == "multi_label" else logits
        return {name: METRICS[name].function(gold, decided) for name in self.metrics}


def _glue(
    name: str, columns: tuple[str, ...], names: str, metrics: str = "accuracy", headline: str = "", **options: Any
) -> Task:
    return Task(
        name, columns, label_names=tuple(names.split()), metrics=tuple(metrics.split()), headline=headline, **options
    )


_MNLI_SPLITS = {
    "validation": "validation_matched",
    "validation_mismatched": "validation_mismatched",
    "test": "test_matched",
    "test_mismatched": "test_mismatched",
}
# Label names in the order of the Hub's nyu-mll/glue. MRPC and QQP report F1 first, as the papers do; STS-B Spearman.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), "unacceptable acceptable", "matthews_correlation"),
        _glue("sst2", ("sentence",), "negative positive"),
        _glue("mrpc", ("sentence1", "sentence2"), "not_equivalent equivalent", "accuracy f1", "f1"),
        _glue("qqp", ("question1", "question2"), "not_duplicate duplicate", "accuracy f1", "f1"),
        _glue(
            "stsb",
            ("sentence1", "sentence2"),
            "",
            "pearson spearmanr",
            "spearmanr",
            kind="regression",
            label_range=(0.0, 5.0),
        ),
        _glue("mnli", ("premise", "hypothesis"), "entailment neutral contradiction", splits=_MNLI_SPLITS),
        _glue("qnli", ("question", "sentence"), "entailment not_entailment"),
        _glue("rte", ("sentence1", "sentence2"), "entailment not_entailment"),
        _glue("wnli", ("sentence1", "sentence2"), "not_entailment entailment"),
    )
}


def glue_task(name: str) -> Task:
    """One of the nine GLUE tasks by name; "SST-2", "sst_2" and "sst2" are the same.

    Raises:
        ValueError: no such task.
    """
    key = str(name).lower().replace("-", "").replace("_", "")
    if key not in GLUE:
        raise ValueError(
            f"`task` must be one of {', '.join(GLUE)}, got {name!r}. To resolve, choose one of them, or read your own "
            f"data with "
            "`load_files` (flags --train-file, --validation-file)."
        )
    return GLUE[key]


def turned_pairs(rows: Dataset, task: Task) -> Dataset:
    """Each pair of texts the other way round, (b, a) for (a, b), and without a label: more text of the task's own kind.

    For a student to learn from: a teacher labels what it is shown, also where the direction matters, as in entailment.

        compress(model, unlabelled_dataset=turned_pairs(train, task), ...)

    Args:
        rows: with the task's two text columns; others are left out.
        task: names them.

    Returns:
        As many rows, in the same order.

    Raises:
        ValueError: a task of single texts, or a column that is not there.
    """
    if len(task.text_columns) != 2:
        raise ValueError(
            f"`task` must have two text columns to turn round, got {task.text_columns} of {task.name!r}. "
            "To resolve, leave the turned pairs (flag --turned-pairs) out."
        )
    _rows.require_columns(rows, list(task.text_columns), "train")
    one, other = task.text_columns
    plain = rows.select_columns([one, other])
    return plain.rename_columns({one: other, other: one}).select_columns([one, other])


def custom_task_from(
    dataset: Dataset | Mapping[str, Dataset],
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    *,
    kind: str | None = None,
    label_names: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    headline: str = "",
    name: str = "custom",
) -> Task:
    """Find out what task a data set poses, from its training split; what is named is taken as named.

    Label column: `label` or `labels`. Text columns: a usual pair (sentence1/sentence2, premise/hypothesis, ...),
    `text`, `sentence`, or the one or two remaining columns of texts. Kind: lists are multi-label (lists of labels, or
    multi-hot rows), fractions a regression, everything else classes; integers that are scores need `kind="regression"`.
    Classes: `label_names`, the names of a ClassLabel column, or the distinct labels sorted (numbers by value).

    Raises:
        ValueError: columns that are absent or cannot be told, one class only, numbers and words in one label column.
    """
    found = _prepare.describe(dataset, text_columns, label_column, kind, label_names)
    return Task(name, metrics=tuple(metrics), headline=headline, **found)


def load_task(
    name_or_task: str | Task, data_dir: str | Path | None = None, required: Sequence[str] = ("train", "validation")
) -> tuple[Task, DatasetDict]:
    """A task and its data, checked: from `data_dir`, else (GLUE) from the Hub's nyu-mll/glue.

    Args:
        name_or_task: name of a GLUE task, or a task.
        data_dir: folder that holds `<task name>/train.parquet` and so on (.parquet, .csv, .json, .jsonl; `dev` and
            `validation_matched` are validation; shards are joined), or that task's folder itself.
        required: canonical splits that must be there.

    Raises:
        ValueError: unknown task, folder or files that do not fit, Hub out of reach, or bad rows (see `prepare`).
    """
    task = name_or_task if isinstance(name_or_task, Task) else glue_task(name_or_task)
    if data_dir is not None:
        files = _rows.split_files(_rows.find_folder(data_dir, task.name, GLUE))
        return task, prepare(task, {split: _rows.read_files(f) for split, f in files.items()}, required)
    if GLUE.get(task.name) != task:
        raise ValueError(
            f"`data_dir` must be given for task {task.name!r}, which is not on the Hub. To resolve, pass the folder."
        )
    try:
        data = cast(DatasetDict, load_dataset("nyu-mll/glue", task.name))
    except Exception as error:  # the Hub client raises its own, requests' and the operating system's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"could not load GLUE task {task.name!r} from the Hub (nyu-mll/glue): {reason}. To resolve, check the "
            f"connection (and that "
            f"HF_HUB_OFFLINE is not set), or pass `data_dir` (flag --data-dir) with {task.name}/train.parquet and "
            f"validation.parquet."
        ) from error
    return task, prepare(task, data, required)


def load_files(
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    *,
    required: Sequence[str] = ("train", "validation"),
    **description: Any,
) -> tuple[Task, DatasetDict]:
    """A task and its data from one's own csv, json, jsonl or parquet files, checked.

    Args:
        train_file: file of the training split; the other two alike.
        validation_file: see `train_file`.
        test_file: see `train_file`; may lack labels.
        required: canonical splits that must be there.
        description: `text_columns`, `label_column`, `kind`, `label_names`, `metrics`, `headline`, `name`, as in
            `custom_task_from`.

    Raises:
        ValueError: files that cannot be read, columns that cannot be told, or bad rows (see `prepare`).
    """
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    absent = [f"`{split}_file`" for split in required if given.get(split) is None]
    if absent:
        flags = ", ".join(f"--{split}-file" for split in required if given.get(split) is None)
        raise ValueError(f"{' and '.join(absent)} must be given. To resolve, pass {flags}.")
    data = {split: _rows.read_files([file]) for split, file in given.items() if file is not None}
    task = custom_task_from(data, **description)
    return task, prepare(task, data, required)


def majority_baseline(task: Task, train: Dataset, validation: Dataset) -> dict[str, float]:
    """What one gets without reading: the most frequent class of the (prepared) training rows, per label for
    multi-label; the mean score.

    Returns:
        Metrics on `validation`, as `Task.compute` gives them.
    """
    labels, gold = np.asarray(list(train[task.label_column])), np.asarray(list(validation[task.label_column]))
    if task.kind == "single_label":
        row = np.eye(task.num_labels)[np.bincount(labels, minlength=task.num_labels).argmax()]
    elif task.kind == "multi_label":
        row = labels.mean(axis=0) - 0.5
    else:
        row = labels.mean(dtype=np.float64, keepdims=True)
    return task.compute(np.tile(row, (len(gold), 1)), gold)
