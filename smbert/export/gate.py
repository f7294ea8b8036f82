"""The quality gate of an export: the artefact's metric on validation rows against torch's, both from raw text to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import in_fp32
from ..heads import check_labels
from ..runtime import Classifier
from ..tasks import Task, tokenize
from ..teacher import DistillCollator, predict_logits


@dataclass(frozen=True)
class Gate:
    """What an artefact has to reach.

    Attributes:
        task: names the columns and the metric.
        rows: labelled validation rows of the task, checked (`smbert.tasks.prepare`).
        max_drop: most points (hundredths of the headline metric) that the artefact may lose against torch in fp32; None measures only.
        fallback: try safer settings where one loses too much; else refuse.
    """

    task: Task
    rows: Dataset
    max_drop: float | None = None
    fallback: bool = True

    def __post_init__(self) -> None:
        drop = self.max_drop
        if drop is not None and (
            isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < math.inf
        ):
            raise ValueError(f"`max_drop` must be a number of points from 0, got {drop!r}. To resolve, try 0.5.")
        if len(self.rows) == 0:
            raise ValueError("`rows` must hold at least one validation row, got none. To resolve, pass labelled rows.")

    @property
    def texts(self) -> list[Any]:
        """The rows as a `Classifier` reads them."""
        columns = [list(self.rows[column]) for column in self.task.text_columns]
        return list(zip(*columns)) if len(columns) == 2 else columns[0]


@dataclass(frozen=True)
class Reference:
    """What torch answers to the rows of a gate.

    Attributes:
        gate: the gate.
        logits: (rows, labels) float32.
    """

    gate: Gate
    logits: np.ndarray

    @classmethod
    def of(cls, gate: Gate, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Reference:
        """Asks the model, with the tokenizer of transformers.

        Raises:
            ValueError: the model's labels are not the task's.
        """
        check_labels(model, gate.task)
        rows = tokenize(gate.rows, gate.task, tokenizer, max_length)
        assert isinstance(rows, Dataset)
        return cls(gate, predict_logits(in_fp32(model), rows, DistillCollator(tokenizer), disable_tqdm=True))

    def metric(self, logits: np.ndarray) -> float:
        """The headline metric of some logits."""
        task = self.gate.task
        return task.compute(logits, np.asarray(self.gate.rows[task.label_column][:]))[task.headline]

    def judge(self, folder: Path) -> dict[str, Any]:
        """Runs an artefact on the rows: its metric, the points it loses, whether it passes, and how far its logits are from torch's.

        Answers that are not finite never pass, and count as a metric of 0.
        """
        logits = Classifier(folder, verify=False, warm=False).logits(self.gate.texts)
        before = self.metric(self.logits)
        if not np.isfinite(logits).all():  # half precision overflows where fp32 does not
            return {"metric": 0.0, "drop_points": round(100 * before, 4), "passed": False, "finite": False}
        after = self.metric(logits)
        drop = 100 * (before - after)
        limit = self.gate.max_drop
        return {
            "metric": round(after, 6),
            "drop_points": round(drop, 4),
            # A metric of fp32 sums: equal answers must not fail for the last digit.
            "passed": limit is None or drop <= limit + 1e-9,
            "largest_logit_difference": float(np.abs(logits - self.logits).max()),
        }

    def summary(self, attempts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the manifest says of the gate."""
        task = self.gate.task
        return {
            "task": task.name,
            "metric_name": task.headline,
            "rows": len(self.gate.rows),
            "torch_fp32": round(self.metric(self.logits), 6),
            "max_drop": self.gate.max_drop,
            "attempts": list(attempts),
        }
