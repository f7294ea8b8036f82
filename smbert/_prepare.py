"""Checks a whole data set against a task, and finds out what task a data set poses. Public through `smbert.tasks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import ClassLabel, Dataset, DatasetDict, List, Value

from smbert import _rows

if TYPE_CHECKING:
    from smbert.tasks import Task

SPLITS = ("train", "validation", "validation_mismatched", "test", "test_mismatched", "unlabelled")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)


def describe(
    dataset: Dataset | Mapping[str, Dataset],
    text_columns: str | Sequence[str] | None,
    label_column: str | None,
    kind: str | None,
    label_names: Sequence[str] | None,
) -> dict[str, Any]:
    """The fields of the task that a data set poses; see `smbert.tasks.custom_task_from`."""
    source = _richest(dataset)
    there = f"its columns are {', '.join(map(repr, source.column_names))}"
    if len(source) == 0:
        raise ValueError("the data set has no rows. To resolve, provide some.")
    if label_column is None:
        found = [c for c in ("label", "labels") if c in source.column_names]
        if len(found) != 1:
            state = "both 'label' and 'labels'" if found else "neither 'label' nor 'labels'"
            raise ValueError(f"the data set has {state}; {there}. To resolve, pass `label_column`.")
        label_column = found[0]
    _rows.require_columns(source, [label_column], "train")
    if text_columns is None:
        text_columns = _text_columns(source, label_column, there)
    texts = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    _rows.require_columns(source, texts, "train")
    values = list(source[label_column])
    kind = kind or ("regression" if _is_float(source, label_column) else _rows.label_kind(values, label_column))
    if kind == "regression":
        label_names = ()
    elif label_names is None:
        feature = _inner(source.features[label_column])
        if isinstance(feature, ClassLabel):
            label_names = feature.names
        elif kind == "multi_label" and _rows.is_multi_hot(values):
            label_names = [str(i) for i in range(len(values[0]))]
        else:
            label_names = _rows.class_names(values)
        if len(label_names) < 2:
            raise ValueError(
                f"label column {label_column!r} must hold at least 2 classes, got only {list(label_names)}. "
                "To resolve, provide rows of another class, or name the right label column."
            )
    return {"text_columns": texts, "label_column": label_column, "kind": kind, "label_names": tuple(label_names)}


def prepare(
    task: Task, dataset: Dataset | Mapping[str, Dataset], required: Sequence[str] = ("train", "validation")
) -> DatasetDict:
    """Check every row of every split and bring the data into the one shape that this module promises.

    Preparing prepared data changes nothing. Splits that are none (such as IMDB's "unsupervised") are left out; the
    split "unlabelled" needs texts only and comes back without labels.

    Args:
        task: the task.
        dataset: splits; a bare `Dataset` is the training split.
        required: canonical splits that must be there.

    Raises:
        ValueError: a required split or a column is absent, a split is empty, a text is no string, a label is missing,
        outside the classes or no number, or the training split has one class only.
        TypeError: `dataset` is neither a Dataset nor a mapping of them.
    """
    if isinstance(dataset, Dataset):
        dataset = {"train": dataset}
    if not isinstance(dataset, Mapping) or not all(isinstance(d, Dataset) for d in dataset.values()):
        raise TypeError(
            f"`dataset` must be a datasets.Dataset or a mapping of splits to them, got {type(dataset).__name__}. "
            "To resolve, build one with datasets.Dataset.from_dict or load_dataset(..., streaming=False)."
        )
    named = {source: split for split, source in task.splits.items()}
    splits: dict[str, Dataset] = {}
    for source, rows in dataset.items():
        split = named.get(source) or (source if source in SPLITS else _rows.canonical_split(str(source)))
        if split in splits:
            raise ValueError(
                f"two splits of the data are the {split} split: {', '.join(dataset)}. To resolve, pass one of them."
            )
        if split is not None:
            splits[split] = rows.with_format(None)
    absent = [s for s in required if s not in splits]
    if absent:
        raise ValueError(
            f"task {task.name!r} needs the split {', '.join(absent)}; the data has "
            f"{', '.join(map(str, dataset)) or 'none'}. "
            "To resolve, provide it, for example with Dataset.train_test_split."
        )
    hot = task.kind == "multi_label" and _rows.is_multi_hot(
        [
            v
            for s, d in splits.items()
            if s != "unlabelled" and task.label_column in d.column_names
            for v in d[task.label_column]
        ]
    )
    return DatasetDict({split: _prepare_split(task, splits[split], split, hot) for split in SPLITS if split in splits})


def _prepare_split(task: Task, rows: Dataset, split: str, multi_hot: bool) -> Dataset:
    columns = list(task.text_columns)
    labelled = split != "unlabelled" and not (split.startswith("test") and task.label_column not in rows.column_names)
    if len(rows) == 0:
        raise ValueError(f"the {split} split of task {task.name!r} has no rows. To resolve, provide some.")
    _rows.require_columns(rows, columns + [task.label_column] * labelled, split)
    for column in columns:
        _rows.check_texts(list(rows[column]), column, split)
    labels = _encode_labels(task, rows, split, multi_hot) if labelled else None
    if labels is None:
        return rows.select_columns(columns)
    feature = {
        "single_label": ClassLabel(names=list(task.label_names)),
        "multi_label": List(Value("float32")),
        "regression": Value("float32"),
    }[task.kind]
    if rows.features[task.label_column] == feature:
        return rows.select_columns([*columns, task.label_column])
    return rows.select_columns(columns).add_column(task.label_column, labels, feature=feature)


def _encode_labels(task: Task, rows: Dataset, split: str, multi_hot: bool) -> list[Any] | None:
    """Labels of one split as class numbers, floats or multi-hot rows; None for a test split that has none."""
    column, values = task.label_column, list(rows[task.label_column])
    where, fix = f"label column {task.label_column!r} of the {split} split", "correct these rows"
    feature = _inner(rows.features[column])
    if isinstance(feature, ClassLabel) and set(feature.names) == set(task.label_names):
        names = [*feature.names, "-1"]  # -1 is the Hub's mark for no label
        values = [[names[x] for x in v] if isinstance(v, list) else v if v is None else names[v] for v in values]
    elif isinstance(feature, ClassLabel) and not (
        all(map(_rows.is_integer, feature.names)) and len(feature.names) == task.num_labels
    ):
        raise ValueError(
            f"{where} has the classes {feature.names}, but task {task.name!r} has {list(task.label_names)}. "
            "To resolve, rename the classes of the data, or pass the task that fits it."
        )

    marks_minus_one = task.kind == "single_label" and "-1" not in task.label_names
    marks_minus_one |= task.kind == "regression" and task.label_range is not None and split.startswith("test")

    def missing(value: Any) -> bool:
        return _rows.is_missing(value) or (marks_minus_one and _rows.is_number(value) and float(value) == -1)

    if split.startswith("test") and all(map(missing, values)):
        return None
    remedy = "label or drop these rows (-1 means no label; where it is a class, pass it in `label_names`)"
    _rows.raise_first(values, missing, f"{where} must have a label in every row", remedy)

    if task.kind == "regression":
        _rows.raise_first(
            values,
            lambda v: not _rows.is_number(v),
            f"{where} must hold numbers",
            f'{fix}, or pass kind="single_label"',
        )
        encoded: list[Any] = [float(v) for v in values]
        if task.label_range is not None:
            low, high = task.label_range
            _rows.raise_first(
                encoded, lambda v: not low <= v <= high, f"{where} must hold numbers from {low:g} to {high:g}", fix
            )
    else:
        known = ", ".join(f"{i} ({n})" if str(i) != n else n for i, n in enumerate(task.label_names))
        known = known if len(known) <= 300 else known[:297] + "..."
        index = _rows.class_index(task.label_names)
        if task.kind == "single_label":
            encoded = [index(v) for v in values]
            bad = dict.fromkeys(i for i, e in enumerate(encoded) if e is None)
            rule = f"{where} must hold one of the labels {known}"
        else:
            _rows.raise_first(values, lambda v: not isinstance(v, list), f"{where} must hold lists of labels", fix)
            rule = f"{where} must hold multi-hot rows of {task.num_labels} or lists of the labels {known}"
            lists = values if multi_hot else [[index(x) for x in v] for v in values]
            wrong = [len(v) != task.num_labels if multi_hot else None in v for v in lists]
            bad = dict.fromkeys(i for i, w in enumerate(wrong) if w)
            encoded = lists if multi_hot else [[float(i in v) for i in range(task.num_labels)] for v in lists]
        if bad:
            shown = iter(range(len(values)))
            _rows.raise_first(
                values, lambda v: next(shown) in bad, rule, f"{fix}, or pass the `label_names` that the data has"
            )
    if split == "train" and all(e == encoded[0] for e in encoded):
        raise ValueError(
            f"{where} holds one label only: {values[0]!r} in all {len(values)} rows. To resolve, provide rows of "
            f"others."
        )
    return encoded


def _inner(feature: Any) -> Any:
    return getattr(feature, "feature", feature)


def _is_float(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and feature.dtype.startswith(("float", "double"))


def _richest(dataset: Dataset | Mapping[str, Dataset]) -> Dataset:
    """The split that says most about the task: the training split where there is one."""
    if isinstance(dataset, Dataset):
        return dataset.with_format(None)
    for split in (*SPLITS, *dataset):
        if split in dataset:
            return dataset[split].with_format(None)
    raise ValueError("the data set has no split. To resolve, pass at least a training split.")


def _text_columns(rows: Dataset, label_column: str, there: str) -> tuple[str, ...]:
    for usual in (*TEXT_PAIRS, ("text",), ("sentence",)):
        if all(c in rows.column_names for c in usual):
            return usual
    sample = rows.select(range(min(len(rows), 1000)))
    texts = []
    for column in rows.column_names:
        values = [v for v in sample[column] if not _rows.is_missing(v)]
        words = values and all(isinstance(v, str) for v in values) and not all(map(_rows.is_number, values))
        if words and column != label_column:
            texts.append(column)
    if len(texts) not in (1, 2):
        what = f"{len(texts)} columns of texts ({', '.join(texts)})" if texts else "no column of texts"
        raise ValueError(
            f"the data set has {what}; {there}. To resolve, pass `text_columns`: one, or the two of a pair."
        )
    return tuple(texts)
