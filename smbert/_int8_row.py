"""The report's standing row: what a user would take instead of a smaller model, the teacher in int8 by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from . import runtime
from ._report_tables import INT8_TEACHER, TEACHER
from .measure import size_mb
from .teacher import model_fingerprint

logger = logging.getLogger(__name__)


class Served(nn.Module):
    """An exported folder in the shape in which torch's models are scored and timed, so that both go through the same code.

    Args:
        folder: written by `smbert.export.export`.
        model: what was exported, for its config and its parameters' number.
        threads: CPU threads.

    Raises:
        ValueError: the folder is damaged.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, threads: int):
        super().__init__()
        manifest = runtime.read_manifest(folder)
        file = folder / manifest["model"]
        self.config, self.size_mb, self.inputs = model.config, size_mb(file), list(manifest["inputs"])
        # Its spinning threads would slow the models that are timed in turns with it.
        self._graph = runtime.open_graph(file, manifest["engine"], threads=threads, spinning=False)
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # models are asked for their parameters' device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """(batch, length) each, to logits (batch, labels), on the CPU."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}
        logits = self._graph({name: given[name].numpy().astype(np.int64, copy=False) for name in self.inputs})
        return SequenceClassifierOutput(logits=torch.from_numpy(logits))  # type: ignore[arg-type]


def with_int8_teacher(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_length: int | None = None,
    threads: int | None = None,
) -> tuple[dict[str, PreTrainedModel | Served], list[str]]:
    """The models of a report with the teacher in int8 behind the teacher, and what the report should say of it.

    Without onnx and onnxruntime, or where the export fails, the models are as they were and the note says why: the row is worth a
    minute, and no run that took hours.

    Args:
        models: by the name of their row.
        tokenizer: of the teacher.
        folder: where the export is kept; one of the same weights and length that is there already is used again.
        max_length: most tokens of a row, for those who ask the folder and not the model; default: as many as the teacher takes.
        threads: CPU threads; default: torch's.
    """
    try:
        place = _exported(models[TEACHER], tokenizer, folder, max_length)
        served = Served(place, models[TEACHER], threads or torch.get_num_threads())
    except Exception as error:  # onnx, onnxruntime and protobuf have errors of their own, which share no narrower class
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("no row %r: %s", INT8_TEACHER, reason)
        again = " Then run the same command again." if "pip install" in reason else ""
        return dict(models), [f"The row {INT8_TEACHER!r} is missing: {reason}{again}"]
    out: dict[str, PreTrainedModel | Served] = {}
    for name, model in models.items():
        out[name] = model
        if name == TEACHER:
            out[INT8_TEACHER] = served
    return out, []


def _exported(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int | None
) -> Path:
    """The folder with the teacher in int8, dynamic and per channel.

    Raises:
        ValueError, RuntimeError, OSError: as `smbert.export.export`.
    """
    from .export import export

    try:
        manifest = runtime.read_manifest(folder)
        runtime.verify_files(folder, manifest)
        as_long = max_length is None or manifest["max_length"] == max_length
        if as_long and manifest["parent"]["fingerprint"] == model_fingerprint(teacher):
            return folder
    except (ValueError, KeyError):
        pass  # none, or a damaged one: it is made anew
    logger.info("the teacher is exported in int8, for the report")
    return export(teacher, folder, precision="int8", tokenizer=tokenizer, max_length=max_length).folder
