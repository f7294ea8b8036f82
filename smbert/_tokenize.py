"""Texts to token ids, and fingerprints that caches of rows can rely on. Public through `smbert.tasks`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import datasets
import transformers
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from smbert import _rows

if TYPE_CHECKING:
    from smbert.tasks import Task


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does to a text: the same in every process, and before and after its first call.

    (The hash that `datasets` would take by itself changes with the first call, which writes truncation into the fast
    tokenizer.)
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    about = [
        type(tokenizer).__name__,
        tokenizer.model_input_names,
        tokenizer.truncation_side,
        tokenizer.special_tokens_map,
    ]
    return _digest(json.dumps([about, content], sort_keys=True, default=str))


def data_fingerprint(dataset: Dataset, columns: Sequence[str]) -> str:
    """A hash of the rows of `columns`, in order: the same in every process and wherever the rows came from."""
    rows = dataset.with_format(None).select_columns(list(columns)).iter(batch_size=1000)
    return _digest(*(json.dumps(batch, sort_keys=True, default=str) for batch in rows))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tokenize(
    dataset: Dataset | Mapping[str, Dataset], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> Dataset | DatasetDict:
    """Token ids of prepared data (see `prepare`): truncated, not padded (batches are padded when they are made).

    Results are cached by `datasets` under a fingerprint of the rows, the tokenizer and `max_length`.

    Args:
        dataset: one split, or all of them.
        task: names the columns.
        tokenizer: slow or fast.
        max_length: most tokens of a row, special tokens included; a pair is cut at its longer text.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, and `labels` (int64 class
        number, float32 score or float32 multi-hot row) where the split has labels; nothing else.

    Raises:
        ValueError: `max_length` outside what the tokenizer takes.
    """
    if not isinstance(dataset, Dataset):
        return DatasetDict(
            {name: cast(Dataset, tokenize(rows, task, tokenizer, max_length)) for name, rows in dataset.items()}
        )
    least = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2) + len(task.text_columns)
    if not isinstance(max_length, int) or not least <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"`max_length` must be an integer from {least} to {tokenizer.model_max_length} for this tokenizer, got "
            f"{max_length!r}. "
            "To resolve, choose another one."
        )
    labelled = task.label_column in dataset.column_names
    columns = [*task.text_columns, *([task.label_column] if labelled else [])]
    _rows.require_columns(dataset, columns, "given")
    types: dict[str, Any] = {"input_ids": "int32", "token_type_ids": "int8", "attention_mask": "int8"}
    keys = [k for k in types if k in tokenizer(*["a"] * len(task.text_columns))]
    types = {k: List(Value(types[k])) for k in keys}
    if labelled:
        score = Value("float32")
        types["labels"] = {"single_label": Value("int64"), "multi_label": List(score), "regression": score}[task.kind]

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            *(list(batch[c]) for c in task.text_columns), truncation=True, max_length=max_length, padding=False
        )
        return {k: batch[task.label_column] if k == "labels" else encoded[k] for k in types}

    versions = (datasets.__version__, transformers.__version__)
    parts = (*versions, *columns, str(labelled), task.kind, str(max_length), *keys)
    return dataset.with_format(None).map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        features=Features(types),
        new_fingerprint=_digest(*parts, data_fingerprint(dataset, columns), tokenizer_fingerprint(tokenizer)),
        desc="tokenizing",
    )
