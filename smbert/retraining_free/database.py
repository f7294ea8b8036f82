"""Every size of every sub-layer, computed once: reconstruction error, units that stay, updated output projections.

A folder that any later target reuses:

    database.json            fingerprints of model and data, settings; per sub-layer the removal order, sizes and errors
    layer-00.safetensors     attention_output.8.weight (hidden, 8 * head_dim), .bias; ffn_out.768.weight ...; half precision where
                             that changes the error by less than a hundredth

Memory stays at one layer's moments and weights. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .._costs import Widths
from .._sizes import round_up
from ..processes import process_state
from ..surgery import PruningPlan, structure_of
from ..teacher import model_fingerprint
from .reconstruct import Moments, Projection, Reduce
from .stream import PARTS, Calls, Stream
from .working_copy import output_projection, put

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILE = "database.json"
# Rounding may add this much to an error: a share of it, and of the sub-layer's whole output.
_ROUNDING = (0.01, 1e-6)
_ABOUT = ("model", "data", "settings", "tokens")
_STALE_S = 3600  # a layer takes seconds, so what has not grown for so long is a killed run's


@dataclass(frozen=True)
class Settings:
    """What is computed.

    Attributes:
        levels: FFN sizes are multiples of 1 / levels of the widest layer, and a half and a quarter of the smallest of them.
        multiple_of: and they are rounded up to multiples of it.
        damping: see `reconstruct.damping_of`.
    """

    levels: int = 16
    multiple_of: int = 8
    damping: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("levels", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}. To resolve, correct it.")
        if not 0 < self.damping < 1:
            raise ValueError(f"`damping` must be above 0 and below 1, got {self.damping!r}. To resolve, try 1.0e-4.")

    def ffn_sizes(self, width: int, widest: int) -> tuple[int, ...]:
        """The FFN sizes of a layer of `width` neurons in a model whose widest has `widest`, ascending from 0 to `width`."""
        step = max(1, widest // self.levels)
        marks = [step // 4, step // 2, *range(step, widest, step)]
        sizes = {round_up(mark, self.multiple_of) for mark in marks if mark}
        return tuple(sorted({0, width} | {size for size in sizes if size < width}))

    def sizes(self, widths: Widths) -> list[tuple[int, ...]]:
        """The sizes of attention and feed-forward part of each layer in turn."""
        widest = max(ffn for _, ffn in widths)
        return [size for heads, ffn in widths for size in (tuple(range(heads + 1)), self.ffn_sizes(ffn, widest))]


@dataclass(frozen=True)
class SubLayer:
    """The sizes of one sub-layer.

    Attributes:
        part: of `PARTS`.
        layer: its number.
        order: all units in the order in which they are removed.
        sizes: numbers of units, ascending from 0 to all.
        errors: mean squared error of the output at each size, as a share of the output's own variance (mean square, for
            projections without a bias).
    """

    part: str
    layer: int
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    errors: tuple[float, ...]

    def kept(self, size: int) -> tuple[int, ...]:
        """The units that stay at a size, sorted."""
        return tuple(sorted(self.order[len(self.order) - size :]))


@dataclass(frozen=True)
class Database:
    """All sizes of all sub-layers of one model.

    Attributes:
        folder: where it lies.
        about: "model", "data" (fingerprints), "settings", "tokens".
        sublayers: attention, then feed-forward part of each layer.
    """

    folder: Path
    about: dict[str, Any]
    sublayers: tuple[SubLayer, ...]

    @classmethod
    def load(
        cls, folder: str | Path, model: PreTrainedModel, data: str | None = None, settings: Settings | None = None
    ) -> Database:
        """Opens a database.

        Args:
            folder: from `build_database`.
            model: the model that it must be of.
            data: fingerprint of the data that it must be of; None takes any.
            settings: with which it must have been built; None takes any.

        Raises:
            ValueError: not a database, or one of another checkpoint, other data or other settings.
        """
        folder = Path(folder)
        values = _read(folder)
        about = {key: values[key] for key in _ABOUT}
        if about["model"] != model_fingerprint(model):
            raise ValueError(
                f"{folder} is a database of another checkpoint: its weights would not fit this model's. To resolve, name another "
                "folder, or delete this one, so that it is built anew."
            )
        if data is not None and about["data"] != data:
            raise ValueError(
                f"{folder} is a database of other calibration data. To resolve, name another folder, delete this one, or go back "
                "to its `samples`, `calibration`, seed and training rows."
            )
        if settings is not None:
            _check_settings(folder, about["settings"], settings)
        return cls(folder, about, values["sublayers"])

    def weights(self, sublayer: SubLayer, size: int) -> tuple[Tensor, Tensor | None]:
        """The output projection of a sub-layer at a size smaller than all: weight (hidden, size * dim), bias; float32."""
        file, name = self.folder / f"layer-{sublayer.layer:02d}.safetensors", f"{sublayer.part}.{size}"
        try:
            with safe_open(file, framework="pt") as tensors:
                bias = tensors.get_tensor(f"{name}.bias").float() if f"{name}.bias" in tensors.keys() else None  # noqa: SIM118
                return tensors.get_tensor(f"{name}.weight").float(), bias
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file} must hold the sizes of layer {sublayer.layer}, but reading {name} gave {error}. To resolve, delete "
                f"{self.folder}, so that it is built anew."
            ) from error

    def plan(self, widths: Widths) -> PruningPlan:
        """The units that stay at the (heads, neurons) of each layer."""
        kept = [s.kept(size) for s, size in zip(self.sublayers, _flat(widths), strict=True)]
        return PruningPlan(heads=tuple(kept[::2]), ffn=tuple(kept[1::2]))

    def apply(self, copy: PreTrainedModel, model: PreTrainedModel, widths: Widths) -> None:
        """Writes the output projections of these sizes into a working copy of the model."""
        dim = structure_of(model).head_dim
        for sublayer, size in zip(self.sublayers, _flat(widths), strict=True):
            self.apply_one(copy, model, sublayer, size, dim)

    def apply_one(
        self, copy: PreTrainedModel, model: PreTrainedModel, sublayer: SubLayer, size: int, head_dim: int
    ) -> None:
        """Writes one sub-layer's output projection of a size into a working copy; at all units, the model's own."""
        linear = output_projection(copy, sublayer.part, sublayer.layer)
        if size == sublayer.sizes[-1]:
            own = output_projection(model, sublayer.part, sublayer.layer)
            put(linear, range(own.in_features), own.weight, own.bias)
            return
        dim = head_dim if sublayer.part == "attention_output" else 1
        columns = [unit * dim + i for unit in sublayer.kept(size) for i in range(dim)]
        put(linear, columns, *self.weights(sublayer, size))


def check_folder(folder: Path, settings: Settings) -> None:
    """What can be said before there is a model: ValueError for a database of other settings, or something else in its place."""
    if (folder / FILE).is_file():
        _check_settings(folder, _read(folder)["settings"], settings)
    else:
        check_vacant(folder)


def check_vacant(folder: Path) -> None:
    """ValueError where something lies in the place of a database that is still to be built."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} must not exist or be empty, since it is no database of sizes. To resolve, name another folder, or delete it."
        )


