"""One engine and one checkpoint in a process of their own, for engines.py: python engine_process.py SPEC.json RESULT.json

WHY so few imports: the time from the start of the process to the first answer, and its memory, are what is measured, so nothing may be
imported that a service with this engine would not import.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[dict[str, np.ndarray]], np.ndarray]
Answer = Callable[
    [Sequence[Any], int], np.ndarray
]  # texts (or pairs) and a batch size, to logits in the order of the texts


def main() -> None:
    spec_file, result_file = (Path(name) for name in sys.argv[1:3])
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    texts = [tuple(t) if isinstance(t, list) else t for t in spec["texts"]]
    run, answer, names, mb = (load_torch if spec["engine"].startswith("torch") else load_exported)(spec)
    answer(texts[:1], 1)
    result: dict[str, Any] = {
        "first_answer_at": time.time(),
        "first_answer_rss_mb": peak_mb(),
        "mb": mb,
        "latency_ms": {},
    }
    rng = np.random.default_rng(0)
    for batch, length in spec["shapes"]:
        ids = rng.integers(spec["vocabulary"], size=(batch, length))
        made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        inputs = {name: made[name] for name in names}
        result["latency_ms"][f"{batch}x{length}"] = timed(lambda inputs=inputs: run(inputs), spec)
    some = texts[:64]
    turn = iter(range(10**9))
    result["latency_ms"]["1xtext"] = timed(lambda: answer([some[next(turn) % len(some)]], 1), spec)
    start = time.perf_counter()
    logits = answer(texts, 32)
    result["texts_per_second"] = len(texts) / (time.perf_counter() - start)
    result |= {"logits": {"32": logits.astype(float).tolist()}, "peak_rss_mb": peak_mb()}
    for size in spec["parity"]:
        result["logits"][str(size)] = answer(texts, size).astype(float).tolist()
    result_file.write_text(json.dumps(result), encoding="utf-8")


def load_torch(spec: dict[str, Any]) -> tuple[Run, Answer, list[str], float]:
    """A checkpoint in torch the leanest way: transformers alone, which finds smbert's classes in the checkpoint's own modeling.py."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    dtype = torch.bfloat16 if spec["engine"] == "torch-bf16" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(spec["folder"], dtype=dtype, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.float().numpy()

    def answer(texts: Sequence[Any], batch_size: int) -> np.ndarray:
        encoded = [
            tokenizer(*(t if isinstance(t, tuple) else (t,)), truncation=True, max_length=spec["max_length"])
            for t in texts
        ]
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]["input_ids"]))
        parts = []
        for start in range(0, len(order), batch_size):
            batch = tokenizer.pad([encoded[i] for i in order[start : start + batch_size]], return_tensors="np")
            parts.append(run({name: np.asarray(array) for name, array in batch.items()}))
        logits = np.empty_like(np.concatenate(parts))
        logits[order] = np.concatenate(parts)
        return logits

    return run, answer, [n for n in tokenizer.model_input_names if n in ("input_ids", "attention_mask")], mb


def load_exported(spec: dict[str, Any]) -> tuple[Run, Answer, list[str], float]:
    """An exported folder through the runtime that lies in it."""
    folder = Path(spec["folder"])
    module_spec = importlib.util.spec_from_file_location("runtime", folder / "runtime.py")
    assert module_spec is not None and module_spec.loader is not None
    runtime = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(runtime)
    classifier = runtime.Classifier(folder, threads=spec["threads"], warm=False)

    def answer(texts: Sequence[Any], batch_size: int) -> np.ndarray:
        classifier.batch_size = batch_size
        return classifier.logits(texts)

    return classifier.infer, answer, list(classifier.inputs), (folder / "model.onnx").stat().st_size / 1e6


def timed(run: Callable[[], Any], spec: dict[str, Any]) -> dict[str, float]:
    """Median and 95th percentile in ms, after warm-ups; at least five runs, then until `min_runs` or `min_seconds`."""
    for _ in range(spec["warmup"]):
        run()
    seconds: list[float] = []
    while len(seconds) < spec["min_runs"] and (len(seconds) < 5 or sum(seconds) < spec["min_seconds"]):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"p50": float(np.median(seconds)) * 1e3, "p95": float(np.percentile(seconds, 95)) * 1e3}


def peak_mb() -> float:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage also counts what the parent was before this program took its place
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    main()
