"""From an fp32 ONNX graph to the same graph in fp16 or int8, by onnxruntime's quantisers where the engine can run what they write.

Embedding tables, which are most of a small model, get one scale per row; matrix products one scale per column of the weight ("per
channel") or one for all. Products of two activations (attention) stay in fp32: they gain little and lose much.

engine      int8 dynamic                                          int8 static
onnx        one range for each tensor of a batch                  ranges from calibration data
openvino    one range for each 32 values of a token's vector      the same graph
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..runtime import open_graph
from .onnx_graph import embedding_tables, products_by_layer, quantise_rows, quantise_weights, weight_products

PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "openvino": ("fp32", "bf16", "int8")}  # by engine
METHODS = ("dynamic", "static")

Batches = Sequence[Mapping[str, np.ndarray]]  # model inputs, each (batch, length) int64


@dataclass(frozen=True)
class Setting:
    """How a graph is stored and computed.

    Attributes:
        precision: "fp32", "fp16" (weights and products; inputs and logits stay as they are), "bf16" (products; the weights are stored
            in fp32), or "int8".
        method: int8 only: "dynamic" finds the ranges of activations in each batch, "static" once, on calibration data.
        per_channel: int8 only: one scale per output of a weight, else one for the whole weight.
        fp32_layers: int8 only: encoder layers, from 0, whose products stay in fp32.
    """

    precision: str = "fp32"
    method: str = "dynamic"
    per_channel: bool = True
    fp32_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        precisions = tuple(dict.fromkeys(p for several in PRECISIONS.values() for p in several))
        for name, known in (("precision", precisions), ("method", METHODS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}. To resolve, choose one.")

    def __str__(self) -> str:
        if self.precision != "int8":
            return self.precision
        layers = f", layers {', '.join(map(str, self.fp32_layers))} in fp32" if self.fp32_layers else ""
        return f"int8 {self.method} {'per channel' if self.per_channel else 'per tensor'}{layers}"

    def to_dict(self) -> dict[str, Any]:
        """What of the setting matters for its precision."""
        values = asdict(self)
        return values if self.precision == "int8" else {"precision": self.precision}


def ladder(start: Setting, sensitive: Callable[[], Sequence[int]], calibrated: bool) -> Iterator[Setting]:
    """The setting asked for, then the safer ones in turn: per channel, a quarter and half of the layers in fp32, static ranges, fp32.

    Args:
        start: what was asked for.
        sensitive: the layers, the most sensitive first; called when the ladder gets there, as it takes a while.
        calibrated: whether there is the data that static ranges need.
    """
    tried = {start}
    yield start

    def steps() -> Iterator[Setting]:
        if start.precision == "int8":
            yield Setting("int8")
            order = sensitive()
            for share in (4, 2):
                yield Setting("int8", fp32_layers=tuple(sorted(order[: -(-len(order) // share)])))
            if calibrated:
                yield Setting("int8", "static")
        yield Setting("fp32")

    for step in steps():
        if step not in tried:
            tried.add(step)
            yield step


def convert(
    source: Path,
    target: Path,
    setting: Setting,
    model: PreTrainedModel,
    calibration: Batches = (),
    engine: str = "onnx",
) -> None:
    """Writes `source`, an fp32 graph of `model`, to `target` in another precision.

    Args:
        source: the fp32 graph.
        target: the file to write.
        setting: the precision.
        model: whose graph it is.
        calibration: a sample of real inputs, for static ranges.
        engine: which will run it.

    Raises:
        ValueError: static ranges without calibration data.
    """
    import onnx

    if setting.precision == "int8" and setting.method == "static" and not calibration:
        raise ValueError(
            "static int8 needs calibration data. To resolve, pass `calibration`, or use the dynamic method."
        )
    graph = onnx.load(str(source))
    if setting.precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(graph, keep_io_types=True), str(target))
    elif setting.precision == "int8":
        in_fp32 = {name for layer in setting.fp32_layers for name in products_by_layer(graph, model).get(layer, ())}
        nodes = [name for name in weight_products(graph) if name not in in_fp32]
        _int8(graph, target, setting, model, nodes, calibration, engine)
    else:  # bf16 is how the engine computes
        onnx.save(graph, str(target))


def sensitive_layers(
    source: Path, model: PreTrainedModel, batches: Batches, workdir: Path, engine: str = "onnx"
) -> list[int]:
    """The encoder layers by what their quantisation alone does to the logits (mean squared difference), the most sensitive first.

    Args:
        source: the fp32 graph.
        model: whose graph it is.
        batches: a sample of real inputs.
        workdir: for graphs that are deleted again.
        engine: which will run it.
    """
    import onnx

    def logits(file: Path, precision: str) -> np.ndarray:
        graph = open_graph(file, engine, precision)
        return np.concatenate([graph(dict(batch)) for batch in batches])

    expected, damage = logits(source, "fp32"), {}
    for layer, names in products_by_layer(onnx.load(str(source)), model).items():
        file = workdir / "one-layer.onnx"
        _int8(onnx.load(str(source)), file, Setting("int8"), model, names, engine=engine, embeddings=False)
        damage[layer] = float(np.square(logits(file, "int8") - expected).mean())
        file.unlink()
    return sorted(damage, key=lambda layer: (-damage[layer], layer))


class _Reader:
    """Calibration batches, one after the other, as onnxruntime asks for them."""

    def __init__(self, batches: Batches):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else dict(batch)


def _int8(
    graph: Any,
    target: Path,
    setting: Setting,
    model: PreTrainedModel,
    nodes: Sequence[str],
    calibration: Batches = (),
    engine: str = "onnx",
    embeddings: bool = True,
) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    if not nodes:  # an empty list would mean all of them
        pass
    elif setting.method == "dynamic" and engine == "openvino":
        quantise_weights(graph, nodes, setting.per_channel)
    elif setting.method == "dynamic":
        with _quiet():
            quantize_dynamic(
                graph,
                target,
                per_channel=setting.per_channel,
                # Before it looks at names, it makes a Gemm a MatMul of that other name.
                nodes_to_quantize=[*nodes, *(f"{name}_MatMul" for name in nodes)],
                weight_type=QuantType.QInt8,
            )
        graph = onnx.load(str(target))
    else:
        with _quiet():
            quantize_static(
                graph,
                target,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],  # or ranges of the -inf of attention masks are looked for too
                per_channel=setting.per_channel,
                nodes_to_quantize=list(nodes),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # The sums of a product are exact; only what goes into it has to be rounded.
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )
        graph = onnx.load(str(target))
    if embeddings:
        quantise_rows(graph, embedding_tables(graph, model))
    onnx.save(graph, str(target))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to pre-process the graph, which changes nothing for these models."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