def _read(folder: Path) -> dict[str, Any]:
    """What the JSON file says, with its sub-layers as such."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        sublayers = tuple(
            SubLayer(s["part"], s["layer"], tuple(s["order"]), tuple(s["sizes"]), tuple(s["errors"]))
            for s in values["sublayers"]
        )
        found = {"sublayers": sublayers, **{key: values[key] for key in _ABOUT}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} must be a database of sub-layer sizes, but reading its {FILE} gave {error!r}. To resolve, delete the "
            "folder, so that it is built anew, or name another one."
        ) from error
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{folder} is of another version of smbert. To resolve, delete it, so that it is built anew.")
    return found


def _check_settings(folder: Path, found: Mapping[str, Any], settings: Settings) -> None:
    changed = [
        f"{name} {found.get(name)} and not {value}"
        for name, value in asdict(settings).items()
        if found.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} is a database of other settings ({', '.join(changed)}). To resolve, name another folder, delete this one, "
            "or go back to its settings."
        )


def build_database(
    model: PreTrainedModel,
    calls: Calls,
    folder: str | Path,
    data: str,
    settings: Settings | None = None,
    reduce: Reduce | None = None,
) -> Database:
    """Computes all sizes of all sub-layers in one pass through the layers, and writes them.

    Args:
        model: of any known family, pruned or not.
        calls: this process's share of the calibration rows, from `stream.record`.
        folder: to be made.
        data: fingerprint of the calibration rows.
        settings: see `Settings`.
        reduce: sums a tensor over all ranks, such as `sum_over_ranks`; None: this process is alone. The main process solves and
            writes.

    Raises:
        ValueError: fewer tokens than the widest output projection has columns, activations that are not finite, or a folder that
            holds something else.
        OSError: the folder cannot be written.
    """
    settings = settings or Settings()
    structure, stream = structure_of(model), Stream(model, calls)
    sizes = iter(settings.sizes(structure.layer_widths))
    columns = max(max(heads * structure.head_dim, ffn) for heads, ffn in structure.layer_widths)
    tokens = torch.tensor([float(calls.tokens)], dtype=torch.float64)
    total = int((reduce(tokens) if reduce else tokens)[0])
    if total <= columns:
        raise ValueError(
            f"calibration needs more than {columns} tokens, as many as the widest output projection has columns, got {total}. To "
            "resolve, raise `samples`, or give more or longer rows."
        )
    main, folder = process_state().is_main_process, Path(folder)
    check_vacant(folder)
    part_folder = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    for left in folder.parent.glob(f".{folder.name}.*.part") if main else ():
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    found: list[SubLayer] = []
    failure: Exception | None = None
    try:
        for layer, (heads, ffn) in enumerate(structure.layer_widths):
            # Separate tables for both parts, so that no more than one layer's is in memory.
            moments = {
                "attention_output": Moments(heads * structure.head_dim, device=model.device),
                "ffn_out": Moments(ffn, device=model.device),
            }
            for seen in stream.see(*PARTS, advance=True):
                for part in PARTS:
                    moments[part].add(seen[part].inputs)
            reduced = {part: moments.pop(part).reduced(reduce) for part in PARTS}
            if main:
                try:
                    tensors: dict[str, Tensor] = {}
                    for part in PARTS:
                        dim = structure.head_dim if part == "attention_output" else 1
                        linear = output_projection(model, part, layer)
                        own = Projection.of(linear, reduced.pop(part), settings.damping, dim)
                        found.append(_sizes_of(own, part, layer, next(sizes), tensors))
                    part_folder.mkdir(parents=True, exist_ok=True)
                    save_file(tensors, part_folder / f"layer-{layer:02d}.safetensors")
                    logger.info("layer %d of %d is in the database", layer + 1, structure.num_layers)
                except Exception as error:
                    failure = error
            _end_together(failure, reduce)
        if main:
            try:
                about = {
                    "schema_version": SCHEMA_VERSION,
                    "model": model_fingerprint(model),
                    "data": data,
                    "settings": asdict(settings),
                    "tokens": total,
                    "sublayers": [asdict(sublayer) for sublayer in found],
                }
                (part_folder / FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
                part_folder.rename(folder)  # in the place of an empty folder, too
            except Exception as error:
                failure = error
        _end_together(failure, reduce)
    finally:
        if main:
            shutil.rmtree(part_folder, ignore_errors=True)
    return Database.load(folder, model, data)


def _end_together(failure: Exception | None, reduce: Reduce | None) -> None:
    """Raises the main process's error there and an OSError elsewhere, so that nobody waits for a process that has ended."""
    flag = torch.tensor([float(failure is not None)], dtype=torch.float64)
    failed = bool((reduce(flag) if reduce else flag)[0])
    if failure is not None:
        raise failure
    if failed:
        raise OSError("the main process could not build the database of sizes. To resolve, see what it says.")


def _sizes_of(own: Projection, part: str, layer: int, sizes: Sequence[int], tensors: dict[str, Tensor]) -> SubLayer:
    """The errors of all sizes; adds the weights to `tensors`."""
    sublayer = SubLayer(part, layer, tuple(own.removal_order()), tuple(sizes), ())
    errors: list[float] = []
    for size in sizes[:-1]:
        kept = sublayer.kept(size)
        weight, bias = own.solve(kept)
        error, half = own.error(weight, kept), weight.half()
        rounded = own.error(half.double(), kept) if half.isfinite().all() else float("inf")
        name, fits = f"{part}.{size}", rounded <= error * (1 + _ROUNDING[0]) + _ROUNDING[1]
        tensors[f"{name}.weight"] = (half if fits else weight.float()).cpu().contiguous()
        if bias is not None:
            tensors[f"{name}.bias"] = bias.float().cpu()
        errors.append(error)
    # All units as they are: no error, and nothing to store.
    return SubLayer(part, layer, sublayer.order, sublayer.sizes, (*errors, 0.0))


def _flat(widths: Widths) -> list[int]:
    return [size for pair in widths for size in pair]
