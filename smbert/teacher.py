"""The teacher: frozen, and asked once. Its logits are kept on disk under the content of the model and of the rows."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from .processes import process_state

if TYPE_CHECKING:
    from .tasks import Task

logger = logging.getLogger(__name__)

LABELS = ("labels", "label", "label_ids", "teacher_logits")
PADDED = ("input_ids", "attention_mask", "token_type_ids")

# Config entries that say where a model lies, what made it or how it is run, but not what it computes.
_INCIDENTAL = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
)


# Without a value they say nothing, as in configs that were written before there was such an entry.
_OPTIONAL = ("embedding_rank", "passed_by")


def freeze(model: nn.Module) -> Any:
    """The same model in eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def model_fingerprint(model: nn.Module) -> str:
    """sha256 of what a model computes: class, config, and names, types, shapes and bytes of its tensors.

    The same on every device, before saving and after reloading, and wherever the model lies.
    """
    config = getattr(model, "config", None)
    entries = config.to_dict() if config is not None else {}
    settings = {k: v for k, v in entries.items() if k not in _INCIDENTAL and not (k in _OPTIONAL and v is None)}
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def dataset_fingerprint(dataset: Dataset, columns: Sequence[str] | None = None) -> str:
    """sha256 of the rows of `columns` (default: all), in order; not of how they are stored or where they came from.

    The width of integers and floats does not matter, nor do the order of the columns, the format or the selection that
    led to the rows.
    """
    chosen = sorted(dataset.column_names if columns is None else columns)
    digests: dict[str, Any] = {}
    for table in dataset.select_columns(chosen).with_format("arrow").iter(batch_size=10_000):
        for column in chosen:
            for chunk in table.column(column).chunks:
                _add_array(digests, column, chunk)
    parts = [(path, digest.hexdigest()) for path, digest in sorted(digests.items())]
    return hashlib.sha256(json.dumps([len(dataset), chosen, parts]).encode()).hexdigest()


def _add_array(digests: dict[str, Any], path: str, array: Any) -> None:
    """Adds an Arrow array to running digests, one for each level of nesting, so that no chunk border leaves a trace."""
    digest = digests.setdefault(path, hashlib.sha256())
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        # -1 is a missing list: neither it nor an empty one has values.
        lengths = pc.list_value_length(array).fill_null(-1).cast(pa.int64())
        digest.update(lengths.to_numpy(zero_copy_only=False).tobytes())
        _add_array(digests, f"{path}[]", array.flatten())
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        number = pa.float64() if pa.types.is_floating(kind) else pa.int64()
        digest.update(array.cast(number).fill_null(0).to_numpy(zero_copy_only=False).tobytes())
        digests.setdefault(f"{path}?", hashlib.sha256()).update(
            array.is_null().to_numpy(zero_copy_only=False).tobytes()
        )
    else:
        for value in array.to_pylist():
            digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\0")


def predict_logits(
    model: nn.Module,
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    batch_size: int = 64,
    bf16: bool = False,
    disable_tqdm: bool = False,
) -> np.ndarray:
    """Logits of a model, in the order of the rows, computed in batches of similar length, longest first.

    Runs where the model is, in eval mode; the mode is restored afterwards.

    Args:
        model: with a sequence-classification head.
        dataset: tokenised rows; labels and other columns that the model does not take are ignored.
        collator: pads rows to a batch.
        batch_size: rows per batch.
        bf16: autocast to bfloat16.
        disable_tqdm: no progress bar.

    Returns:
        (rows, classes) float32.

    Raises:
        ValueError: no rows, or no `input_ids`.
    """
    columns = inputs_of(model, dataset)
    device = next(model.parameters()).device
    logits: np.ndarray | None = None
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            for chosen, batch in batches_by_length(dataset, columns, collator, batch_size, "logits", disable_tqdm):
                inputs = {k: v.to(device) for k, v in batch.items() if k in columns}
                part = model(**inputs).logits.float().cpu().numpy()  # (batch, classes)
                if logits is None:
                    logits = np.empty((len(dataset), *part.shape[1:]), dtype=np.float32)
                logits[chosen] = part
    finally:
        model.train(was_training)
    assert logits is not None  # there are rows
    return logits


def token_counts(dataset: Dataset) -> np.ndarray:
    """Tokens of each row, (rows,)."""
    column = dataset.select_columns(["input_ids"]).with_format("arrow")[:].column("input_ids")
    return pc.list_value_length(column).to_numpy()


