"""What a model costs: parameters, MACs, size on disk and latency, together with the machine that the figures belong to.

Parameters and MACs follow from the structure alone. Latency belongs to one machine, dtype and number of threads, and to
nothing else, so baseline and candidates are timed in turns in one process, and `environment` is stored beside the figures.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._memory import freed_memory_kept
from .modeling import encoder_layers, family_of, head_dim, layer_widths

Latencies = dict[str, dict[str, dict[str, float]]]  # {name: {"32x128": {"p50": ms, "p95": ms}}}

# The instruction sets that decide how fast matrix products in fp32, bf16 and int8 are.
_X86 = "avx2 fma avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
_ISA = tuple(f"{_X86} asimd asimddp i8mm bf16 sve".split())
_LEAST_RUNS = 5  # a median of fewer runs says nothing, however slow the model


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; shared ones count once.

    Attributes:
        total: all of the model, its head included.
        encoder: the encoder layers only.
        embedding: all embedding tables outside the layers, their norm and (ELECTRA) their projection to the hidden size.
    """

    total: int
    encoder: int
    embedding: int


def count_parameters(model: nn.Module) -> Parameters:
    """Counts the parameters of a model of a known family, with or without a head.

    Raises:
        ValueError: the model's family is unknown.
    """
    encoder = {id(p): p.numel() for p in encoder_layers(model).parameters()}
    embedding: dict[int, int] = {}
    for name, module in getattr(model, "base_model", model).named_modules():
        # MPNet's table of relative positions lies beside its layers, not among the other embeddings.
        if name.split(".")[0].startswith("embeddings") or isinstance(module, nn.Embedding):
            embedding.update((id(p), p.numel()) for p in module.parameters() if id(p) not in encoder)
    total = sum(p.numel() for p in model.parameters())
    return Parameters(total, encoder=sum(encoder.values()), embedding=sum(embedding.values()))


def encoder_macs(
    layer_widths: Sequence[tuple[int, int]],
    hidden: int,
    head_dim: int,
    seq_len: int,
    gated: bool = False,
    batch: int = 1,
) -> int:
    """Multiply-accumulate operations of encoder layers: projections, attention products and FFN; biases and norms are left out.

    Args:
        layer_widths: (heads, FFN neurons) of each layer.
        hidden: width of the residual stream.
        head_dim: size of one head.
        seq_len: tokens per sequence. Every token meets every other: a sliding window masks products, it does not save them.
        gated: the FFN has two input projections (a GLU).
        batch: sequences.
    """
    macs = 0
    for heads, ffn in layer_widths:
        attention = heads * head_dim
        macs += 4 * seq_len * hidden * attention  # query, key, value, output
        macs += 2 * seq_len * seq_len * attention  # Q K^T and softmax(...) V
        macs += (3 if gated else 2) * seq_len * hidden * ffn
    return batch * macs


