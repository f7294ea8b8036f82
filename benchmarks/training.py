"""Speed of every stage against plain fine-tuning of the same student, in one run.

    python benchmarks/training.py --model DIR_OR_ID --task mrpc --data-dir DIR --rounds 5 --output DIR

WHY ratios: samples/s belong to one machine on one day; what a stage costs beyond plain fine-tuning belongs to the code.

 (a) distillation from cached teacher logits      / plain fine-tuning of the same student          at most 1.10
 (b) live logits, hidden and attention objectives / one student step and one teacher forward       at most 1.15
 (c) a Theseus step, draws fixed by a seed        / a plain step of the layers that it really runs  at most 1.10
 (d) a pruning stage, scoring all samples once    / one epoch over those samples                   at most 1.00
 (e) dynamic padding, grouped by length           / padding to the maximum length                  at most 1.00

Every figure is one epoch over the same rows by the Trainer's own loop (collator, autocast, back end of attention, clipping,
optimizer), timed from its first step to its last. All of them take turns in each round, the first of which is not counted, and the
ratios are medians over the rounds of ratios within a round. The student has a quarter of the model's layers, Theseus halves them.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback, set_seed

from smbert.checkpoints import load_model
from smbert.cli import guarded
from smbert.context import Context, device_of_run
from smbert.heads import with_head
from smbert.inputs import tokenised
from smbert.measure import environment, supports_bf16
from smbert.modeling import encoder_layers
from smbert.objectives import GoldObjective, LogitsObjective, Objective, build_objectives
from smbert.runner import write_json
from smbert.stages import Distill, WidthPruning
from smbert.surgery import keep_layers, structure_of
from smbert.tasks import load_task
from smbert.teacher import cached_logits, freeze, with_teacher_logits
from smbert.trainer import (
    FORWARD_INPUTS, Distillation, ReplacingSchedule, SmbertTrainer, Theseus, contiguous_modules, training_arguments, training_attention,
)  # fmt: skip

PLAIN, KD, LIVE, FORWARD = "plain fine-tuning", "cached logits", "live objectives", "teacher forward"
THESEUS, RAN, SCORE, PADDED = "Theseus", "the layers that Theseus ran", "pruning stage", "padded to the maximum length"
# letter, what, what it is held against (summed), bound
COMPARISONS = [
    ("a", KD, [PLAIN], 1.10),
    ("b", LIVE, [PLAIN, FORWARD], 1.15),
    ("c", THESEUS, [RAN], 1.10),
    ("d", SCORE, [PLAIN], 1.00),
    ("e", PLAIN, [PADDED], 1.00),
]


class Stopwatch(TrainerCallback):
    """Seconds from the first step to the end of the last, without the Trainer's own set-up."""

    seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = -now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += now()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """The models, the rows, and what is timed: a method takes the seed of the round and returns seconds."""

    def __init__(self, args: argparse.Namespace, workdir: Path):
        self.args, self.workdir, self.device = args, workdir, device_of_run()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        task, data = load_task(args.task, args.data_dir)
        data["train"] = data["train"].shuffle(seed=0).select(range(min(args.samples, len(data["train"]))))
        splits = tokenised(task, data, tokenizer, args.max_length)
        quiet = {"disable_tqdm": True, "save_strategy": "no"}
        self.context = Context(tokenizer, splits, cache_dir=workdir, args=quiet)
        self.rows, self.gold = splits.train, [GoldObjective()]
        set_seed(0)
        self.teacher = freeze(with_head(load_model(args.model), task).to(self.device))
        depth = len(encoder_layers(self.teacher))
        self.student = self.cut(range(0, depth, 4))
        self.runs = contiguous_modules(depth, max(1, depth // 2))
        self.successor = self.cut(range(len(self.runs)))
        begin = now()
        logits = cached_logits(
            self.teacher, self.rows, self.context.collator, workdir, bf16=supports_bf16(), disable_tqdm=True
        )
        self.cache_seconds = now() - begin
        self.taught = with_teacher_logits(self.rows, logits)

    def cut(self, layers: Sequence[int]) -> PreTrainedModel:
        model = keep_layers(self.teacher, layers).requires_grad_(True).to(self.device)
        if self.args.freeze_embeddings:
            for table in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
                table.requires_grad_(False)
        return model

    def trainer(self, holder: Any, rows: Dataset, seed: int, **changes: Any) -> SmbertTrainer:
        options = {**self.context.args, "per_device_train_batch_size": self.args.batch_size, "num_train_epochs": 1}
        collator = changes.pop("collator", self.context.collator)
        arguments = training_arguments(self.workdir, options, learning_rate=1e-5, seed=seed, **changes)
        return SmbertTrainer(holder, arguments, train_dataset=rows, data_collator=collator)

    def epoch(self, holder: Any, rows: Dataset, seed: int, **changes: Any) -> float:
        trainer, watch = self.trainer(holder, rows, seed, **changes), Stopwatch()
        trainer.add_callback(watch)
        with training_attention(holder.student):
            trainer.train()
        return watch.seconds

    def holder(self, objectives: Sequence[Objective], student: PreTrainedModel | None = None) -> Distillation:
        student = student or self.student
        built = build_objectives(
            objectives, structure_of(student), structure_of(self.teacher), self.context.data.task.kind
        )
        return Distillation(student, built.to(self.device), self.teacher if built.needs.live_teacher else None)

    def plain(self, seed: int) -> float:
        return self.epoch(self.holder(self.gold), self.rows, seed)

    def padded(self, seed: int) -> float:
        changes = {"train_sampling_strategy": "random", "collator": self.pad_fully}
        return self.epoch(self.holder(self.gold), self.rows, seed, **changes)

    def cached(self, seed: int) -> float:
        return self.epoch(self.holder([LogitsObjective(), *self.gold]), self.taught, seed)

    def live(self, seed: int) -> float:
        return self.epoch(self.holder(Distill().objectives), self.rows, seed)

    def forwards(self, seed: int) -> float:
        set_seed(seed)
        batches = self.trainer(self.holder(self.gold), self.rows, seed).get_train_dataloader()
        begin = now()
        for batch in batches:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=supports_bf16()):
                self.teacher(**{k: batch[k] for k in FORWARD_INPUTS if k in batch})
        return now() - begin

    def draws(self, seed: int) -> tuple[int, list[bool]]:
        """A seed that draws at least one successor at probability 1/2, and what it draws."""
        torch.manual_seed(seed)
        replaced = (torch.rand(len(self.runs)) < 0.5).tolist()
        return (seed, replaced) if any(replaced) else self.draws(seed + 1000)

    def theseus(self, seed: int) -> float:
        objective = self.holder(self.gold, self.successor).objective
        holder = Theseus(self.successor, self.teacher, objective, ReplacingSchedule(0.5, 0.0))
        fixed, _ = self.draws(seed)
        holder.register_forward_pre_hook(lambda *_: torch.manual_seed(fixed) and None)
        return self.epoch(holder, self.rows, seed)

    def theseus_layers(self, seed: int) -> float:
        """A plain model of as many layers as Theseus ran, of which the same ones learn and the others know no dropout."""
        chosen = [(i, r) for run, r in zip(self.runs, self.draws(seed)[1]) for i in (run[:1] if r else run)]
        model = self.cut([i for i, _ in chosen]).requires_grad_(False)
        for layer, (_, learns) in zip(encoder_layers(model), chosen):
            layer.requires_grad_(learns)
            for dropout in (m for m in layer.modules() if isinstance(m, torch.nn.Dropout) and not learns):
                dropout.p = 0.0
        return self.epoch(self.holder(self.gold, model), self.rows, seed)

    def pruning(self, seed: int) -> float:
        stage, student = WidthPruning(samples=len(self.rows)), copy.deepcopy(self.student)
        begin = now()
        stage.run(student, self.context, self.workdir)
        return now() - begin

    def pad_fully(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch, ids = self.context.collator(features), {"input_ids": self.context.tokenizer.pad_token_id}
        missing = self.args.max_length - batch["input_ids"].shape[1]
        return {k: F.pad(v, (0, missing), value=ids.get(k, 0)) if k in FORWARD_INPUTS else v for k, v in batch.items()}


def peak_memory_mb() -> float:
    """Most memory since the last call: of the GPU, or of the whole process (where the system cannot reset it: since its start)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3
        Path("/proc/self/clear_refs").write_text("5")
    return peak


