"""What a student of another architecture is taught from: texts, soft targets, gold labels, and who may not be among them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import _rows
from ..heads import is_finetuned, label_names
from ..measure import max_positions
from ..tasks import Task, tokenize
from ..teacher import DistillCollator, cached_logits, predict_logits, with_teacher_logits

logger = logging.getLogger(__name__)

Texts = list[Any]  # of str, or of (str, str) for a task of pairs


@dataclass(frozen=True)
class Taught:
    """Rows to learn from.

    Attributes:
        texts: (rows,) texts or pairs.
        targets: (rows, classes) probabilities.
        gold: (rows,) class numbers, -1 where there is no label.
    """

    texts: Texts
    targets: np.ndarray
    gold: np.ndarray

    def select(self, numbers: np.ndarray) -> Taught:
        """The rows of these numbers, in their order."""
        return Taught([self.texts[i] for i in numbers], self.targets[numbers], self.gold[numbers])

    def __add__(self, other: Taught) -> Taught:
        return Taught(
            self.texts + other.texts,
            np.concatenate([self.targets, other.targets]),
            np.concatenate([self.gold, other.gold]),
        )


def longest_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens of a row where none are asked for: 512, or as many as the teacher takes."""
    return int(min(512, tokenizer.model_max_length, max_positions(model) // 8 * 8))


@dataclass(frozen=True)
class TeacherSource:
    """Where soft labels come from: the column `teacher_logits` of the rows, else this teacher.

    Attributes:
        model: fine-tuned on the task; None where all rows carry their logits, or for a student of gold labels.
        tokenizer: the teacher's.
        task: the rows' task.
        cache_dir: where logits are kept; None computes them every time.
        max_length: most tokens of a row; None for 512, or as many as the teacher takes.
        batch_size: rows per batch.
        bf16: autocast to bfloat16.
        disable_tqdm: no progress bar.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    task: Task
    cache_dir: str | Path | None = None
    max_length: int | None = None
    batch_size: int = 64
    bf16: bool = False
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        if self.model is None:
            return
        if self.tokenizer is None:
            raise ValueError("`tokenizer` must be given beside a teacher. To resolve, pass the teacher's tokenizer.")
        check_teacher(self.model, self.task)

    def logits(self, rows: Dataset) -> np.ndarray | None:
        """(rows, classes) float32; None where the rows carry no logits and there is no teacher to ask.

        Raises:
            ValueError: logits of another number of classes.
        """
        if "teacher_logits" in rows.column_names:
            found = np.asarray(list(rows["teacher_logits"]), dtype=np.float32).reshape(len(rows), -1)
        elif self.model is None or self.tokenizer is None:
            return None
        else:
            plain = rows.select_columns(list(self.task.text_columns))
            tokens = cast(
                Dataset,
                tokenize(plain, self.task, self.tokenizer, self.max_length or longest_row(self.model, self.tokenizer)),
            )
            ask: dict[str, Any] = {
                "batch_size": self.batch_size,
                "bf16": self.bf16,
                "disable_tqdm": self.disable_tqdm,
            }
            collator = DistillCollator(self.tokenizer)
            if self.cache_dir is None:
                found = predict_logits(self.model, tokens, collator, **ask)
            else:
                found = cached_logits(self.model, tokens, collator, self.cache_dir, **ask)
        if found.shape[1] != self.task.num_labels:
            raise ValueError(
                f"teacher logits must have {self.task.num_labels} classes, those of task {self.task.name!r}, got "
                f"{found.shape[1]}. To resolve, use a teacher of {list(self.task.label_names)}."
            )
        return found


def soft_label(rows: Dataset, source: TeacherSource) -> Dataset:
    """The rows with the teacher's logits in the column `teacher_logits`, so that several students ask only once."""
    if (logits := source.logits(rows)) is None:
        raise ValueError("a teacher must be given to label rows, got none. To resolve, pass `teacher`.")
    return with_teacher_logits(rows, logits)


def check_teacher(teacher: PreTrainedModel, task: Task) -> None:
    """ValueError unless the teacher is fine-tuned on the task's labels, in number and in order."""
    if not is_finetuned(teacher):
        raise ValueError(
            f"`teacher` must have a trained classification head, got {type(teacher).__name__}. "
            "To resolve, fine-tune it on the task first."
        )
    own, wanted = label_names(teacher), list(task.label_names)
    count = teacher.config.num_labels
    numbered = all(name.isdigit() for name in wanted)
    same_names = own is None or numbered or [n.casefold() for n in own] == [n.casefold() for n in wanted]
    if count != len(wanted) or not same_names:
        raise ValueError(
            f"the teacher's labels must be the task's, in this order: the teacher has {own or count}, task {task.name!r} "
            f"has {wanted}. To resolve, pass `label_names` in the teacher's order (flag --label-names), or a teacher "
            "that was fine-tuned on these labels."
        )


def texts_of(rows: Mapping[str, Any] | Dataset, task: Task) -> Texts:
    """The texts of a task's rows: strings, or tuples for pairs."""
    columns = [list(rows[name]) for name in task.text_columns]
    return columns[0] if len(columns) == 1 else list(zip(*columns))


def soft_targets(
    logits: np.ndarray | None, gold: np.ndarray, classes: int, temperature: float, gold_weight: float
) -> np.ndarray:
    """(rows, classes) probabilities: softmax(logits / temperature), mixed with the gold label where a row has one.

    Args:
        logits: (rows, classes), None for a student of gold labels.
        gold: (rows,) class numbers, -1 for none.
        classes: their number.
        temperature: above 1 softens.
        gold_weight: share of the gold label.
    """
    labelled = gold >= 0
    one_hot = np.eye(classes)[np.maximum(gold, 0)]
    if logits is None:
        return one_hot
    soft = softmax(logits.astype(np.float64) / temperature, axis=1)
    share = np.where(labelled, gold_weight, 0.0)[:, None]
    return share * one_hot + (1 - share) * soft


def text_key(text: Any) -> tuple[str, ...]:
    """What two rows have in common that are the same text but for case and white space."""
    parts = (text,) if isinstance(text, str) else text
    return tuple(" ".join(part.split()).casefold() for part in parts)


def keys_of(rows: Dataset | Sequence[Dataset] | None, task: Task) -> set[tuple[str, ...]]:
    """The keys of all rows of one or several data sets.

    Raises:
        ValueError: a data set lacks a text column, or a text is no string.
    """
    if rows is None:
        return set()
    every = [rows] if isinstance(rows, Dataset) else list(rows)
    for one in every:
        if missing := [c for c in task.text_columns if c not in one.column_names]:
            raise ValueError(
                f"`held_out` must have the columns {list(task.text_columns)}, got {one.column_names} without {missing}. "
                "To resolve, pass the evaluation rows of the same task."
            )
        for column in task.text_columns:
            _rows.check_texts(list(one[column]), column, "`held_out`")
    return {text_key(text) for one in every for text in texts_of(one, task)}


def labelled_rows(rows: Dataset, source: TeacherSource, temperature: float, gold_weight: float) -> Taught:
    """Prepared labelled rows with their targets; the teacher is asked unless gold labels are all that counts."""
    gold = np.asarray(list(rows[source.task.label_column]), dtype=np.int64)
    logits = None if gold_weight == 1 else source.logits(rows)
    targets = soft_targets(logits, gold, source.task.num_labels, temperature, gold_weight)
    return Taught(texts_of(rows, source.task), targets, gold)


def check_pool(rows: Dataset, task: Task) -> None:
    """ValueError unless the rows have the task's text columns, with texts in them."""
    _rows.require_columns(rows, task.text_columns, "unlabelled")
    for column in task.text_columns:
        _rows.check_texts(list(rows[column]), column, "unlabelled")


def pool_rows(
    rows: Dataset,
    source: TeacherSource,
    left_out: tuple[set[tuple[str, ...]], set[tuple[str, ...]]],
    temperature: float,
    counts: dict[str, int],
) -> Taught:
    """Unlabelled rows with the teacher's targets.

    Args:
        rows: texts, and `teacher_logits` where they are known.
        source: the teacher.
        left_out: keys of evaluation rows and of labelled rows; rows of these texts are not used.
        temperature: of the soft labels.
        counts: `pool` (rows used), `pool_also_held_out` and `pool_also_labelled` are added to.

    Raises:
        ValueError: a column is missing, a text is no string, or nobody knows the logits.
    """
    check_pool(rows, source.task)
    evaluation, labelled = left_out
    keys = [text_key(text) for text in texts_of(rows, source.task)]
    chosen = [number for number, key in enumerate(keys) if key not in evaluation and key not in labelled]
    counts["pool"] = counts.get("pool", 0) + len(chosen)
    for name, texts in (("pool_also_held_out", evaluation), ("pool_also_labelled", labelled - evaluation)):
        counts[name] = counts.get(name, 0) + sum(key in texts for key in keys)
    gold = np.full(len(chosen), -1, dtype=np.int64)
    if not chosen:
        return Taught([], np.empty((0, source.task.num_labels)), gold)
    rows = rows.select(chosen)
    if (logits := source.logits(rows)) is None:
        raise ValueError(
            "`teacher` must be given to learn from unlabelled texts, got none. To resolve, pass it, or leave out the pool."
        )
    return Taught(
        texts_of(rows, source.task), soft_targets(logits, gold, source.task.num_labels, temperature, 0.0), gold
    )
