"""Tiny checkpoints, tokenizer, data and recipes for tests of whole runs; importable in child processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from smbert.context import Context
from smbert.inputs import tokenised
from smbert.recipe import Recipe
from smbert.retraining_free.cost_table import CostTable, counted_costs
from smbert.stages import DepthReduction, Distill, Finetune, WidthPruning, retraining_free
from smbert.surgery import structure_of
from smbert.tasks import Task, prepare
from smbert.trainer import SmbertTrainer

# No test here says anything about speed, and a progress bar costs more than a step of a tiny model.
QUIET = {"disable_tqdm": True, "bf16": False}
WORDS = [f"word{i}" for i in range(40)]
GOOD, BAD = WORDS[:8], WORDS[8:16]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words to 46 ids; answers as BERT's: [CLS] a [SEP] b [SEP] and token types."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def texts(n: int, seed: int = 0, labels: bool = True) -> Dataset:
    """Rows of `text` and `label`: 1 where the text has more words of GOOD than of BAD."""
    draw = random.Random(seed)
    rows: dict[str, list[Any]] = {"text": [], "label": []}
    for i in range(n):
        words = draw.choices(GOOD if i % 2 else BAD, k=3) + draw.choices(WORDS[16:], k=draw.randint(1, 8))
        draw.shuffle(words)
        rows["text"].append(" ".join(words))
        rows["label"].append(i % 2)
    return Dataset.from_dict(rows if labels else {"text": rows["text"]})


def splits(n: int = 32, seed: int = 0) -> DatasetDict:
    return DatasetDict({"train": texts(n, seed), "validation": texts(16, seed + 1)})


def checkpoint(folder: Path, model: PreTrainedModel | None = None, **kwargs: Any) -> Path:
    """A folder with a tiny model (`tiny_models.tiny`) and the tokenizer."""
    sizes = {"max_position_embeddings": 132, **kwargs}
    model = model if model is not None else tiny(sizes.pop("family", "bert"), **sizes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def raw_checkpoint(folder: Path, **kwargs: Any) -> Path:
    """An encoder without a head."""
    return checkpoint(folder, head="encoder", **kwargs)


TASK = Task("up-down", ("text",), label_names=("down", "up"))


def tiny_context(folder: Path, n: int = 32, **kwargs: Any) -> Context:
    tokenizer = tiny_tokenizer()
    rows = prepare(TASK, splits(n))
    values: dict[str, Any] = {"cache_dir": folder / "cache", "args": QUIET, "seed": 1, **kwargs}
    return Context(tokenizer=tokenizer, data=tokenised(TASK, rows, tokenizer, 32), **values)


FAST: dict[str, Any] = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}


def tiny_recipe(**options: Any) -> Recipe:
    """All four kinds, two steps each: 4 -> 2 layers, 4 -> 3 heads, 64 -> 48 neurons."""
    fast = {**FAST, **options}
    return Recipe(
        name="tiny",
        max_length=32,
        teacher=Finetune(**fast),
        stages=(
            DepthReduction(layers="1/2", **fast),
            Distill(**fast),
            WidthPruning(heads=3, ffn=48, samples=8, batch_size=4),
            Finetune(**fast),
        ),
    )


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder, read without any class."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Whether two folders hold bit-equal weights under the same names."""
    one, two = state_of(a), state_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stage_folders(output_dir: Path) -> list[str]:
    """Names of what a run began or finished there; [] for a run that was refused before any work."""
    if not output_dir.is_dir():
        return []
    return sorted(p.name for p in output_dir.iterdir() if p.name.lstrip(".")[:2].isdigit() or p.name == "undistilled")


# ---------------------------------------------------------------------------------------------------------- child processes


def child(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """A started child process in which the imports are done already; it can be killed at any point."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.trainer", "smbert.runner", "run_helpers"])
    process = context.Process(target=_run_child, args=(function, args), daemon=True)
    process.start()
    return process


class _Pause(TrainerCallback):
    def __init__(self, stage: str, step: int, file: Path):
        self.stage, self.step, self.file = stage, step, file

    def on_step_end(self, args, state, control, **kwargs):
        if self.stage in args.output_dir and state.global_step == self.step:
            self.file.touch()
            signal.pause()


def pause_training(stage: str, step: int, file: Path) -> None:
    """In a child only: every training below a folder of this name stops after a step, for ever, and says so by making a file."""
    init = SmbertTrainer.__init__

    def init_with_pause(self: SmbertTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(_Pause(stage, step, file))

    SmbertTrainer.__init__ = init_with_pause  # type: ignore[method-assign]


def _run_child(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    raise SystemExit(function(*args))


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 60) -> None:
    """Until something is true; fails where the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the child process ended early with {process.exitcode}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def kill(process: BaseProcess) -> None:
    """SIGKILL, which no handler sees."""
    process.kill()
    process.join(30)
    assert process.exitcode == -9


def finish(process: BaseProcess, seconds: float = 120) -> int | None:
    process.join(seconds)
    return process.exitcode


def as_nobody(action: Callable[[], Any]) -> Any:
    """Run without the rights that root has over every folder."""
    if os.geteuid() != 0:
        return action()
    os.seteuid(65534)
    try:
        return action()
    finally:
        os.seteuid(0)


def millisecond_per_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pruning stage's own timings as on a machine on which a multiply-accumulate takes a millisecond.

    Real ones would say nothing: models of this size take as long as their overhead.
    """

    def table(model: Any, heads: Any, ffn: Any, *_: Any, **__: Any) -> CostTable:
        return replace(counted_costs(model, "macs", heads, ffn), name="latency_ms")

    def whole(models: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, float]:
        widths = {name: structure_of(model).layer_widths for name, model in models.items()}
        return {
            name: table(model, *map(set, zip((0, 0), *widths[name]))).total(widths[name])
            for name, model in models.items()
        }

    monkeypatch.setattr(retraining_free, "latency_table", table)
    monkeypatch.setattr(retraining_free, "whole_models_ms", whole)
