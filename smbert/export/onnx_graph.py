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
from ..runtime import Graph

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


def write_onnx(model: PreTrainedModel, names: Sequence[str], file: Path, opset: int) -> list[str]:
    """Writes a model with dynamic batch and length; returns the inputs that count: without any heads nothing depends on the mask.

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
    return _drop_empty_products(file)


def _drop_empty_products(file: Path) -> list[str]:
    """In a graph with layers without heads or neurons, puts zeros for their products over nothing, and takes out what led there.

    OpenVINO cannot read a weight without elements. Returns the names of the inputs that are left.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file))
    body, empty = graph.graph, {t.name: t for t in graph.graph.initializer if len(t.dims) == 2 and t.dims[0] == 0}
    for node in body.node:  # equal weights, as all empty ones are, stand there once
        if node.op_type == "Identity" and node.input[0] in empty:
            empty[node.output[0]] = empty[node.input[0]]
    ends = [node for node in body.node if node.op_type == "MatMul" and node.input[1] in empty]
    if not ends:
        return [value.name for value in body.input]
    for node in ends:
        zeros = np.zeros(empty[node.input[1]].dims[1], np.float32)  # (hidden,), added to a (batch, length, hidden)
        body.initializer.append(numpy_helper.from_array(zeros, node.output[0]))
        body.node.remove(node)
    needed = {output.name for output in body.output}
    for node in reversed(list(body.node)):  # they stand in the order in which they are computed
        if needed.isdisjoint(node.output):
            body.node.remove(node)
        else:
            needed.update(node.input)
    for tensor in list(body.initializer):
        if tensor.name not in needed:
            body.initializer.remove(tensor)
    for value in list(body.input):
        if value.name not in needed:
            body.input.remove(value)
    onnx.save(graph, str(file))
    return [value.name for value in body.input]


def largest_difference(model: PreTrainedModel, names: Sequence[str], graph: Graph, longest: int) -> float:
    """The largest difference between the logits of torch and of an engine, over batch sizes and lengths that were not traced."""
    worst = 0.0
    model = copy.deepcopy(model).cpu().float().eval()
    for batch, length in ((1, 3), (3, 8), (7, 17), (2, 64)):
        inputs = example(model, names, batch, min(length, longest))
        with torch.inference_mode():
            expected = model(**inputs).logits.numpy()
        found = graph({name: inputs[name].numpy() for name in names})
        worst = float(np.maximum(worst, np.abs(expected - found).max()))  # max() would pass NaN over
    return worst


def weight_products(graph: onnx.ModelProto) -> list[str]:
    """Names of the products with a constant weight that may be quantised.

    Left out is the classifier: it is tiny, and its rounding goes straight into the answer.
    """
    constant = {tensor.name for tensor in graph.graph.initializer}
    return [
        node.name
        for node in graph.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constant and OUTPUT not in node.output
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


def embedding_tables(graph: onnx.ModelProto, model: PreTrainedModel) -> list[str]:
    """The graph's names of the tables that rows are looked up in: words and positions, not the few of token types or distances."""
    uses: dict[str, set[str]] = {}
    for node in graph.graph.node:
        for name in node.input:
            uses.setdefault(name, set()).add(node.op_type)
    words = model.get_input_embeddings()
    tables = {f"model.{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return [n for n, m in tables.items() if (m is words or m.num_embeddings > 32) and uses.get(n) == {"Gather"}]


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


def quantise_weights(graph: onnx.ModelProto, names: Iterable[str], per_channel: bool) -> None:
    """Stores the weights of the named products in int8, in place: MatMul(x, weight) becomes MatMul(x, DequantizeLinear(integers)).

    The form that OpenVINO takes as an order to find the ranges of `x` as it goes and to multiply integers. What onnxruntime's quantiser
    writes for that (DynamicQuantizeLinear, MatMulInteger) it computes in fp32, slower than the fp32 graph.
    """
    from onnx import helper, numpy_helper

    body, wanted = graph.graph, set(names)
    tensors = {tensor.name: tensor for tensor in body.initializer}
    for node in [n for n in body.node if n.name in wanted and n.input[1] in tensors]:
        weight = numpy_helper.to_array(tensors[node.input[1]])
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if transposed else 1  # of the outputs
        largest = np.abs(weight).max(axis=1 - axis) if per_channel else np.abs(weight).max()
        scales = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
        shaped = np.expand_dims(scales, 1 - axis) if per_channel else scales
        own = f"{node.name}/int8"
        made = {
            f"{own}/weight": np.round(weight / shaped).astype(np.int8),
            f"{own}/scales": scales,
            f"{own}/zeros": np.zeros(scales.shape, np.int8),
        }
        body.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in made.items())
        floats = f"{own}/floats"
        body.node.insert(0, helper.make_node("DequantizeLinear", list(made), [floats], f"{own}/Dequantize", axis=axis))
        node.input[1] = floats
    used = {name for node in body.node for name in node.input}
    for name, tensor in tensors.items():
        if name not in used:
            body.initializer.remove(tensor)