def macs(model_or_config: Any, seq_len: int = 128, batch: int = 1) -> int:
    """Multiply-accumulate operations of one forward of the encoder: its layers and ELECTRA's embedding projection.

    The head is left out (a pooler and a classifier see one token of each sequence), so that a model, its config and the
    same encoder under another head all have the same number.

    Raises:
        ValueError: the family is unknown, or a size is below 1.
    """
    for name, value in (("seq_len", seq_len), ("batch", batch)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    config = getattr(model_or_config, "config", model_or_config)
    gated, hidden = family_of(config).gated, config.hidden_size
    embedding = getattr(config, "embedding_size", hidden)
    projection = 0 if embedding == hidden else batch * seq_len * embedding * hidden
    if rank := getattr(config, "embedding_rank", None):
        projection += batch * seq_len * rank * embedding
    return projection + encoder_macs(layer_widths(config), hidden, head_dim(config), seq_len, gated, batch)


def size_mb(path: str | os.PathLike[str]) -> float:
    """Size on disk in MB (10^6 bytes) of a file, or of the weights in a model folder.

    In a folder, only the weights that a load would read count: safetensors, else PyTorch's, else ONNX files (with their
    external data); a folder with none of them counts whole. Tokenizer, report and optimizer state are no part of a model's size.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size / 1e6
    if not path.is_dir():
        raise FileNotFoundError(
            f"`path` must be a file or a model folder, got {str(path)!r}. To resolve, save the model."
        )
    kinds = (("model*.safetensors",), ("pytorch_model*.bin",), ("*.onnx", "*.onnx_data", "*.onnx.data"), ("**/*",))
    found = ([file for pattern in kind for file in path.glob(pattern) if file.is_file()] for kind in kinds)
    return sum(file.stat().st_size for file in next(filter(None, found), [])) / 1e6


@functools.cache
def _cpu() -> tuple[str, frozenset[str]]:
    """Name and instruction set flags of the CPU; no flags where the system does not tell."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return fields.get("model name") or platform.processor() or platform.machine(), frozenset(flags)


def supports_bf16(device: str | torch.device | None = None) -> bool:
    """Whether the hardware multiplies bf16 matrices itself (avx512_bf16, AMX, ARM bf16, or the GPU's units).

    Args:
        device: the device in question; None: the GPU where there is one, else the CPU.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and not _cpu()[1].isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def environment(threads: int | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The machine and the versions that figures belong to, without host names or paths, ready for JSON.

    Args:
        threads: the number of threads that `latency` was given; None: the number that torch uses now.
        dtype: the dtype that `latency` was given; None leaves it out.
    """
    name, flags = _cpu()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    versions: dict[str, str | None] = {}
    for package in ("transformers", "smbert"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            versions[package] = None
    description = {
        "cpu": name,
        "isa": [flag for flag in _ISA if flag in flags],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build: "+cpu", "+cu130"
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    return description if dtype is None else {**description, "dtype": str(dtype).removeprefix("torch.")}


def machine_line(about: Mapping[str, Any]) -> str:
    """What `environment` found as one line of text; what is not there is left out."""
    told = {key: "+".join(value) if isinstance(value, list) else value for key, value in about.items()}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value not in (None, ""))


PERCENTILES = (50, 95)  # of the runs of a model, unless others are asked for


def latency(
    models: Mapping[str, nn.Module],
    shapes: Sequence[tuple[int, int]] = ((1, 128), (32, 128)),
    *,
    warmup: int = 10,
    min_runs: int = 50,
    min_seconds: float = 15.0,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    disable_tqdm: bool = False,
) -> Latencies:
    """Times forward passes of all models in turns, on random tokens without padding, in milliseconds per batch.

    What a pass frees stays with the process until all are timed (see `_memory.py`).

    Args:
        models: the baseline and the candidates, each on its own device. Their modes are restored afterwards.
        shapes: (batch, seq) of the inputs.
        warmup: untimed runs of each model for each shape.
        min_runs: timed runs of each model for each shape; fewer (but at least 5) when `min_seconds` are over before.
        min_seconds: timed seconds for each shape, on the mean over the models, after which a slow measurement may end.
        dtype: torch.float32, or torch.bfloat16 for autocast. Weights stay in fp32 either way.
        threads: torch's number of threads for the CPU; None keeps the present number. It is restored afterwards.
        disable_tqdm: no progress line.

    Returns:
        {name: {"32x128": {"p50": median, "p95": 95th percentile}}}.

    Raises:
        ValueError: an argument out of range, weights that are not fp32, or a shape longer than a model's positions.
    """
    settings = _Settings(warmup, min_runs, min_seconds, dtype, threads, disable_tqdm)
    for batch, length in shapes:
        if batch < 1 or length < 1:
            raise ValueError(f"`shapes` must hold pairs (batch, seq) of at least 1, got {(batch, length)}.")
        for name, model in models.items():
            if length > (limit := max_positions(model)):
                raise ValueError(
                    f"`shapes` must not be longer than the {limit} positions of {name!r}, got {batch}x{length}."
                )
    generator = torch.Generator().manual_seed(0)

    def tokens(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)  # type: ignore[arg-type, union-attr]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    results: Latencies = {name: {} for name in models}
    with _conditions(models, settings):
        for batch, length in shapes:
            label = f"{batch}x{length}"
            inputs = {name: [tokens(model, batch, length)] for name, model in models.items()}
            timed = _in_turns(models, inputs, label, settings)
            for name, summary in timed.items():
                results[name][label] = summary
    return results


def latency_on(
    models: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Tensor]] | Mapping[str, Sequence[Mapping[str, Tensor]]],
    *,
    label: str = "mix",
    warmup: int = 10,
    min_runs: int = 50,
    min_seconds: float = 15.0,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    disable_tqdm: bool = False,
    percentiles: Sequence[int] = PERCENTILES,
) -> Latencies:
    """Times forward passes on tokenised text with its real lengths and padding; otherwise the same as `latency`.

    Args:
        models: the baseline and the candidates.
        batches: model inputs, each tensor (batch, seq); or one such list for each model, where tokenizers differ. All of
            them are run equally often. Labels are left out, so that no loss is timed.
        label: name of the text in the result, where `latency` has the shape.
        percentiles: of the times of each model, in milliseconds, that are returned: 10 as "p10".

    Raises:
        ValueError: as `latency`, or no batches, or lists of unequal length.
    """
    inputs = batches if isinstance(batches, Mapping) else {name: batches for name in models}
    if set(inputs) != set(models):
        raise ValueError(f"`batches` must have the names of the models, {sorted(models)}, got {sorted(inputs)}.")
    counts = {len(group) for group in inputs.values()}
    if models and (len(counts) != 1 or counts == {0}):
        raise ValueError(f"`batches` must hold equally many batches, at least 1, for all models, got {sorted(counts)}.")
    plain = {
        name: [{key: value for key, value in batch.items() if key not in ("labels", "label")} for batch in group]
        for name, group in inputs.items()
    }
    settings = _Settings(warmup, min_runs, min_seconds, dtype, threads, disable_tqdm)
    with _conditions(models, settings):
        timed = _in_turns(models, plain, label, settings, percentiles)
    return {name: {label: summary} for name, summary in timed.items()}


