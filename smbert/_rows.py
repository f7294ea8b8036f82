"""Reading rows from files and checking them: what `smbert.tasks` stands on.

Nothing here knows a task. Functions get column names, label names and split names, and answer with rows or with a
ValueError that names the column, the split, the first bad row (counted from 0), its value and the remedy. All of it
runs before any model is touched.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, Features, Value, load_dataset

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}

# `validation_matched`, `dev`, `train-00000-of-00001`; other stems are not splits.
_SPLIT_FILE = re.compile(r"^(train|validation|valid|val|dev|test)(_matched|_mismatched)?(-\d{5}-of-\d{5})?$")
_INTEGER = re.compile(r"^-?(0|[1-9]\d*)$")


def canonical_split(name: str) -> str | None:
    """The canonical name of a split (`dev` is `validation`), None for a name that is no split."""
    match = _SPLIT_FILE.match(name)
    if match is None:
        return None
    role = {"valid": "validation", "val": "validation", "dev": "validation"}.get(match[1], match[1])
    return role + ("_mismatched" if match[2] == "_mismatched" else "")


def data_files(folder: Path) -> list[Path]:
    """The files of `folder` (not of its sub-folders) in a known format, whose name is a split."""
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in BUILDERS)
    return sorted(f for f in files if canonical_split(f.stem) is not None)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Canonical split -> its files (several when sharded).

    Raises:
        ValueError: one split stands there twice (train.csv beside train.parquet).
    """
    splits: dict[str, list[Path]] = {}
    for file in data_files(folder):
        splits.setdefault(cast(str, canonical_split(file.stem)), []).append(file)
    for split, files in splits.items():
        sharded = all("-of-" in f.stem for f in files)
        if len(files) > 1 and (not sharded or len({(f.suffix, f.stem.split("-")[0]) for f in files}) > 1):
            names = ", ".join(f.name for f in files)
            raise ValueError(
                f"`{folder}` holds the {split} split more than once: {names}. To resolve, keep one of them."
            )
    return splits


