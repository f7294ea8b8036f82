"""Soft labels for a pool of unlabelled text, shard by shard: larger than memory, resumable, by any number of processes.

    label_pool(teacher, tokenizer, task, texts, "pool", exclude=data["validation"])   # under accelerate: each process its shards
    pool = read_pool("pool")                                                          # texts and teacher_logits, memory-mapped

A shard is a run of `shard_rows` rows of the pool in its own order, and becomes one Parquet file: the texts that stay and the
teacher's logits in half precision. It appears whole or not at all. Its footer says of which rows, by which teacher and with
which settings it was made, so a second run skips what is done and refuses what belongs to another pool.

Document: "BERT-small taught on unlabelled text" of the project's sources (a teacher on 10 k labels soft-labels 639 k texts).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ._model_card import write_whole
from .context import on_device
from .heads import check_labels
from .measure import supports_bf16
from .processes import process_state
from .tasks import Task, tokenize, tokenizer_fingerprint
from .teacher import DistillCollator, freeze, model_fingerprint, predict_logits

logger = logging.getLogger(__name__)
FOOTER = b"smbert"
LOGITS = "teacher_logits"
# Says how many shards there are: the shards by themselves cannot say that none is missing at the end.
FINISHED = "pool.json"


@dataclass(frozen=True)
class PoolReport:
    """What became of the rows of a pool; each row is counted once.

    Attributes:
        rows: that were read.
        labelled: that were kept and have teacher logits.
        in_excluded: left out because the same text stands in an excluded set (the evaluation data).
        repeated: left out because the same text stands earlier in the same shard.
        empty: left out because there is no text.
        shards: files.
    """

    rows: int = 0
    labelled: int = 0
    in_excluded: int = 0
    repeated: int = 0
    empty: int = 0
    shards: int = 0

    def __add__(self, other: PoolReport) -> PoolReport:
        mine, theirs = asdict(self), asdict(other)
        return PoolReport(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class LabelledPool:
    """A labelled pool on disk.

    Attributes:
        rows: the texts and `teacher_logits` (classes,) float16 of each, memory-mapped.
        report: what was kept and what was left out.
        text_columns: names of the texts' columns.
    """

    rows: Dataset
    report: PoolReport
    text_columns: tuple[str, ...]

    def tokenised(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Dataset:
        """Rows that `Distill` takes: the student's tokens and the teacher's logits, which may be of another tokenizer."""
        tokens = tokenize(self.rows, task, tokenizer, max_length)
        return tokens.add_column(LOGITS, self.rows.data.column(LOGITS), feature=self.rows.features[LOGITS])


def text_key(texts: Sequence[str]) -> bytes:
    """Equal for texts that differ in case and white space only."""
    plain = "\x1f".join(" ".join(text.casefold().split()) for text in texts)
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def label_pool(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    texts: Dataset | IterableDataset,
    folder: str | Path,
    *,
    exclude: Iterable[Dataset] | Dataset | None = None,
    shard_rows: int = 20_000,
    max_length: int = 128,
    batch_size: int = 64,
    disable_tqdm: bool = False,
) -> PoolReport:
    """Write the teacher's logits for every text of a pool.

    Memory holds one shard, whatever the size of the pool. Under `accelerate launch`, on one machine or several with a folder
    that all can see, process r of n labels the shards r, r + n, r + 2n, ...: no row twice.

    Args:
        teacher: fine-tuned on `task`.
        tokenizer: the teacher's.
        task: names the text columns.
        texts: the pool; other columns are ignored. A stream is read once, and the shards of other processes are skipped.
        folder: for the shards.
        exclude: rows whose texts must not be in the pool: the evaluation data.
        shard_rows: rows of the pool in one file.
        max_length: tokens.
        batch_size: texts of one forward pass.
        disable_tqdm: no progress bars.

    Returns:
        The counts over all shards, on every process.

    Raises:
        ValueError: a teacher of other labels, or of the same in another order, a column that is not there, a value that is no
            text, an empty pool, a folder that holds the shards of another teacher or pool, logits that are not finite, a shard
            that another process failed to make.
        OSError: the disk is full; the shards that are done stay.
    """
    columns = task.text_columns
    if isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
        raise ValueError(f"`shard_rows` must be a whole number above 0, got {shard_rows!r}. To resolve, try 20000.")
    check_labels(teacher, task)
    known = texts.column_names
    if known is not None and (missing := [c for c in columns if c not in known]):
        raise ValueError(
            f"the pool must have the columns {', '.join(columns)}, got {', '.join(known)} without {', '.join(missing)}. "
            "To resolve, rename its columns."
        )
    excluded = _keys([exclude] if isinstance(exclude, Dataset) else exclude or [], columns)
    folder = Path(folder)
    settings = {
        "task": task.name,
        "text_columns": list(columns),
        "model": model_fingerprint(teacher),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_length": max_length,
        "shard_rows": shard_rows,
        "excluded": hashlib.sha256(b"".join(sorted(excluded))).hexdigest(),
    }
    state = process_state()
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        (folder / FINISHED).unlink(missing_ok=True)
    # A copy, because a teacher is frozen and moved to the device of the run.
    model = on_device(freeze(copy.deepcopy(teacher)))
    wanted: list[dict[str, Any]] = []
    try:
        for index, shard in enumerate(_shards(texts, columns, shard_rows, disable_tqdm or not state.is_main_process)):
            wanted.append(about := {**settings, "shard": index, "source": _digest(shard, columns)})
            if index % state.num_processes == state.process_index:
                file = _shard_file(folder, index)
                if not _is_done(file, about):
                    _label(model, tokenizer, task, shard, excluded, file, about, batch_size)
    finally:
        state.wait_for_everyone()
    # On every process, so that all of them stop where one has failed.
    footers = _complete(folder, wanted)
    try:
        if state.is_main_process:
            write_whole(folder / FINISHED, json.dumps({"shards": len(footers)}).encode())
    finally:
        state.wait_for_everyone()
    return _summed(footers)


def read_pool(folder: str | Path) -> LabelledPool:
    """A pool that `label_pool` has finished.

    Raises:
        ValueError: there is none, it is not finished, a shard is damaged, or shards of several runs lie together; the message
            names the file.
    """
    folder = Path(folder)
    footers = _footers(folder)
    if not footers:
        raise ValueError(f"{folder} holds no labelled pool. To resolve, run label_pool first.")
    first, found = footers[0], [about["shard"] for about in footers]
    if found != list(range(_shards_of(folder))):
        raise ValueError(
            f"{folder} is not finished. To resolve, run label_pool again: it makes what is missing and nothing else."
        )
    for about in footers:
        file = _shard_file(folder, about["shard"])
        if _settings(about) != _settings(first):
            raise ValueError(f"{file} is of another run than shard 0. To resolve, label the pool in an empty folder.")
        with _damage_named(file):
            for _ in pq.ParquetFile(file, page_checksum_verification=True).iter_batches():
                pass
    files = [str(_shard_file(folder, about["shard"])) for about in footers if about["counts"]["labelled"]]
    if not files:
        raise ValueError(
            f"no text of {folder} was kept: {_summed(footers)}. To resolve, give a pool that has other texts."
        )
    # Beside the shards, since a pool that fills a disk should fill the disk that the user chose.
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / ".arrow"))
    return LabelledPool(rows, _summed(footers), tuple(first["text_columns"]))


def _shards(
    texts: Dataset | IterableDataset, columns: Sequence[str], shard_rows: int, disable_tqdm: bool
) -> Iterator[dict[str, list[Any]]]:
    """The text columns of `shard_rows` rows at a time; the last shard may be shorter."""
    plain = texts.select_columns(list(columns)) if texts.column_names is not None else texts
    total = -(-len(texts) // shard_rows) if isinstance(texts, Dataset) else None
    bar = tqdm(plain.iter(batch_size=shard_rows), total=total, desc="pool", unit="shard", disable=disable_tqdm)
    for number, rows in enumerate(bar):
        if missing := [c for c in columns if c not in rows]:
            raise ValueError(
                f"the pool must have the columns {', '.join(columns)}, got {', '.join(rows)} without {', '.join(missing)}. "
                "To resolve, rename its columns."
            )
        shard = {c: list(rows[c]) for c in columns}
        for column, values in shard.items():
            for place, value in enumerate(values):
                if value is not None and not isinstance(value, str):
                    raise ValueError(
                        f"column {column!r} of the pool must hold texts, got {value!r} in row {number * shard_rows + place}. "
                        "To resolve, convert it, or drop the row."
                    )
        yield shard


def _label(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shard: Mapping[str, list[Any]],
    excluded: set[bytes],
    file: Path,
    about: dict[str, Any],
    batch_size: int,
) -> None:
    columns = list(shard)
    rows = list(zip(*(shard[c] for c in columns), strict=True))
    kept, seen, in_excluded, repeated, empty = [], set[bytes](), 0, 0, 0
    for texts in rows:
        if not all(text and text.strip() for text in texts):
            empty += 1
            continue
        key = text_key(texts)
        if key in excluded:
            in_excluded += 1
        elif key in seen:
            repeated += 1
        else:
            seen.add(key)
            kept.append(texts)
    logits = np.zeros((0, task.num_labels), np.float32)
    if kept:
        data = Dataset.from_dict({c: list(values) for c, values in zip(columns, zip(*kept))})
        tokens = tokenize(data, task, tokenizer, about["max_length"])
        logits = predict_logits(
            model, tokens, DistillCollator(tokenizer), batch_size, bf16=supports_bf16(), disable_tqdm=True
        )
    half = logits.astype(np.float16)
    if not np.isfinite(half).all():
        bad = int(np.flatnonzero(~np.isfinite(half).all(-1))[0])
        raise ValueError(
            f"teacher logits must be finite in half precision, got {logits[bad].tolist()} for {kept[bad]!r}. "
            "To resolve, check the teacher's weights."
        )
    counts = PoolReport(len(rows), len(kept), in_excluded, repeated, empty, shards=1)
    table = pa.table(
        {
            **{c: pa.array([texts[i] for texts in kept], pa.string()) for i, c in enumerate(columns)},
            LOGITS: pa.array(list(half), pa.list_(pa.float16())),
        }
    )
    footer = {FOOTER: json.dumps({**about, "counts": asdict(counts)}).encode()}
    part = file.with_name(f".{file.name}.part")
    try:
        pq.write_table(table.replace_schema_metadata(footer), part, write_page_checksum=True)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{file} could not be written: {error.strerror or error}; the shards before it stay. "
            "To resolve, free space and run the same command again",
        ) from error


def _is_done(file: Path, about: Mapping[str, Any]) -> bool:
    """Whether the shard is there; a damaged one counts as missing, one of other texts or another teacher is refused."""
    if not file.exists():
        return False
    try:
        found = _footer(file)
    except ValueError as error:
        logger.warning("%s It is made again.", error)
        return False
    if changed := [k for k in about if found.get(k) != about[k]]:
        raise ValueError(
            f"{file} was made with another {', '.join(changed)}. To resolve, label the pool in an empty folder, or go back to "
            "what it was made with."
        )
    return True


def _complete(folder: Path, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The footers of a folder that holds the wanted shards and no others.

    Raises:
        ValueError: one is missing, of another run, or too many.
    """
    done = [about["shard"] for about in wanted if _is_done(_shard_file(folder, about["shard"]), about)]
    if len(done) < len(wanted):
        raise ValueError(
            f"{folder} holds the shards {done}, must hold 0 to {len(wanted) - 1}: another process has failed. "
            "To resolve, see its message, then run the same command again."
        )
    footers = _footers(folder)
    if len(footers) > len(wanted):
        raise ValueError(
            f"{folder} holds the shards {[about['shard'] for about in footers]}, must hold {done}: the others are of a longer pool. "
            "To resolve, delete them, or label the pool in an empty folder."
        )
    if not footers:
        raise ValueError("the pool must hold at least one text, got none. To resolve, check where it is read from.")
    return footers


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.parquet"


