"""Vocabulary pruning: the pieces that the data use stay, the rest of the embedding table goes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .._rows import read_files
from .._sizes import Size, count_from, parse
from .._surgery_vocab import keep_vocabulary, token_ids_in_config
from ..context import Context, TaskData
from ..measure import count_parameters
from ..processes import process_state
from ..surgery import structure_of
from ..tasks import tokenize
from ..vocab import choose_pieces, count_pieces, kept_ids, prune_tokenizer, segmentation_change, tokenizer_parts
from .base import Outline, Stage, as_text


@dataclass(frozen=True, kw_only=True)
class VocabPruning(Stage):
    """Keeps the pieces of the vocabulary that a corpus uses; special tokens, single characters and bytes always stay.

    The result answers as before on text whose pieces all stay. The tokenizer of the run changes with the model: the stages that follow
    see the data, and the teacher, in the new vocabulary.

    Attributes:
        coverage: share of the corpus's tokens whose pieces stay; 1.0 keeps every piece that occurs.
        pieces: at most so many pieces: a number, or a share of those that come in.
        params: at most so many parameters of the whole model: a number, or a share of what comes in.
        corpus: "rows" counts the training rows and the texts without labels of the run; a file (txt with a text per line, csv, json,
            jsonl or parquet with the task's text columns) is counted instead of them.
        min_class_coverage: refuse to drop more than the rest of the tokens of any class's training rows; catches a corpus that lacks
            the texts of a class.
    """

    kind: ClassVar[str] = "vocab_pruning"
    coverage: float = 1.0
    pieces: Size | None = None
    params: Size | None = None
    corpus: str = "rows"
    min_class_coverage: float = 0.95

    def __post_init__(self) -> None:
        for name in ("pieces", "params", "corpus"):
            object.__setattr__(self, name, as_text(getattr(self, name)))
        for name in ("coverage", "min_class_coverage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {value!r}. To resolve, try 0.999.")
        for name in ("pieces", "params"):
            if (value := getattr(self, name)) is not None and parse(value, name) == 0:
                raise ValueError(f"`{name}` must be above 0, got {value!r}. To resolve, leave it out or allow more.")
        if not isinstance(self.corpus, str) or not self.corpus:
            raise ValueError(f'`corpus` must be "rows" or a file, got {self.corpus!r}. To resolve, leave it out.')

    def outline(self, before: Outline, context: Context) -> Outline:
        tokenizer_parts(context.tokenizer)
        for data in (context.data, *context.other.values()):
            if data.texts is None:
                raise ValueError(
                    f"vocab_pruning needs the texts of {data.task.name!r} beside their token ids. To resolve, build TaskData with `texts`."
                )
        if context.pool is not None and context.pool_texts is None:
            raise ValueError(
                "vocab_pruning needs the texts of the pool. To resolve, build the Context with `pool_texts`."
            )
        _check_classes(context.data)
        if self.corpus != "rows":
            _texts_of(Path(self.corpus), context.data.task.text_columns)
        return replace(before, outer_known=False)

    def looks_at_pool(self, context: Context) -> bool:
        return True

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        start = time.perf_counter()
        old, size = context.tokenizer, structure_of(model).vocab_size
        counts = self._counts(context, size)
        ids = choose_pieces(
            old, counts, coverage=self.coverage, limit=self._limit(model, len(old)), always=token_ids_in_config(model)
        )
        by_class = _coverage_by_class(context.data, ids, size, old)
        worst = min(by_class, key=by_class.__getitem__)
        if by_class[worst] < self.min_class_coverage:
            raise ValueError(
                f"`min_class_coverage` must hold for every class, and the pieces that would stay cover {by_class[worst]:.1%} of the tokens "
                f"of class {worst!r} ({self.min_class_coverage:.1%} asked). To resolve, add texts of this class to the corpus, keep more "
                "pieces, or lower `min_class_coverage`."
            )
        new = prune_tokenizer(old, ids)
        if process_state().is_main_process:
            new.save_pretrained(workdir / TOKENIZER)
        process_state().wait_for_everyone()
        result = keep_vocabulary(model, ids)
        assert context.data.texts is not None  # checked by outline
        held_out = context.data.texts["validation"]
        texts = [text for column in context.data.task.text_columns for text in list(held_out[column])]
        return result, {
            "pieces": {"before": len(old), "after": len(ids), "rows_before": size},
            "mb": {"before": _megabytes(model), "after": _megabytes(result)},
            "corpus_tokens": int(counts.sum()),
            "corpus_coverage": round(float(counts[ids].sum() / counts.sum()), 6),
            "coverage_by_class": {name: round(share, 6) for name, share in by_class.items()},
            "held_out": {name: round(value, 6) for name, value in segmentation_change(old, new, texts).items()},
            "pruning_seconds": round(time.perf_counter() - start, 1),
        }

    def context_after(self, context: Context, folder: Path) -> Context:
        """The surroundings in the new vocabulary: tokenizer, all rows, and the teacher."""
        place = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
        return in_vocabulary(context, AutoTokenizer.from_pretrained(str(place)))

    def _limit(self, model: PreTrainedModel, pieces: int) -> int | None:
        limits = []
        if self.pieces is not None:
            limits.append(count_from(self.pieces, pieces, "pieces"))
        if self.params is not None:
            structure, total = structure_of(model), count_parameters(model).total
            smallest = keep_vocabulary(model, sorted(token_ids_in_config(model) | {0}))
            rows = structure.vocab_size - structure_of(smallest).vocab_size
            # A head that is not tied has a row, and any head a bias, for each piece too.
            per_piece = (total - count_parameters(smallest).total) // rows
            asked = parse(self.params, "params")
            budget = asked if isinstance(asked, int) else math.floor(asked * total)
            outside = total - per_piece * structure.vocab_size
            if budget <= outside:
                raise ValueError(
                    f"`params` must be above {outside:,}, what is outside the vocabulary, got {self.params!r} = {budget:,}. "
                    "To resolve, allow more, or prune layers, heads and neurons first."
                )
            limits.append((budget - outside) // per_piece)
        return min(limits, default=None)

    def _counts(self, context: Context, size: int) -> np.ndarray:
        corpus: Iterable[Dataset]
        if self.corpus == "rows":
            corpus = [context.data.train, *([context.pool] if context.pool is not None else [])]
        else:
            texts = _texts_of(Path(self.corpus), context.data.task.text_columns)
            corpus = _cut_up(texts, context.tokenizer)
        return _content(count_pieces(corpus, size), context.tokenizer)


TOKENIZER = "tokenizer"


def in_vocabulary(context: Context, tokenizer: PreTrainedTokenizerBase) -> Context:
    """The context with all texts cut up by a pruned tokenizer, and with a teacher that knows its pieces only."""
    teacher = context.teacher
    if teacher is not None:
        teacher = keep_vocabulary(teacher, kept_ids(context.tokenizer, tokenizer))

    def again(data: TaskData) -> TaskData:
        assert data.texts is not None and data.max_length is not None  # checked by outline
        rows = {s: tokenize(data.texts[s], data.task, tokenizer, data.max_length) for s in ("train", "validation")}
        return replace(data, **rows)  # type: ignore[arg-type]

    pool = context.pool
    if pool is not None:
        assert context.pool_texts is not None and context.data.max_length is not None
        pool = tokenize(context.pool_texts, context.data.task, tokenizer, context.data.max_length)  # type: ignore[assignment]
    return replace(
        context,
        tokenizer=tokenizer,
        data=again(context.data),
        other={name: again(data) for name, data in context.other.items()},
        pool=pool,
        teacher=teacher,
    )


def _check_classes(data: TaskData) -> None:
    """ValueError where a class has no training row: its words would be dropped."""
    if data.task.kind != "single_label":
        return
    present = set(np.unique(np.asarray(data.train["labels"][:])).tolist())
    if missing := [name for i, name in enumerate(data.task.label_names) if i not in present]:
        raise ValueError(
            f"the training rows must hold texts of every class, and {', '.join(map(repr, missing))} has none, so that its words would "
            "be dropped. To resolve, add rows of it, or leave vocabulary pruning out."
        )


def _content(counts: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The counts without special tokens: they stay anyway, and would make any coverage of short texts look high."""
    counts[[i for i in tokenizer.all_special_ids if i < len(counts)]] = 0
    return counts


def _coverage_by_class(
    data: TaskData, ids: list[int], size: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Share of the tokens of each class's training rows that stay; of all rows where there are no classes."""
    task, labels = data.task, np.asarray(data.train["labels"][:])
    if task.kind == "regression":
        groups = {"all": np.ones(len(labels), dtype=bool)}
    elif task.kind == "multi_label":
        groups = {name: labels[:, i] > 0 for i, name in enumerate(task.label_names)}
    else:
        groups = {name: labels == i for i, name in enumerate(task.label_names)}
    shares = {}
    for name, member in groups.items():
        counts = _content(count_pieces([data.train.select(np.flatnonzero(member))], size), tokenizer)
        # A label that no row of a multi-label task carries has no text to lose.
        shares[name] = float(counts[ids].sum() / counts.sum()) if counts.sum() else 1.0
    return shares


def _cut_up(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Dataset]:
    """Token ids of a thousand texts at a time: those of a whole corpus would take some 200 bytes a token."""
    for start in range(0, len(texts), 1000):
        yield Dataset.from_dict({"input_ids": tokenizer(texts[start : start + 1000])["input_ids"]})


def _texts_of(file: Path, columns: tuple[str, ...]) -> list[str]:
    if not file.is_file():
        raise ValueError(
            f'`corpus` must be "rows" or a file, and there is no file {str(file)!r}. To resolve, check the path.'
        )
    if file.suffix.lower() != ".txt":
        rows = read_files([file])
        present = [column for column in columns if column in rows.column_names]
        if not present:
            raise ValueError(
                f"`corpus` must have one of the task's text columns {', '.join(columns)}, and {file} has "
                f"{', '.join(rows.column_names)}. To resolve, rename one."
            )
        texts = [text for column in present for text in list(rows[column]) if isinstance(text, str)]
    else:
        try:
            texts = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"`corpus` must be UTF-8, and {file} is not: {error}. To resolve, convert it.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"`corpus` must hold texts, and {file} has none. To resolve, give one text per line.")
    return texts


def _megabytes(model: PreTrainedModel) -> float:
    return round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 2)