def batches_by_length(
    dataset: Dataset,
    columns: Sequence[str],
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    batch_size: int,
    description: str,
    disable_tqdm: bool,
) -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
    """Every row once, in padded batches of similar length, longest first: the rows' places (batch,), and the batch."""
    rows = dataset.select_columns(list(columns)).with_format(None)
    order = np.argsort(-token_counts(dataset), kind="stable")
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", leave=False, disable=disable_tqdm):
        chosen = order[start : start + batch_size]
        columnwise = rows[chosen.tolist()]
        yield chosen, collator([dict(zip(columnwise, row)) for row in zip(*columnwise.values())])


def inputs_of(model: nn.Module, dataset: Dataset) -> list[str]:
    """The columns that the model takes; ValueError where there are no tokenised rows."""
    known = inspect.signature(model.forward).parameters
    columns = [c for c in dataset.column_names if c in known and c not in LABELS]
    if len(dataset) == 0 or "input_ids" not in columns:
        raise ValueError(
            f"`dataset` must hold tokenised rows, got {len(dataset)} rows of the columns {dataset.column_names}. "
            "To resolve, tokenize it, so that it has at least one row and `input_ids`."
        )
    return columns


def cached_logits(
    teacher: nn.Module,
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    cache_dir: str | Path,
    batch_size: int = 64,
    bf16: bool = False,
    disable_tqdm: bool = False,
    alone: bool = False,
) -> np.ndarray:
    """Like `predict_logits`, but computed only if `cache_dir` does not hold the answer yet.

    The key is the sha256 of the teacher's weights and config, the rows' inputs and the precision. Beside NAME.npy lies
    NAME.json, which says what it holds; a file that does not match it is computed again, with a warning. Under
    torch.distributed the main process computes while the others wait (no longer than the process group's timeout), and
    all read the same file, so `cache_dir` has to be visible to all of them; `alone` is for what one process asks for itself.

    Raises:
        ValueError: as `predict_logits`, or logits that are not finite.
        OSError: the cache cannot be written; nothing half-written stays.
    """
    columns = inputs_of(teacher, dataset)
    about = {
        "model": model_fingerprint(teacher),
        "rows": dataset_fingerprint(dataset, columns),
        "precision": "bf16" if bf16 else str(next(teacher.parameters()).dtype).removeprefix("torch."),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(cache_dir) / f"logits-{key}.npy"
    state = process_state()
    if alone or state.is_main_process:
        try:
            if (logits := _read(path, len(dataset))) is None:
                logits = predict_logits(teacher, dataset, collator, batch_size, bf16, disable_tqdm)
                _check_finite(logits)
                _write(path, logits, about)
        finally:
            if not alone:  # the others must not wait for a process that has failed
                state.wait_for_everyone()
        return logits
    state.wait_for_everyone()
    if (shared := _read(path, len(dataset))) is None:
        raise OSError(
            f"the main process left no teacher logits in {path}. To resolve, see its error, and use a `cache_dir` that "
            "all processes can see."
        )
    return shared


def _check_finite(logits: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).reshape(len(logits), -1).all(-1))
    if len(bad):
        raise ValueError(
            f"teacher logits must be finite, got {logits[bad[0]].tolist()} in row {bad[0]} ({len(bad)} of "
            f"{len(logits)} rows). To resolve, check the teacher's weights, or compute in float32 with `bf16=False`."
        )


