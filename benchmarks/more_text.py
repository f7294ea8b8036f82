"""Text without labels for the benchmarks: what a student may learn from beside the rows that its teacher saw."""

from __future__ import annotations

import argparse

import numpy as np
from datasets import Dataset, concatenate_datasets

from smbert.tasks import Task, glue_task, load_task, turned_pairs


def add_arguments(parser: argparse.ArgumentParser, default_task: str) -> None:
    parser.add_argument(
        "--pool-samples",
        type=int,
        help="fill the student's rows up to so many with text without labels: what --turned-pairs makes, the task's other rows, then "
        "--pool-task's",
    )
    parser.add_argument(
        "--turned-pairs",
        action="store_true",
        help="the pairs that the teacher saw turned round, (b, a), are text, too",
    )
    parser.add_argument("--pool-task", help=f"whose text fills up (default: {default_task})")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a pool without a size or of no task."""
    if args.pool_samples is not None and args.pool_samples < 1:
        raise ValueError(f"`--pool-samples` must be at least 1, got {args.pool_samples}. To resolve, try 20000.")
    if args.pool_task is not None:
        glue_task(args.pool_task)
    for flag, value in (("--pool-task", args.pool_task), ("--turned-pairs", args.turned_pairs)):
        if value and args.pool_samples is None:
            raise ValueError(
                f"`{flag}` needs `--pool-samples`, got {value!r} alone. To resolve, pass both, or neither."
            )


def unlabelled(
    task: Task,
    train: Dataset,
    own: int,
    samples: int,
    seed: int,
    source: str | None = None,
    data_dir: str | None = None,
    turned: bool = False,
) -> Dataset | None:
    """Texts in the task's columns: its training rows after the first `own` of their shuffle, then those of another task.

    A task of single texts takes nothing from one of pairs, and has nothing to turn round.

    Args:
        task: whose columns the texts get.
        train: all its training rows.
        own: the rows that the teacher sees, the first of `train.shuffle(seed=seed)`.
        samples: of the rows and the texts together.
        seed: of both shuffles.
        source: the other task.
        data_dir: where it lies (default: the Hub).
        turned: the first `own` rows with their two texts exchanged come before all these.

    Returns:
        None where nothing is missing or nothing is there.
    """
    columns = list(task.text_columns)
    rest = np.arange(own, len(train))  # which may be none, and `select` takes no such range
    shuffled = train.shuffle(seed=seed)
    found = [shuffled.select(rest).select_columns(columns)]
    if source is not None:
        other, data = load_task(source, data_dir, required=("train",))
        if len(other.text_columns) == len(columns):
            texts = data["train"].shuffle(seed=seed).select_columns(list(other.text_columns))
            found.append(texts.rename_columns(dict(zip(other.text_columns, columns))).cast(found[0].features))
    if turned and len(columns) == 2:
        found.insert(0, turned_pairs(shuffled.select(range(own)), task))
    missing = min(samples - own, sum(map(len, found)))
    return concatenate_datasets(found).select(range(missing)) if missing > 0 else None