def find_folder(data_dir: str | Path, name: str, other_names: Iterable[str]) -> Path:
    """The folder with the files of task `name`: `data_dir/name`, else `data_dir` itself.

    Raises:
        ValueError: it is missing, holds another task of `other_names`, or holds only sub-folders (never read as one
        data set).
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"`data_dir` must be an existing folder, got {str(root)!r}. To resolve, check the path.")
    if data_files(root / name):
        return root / name
    layout = f"{root}/{name}/train.parquet and validation.parquet (or .csv, .json, .jsonl)"
    if data_files(root):
        here = root.resolve().name
        if here != name and here in set(other_names):
            raise ValueError(
                f"`data_dir` is the folder of task {here!r}, but the task is {name!r}. "
                f"To resolve, pass the folder of {name!r}, or the one that holds {here!r} and {name!r}."
            )
        return root
    holds = sorted(d.name for d in root.iterdir() if d.is_dir() and data_files(d))
    if holds:
        raise ValueError(
            f"`data_dir` {str(root)!r} has no sub-folder {name!r} with data; those with data are {', '.join(holds)}. "
            f"To resolve, name one of them, or add {layout}."
        )
    found = ", ".join(sorted(f.name for f in root.iterdir())[:10]) or "nothing"
    raise ValueError(f"`data_dir` {str(root)!r} holds no data files (found: {found}). To resolve, provide {layout}.")


def read_files(files: Sequence[str | Path]) -> Dataset:
    """Read csv, json, jsonl or parquet files of one split.

    CSV cells are read as text, so that a text such as "null" or "NA" stays a text and an identifier keeps its zeros;
    labels are parsed later, where their kind is known.

    Raises:
        ValueError: a file is missing, of an unknown format, empty or damaged.
    """
    paths = [Path(f).expanduser() for f in files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"data file {str(path)!r} does not exist. To resolve, check the path.")
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"data file {str(path)!r} must be one of {', '.join(BUILDERS)}. To resolve, convert it.")
        if path.stat().st_size == 0:
            raise ValueError(f"data file {str(path)!r} is empty. To resolve, provide rows.")
    builder = BUILDERS[paths[0].suffix.lower()]
    options = reading_options(paths[0])
    try:
        return cast(Dataset, load_dataset(builder, data_files=[str(p) for p in paths], split="train", **options))
    except Exception as error:  # builders raise their own, pandas', pyarrow's and csv's errors
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        names = ", ".join(str(p) for p in paths)
        if "corresponds to no data" in reason:  # how `datasets` says it for a file without rows
            raise ValueError(f"{names} holds no rows. To resolve, provide some.") from error
        raise ValueError(
            f"could not read {names} as {builder}: {reason}. To resolve, check that it is whole and well formed."
        ) from error


def reading_options(path: Path) -> dict[str, Any]:
    """What `load_dataset` must be told so that it reads a file as `read_files` does.

    Raises:
        ValueError: the first line of a csv does not name every column once, or is not UTF-8.
    """
    if BUILDERS[path.suffix.lower()] != "csv":
        return {}
    return {
        "features": Features({name: Value("string") for name in _csv_header(path)}),
        "keep_default_na": False,
        "na_filter": False,
        "encoding": "utf-8-sig",
    }


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 ({error}). To resolve, save it as UTF-8.") from error
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled or not all(name.strip() for name in header):
        raise ValueError(
            f"the first line of {str(path)!r} must name every column once, got {header}. To resolve, add a header line."
        )
    return header


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN or a blank string."""
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def is_number(value: Any) -> bool:
    """Whether a cell is a number or spells one."""
    try:
        return not isinstance(value, bool | list) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def is_integer(value: Any) -> bool:
    """Whether a cell is an int or spells one."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and _INTEGER.match(value.strip()) is not None
    )


def require_columns(dataset: Dataset, columns: Sequence[str], split: str) -> None:
    """Refuse a split that lacks one of `columns`, naming those that are there."""
    absent = [c for c in columns if c not in dataset.column_names]
    if absent:
        raise ValueError(
            f"the {split} split has no column {', '.join(map(repr, absent))}; its columns are "
            f"{', '.join(map(repr, dataset.column_names))}. To resolve, name the columns that hold the texts and the "
            f"labels."
        )


def check_texts(values: Sequence[Any], column: str, split: str) -> None:
    """Refuse a text column with anything but strings in it (an empty string is a text: GLUE has some)."""
    raise_first(
        values,
        lambda v: not isinstance(v, str),
        f"text column {column!r} of the {split} split must hold strings",
        "drop or correct these rows, or name another text column",
    )


def raise_first(values: Sequence[Any], bad: Callable[[Any], bool], rule: str, remedy: str) -> None:
    """Raise a ValueError for the first bad row and the number of bad rows; nothing where there is none."""
    rows = [i for i, v in enumerate(values) if bad(v)]
    if rows:
        value = repr(values[rows[0]])
        value = value if len(value) <= 80 else value[:77] + "..."
        many = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        raise ValueError(f"{rule}, got {value} in row {rows[0]}{many}. To resolve, {remedy}.")


def label_kind(values: Sequence[Any], column: str) -> str:
    """What a column of labels means: "multi_label" (lists), "regression" (fractions) or "single_label" (integers,
    words, booleans).

    Raises:
        ValueError: numbers and words stand in one column, or every label is missing.
    """
    present = [v for v in values if not is_missing(v)]
    if not present:
        raise ValueError(f"label column {column!r} holds no label at all. To resolve, name the column that does.")
    if any(isinstance(v, list) for v in present):
        return "multi_label"
    numbers = sum(map(is_number, present))
    if 0 < numbers < len(present):
        wanted, first = (False, "text among numbers") if numbers * 2 >= len(present) else (True, "a number among texts")
        raise_first(
            values,
            lambda v: not is_missing(v) and is_number(v) == wanted,
            f"label column {column!r} must hold numbers only or texts only; {first}",
            'correct these rows, or pass kind="single_label" if they are classes',
        )
    return "single_label" if not numbers or all(map(is_integer, present)) else "regression"


def class_names(values: Iterable[Any]) -> tuple[str, ...]:
    """The distinct labels of a column (or of its lists), sorted, numbers by value. -1 is no class."""
    flat: set[str] = set()
    for value in values:
        flat.update(str(v).strip() for v in (value if isinstance(value, list) else [value]) if not is_missing(v))
    if all(map(is_integer, flat)):
        return tuple(sorted(flat - {"-1"}, key=int))
    return tuple(sorted(flat))


def is_multi_hot(values: Sequence[Any]) -> bool:
    """Whether lists are multi-hot rows: all of one length of at least 2, and nothing but 0 and 1.

    As lists of label ids such rows would have to repeat an id, or (length 2) give every row both labels, so this is
    never ambiguous.
    """
    rows = [v for v in values if isinstance(v, list)]
    return bool(rows) and len(rows[0]) > 1 and all(len(v) == len(rows[0]) and all(x in (0, 1) for x in v) for v in rows)


def class_index(names: Sequence[str]) -> Callable[[Any], int | None]:
    """A function that maps a label to its class: by name, else (names that are words) by number; None where it is
    neither.
    """
    by_name = {name: i for i, name in enumerate(names)}
    numeric = all(map(is_integer, names))

    def index(value: Any) -> int | None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        name = str(value).strip()
        if name in by_name:
            return by_name[name]
        if numeric or not is_integer(value):
            return None
        return int(value) if 0 <= int(value) < len(names) else None

    return index


def at_most(rows: Dataset, count: int | None, name: str) -> Dataset:
    """A random subset of `count` rows, the same in every run; all of them where there are no more or `count` is None.

    Raises:
        ValueError: `count`, which the user knows by `name`, is below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {count}. To resolve, raise it or leave it out.")
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=0).select(range(count))
