"""Classical students of a transformer: Naive Bayes, logistic regression, SVM, trees, static embeddings.

    student = distill_classical(teacher, train, unlabelled=pool, student="logistic_regression", tokenizer=tokenizer)
    student("a fine film")                        # [{"label": "positive", "score": 0.93}]
    student.save("student"); load_student("student")
    baseline = distill_classical(None, train, student="logistic_regression")

The teacher's soft labels are learned exactly where scikit-learn allows it: rows are stacked once per class with the
probability as their weight (Naive Bayes, logistic regression, trees); the SVM becomes a regression on clipped logits.
Parameters are chosen, and probabilities calibrated, on labelled rows that the student in question has not seen; a static
student that has fewer than 200 of them holds back rows of the pool too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tasks import Task, custom_task_from, prepare
from ..teacher import with_teacher_logits
from .features import TextFeatures
from .files import read_about
from .fitting import Settings, fit_in_memory, fit_stream
from .kinds import KINDS, Kind, is_soft
from .rows import TeacherSource, check_pool, keys_of, labelled_rows, longest_row, pool_rows, soft_label, texts_of
from .static import KIND as STATIC
from .static import StaticStudent, StaticTraining, fit_static
from .students import ClassicalStudent, Student

__all__ = [
    "STUDENTS",
    "ClassicalStudent",
    "Settings",
    "StaticStudent",
    "Student",
    "TeacherSource",
    "TextFeatures",
    "distill_classical",
    "load_student",
    "longest_row",
    "soft_label",
    "texts_of",
]

logger = logging.getLogger(__name__)

STUDENTS = (*KINDS, STATIC)


def distill_classical(
    teacher: PreTrainedModel | None,
    train_dataset: Dataset | None,
    unlabelled: Dataset | IterableDataset | None = None,
    student: str = "logistic_regression",
    *,
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: Dataset | Sequence[Dataset] | None = None,
    cache_dir: str | Path | None = None,
    **settings: Any,
) -> Student:
    """Teaches a classical student with a teacher's soft labels, or, without a teacher, with gold labels.

    Args:
        teacher: fine-tuned on the task; None for the baseline on gold labels. Rows that have a column `teacher_logits`
            (see `soft_label`) are taught by it, and the teacher is not asked.
        train_dataset: labelled rows; None to learn from the pool alone.
        unlabelled: more texts, which the teacher labels. An `IterableDataset` is streamed: it need not fit in memory,
            features are hashed and the student learns by `partial_fit`. Rows that are also among `train_dataset` or
            `held_out` are left out, and counted in `student.training`.
        student: one of `STUDENTS`.
        task: which columns and labels; None: found from `train_dataset`.
        tokenizer: the teacher's.
        held_out: evaluation rows, which must not be learned from by way of the pool.
        cache_dir: where the teacher's logits are kept.
        settings: fields of `Settings`.

    Raises:
        ValueError: no labels, one class only, a teacher of other labels, a student that cannot stream, texts without
            words, or a setting out of range; before any work.
        TypeError: an unknown setting.
    """
    options = settings_of(settings)
    if student not in STUDENTS:
        raise ValueError(f"`student` must be one of {', '.join(STUDENTS)}, got {student!r}. To resolve, choose one.")
    kind = KINDS.get(student)
    if kind is not None:
        options.candidates(kind)
    if isinstance(unlabelled, IterableDataset) and (kind is None or kind.stream is None):
        able = [name for name, one in KINDS.items() if one.stream is not None]
        raise ValueError(
            f"`student` must be one of {', '.join(able)} for a streamed pool, got {student!r}. "
            "To resolve, choose one of them, or pass the pool as a Dataset."
        )
    if kind is None and teacher is None:
        raise ValueError(
            "`teacher` must be given for a static_embedding student, whose embeddings are the teacher's. "
            "To resolve, pass it, with gold_weight=1.0 and no pool for the baseline."
        )
    if options.gold_weight == "auto":
        if train_dataset is None or isinstance(unlabelled, IterableDataset) or options.folds == 0:
            raise ValueError(
                "`gold_weight` auto needs labelled rows, folds of them, and a pool in memory. To resolve, pass a number from 0 to 1."
            )
        both = [
            distill_classical(
                teacher,
                train_dataset,
                pool,
                student,
                task=task,
                tokenizer=tokenizer,
                held_out=held_out,
                cache_dir=cache_dir,
                **{**settings, "gold_weight": weight},
            )
            for weight, pool in ((0.5, unlabelled), (1.0, None))
        ]
        return max(both, key=lambda one: _accuracy(one.training))  # of equals the first
    task, train = _checked(task, train_dataset, unlabelled, teacher)
    source = TeacherSource(
        teacher,
        tokenizer,
        task,
        cache_dir,
        options.max_length,
        options.batch_size,
        options.bf16,
        options.disable_tqdm,
    )
    left_out = keys_of(held_out, task), keys_of(train, task)
    facts: dict[str, Any] = {"labelled": 0 if train is None else len(train)}
    if repeated := len(left_out[0] & left_out[1]):
        facts["labelled_also_held_out"] = repeated
        logger.warning("%d labelled texts are also in `held_out`; they are used, which flatters the student", repeated)

    begin = time.perf_counter()
    labelled = None if train is None else labelled_rows(train, source, options.temperature, float(options.gold_weight))
    about = {"label_names": task.label_names, "text_columns": task.text_columns}
    found: Student
    if isinstance(unlabelled, IterableDataset):
        pipeline, temperature, done = fit_stream(cast(Kind, kind), labelled, unlabelled, source, left_out, options)
        found = ClassicalStudent(pipeline, kind=student, temperature=temperature, **about)
    else:
        rows = labelled
        if unlabelled is not None:
            pool = pool_rows(unlabelled, source, left_out, options.temperature, facts)
            rows = pool if rows is None else rows + pool
        if rows is None or not rows.texts:
            raise ValueError("no row is left to learn from. To resolve, pass texts that are not in `held_out`.")
        if kind is None:
            teacher, tokenizer = cast(PreTrainedModel, teacher), cast(PreTrainedTokenizerBase, tokenizer)
            training = StaticTraining(options.epochs, options.learning_rate, options.seed)
            model, temperature, done = fit_static(teacher, tokenizer, rows, training)
            found = StaticStudent(model, tokenizer, temperature=temperature, **about)
        else:
            pipeline, temperature, done = fit_in_memory(kind, rows, options)
            found = ClassicalStudent(pipeline, kind=student, temperature=temperature, **about)
    for name in ("pool_also_held_out", "pool_also_labelled"):
        if number := {**facts, **done}.get(name):
            logger.info("%d texts of the pool were left out: %s", number, name.replace("_", " "))
    soft = unlabelled is not None or (labelled is not None and is_soft(labelled.targets))
    found.training = {
        "taught_by": "soft labels" if soft else "gold labels",
        **facts,
        **done,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    return found


def _accuracy(training: Mapping[str, Any]) -> float:
    """On labelled rows that the student was not fitted on; 0 where none could be spared."""
    return float(training.get("out_of_fold_accuracy", training.get("accuracy")) or 0)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings; TypeError for an unknown name, ValueError for a value out of range."""
    known = [entry.name for entry in fields(Settings)]
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(
            f"settings must be among {', '.join(known)}, got {', '.join(unknown)}. To resolve, correct the name."
        )
    return Settings(**given)


