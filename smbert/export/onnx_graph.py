"""A torch classifier as an ONNX graph, and the parts of that graph that quantisation has to know."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling import encoder_layers

if TYPE_CHECKING:
    import onnx

OUTPUT = "logits"
# In the order in which the graph takes them.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Positional(nn.Module):
    """The model with its inputs by position and its logits alone as output, which is what an exporter can trace."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The inputs that the tokenizer makes and the model takes."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in INPUTS if name in taken and name in tokenizer.model_input_names]


def example(model: PreTrainedModel, names: Sequence[str], batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random model inputs (batch, length) with real padding in all rows but the first, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    padding = config.pad_token_id or 0
    # RoBERTa's positions skip the padding's id, so it must not occur inside a text.
    ids[ids == padding] = (padding + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - row % length) :] = 0
    types = (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()
    if getattr(config, "type_vocab_size", 2) < 2:
        types = torch.zeros_like(types)
    made = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask, "token_type_ids": types * mask}
    return {name: made[name] for name in names}


def write_onnx(model: PreTrainedModel, names: Sequence[str], file: Path, opset: int) -> None:
    """Writes a model with dynamic batch and length.

    By the tracing exporter (`dynamo=False`): what torch.export makes of layers without heads or neurons fails in onnxruntime, and it
    needs onnxscript. Tracing is exact here because the classifiers have no branches that depend on values.
    """
    wrapped = _Positional(copy.deepcopy(model).cpu().float(), names).eval()
    axes = {name: {0: "batch", 1: "length"} for name in names} | {OUTPUT: {0: "batch"}}
    inputs = example(model, names, batch=2, length=8)
    with warnings.catch_warnings():
        # They announce the end of the exporter, and value-dependent branches that are checked by `largest_difference`.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapped,
            tuple(inputs[name] for name in names),
            str(file),
            input_names=list(names),
            output_names=[OUTPUT],
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )


def session(file: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def largest_difference(model: PreTrainedModel, names: Sequence[str], file: Path, longest: int) -> float:
    """The largest difference between the logits of torch and of onnxruntime, over batch sizes and lengths that were not traced."""
    running, worst = session(file), 0.0
    model = copy.deepcopy(model).cpu().float().eval()
    for batch, length in ((1, 3), (3, 8), (7, 17), (2, 64)):
        inputs = example(model, names, batch, min(length, longest))
        with torch.inference_mode():
            expected = model(**inputs).logits.numpy()
        found = running.run(None, {name: inputs[name].numpy() for name in names})[0]
        worst = max(worst, float(np.abs(expected - found).max()))
    return worst


def weight_products(graph: onnx.ModelProto) -> list[str]:
    """Names of the products with a constant weight that may be quantised.

    Left out are weights without an element, which is what a layer without heads or neurons has, and the classifier: it is tiny, and
    its rounding goes straight into the answer.
    """
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.graph.initializer}
    return [
        node.name
        for node in graph.graph.node
        if node.op_type in ("MatMul", "Gemm") and sizes.get(node.input[1], 0) > 0 and OUTPUT not in node.output
    ]


def products_by_layer(graph: onnx.ModelProto, model: PreTrainedModel) -> dict[int, list[str]]:
    """The `weight_products` of each encoder layer, by its number. The exporter names nodes after the modules that made them."""
    prefix = next(name for name, module in model.named_modules() if module is encoder_layers(model))
    pattern = re.compile(rf"/model/{re.escape(prefix.replace('.', '/'))}\.(\d+)/")
    layers: dict[int, list[str]] = {}
    for name in weight_products(graph):
        if found := pattern.match(name):
            layers.setdefault(int(found[1]), []).append(name)
    return layers


def embedding_name(model: PreTrainedModel) -> str:
    """The graph's name of the word embedding."""
    table = model.get_input_embeddings().weight  # type: ignore[union-attr]
    return "model." + next(name for name, p in model.named_parameters() if p is table)


def quantise_rows(graph: onnx.ModelProto, names: Iterable[str]) -> None:
    """Stores embedding tables in int8 with a scale for each row, in place: Gather(table) becomes Gather(rows) * Gather(scales).

    onnxruntime's own quantiser has one scale for the whole table, which rare and frequent pieces do not share well.
    """
    from onnx import TensorProto, helper, numpy_helper

    body = graph.graph
    tensors = {tensor.name: tensor for tensor in body.initializer}
    for name in names:
        table = numpy_helper.to_array(tensors[name])  # (vocabulary, width)
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12) / 127
        rows = np.round(table / scales).astype(np.int8)
        body.initializer.remove(tensors[name])
        body.initializer.append(numpy_helper.from_array(rows, f"{name}_rows"))
        body.initializer.append(numpy_helper.from_array(scales.astype(np.float32), f"{name}_scales"))
        for node in [n for n in body.node if n.op_type == "Gather" and n.input[0] == name]:
            ids, out, own = node.input[1], node.output[0], f"{node.name or name}/int8"
            new = [
                helper.make_node("Gather", [f"{name}_rows", ids], [f"{own}/rows"], f"{own}/Gather", axis=0),
                helper.make_node("Cast", [f"{own}/rows"], [f"{own}/floats"], f"{own}/Cast", to=TensorProto.FLOAT),
                helper.make_node("Gather", [f"{name}_scales", ids], [f"{own}/scales"], f"{own}/Scales", axis=0),
                helper.make_node("Mul", [f"{own}/floats", f"{own}/scales"], [out], f"{own}/Mul"),
            ]
            at = list(body.node).index(node)
            body.node.remove(node)
            for offset, one in enumerate(new):
                body.node.insert(at + offset, one)
