"""What does not change during a run: teacher, tokenizer, data, seed, training arguments. Stages read it, none writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ._rows import at_most
from .measure import max_positions
from .surgery import structure_of
from .tasks import Task
from .teacher import DistillCollator, cached_logits, predict_logits
from .trainer import uses_bf16

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TaskData:
    """A task and its tokenised splits (`input_ids`, `attention_mask`, `labels`, ...).

    Attributes:
        texts: the same splits before they were tokenised, from which another tokenizer makes its own ids; None where nobody needs to.
        max_length: most tokens per row.
    """

    task: Task
    train: Dataset
    validation: Dataset
    texts: Mapping[str, Dataset] | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Context:
    """Read-only surroundings of the stages of one run.

    Attributes:
        tokenizer: of the checkpoint; the models of a run share it until a stage prunes the vocabulary.
        data: the target task.
        other: intermediate tasks by name, for stages with `task: NAME`.
        pool: tokenised text without labels that `Distill` soft-labels, or None.
        pool_texts: the same rows before they were tokenised.
        teacher: the frozen teacher of the target task; None before it exists.
        args: `TrainingArguments` fields that the user set for every training stage.
        seed: of every random choice.
        cache_dir: teacher logits and other reusable intermediate results.
        states_dir: what the teacher answers to several stages or runs, its hidden states above all; None: each stage makes its own and
            deletes them.
        results: folders of the stages that are done, by their folder name such as "01-finetune".
        compute_metrics: replaces the task's own metrics; EvalPrediction (also a pair: logits, labels) -> {name: value}, the headline first.
    """

    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    cache_dir: Path
    states_dir: Path | None = None
    other: Mapping[str, TaskData] = field(default_factory=dict)
    pool: Dataset | None = None
    pool_texts: Dataset | None = None
    teacher: PreTrainedModel | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42
    results: Mapping[str, Path] = field(default_factory=dict)
    compute_metrics: Any = None

    @property
    def collator(self) -> DistillCollator:
        return DistillCollator(self.tokenizer)

    @property
    def bf16(self) -> bool:
        """Whether the run computes under bf16 autocast, in its training and wherever else it need not be exact."""
        return uses_bf16(self.args)

    @property
    def disable_tqdm(self) -> bool:
        return bool(self.args.get("disable_tqdm", False))

    def data_for(self, task: str | None) -> TaskData:
        """The target task's data, or an intermediate task's by name."""
        return self.data if task is None or task == self.data.task.name else self.other[task]

    def evaluate(self, model: PreTrainedModel, task: str | None = None, limit: int | None = None) -> dict[str, float]:
        """Metrics on the validation split (a fixed sample of `limit` rows), the headline first.

        In fp32, so that a figure does not depend on the hardware. The teacher's answers are kept: every report holds its metric.
        """
        data = self.data_for(task)
        rows = at_most(data.validation, limit, "limit")
        labels = np.asarray(rows["labels"][:])
        if model is self.teacher:
            place = self.states_dir or self.cache_dir
            logits = cached_logits(model, rows, self.collator, place, disable_tqdm=self.disable_tqdm, alone=True)
        else:
            logits = predict_logits(model, rows, self.collator, disable_tqdm=self.disable_tqdm)
        if self.compute_metrics is not None and data is self.data:
            return self._own_metrics(logits, labels)
        metrics = data.task.compute(logits, labels)
        return {data.task.headline: metrics[data.task.headline], **metrics}

    def check_fits(self, model: PreTrainedModel, what: str) -> None:
        """ValueError where the tokenised rows hold ids or lengths that a model has no embeddings for.

        Torch would say "index out of range" in the middle of the run, or, for ids of another tokenizer, nothing.
        """
        vocabulary, positions = structure_of(model).vocab_size, max_positions(model)
        data = [self.data, *self.other.values()]
        for rows in [*(d.train for d in data), *(d.validation for d in data), *([self.pool] if self.pool else [])]:
            ids = rows.with_format("arrow")[:].column("input_ids")
            highest, longest = pc.max(pc.list_flatten(ids)).as_py(), pc.max(pc.list_value_length(ids)).as_py()
            if highest >= vocabulary:
                raise ValueError(
                    f"the tokenizer must be the one that the {what} was trained with: it gives ids up to {highest}, and the {what} has "
                    f"{vocabulary} embeddings. To resolve, pass its own `tokenizer` (flag --tokenizer)"
                    f"{', or a teacher that shares the tokenizer' if what.startswith('teacher') else ''}."
                )
            if -(-longest // 8) * 8 > positions:  # batches are padded to a multiple of 8
                raise ValueError(
                    f"`max_length` must not exceed the {positions} positions of the {what}, and there are rows of {longest} tokens. "
                    f"To resolve, set it to {positions // 8 * 8} in the recipe (flag --max-length)."
                )

    def check_metrics(self) -> None:
        """ValueError where `compute_metrics` cannot digest what it will get, before hours of training have shown it."""
        if self.compute_metrics is None:
            return
        rows = self.data.validation.select(range(min(64, len(self.data.validation))))
        logits = np.random.default_rng(0).standard_normal((len(rows), self.data.task.num_labels), dtype=np.float32)
        try:
            found = self._own_metrics(logits, np.asarray(rows["labels"][:]))
        except Exception as error:
            raise ValueError(
                f"`compute_metrics` must take an EvalPrediction of logits {logits.shape} and labels, and failed: "
                f"{type(error).__name__}: {error}. To resolve, correct it."
            ) from error
        if not found:
            raise ValueError("`compute_metrics` must give {name: number}, got nothing. To resolve, correct it.")

    def _own_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {k: float(v) for k, v in self.compute_metrics(EvalPrediction(logits, labels)).items()}


def on_device(model: Model) -> Model:
    """The model, moved to the device of the run."""
    nn.Module.to(model, device_of_run())
    return model


def device_of_run() -> torch.device:
    """Where training and measuring take place."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
