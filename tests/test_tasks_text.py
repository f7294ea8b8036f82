"""Tokenization with fingerprints that hold, and the GLUE server's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from smbert.tasks import (
    GLUE,
    Task,
    data_fingerprint,
    load_task,
    prepare,
    tokenize,
    tokenizer_fingerprint,
    write_submission,
)


def logits_of(classes: list[int], width: int) -> np.ndarray:
    return np.eye(width)[classes] - 0.5


def rows(n: int = 4, columns: tuple[str, ...] = ("sentence1", "sentence2"), labels: list | None = None) -> Dataset:
    data: dict[str, list] = {c: [f"{c} word {i}" for i in range(n)] for c in columns}
    return Dataset.from_dict({**data, "label": labels if labels is not None else [i % 2 for i in range(n)]})


def tiny_tokenizer(token_types: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "word", "sentence1", "sentence2", "text", *map(str, range(10))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", *["token_type_ids"] * token_types, "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=names,
    )


# --------------------------------------------------------------------------------------------------------- tokenization


def mrpc(n: int = 6) -> DatasetDict:
    data = prepare(GLUE["mrpc"], {"train": rows(n), "validation": rows(4), "test": rows(3, labels=[-1] * 3)})
    return data


def test_tokenize_columns_types_and_values() -> None:
    out = tokenize(mrpc(), GLUE["mrpc"], tiny_tokenizer())
    assert isinstance(out, DatasetDict)
    assert out["train"].column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert out["test"].column_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert out["train"][1] == {
        "input_ids": [2, 5, 4, 9, 3, 6, 4, 9, 3],
        "token_type_ids": [0] * 5 + [1] * 4,
        "attention_mask": [1] * 9,
        "labels": 1,
    }
    single = tokenize(mrpc()["train"], GLUE["mrpc"], tiny_tokenizer(token_types=False))
    assert single.column_names == ["input_ids", "attention_mask", "labels"]


def test_tokenize_truncates_and_does_not_pad() -> None:
    data = Dataset.from_dict({"text": ["word " * 30, "word"], "label": [0, 1]})
    task = Task("t", ("text",), label_names=("no", "yes"))
    out = tokenize(data, task, tiny_tokenizer(), max_length=8)
    assert [len(ids) for ids in out["input_ids"]] == [8, 3]
    assert out["input_ids"][0][-1] == 3  # the separator survives


def test_tokenize_label_types() -> None:
    scores = tokenize(rows(3, ("text",), [0.5, 1.0, 2.5]), Task("r", ("text",), "regression"), tiny_tokenizer())
    assert scores.features["labels"] == Value("float32") and list(scores["labels"]) == [0.5, 1.0, 2.5]
    task = Task("m", ("text",), "multi_label", ("a", "b", "c"))
    data = prepare(task, rows(3, ("text",), [[0], [2, 1], []]), required=("train",))
    hot = tokenize(data["train"], task, tiny_tokenizer())
    assert hot.features["labels"] == List(Value("float32"))
    assert list(hot["labels"]) == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("max_length", [0, 4, 129, 8.0])
def test_tokenize_refuses_lengths(max_length: int) -> None:
    with pytest.raises(ValueError, match=r"`max_length` must be an integer from 5 to 128.*To resolve"):
        tokenize(mrpc(), GLUE["mrpc"], tiny_tokenizer(), max_length)


def test_fingerprints_depend_on_content_only() -> None:
    tokenizer, task = tiny_tokenizer(), GLUE["mrpc"]
    data = mrpc()["train"]
    fresh = tokenizer_fingerprint(tokenizer)
    first = tokenize(data, task, tokenizer, 16)._fingerprint
    assert tokenizer_fingerprint(tokenizer) == fresh  # the call has set truncation inside the tokenizer
    assert tokenize(mrpc()["train"], task, tiny_tokenizer(), 16)._fingerprint == first
    assert tokenize(data.select(range(6)), task, tokenizer, 16)._fingerprint == first
    assert tokenize(data, task, tokenizer, 17)._fingerprint != first
    assert tokenize(data.select([1, 0, 2, 3, 4, 5]), task, tokenizer, 16)._fingerprint != first
    assert tokenize(data.remove_columns("label"), task, tokenizer, 16)._fingerprint != first
    other = tiny_tokenizer()
    other.add_tokens(["another"])
    assert tokenize(data, task, other, 16)._fingerprint != first
    assert data_fingerprint(data, ["sentence1"]) != data_fingerprint(data, ["sentence2"])


def test_fingerprints_are_the_same_in_another_process() -> None:
    here = (
        tokenizer_fingerprint(tiny_tokenizer()),
        tokenize(mrpc()["train"], GLUE["mrpc"], tiny_tokenizer())._fingerprint,
    )
    code = (
        "import test_tasks_text as t\n"
        "print(t.tokenizer_fingerprint(t.tiny_tokenizer()))\n"
        "print(t.tokenize(t.mrpc()['train'], t.GLUE['mrpc'], t.tiny_tokenizer())._fingerprint)\n"
    )
    folder = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split()) == here


def test_second_tokenization_comes_from_the_cache(tmp_path: Path) -> None:
    (tmp_path / "mrpc").mkdir()
    for split in ("train", "validation"):
        rows(2500).to_parquet(str(tmp_path / "mrpc" / f"{split}.parquet"))
    calls = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, *args, **options):  # type: ignore[no-untyped-def]
            calls.append(len(args[0]) if isinstance(args[0], list) else 1)
            return super().__call__(*args, **options)

    _, data = load_task("mrpc", tmp_path)
    source = tiny_tokenizer()
    tokenizer = Counting(tokenizer_object=source.backend_tokenizer, model_max_length=128, pad_token="[PAD]")
    first = tokenize(data["train"], GLUE["mrpc"], tokenizer)
    assert max(calls) > 1
    calls.clear()
    again = tokenize(data["train"], GLUE["mrpc"], tokenizer)
    assert max(calls, default=1) == 1 and again.to_dict() == first.to_dict()


# ---------------------------------------------------------------------------------------------------------- submissions


def test_submission_with_label_names(tmp_path: Path) -> None:
    classes = [0, 1] * 1500
    file = write_submission(GLUE["rte"], logits_of(classes, 2), tmp_path / "new")
    lines = file.read_text().splitlines()
    assert file == tmp_path / "new" / "RTE.tsv" and len(lines) == 3001
    assert (
        lines[:3] == ["index\tprediction", "0\tentailment", "1\tnot_entailment"] and lines[-1] == "2999\tnot_entailment"
    )
    assert [f.name for f in file.parent.iterdir()] == ["RTE.tsv"]


def test_submission_with_numbers_and_own_file_name(tmp_path: Path) -> None:
    file = write_submission(GLUE["cola"], logits_of([1] * 1063, 2), tmp_path / "mine.tsv")
    assert file.name == "mine.tsv" and file.read_text().splitlines()[1] == "0\t1"


@pytest.mark.parametrize("shape", [(1379,), (1379, 1)])
def test_submission_clips_scores(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scores = np.full(shape, 2.5)
    scores.reshape(-1)[:2] = [-0.3, 5.7]
    lines = write_submission(GLUE["stsb"], scores, tmp_path).read_text().splitlines()
    assert lines[1:4] == ["0\t0.000", "1\t5.000", "2\t2.500"]


def test_submission_of_both_mnli_sets(tmp_path: Path) -> None:
    matched = write_submission(GLUE["mnli"], np.eye(3)[np.arange(9796) % 3], tmp_path)
    other = write_submission(GLUE["mnli"], np.zeros((9847, 3)), tmp_path, split="test_mismatched")
    assert (matched.name, other.name) == ("MNLI-m.tsv", "MNLI-mm.tsv")
    assert [line.split("\t")[1] for line in matched.read_text().splitlines()[1:4]] == list(GLUE["mnli"].label_names)


@pytest.mark.parametrize(
    ("task", "predictions", "split", "message"),
    [
        (GLUE["rte"], np.zeros((10, 2)), "test", r"shape \(3000, 2\).*got shape \(10, 2\)"),
        (GLUE["rte"], np.zeros(3000), "test", r"shape \(3000, 2\)"),
        (GLUE["rte"], np.full((3000, 2), np.nan), "test", "must be finite"),
        (GLUE["rte"], np.zeros((3000, 2)), "test_mismatched", "no GLUE test set 'rte' 'test_mismatched'"),
        (Task("mine", ("text",), label_names=("a", "b")), np.zeros((3, 2)), "test", "no GLUE test set 'mine'"),
    ],
)
def test_submission_refuses(tmp_path: Path, task: Task, predictions: np.ndarray, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_submission(task, predictions, tmp_path / "out", split)
    assert not (tmp_path / "out").exists()
