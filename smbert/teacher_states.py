"""The teacher's hidden states of fixed rows, computed once: a student that sees its rows several times needs no teacher beside it.

Half precision, real tokens only, in one memory-mapped file of the stage's work folder, which goes when the stage is done. Attention
features are not kept: queries and keys of every layer are several times as large.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .features import Features, capture_features
from .processes import process_state
from .surgery import structure_of
from .teacher import LABELS, PADDED

logger = logging.getLogger(__name__)
ROW = "row"
# Of what is free where the run writes; checkpoints and results need the rest.
SHARE_OF_DISK = 0.25


class TeacherStates:
    """A teacher's logits and hidden states on disk.

    Args:
        folder: written by `compute`.

    Attributes:
        logits: (rows, classes) float32.
        layers: whose states are kept; 0 is the embedding output, i the output of layer i.
    """

    def __init__(self, folder: Path):
        about = json.loads((folder / "states.json").read_text(encoding="utf-8"))
        self.layers: list[int] = about["layers"]
        self.logits: np.ndarray = np.load(folder / "logits.npy", allow_pickle=False)
        self._ends: np.ndarray = np.load(folder / "ends.npy", allow_pickle=False)
        self._states = np.load(folder / "states.npy", mmap_mode="r", allow_pickle=False)  # (tokens, layers, hidden)

    def features(self, row: Tensor, mask: Tensor) -> Features:
        """The features of a padded batch, on the device of `mask`.

        Args:
            row: (batch,) int64, places of the batch's rows in the data set that the states were computed from.
            mask: (batch, seq) bool, true at real tokens.
        """
        parts = [self._states[self._ends[i - 1] if i else 0 : self._ends[i]] for i in row.tolist()]
        tokens = torch.from_numpy(np.concatenate(parts)).to(mask.device).float()  # (real tokens, layers, hidden)
        hidden = {}
        for place, layer in enumerate(self.layers):
            padded = tokens.new_zeros(*mask.shape, tokens.shape[-1])  # (batch, seq, hidden)
            padded[mask] = tokens[:, place]
            hidden[layer] = padded
        return Features(mask=mask, hidden=hidden)

    @classmethod
    def compute(
        cls,
        teacher: PreTrainedModel,
        rows: Dataset,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        layers: Collection[int],
        folder: Path,
        batch_size: int = 64,
        bf16: bool = False,
        disable_tqdm: bool = False,
    ) -> TeacherStates | None:
        """Run the teacher over all rows, unless `folder` holds the result already.

        Under torch.distributed the main process computes while the others wait.

        Returns:
            The states; None where half precision cannot hold them, which is known after the first batch.
        """
        state = process_state()
        try:
            if state.is_main_process and not folder.is_dir():
                _write(teacher, rows, collator, sorted(layers), folder, batch_size, bf16, disable_tqdm)
        finally:
            state.wait_for_everyone()
        return cls(folder) if folder.is_dir() else None


def worth_keeping(teacher: PreTrainedModel, rows: Dataset, layers: Collection[int], passes: float, place: Path) -> bool:
    """Whether rows are seen more than once and their states fit on the disk of `place`."""
    if passes <= 1:
        return False
    needed = int(_lengths(rows).sum()) * len(layers) * structure_of(teacher).hidden_size * 2
    existing = next(p for p in (place, *place.parents) if p.exists())
    fits = needed <= SHARE_OF_DISK * shutil.disk_usage(existing).free
    if not fits:
        logger.info("the teacher runs live: its hidden states would take %.1f GB of disk", needed / 1e9)
    return fits


def _lengths(rows: Dataset) -> np.ndarray:
    column = rows.select_columns(["input_ids"]).with_format("arrow")[:].column("input_ids")
    return pc.list_value_length(column).to_numpy()


def _write(
    teacher: PreTrainedModel,
    rows: Dataset,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    layers: list[int],
    folder: Path,
    batch_size: int,
    bf16: bool,
    disable_tqdm: bool,
) -> None:
    lengths = _lengths(rows)
    ends = np.cumsum(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    columns = [c for c in rows.column_names if c in PADDED and c not in LABELS]
    inputs = rows.select_columns(columns).with_format(None)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    device = next(teacher.parameters()).device
    shape = (int(ends[-1]), len(layers), structure_of(teacher).hidden_size)
    states = np.lib.format.open_memmap(part / "states.npy", mode="w+", dtype=np.float16, shape=shape)
    logits: np.ndarray | None = None
    steps = tqdm(range(0, len(order), batch_size), desc="teacher", unit="batch", leave=False, disable=disable_tqdm)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for start in steps:
            chosen = order[start : start + batch_size]
            columnwise = inputs[chosen.tolist()]
            batch = collator([dict(zip(columnwise, row)) for row in zip(*columnwise.values())])
            features = capture_features(teacher, {k: batch[k].to(device) for k in columns}, hidden=layers)
            assert features.logits is not None  # it has a classification head
            answers = features.logits.float().cpu().numpy()  # (batch, classes)
            if logits is None:
                logits = np.empty((len(rows), *answers.shape[1:]), np.float32)
            logits[chosen] = answers
            stacked = torch.stack([features.real(features.hidden[i]) for i in layers], 1).half()
            if not stacked.isfinite().all():
                del states
                shutil.rmtree(part)
                logger.info("the teacher runs live: its hidden states are too large for half precision")
                return
            own = np.split(stacked.cpu().numpy(), np.cumsum(lengths[chosen])[:-1])
            for i, values in zip(chosen, own):
                states[ends[i] - lengths[i] : ends[i]] = values
    states.flush()
    assert logits is not None  # there are rows
    np.save(part / "logits.npy", logits)
    np.save(part / "ends.npy", ends)
    (part / "states.json").write_text(json.dumps({"layers": layers}))
    os.replace(part, folder)
