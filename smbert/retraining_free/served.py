"""Whole models behind an engine, as modules that can be timed in turns with each other."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._surgery_vocab import keep_vocabulary, token_ids_in_config
from ..runtime import open_graph

# The exporter's package, then the engine's own.
NEEDED = {"torch": (), "onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
OPSET = 17
# A large table of embeddings would be written once for each size, and its rows are only looked up.
_VOCABULARY = 1000


def check_engine(engine: str) -> None:
    """ValueError for an engine that is unknown or not installed."""
    if engine not in NEEDED:
        raise ValueError(f"`engine` must be one of {', '.join(NEEDED)}, got {engine!r}. To resolve, choose one.")
    for package in NEEDED[engine]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"`engine` {engine} needs {package}. To resolve, pip install smbert[{engine}].")


def versions(engine: str) -> dict[str, str]:
    """Of the packages beside torch on which its times depend."""
    return {package: importlib.metadata.version(package) for package in NEEDED[engine][1:]}


def with_small_vocabulary(model: PreTrainedModel) -> PreTrainedModel:
    """The model with some of its tokens, for timing on random ones."""
    table: Any = model.get_input_embeddings()
    size = len(table.weight)
    return keep_vocabulary(model, sorted({*range(min(_VOCABULARY, size)), *token_ids_in_config(model)}))


@contextlib.contextmanager
def served(models: Mapping[str, PreTrainedModel], engine: str, threads: int | None) -> Iterator[dict[str, nn.Module]]:
    """The models behind an engine in fp32, for input_ids and attention_mask; in torch they are themselves.

    Raises:
        ValueError: a model without a task head, which has no logits that a graph could end in.
    """
    if engine == "torch":
        yield dict(models)
        return
    from ..export.onnx_graph import write_onnx

    if any(not hasattr(model, "base_model") or model.base_model is model for model in models.values()):
        raise ValueError(
            f"`engine` must be torch for a model without a task head, got {engine!r}. To resolve, prune a fine-tuned model."
        )
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, nn.Module] = {}
        for number, (name, model) in enumerate(models.items()):
            file = Path(folder) / f"{number}.onnx"
            inputs = write_onnx(model, ("input_ids", "attention_mask"), file, OPSET)
            found[name] = _Served(file, inputs, engine, threads)
        yield found


class _Served(nn.Module):
    """A graph as a module; its threads do not wait busily, since others are timed in turns with it."""

    def __init__(self, file: Path, inputs: Sequence[str], engine: str, threads: int | None):
        super().__init__()
        self.inputs = inputs
        self.graph = open_graph(file, engine, threads=threads, spinning=False)

    def forward(self, **inputs: Tensor) -> Tensor:
        """(batch, labels) logits."""
        return torch.from_numpy(self.graph({name: inputs[name].numpy() for name in self.inputs}))
