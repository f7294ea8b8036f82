"""What all tests share: offline, one thread, a tokenizer made in code, and a small task that a tiny model can learn."""

from __future__ import annotations

import os

# Read when the libraries are imported; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from smbert.context import Context, TaskData
from smbert.tasks import Task
from smbert.tasks import tokenize as tokenize_rows

torch.set_num_threads(1)
datasets.disable_progress_bars()

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
# Ids 4 to 99 are w4 to w99, so that the tiny models' vocabulary of 100 is used up.
WORDS = tuple(f"w{i}" for i in range(len(SPECIAL), 100))
# A row of class c holds words of its own, among words that say nothing.
TELLING = {0: WORDS[:12], 1: WORDS[12:24]}
NOISE = WORDS[24:]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, [CLS] a [SEP] b [SEP], at most 60 tokens (RoBERTa's positions begin at 2 of 64)."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=60,
        # DistilBERT and ModernBERT take no token types.
        model_input_names=["input_ids", "attention_mask"],
    )


def make_texts(n: int, seed: int = 0, labels: bool = True) -> Dataset:
    """`text` of 3 to 11 words and `label`, the two classes in equal numbers."""
    rng = random.Random(seed)
    texts, classes = [], []
    for i in range(n):
        label = i % 2
        words = rng.choices(NOISE, k=rng.randint(1, 8)) + rng.choices(TELLING[label], k=rng.randint(2, 3))
        rng.shuffle(words)
        texts.append(" ".join(words))
        classes.append(label)
    return Dataset.from_dict({"text": texts, "label": classes} if labels else {"text": texts})


@pytest.fixture(scope="session")
def tiny_task() -> Task:
    return Task(name="tiny", text_columns=("text",), label_names=("dull", "bright"), metrics=("accuracy",))


@pytest.fixture(scope="session")
def tiny_data(tiny_task: Task, tokenizer: PreTrainedTokenizerFast) -> TaskData:
    """64 training and 32 validation rows, tokenised."""
    train, validation = (tokenize_rows(make_texts(n, seed), tiny_task, tokenizer, 32) for n, seed in ((64, 0), (32, 1)))
    assert isinstance(train, Dataset) and isinstance(validation, Dataset)
    return TaskData(tiny_task, train, validation)


@pytest.fixture(scope="session")
def three_way(tokenizer: PreTrainedTokenizerFast) -> TaskData:
    """An intermediate task with another label set: class 2 has no word of its own."""
    task = Task(name="three", text_columns=("text",), label_names=("no", "yes", "perhaps"), metrics=("accuracy",))
    rng, rows = random.Random(5), make_texts(48, seed=2).to_dict()
    for i in range(0, 48, 3):
        rows["text"][i], rows["label"][i] = " ".join(rng.choices(NOISE, k=5)), 2
    tokens = tokenize_rows(Dataset.from_dict(rows), task, tokenizer, 32)
    assert isinstance(tokens, Dataset)
    return TaskData(task, tokens, tokens.select(range(24)))


@pytest.fixture(scope="session")
def pool(tiny_task: Task, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """24 tokenised rows without labels."""
    rows = tokenize_rows(make_texts(24, seed=3, labels=False), tiny_task, tokenizer, 32)
    assert isinstance(rows, Dataset)
    return rows


@pytest.fixture
def context(tokenizer: PreTrainedTokenizerFast, tiny_data: TaskData, tmp_path: Path) -> Context:
    """A run on the tiny task, in float32 and without progress bars; no teacher, no pool, no other task."""
    return Context(
        tokenizer=tokenizer,
        data=tiny_data,
        cache_dir=tmp_path / "cache",
        args={"bf16": False, "disable_tqdm": True, "logging_steps": 2},
        seed=7,
    )
