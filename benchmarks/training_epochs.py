"""One epoch of each stage, timed; `training.py` sets them against each other.

Every epoch runs over the same rows in the Trainer's own loop, with its collator, autocast, clipping and optimizer, and with the back
end of attention that the stages train with. The watch runs from the first step to the end of the last.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from smbert.checkpoints import load_model
from smbert.context import Context, device_of_run, on_device
from smbert.heads import with_head
from smbert.inputs import tokenised
from smbert.measure import supports_bf16
from smbert.modeling import encoder_layers
from smbert.objectives import GoldObjective, LogitsObjective, Objective, build_objectives
from smbert.stages import Distill, WidthPruning
from smbert.surgery import keep_layers, structure_of
from smbert.tasks import load_task
from smbert.teacher import cached_logits, freeze, with_teacher_logits
from smbert.trainer import (
    FORWARD_INPUTS,
    Distillation,
    ReplacingSchedule,
    SmbertTrainer,
    Theseus,
    contiguous_modules,
    dropout_set_to,
    training_arguments,
    training_attention,
)

GOLD = (GoldObjective(),)


class Stopwatch(TrainerCallback):
    """Seconds of a training without the Trainer's set-up."""

    seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = -now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += now()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Epochs:
    """Models and rows; each method without a leading underscore takes the seed of the round and returns seconds."""

    def __init__(
        self,
        model: str,
        task_name: str,
        data_dir: str | None,
        workdir: Path,
        samples: int,
        batch_size: int,
        max_length: int,
        freeze_embeddings: bool,
    ):
        self._workdir, self._batch_size, self._max_length = workdir, batch_size, max_length
        self._freeze_embeddings, self._device = freeze_embeddings, device_of_run()
        tokenizer = AutoTokenizer.from_pretrained(model)
        task, data = load_task(task_name, data_dir)
        data["train"] = data["train"].shuffle(seed=0).select(range(min(samples, len(data["train"]))))
        data["validation"] = data["validation"].select(range(1))
        splits = tokenised(task, data, tokenizer, max_length)
        self._context = Context(tokenizer, splits, cache_dir=workdir, args={"disable_tqdm": True})
        self._rows, self.samples = splits.train, len(splits.train)
        set_seed(0)
        self._teacher = freeze(on_device(with_head(load_model(model), task)))
        depth = len(encoder_layers(self._teacher))
        self._student = on_device(keep_layers(self._teacher, range(0, depth, 4)))
        self._runs = contiguous_modules(depth, max(1, depth // 2))
        self._successor = on_device(keep_layers(self._teacher, range(len(self._runs))))
        begin, collator = now(), self._context.collator
        logits = cached_logits(self._teacher, self._rows, collator, workdir, bf16=supports_bf16(), disable_tqdm=True)
        self.cache_seconds = now() - begin
        self._taught_rows = with_teacher_logits(self._rows, logits)

    def plain(self, seed: int) -> float:
        return self._epoch(self._distillation(GOLD), seed)

    def padded(self, seed: int) -> float:
        """Every batch as long as the longest row may be, in random order."""
        return self._epoch(self._distillation(GOLD), seed, collator=self._pad, train_sampling_strategy="random")

    def cached(self, seed: int) -> float:
        return self._epoch(self._distillation([LogitsObjective(), *GOLD]), seed, self._taught_rows)

    def live(self, seed: int) -> float:
        return self._epoch(self._distillation(Distill().objectives), seed)

    def teacher(self, seed: int) -> float:
        """The teacher's forward passes on the batches of an epoch."""
        batches = self._trainer(self._distillation(GOLD), seed).get_train_dataloader()
        begin = now()
        for batch in batches:
            with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=supports_bf16()):
                self._teacher(**{k: batch[k] for k in FORWARD_INPUTS if k in batch})
        return now() - begin

    def theseus(self, seed: int) -> float:
        """The same draws in every step: those that the seed leads to at probability 1/2."""
        objective = self._distillation(GOLD, self._successor).objective
        holder = Theseus(self._successor, self._teacher, objective, ReplacingSchedule(0.5, 0.0))
        fixed, _ = self._draws(seed)

        def draw_the_same(*_: Any) -> None:
            torch.manual_seed(fixed)

        holder.register_forward_pre_hook(draw_the_same)
        return self._epoch(holder, seed)

    def theseus_layers(self, seed: int) -> float:
        """A plain model of as many layers as Theseus ran, of which the same ones learn and the others know no dropout."""
        _, replaced = self._draws(seed)
        chosen = [(i, learns) for run, learns in zip(self._runs, replaced) for i in (run[:1] if learns else run)]
        holder = self._distillation(GOLD, on_device(keep_layers(self._teacher, [i for i, _ in chosen])))
        holder.requires_grad_(False)
        with ExitStack() as stack:
            for layer, (_, learns) in zip(encoder_layers(holder.student), chosen):
                layer.requires_grad_(learns)
                stack.enter_context(dropout_set_to(layer, None if learns else 0.0))
            return self._epoch(holder, seed)

    def pruning(self, seed: int) -> float:
        """The whole stage with its defaults: all rows scored once, units chosen, model cut."""
        stage, student = WidthPruning(samples=len(self._rows)), copy.deepcopy(self._student)
        context = replace(self._context, seed=seed)
        begin = now()
        stage.run(student, context, self._workdir)
        return now() - begin

    def _distillation(self, objectives: Sequence[Objective], student: PreTrainedModel | None = None) -> Distillation:
        student = student or self._student
        structures, kind = (structure_of(student), structure_of(self._teacher)), self._context.data.task.kind
        built = build_objectives(objectives, *structures, kind).to(self._device)
        return Distillation(student, built, self._teacher if built.needs.live_teacher else None)

    def _trainer(
        self, holder: Any, seed: int, rows: Dataset | None = None, collator: Any = None, **changes: Any
    ) -> SmbertTrainer:
        fixed = {"num_train_epochs": 1, "learning_rate": 1e-5, "seed": seed, "save_strategy": "no"}
        options = {**self._context.args, "per_device_train_batch_size": self._batch_size, **changes}
        return SmbertTrainer(
            holder,
            training_arguments(self._workdir, options, **fixed),
            train_dataset=rows or self._rows,
            data_collator=collator or self._context.collator,
        )

    def _epoch(self, holder: Any, seed: int, rows: Dataset | None = None, **changes: Any) -> float:
        trainer, watch = self._trainer(holder, seed, rows, **changes), Stopwatch()
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        for module in holder.student.modules():
            if self._freeze_embeddings and isinstance(module, nn.Embedding):
                module.requires_grad_(False)
        with training_attention(*holder.differentiated):
            trainer.train()
        return watch.seconds

    def _draws(self, seed: int) -> tuple[int, list[bool]]:
        """A seed that draws at least one successor, and what it draws."""
        torch.manual_seed(seed)
        replaced = (torch.rand(len(self._runs)) < 0.5).tolist()
        return (seed, replaced) if any(replaced) else self._draws(seed + 1000)

    def _pad(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch, filler = self._context.collator(features), {"input_ids": self._context.tokenizer.pad_token_id}
        missing = self._max_length - batch["input_ids"].shape[1]
        return {
            k: F.pad(v, (0, missing), value=filler.get(k, 0)) if k in FORWARD_INPUTS else v for k, v in batch.items()
        }
