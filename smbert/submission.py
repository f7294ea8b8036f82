"""Files for the GLUE test server (gluebenchmark.com). Public through `smbert.tasks`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from smbert.tasks import Task

# Official file name and number of test rows; the server refuses any other.
_SUBMISSIONS = {
    ("cola", "test"): ("CoLA.tsv", 1063),
    ("sst2", "test"): ("SST-2.tsv", 1821),
    ("mrpc", "test"): ("MRPC.tsv", 1725),
    ("qqp", "test"): ("QQP.tsv", 390965),
    ("stsb", "test"): ("STS-B.tsv", 1379),
    ("mnli", "test"): ("MNLI-m.tsv", 9796),
    ("mnli", "test_mismatched"): ("MNLI-mm.tsv", 9847),
    ("qnli", "test"): ("QNLI.tsv", 5463),
    ("rte", "test"): ("RTE.tsv", 3000),
    ("wnli", "test"): ("WNLI.tsv", 146),
}


def write_submission(task: Task, predictions: Any, path: str | Path, split: str = "test") -> Path:
    """Write the GLUE server's file of one test set: lines of index and prediction; label names for MNLI, QNLI and RTE.

    Args:
        task: a GLUE task.
        predictions: logits (rows, num_labels) in the order of the test split; STS-B also (rows,), clipped to 0 ... 5.
        path: folder (the official file name is added) or a file that ends in .tsv.
        split: "test", for MNLI "test_mismatched" too.

    Returns:
        The file, written whole or not at all.

    Raises:
        ValueError: no GLUE test set, or not one finite prediction for each of its rows.
    """
    if (task.name, split) not in _SUBMISSIONS:
        known = ", ".join(f"{t} {s}" for t, s in _SUBMISSIONS)
        raise ValueError(f"no GLUE test set {task.name!r} {split!r}. To resolve, choose one of: {known}.")
    name, rows = _SUBMISSIONS[task.name, split]
    logits = np.asarray(predictions, dtype=np.float64)
    if (
        logits.shape not in {(rows, task.num_labels), (rows,) if task.kind == "regression" else None}
        or not np.isfinite(logits).all()
    ):
        raise ValueError(
            f"`predictions` must be finite and of shape ({rows}, {task.num_labels}) for the GLUE {split} split of "
            f"{task.name!r}, got shape "
            f"{logits.shape}. To resolve, predict the complete official test split."
        )
    if task.kind == "regression":
        answers = [f"{score:.3f}" for score in np.clip(logits.reshape(rows), 0.0, 5.0)]
    else:
        named = task.name in ("mnli", "qnli", "rte")
        answers = [task.label_names[i] if named else str(i) for i in logits.argmax(axis=1)]
    file = Path(path) if Path(path).suffix == ".tsv" else Path(path) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text("".join(["index\tprediction\n", *(f"{i}\t{a}\n" for i, a in enumerate(answers))]), encoding="utf-8")
    os.replace(part, file)
    return file