def _read(path: Path, rows: int) -> np.ndarray | None:
    """The cached logits; None if there are none, or none that can be trusted."""
    sidecar = path.with_suffix(".json")
    if not (path.is_file() and sidecar.is_file()):
        return None
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != json.loads(sidecar.read_text(encoding="utf-8"))["sha256"]:
            raise ValueError("its content does not match its sha256")
        logits = np.load(io.BytesIO(content), allow_pickle=False)
        if len(logits) != rows:
            raise ValueError(f"it holds {len(logits)} rows, not {rows}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("teacher logits in %s are corrupt (%s) and will be computed again", path, error)
        return None
    return logits


def _write(path: Path, logits: np.ndarray, about: dict[str, str]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, logits, allow_pickle=False)
    content = buffer.getvalue()
    described = {
        "schema_version": 1,
        **about,
        "shape": list(logits.shape),
        "dtype": str(logits.dtype),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
        _replace(path.with_suffix(".json"), json.dumps(described, indent=2).encode())
    except OSError as error:
        raise OSError(
            error.errno,
            f"teacher logits ({len(content) / 1e6:.1f} MB) could not be written to {path.parent}: {error.strerror}. "
            "To resolve, free space, or choose another `cache_dir`.",
        ) from error


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def with_teacher_logits(dataset: Dataset, logits: np.ndarray) -> Dataset:
    """The dataset with a column `teacher_logits` (float32 lists), in place of one that it may have.

    Raises:
        ValueError: `logits` are not (rows, classes).
    """
    if logits.ndim != 2 or len(logits) != len(dataset):
        raise ValueError(f"`logits` must have the shape ({len(dataset)}, classes), got {logits.shape}.")
    if "teacher_logits" in dataset.column_names:
        dataset = dataset.remove_columns("teacher_logits")
    values = np.ascontiguousarray(logits, dtype=np.float32)
    digest = hashlib.sha256(dataset._fingerprint.encode() + values.tobytes()).hexdigest()[:32]
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    column = pa.ListArray.from_arrays(offsets, values.reshape(-1))
    return dataset.add_column("teacher_logits", column, new_fingerprint=digest, feature=List(Value("float32")))


def join_unlabelled(labelled: Dataset | None, pool: Dataset | None, task: Task) -> Dataset:
    """Labelled rows, then the rows of a pool as rows without a label: -100 for a class, nan for scores.

    Only the columns of `labelled` stay; either part may be missing, and a pool alone gets no label column.

    Raises:
        ValueError: both are missing, or the pool lacks an input column.
    """
    if labelled is None and pool is None:
        raise ValueError("there must be labelled rows, a pool of unlabelled rows, or both, got neither.")
    if pool is None or labelled is None:
        return pool if labelled is None else labelled  # type: ignore[return-value]
    inputs = [c for c in labelled.column_names if c not in LABELS]
    if missing := [c for c in inputs if c not in pool.column_names]:
        raise ValueError(
            f"the pool must have the columns {inputs}, got {pool.column_names} without {missing}. "
            "To resolve, tokenize both with the same tokenizer."
        )
    none: Any = {"single_label": -100, "regression": float("nan")}.get(task.kind)
    if none is None:
        none = [float("nan")] * len(task.label_names)
    feature = labelled.features["labels"]
    pool = pool.select_columns(inputs).cast(Features({c: labelled.features[c] for c in inputs}))
    column = pa.array(
        [none] * len(pool), type=feature.pa_type if isinstance(feature, Value) else pa.list_(pa.float32())
    )
    digest = hashlib.sha256(f"{pool._fingerprint} {none}".encode()).hexdigest()[:32]
    pool = pool.add_column("labels", column, new_fingerprint=digest, feature=feature)
    return concatenate_datasets([labelled.select_columns([*inputs, "labels"]), pool])


@dataclass(frozen=True)
class DistillCollator:
    """Pads tokenised rows to the longest of the batch; rows may carry labels and teacher logits.

    Rows -> `input_ids`, `attention_mask`, `token_type_ids` (where the rows have them) (batch, seq) int64; `labels`
    (batch,) int64 classes, (batch,) float32 scores or (batch, classes) float32 multi-hot; `teacher_logits`
    (batch, classes) float32; `row` (batch,) int64, the rows' places in their data set. Other columns are left out.

    Attributes:
        tokenizer: knows the padding token and side.
        pad_to_multiple_of: lengths are rounded up to it (fewer shapes, faster kernels), within the tokenizer's limit.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = 8

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{k: row[k] for k in PADDED if k in row} for row in features]
        multiple = self.pad_to_multiple_of
        longest = max(len(row["input_ids"]) for row in inputs)
        if multiple and -(-longest // multiple) * multiple > self.tokenizer.model_max_length:
            multiple = None
        batch = dict(
            pad_without_fast_tokenizer_warning(
                self.tokenizer, inputs, padding=True, pad_to_multiple_of=multiple, return_tensors="pt"
            )
        )
        name = "labels" if "labels" in features[0] else "label"
        if (labels := _stack(features, name)) is not None:
            batch["labels"] = labels
        for name in ("teacher_logits", "row"):
            if (values := _stack(features, name)) is not None:
                batch[name] = values
        return batch


def _stack(features: list[dict[str, Any]], name: str) -> Tensor | None:
    """A column of numbers (int64 if whole, else float32) or of equally long lists (float32); None if no row has one."""
    values = [row.get(name) for row in features]
    missing = sum(value is None for value in values)
    if missing == len(values):
        return None
    if missing:
        raise ValueError(f"`{name}` must be there in all rows of a batch or in none, got {missing} rows without it.")
    try:
        column = np.asarray(values)
    except ValueError:  # lists of several lengths
        column = np.asarray("")
    if column.dtype.kind not in "iufb":
        raise ValueError(
            f"`{name}` must be numbers, or lists of numbers of one length, got {values[0]!r} and the like."
        )
    is_class = column.ndim == 1 and column.dtype.kind in "iub"
    return torch.from_numpy(column.astype(np.int64 if is_class else np.float32))
