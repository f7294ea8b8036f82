"""How long raw text takes to a label: tokenizer or vectorizer included, all models in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ._memory import freed_memory_kept
from .measure import Latencies

_LEAST_RUNS = 5  # a median of fewer runs says nothing, however slow the model


def text_latency(
    models: Mapping[str, Callable[[list[Any]], Any]],
    texts: Sequence[Any],
    batches: Sequence[int] = (1, 32),
    *,
    warmup: int = 3,
    min_runs: int = 50,
    min_seconds: float = 10.0,
    disable_tqdm: bool = False,
) -> Latencies:
    """Times functions of texts, such as `Student.predict_proba`, in milliseconds per call.

    Every model gets the same texts in every turn, and other texts in the next one.

    Args:
        models: the baseline and the candidates.
        texts: strings, or pairs; taken in their order, again from the start when they run out.
        batches: texts per call.
        warmup: untimed turns.
        min_runs: timed turns; fewer (but at least 5) when `min_seconds` are over before.
        min_seconds: timed seconds for each batch size, on the mean over the models.
        disable_tqdm: no progress line.

    Returns:
        {name: {"32xtext": {"p50": median, "p95": 95th percentile}}}.

    Raises:
        ValueError: fewer texts than the largest batch, or no models.
    """
    if not models or len(texts) < max(batches):
        raise ValueError(
            f"`texts` must be at least {max(batches)}, the largest batch, and `models` at least 1, got {len(texts)} and "
            f"{len(models)}. To resolve, pass more, or smaller `batches`."
        )
    names, found = list(models), {name: {} for name in models}  # type: ignore[var-annotated]
    for size in batches:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        spent, turn = 0.0, -warmup
        title = f"latency {size}xtext"
        progress = tqdm(total=warmup + min_runs, desc=title, unit="run", leave=False, disable=disable_tqdm)
        with freed_memory_kept(), progress as bar:
            while turn < min_runs and (turn < _LEAST_RUNS or spent < min_seconds * len(names)):
                start = (turn + warmup) * size
                batch = [texts[(start + i) % len(texts)] for i in range(size)]
                first = turn % len(names)  # nobody always runs in the caches that the same neighbour left
                for name in names[first:] + names[:first]:
                    begin = time.perf_counter()
                    models[name](batch)
                    elapsed = time.perf_counter() - begin
                    if turn >= 0:
                        seconds[name].append(elapsed)
                        spent += elapsed
                turn += 1
                bar.update()
        for name, values in seconds.items():
            p50, p95 = (float(np.percentile(values, q)) * 1e3 for q in (50, 95))
            found[name][f"{size}xtext"] = {"p50": p50, "p95": p95}
    return found
