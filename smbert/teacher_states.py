"""The teacher's hidden states of fixed rows, computed once: a student that sees its rows several times needs no teacher beside it.

Half precision, real tokens only, in one memory-mapped file: of the stage's work folder, which goes when the stage is done, or of a folder
that several stages share. Attention features are not kept: queries and keys of every layer are several times as large.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from .features import Features, capture_features
from .processes import process_state
from .surgery import structure_of
from .teacher import batches_by_length, dataset_fingerprint, freeze, inputs_of, model_fingerprint, token_counts

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

        Under torch.distributed the main process decides and computes while the others wait.

        Args:
            teacher: with a sequence-classification head, where it is to run; it is frozen.
            rows: tokenised.
            collator: pads rows to a batch.
            layers: whose states are kept.
            folder: made whole or not at all.
            batch_size: rows of one forward pass.
            bf16: autocast to bfloat16.
            disable_tqdm: no progress bar.

        Returns:
            The states; None where the disk has no room for them or half precision cannot hold them.
        """
        state = process_state()
        try:
            # What a killed run left decides for the resumed one, whose disk is fuller.
            if state.is_main_process and not folder.is_dir() and _fits(teacher, rows, layers, folder.parent):
                _write(freeze(teacher), rows, collator, sorted(layers), folder, batch_size, bf16, disable_tqdm)
        finally:
            state.wait_for_everyone()
        return cls(folder) if folder.is_dir() else None


def shared_folder(place: Path, teacher: PreTrainedModel, rows: Dataset, layers: Collection[int], bf16: bool) -> Path:
    """Where, in a folder that several stages share, the states of these rows are or shall be; others' may hold more layers."""
    about = json.dumps([model_fingerprint(teacher), dataset_fingerprint(rows, inputs_of(teacher, rows)), bf16])
    name = hashlib.sha256(about.encode()).hexdigest()[:32]
    for folder in sorted(place.glob(f"{name}-*")):
        if folder.suffix == ".part":  # a killed run's
            continue
        if set(layers) <= set(json.loads((folder / "states.json").read_text(encoding="utf-8"))["layers"]):
            return folder
    return place / "-".join([name, *map(str, sorted(layers))])


def _fits(teacher: PreTrainedModel, rows: Dataset, layers: Collection[int], place: Path) -> bool:
    needed = int(token_counts(rows).sum()) * len(layers) * structure_of(teacher).hidden_size * 2
    existing = next(p for p in (place, *place.parents) if p.exists())
    fits = needed <= SHARE_OF_DISK * shutil.disk_usage(existing).free
    if not fits:
        logger.info("the teacher runs live: its hidden states would take %.1f GB of disk", needed / 1e9)
    return fits


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
    lengths, columns = token_counts(rows), inputs_of(teacher, rows)
    ends = np.cumsum(lengths, dtype=np.int64)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    device = next(teacher.parameters()).device
    shape = (int(ends[-1]), len(layers), structure_of(teacher).hidden_size)
    states = np.lib.format.open_memmap(part / "states.npy", mode="w+", dtype=np.float16, shape=shape)
    logits: np.ndarray | None = None
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for chosen, batch in batches_by_length(rows, columns, collator, batch_size, "teacher", disable_tqdm):
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