def _checked(
    task: Task | None, train: Dataset | None, pool: Any, teacher: PreTrainedModel | None
) -> tuple[Task, Dataset | None]:
    """The task and the prepared labelled rows, with the teacher's logits where they had them."""
    if train is None and pool is None:
        raise ValueError("labelled rows, a pool, or both must be given, got neither. To resolve, pass `train_dataset`.")
    # A stream may not know its columns before it is read.
    columns = getattr(pool, "column_names", None)
    carried = columns is None or "teacher_logits" in columns
    if pool is not None and teacher is None and not carried:
        raise ValueError(
            "`teacher` must be given to learn from unlabelled texts, got none. To resolve, pass it, or leave out the pool."
        )
    if train is None:
        if task is None:
            raise ValueError("`task` must be given where no row is labelled. To resolve, pass a smbert.Task.")
    elif task is None:
        task = custom_task_from(train)
    check_kind(task)
    if isinstance(pool, Dataset):
        check_pool(pool, task)
    if train is None:
        return task, None
    prepared = prepare(task, train, required=("train",))["train"]
    if "teacher_logits" in train.column_names:
        logits = np.asarray(list(train["teacher_logits"]), dtype=np.float32).reshape(len(train), -1)
        prepared = with_teacher_logits(prepared, logits)
    return task, prepared


def check_kind(task: Task) -> None:
    """ValueError for a task that classical students do not learn."""
    if task.kind != "single_label":
        raise ValueError(
            f"`task` must be of kind single_label for a classical student, got {task.kind}. "
            "To resolve, use smbert.compress for such a task."
        )


def load_student(folder: str | Path) -> Student:
    """The student that `Student.save` wrote. No code of the folder is ever run.

    Raises:
        ValueError: no student, one that is damaged, or one with contents that a student does not have.
    """
    about = read_about(folder)
    kind = about.get("kind")
    if kind not in STUDENTS:
        raise ValueError(
            f"the student in {folder} must be one of {', '.join(STUDENTS)}, got {kind!r}. "
            "To resolve, load it with the smbert version that wrote it."
        )
    reader = StaticStudent if kind == STATIC else ClassicalStudent
    try:
        return reader.read(Path(folder), about)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} must hold a whole student, but reading it gave {error!r}. To resolve, make it again."
        ) from error