def speedups(latencies: Latencies, baseline: str = "teacher") -> dict[str, dict[str, float]]:
    """How many times faster than the baseline each model is, by the median: {name: {"32x128": 6.1}}; the baseline has 1.0.

    Args:
        latencies: the result of ONE call of `latency` or `latency_on`: figures of different calls saw different machines.

    Raises:
        ValueError: the baseline was not timed in that call, or not for every shape.
    """
    if baseline not in latencies:
        raise ValueError(
            f"`baseline` must be one of the models that were timed together, {sorted(latencies)}, got {baseline!r}. "
            "To resolve, time it in the same call of `latency` as the candidates."
        )
    base = latencies[baseline]
    for name, figures in latencies.items():
        if missing := sorted(set(figures) - set(base)):
            raise ValueError(f"`latencies` must hold the baseline {baseline!r} for {missing}, as it does {name!r}.")
    return {name: {k: base[k]["p50"] / v["p50"] for k, v in figures.items()} for name, figures in latencies.items()}


def max_positions(model: nn.Module) -> float:
    """Most tokens for which the model has positions; infinite where positions are computed (rotary embeddings)."""
    table = getattr(getattr(getattr(model, "base_model", model), "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return float("inf")
    # RoBERTa and MPNet count positions from the row after the padding's.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


@dataclass(frozen=True)
class _Settings:
    """The arguments that `latency` and `latency_on` share, checked."""

    warmup: int
    min_runs: int
    min_seconds: float
    dtype: torch.dtype
    threads: int | None
    disable_tqdm: bool

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("min_runs", 1), ("min_seconds", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be at least 1, or None for torch's present number, got {self.threads}.")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"`dtype` must be torch.float32, or torch.bfloat16 for autocast, got {self.dtype}.")


@contextlib.contextmanager
def _conditions(models: Mapping[str, nn.Module], settings: _Settings) -> Iterator[None]:
    """Eval mode, the asked number of threads and freed memory kept inside, restored outside."""
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    for name, model in models.items():
        others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
        if others:  # such a figure would be compared with fp32 ones in silence
            raise ValueError(f"{name!r} must have fp32 weights, got {others.pop()}. To resolve, use model.float().")
    before = torch.get_num_threads()
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        torch.set_num_threads(settings.threads or before)
        for model in models.values():
            model.eval()
        with freed_memory_kept():
            yield
    finally:
        torch.set_num_threads(before)
        for module, training in modes:
            module.training = training


def _in_turns(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[Mapping[str, Tensor]]],
    label: str,
    settings: _Settings,
    percentiles: Sequence[int] = PERCENTILES,
) -> dict[str, dict[str, float]]:
    """Runs every model once per round; the batches come in turns too, all of them equally often."""
    warmup, min_runs = settings.warmup, settings.min_runs
    runners = {name: _runner(models[name], inputs[name], settings.dtype) for name in models}
    names, batches = list(models), len(inputs[next(iter(models))])
    least, enough = min(min_runs, _LEAST_RUNS), settings.min_seconds * len(names)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    title = f"latency {label}"
    with tqdm(total=warmup + min_runs, desc=title, unit="run", leave=False, disable=settings.disable_tqdm) as progress:
        for turn in range(warmup):
            for run in runners.values():
                run(turn % batches)
            progress.update()
        turn, spent = 0, 0.0
        while turn % batches or (turn < min_runs and (turn < least or spent < enough)):
            first = turn % len(names)  # nobody always runs in the caches that the same neighbour left
            for name in names[first:] + names[:first]:
                elapsed = runners[name](turn % batches)
                seconds[name].append(elapsed)
                spent += elapsed
            turn += 1
            progress.update()
    return {
        name: {f"p{share}": float(np.percentile(values, share)) * 1e3 for share in percentiles}
        for name, values in seconds.items()
    }


def _runner(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> Callable[[int], float]:
    """A function that runs the model on the batch of that index and returns the seconds it took."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    placed = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda device: None

    def run(index: int) -> float:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            synchronize(device)
            start = time.perf_counter()
            model(**placed[index])
            synchronize(device)
            return time.perf_counter() - start

    return run