def _shards_of(folder: Path) -> int:
    """How many shards the pool has; 0 where `label_pool` has not come to its end."""
    try:
        return int(json.loads((folder / FINISHED).read_text(encoding="utf-8"))["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _footers(folder: Path) -> list[dict[str, Any]]:
    return [_footer(file) for file in sorted(folder.glob("shard-*.parquet"))]


def _footer(file: Path) -> dict[str, Any]:
    with _damage_named(file):
        about = json.loads((pq.read_schema(file).metadata or {})[FOOTER])
        if pq.read_metadata(file).num_rows != about["counts"]["labelled"]:
            raise ValueError("it lacks rows")
        return about


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} is damaged ({str(error).splitlines()[0]}). To resolve, delete it and run label_pool again."
        ) from error


def _settings(about: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in about.items() if k not in ("shard", "source", "counts")}


def _summed(footers: Iterable[Mapping[str, Any]]) -> PoolReport:
    return sum((PoolReport(**about["counts"]) for about in footers), PoolReport())


def _digest(shard: Mapping[str, list[Any]], columns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for texts in zip(*(shard[c] for c in columns), strict=True):
        digest.update(json.dumps(texts, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _keys(sets: Iterable[Dataset], columns: Sequence[str]) -> set[bytes]:
    return {
        text_key(texts)
        for rows in sets
        for batch in rows.select_columns(list(columns)).iter(batch_size=10_000)
        for texts in zip(*(batch[c] for c in columns), strict=True)
        if all(texts)
    }
