"""The cache gives what the teacher would have said, row by row, and never the answer to another question."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from tiny_models import tiny
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from smbert.tasks import Task
from smbert.teacher import (
    DistillCollator,
    cached_logits,
    dataset_fingerprint,
    freeze,
    join_unlabelled,
    model_fingerprint,
    predict_logits,
    with_teacher_logits,
)


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 100)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **options)


def make_rows(n: int = 25, seed: int = 0, labels: bool = True) -> Dataset:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(4, 100, rng.integers(2, 20)).tolist() for _ in range(n)]
    columns: dict[str, list[Any]] = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    if labels:
        columns["labels"] = rng.integers(0, 2, n).tolist()
    return Dataset.from_dict(columns)


collator = DistillCollator(make_tokenizer())


class Mute(nn.Module):
    """A teacher that must not be asked: like `model` in all that the cache sees, but its forward fails."""

    def __new__(cls, model: Any) -> Any:
        def forward(
            input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, labels: Any = None
        ) -> Any:
            raise AssertionError("the teacher was asked although its logits are cached")

        model.forward = forward
        return model


def one_by_one(model: Any, rows: Dataset) -> np.ndarray:
    with torch.no_grad():
        return np.stack([model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in rows["input_ids"]])


def files(folder: Path) -> list[str]:
    return sorted(p.suffix for p in folder.iterdir())


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_predicted_logits_keep_the_order_of_the_rows(family: str) -> None:
    model, rows = tiny(family, num_labels=3), make_rows()
    expected = one_by_one(model, rows)
    for batch_size in (4, 64):
        logits = predict_logits(model, rows, collator, batch_size, disable_tqdm=True)
        assert logits.dtype == np.float32 and logits.shape == (25, 3)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_predict_ignores_other_columns_the_format_and_the_mode() -> None:
    model, rows = tiny("bert").train(), make_rows()
    extra = rows.add_column("length", [9] * 25).add_column("token_type_ids_of_another", ["x"] * 25).with_format("torch")
    logits = predict_logits(model, extra, collator, disable_tqdm=True)
    assert model.training
    np.testing.assert_allclose(logits, one_by_one(model.eval(), rows), atol=1e-5)


@pytest.mark.parametrize("rows", [make_rows(3).select([]), make_rows(3).remove_columns("input_ids")])
def test_rows_that_cannot_be_predicted_are_refused(rows: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold tokenised rows"):
        predict_logits(tiny("bert"), rows, collator)
    with pytest.raises(ValueError, match="must hold tokenised rows"):
        cached_logits(tiny("bert"), rows, collator, tmp_path)


def test_logits_are_computed_once(tmp_path: Path) -> None:
    model, rows = tiny("bert"), make_rows()
    first = cached_logits(model, rows, collator, tmp_path / "new" / "cache", disable_tqdm=True)
    np.testing.assert_allclose(first, one_by_one(model, rows), atol=1e-5)
    again = cached_logits(Mute(tiny("bert")), rows, collator, tmp_path / "new" / "cache", batch_size=3)
    assert np.array_equal(first, again)
    assert files(tmp_path / "new" / "cache") == [".json", ".npy"]
    about = json.loads(next((tmp_path / "new" / "cache").glob("*.json")).read_text())
    assert about["shape"] == [25, 2] and about["precision"] == "float32" and about["rows"] and about["model"]


def test_labels_and_teacher_logits_are_not_part_of_the_question(tmp_path: Path) -> None:
    rows = make_rows()
    first = cached_logits(tiny("bert"), rows, collator, tmp_path, disable_tqdm=True)
    relabelled = with_teacher_logits(rows.remove_columns("labels"), first)
    assert np.array_equal(first, cached_logits(Mute(tiny("bert")), relabelled, collator, tmp_path))


def test_another_teacher_other_rows_or_precision_are_another_question(tmp_path: Path) -> None:
    model, rows = tiny("bert"), make_rows()
    first = cached_logits(model, rows, collator, tmp_path, disable_tqdm=True)
    with torch.no_grad():
        model.classifier.bias[0] += 1.0
    changed = cached_logits(model, rows, collator, tmp_path, disable_tqdm=True)
    np.testing.assert_allclose(changed - first, np.tile([[1.0, 0.0]], (25, 1)), atol=1e-5)
    backwards = cached_logits(model, rows.select(range(24, -1, -1)), collator, tmp_path, disable_tqdm=True)
    np.testing.assert_allclose(backwards[::-1], changed, atol=1e-5)
    coarse = cached_logits(model, rows, collator, tmp_path, bf16=True, disable_tqdm=True)
    assert not np.array_equal(coarse, changed)
    np.testing.assert_allclose(coarse, changed, atol=0.2)
    assert len(files(tmp_path)) == 8


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "no json", "bad json", "pickle"])
def test_a_damaged_cache_is_computed_again_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = tiny("bert"), make_rows()
    first = cached_logits(model, rows, collator, tmp_path, disable_tqdm=True)
    array, sidecar = next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.json"))
    good = array.read_bytes()
    if damage == "no json":
        sidecar.unlink()
    elif damage == "bad json":
        sidecar.write_text("[]")
    elif damage == "pickle":
        np.save(array, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        bad = {"truncated": good[:-9], "one bit": good[:-1] + bytes([good[-1] ^ 1]), "empty": b""}
        array.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        again = cached_logits(model, rows, collator, tmp_path, disable_tqdm=True)
    assert np.array_equal(first, again) and array.read_bytes() == good
    assert ("corrupt" in caplog.text) == (damage != "no json")
    assert files(tmp_path) == [".json", ".npy"]


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model, rows = tiny("bert"), make_rows()
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight[rows[7]["input_ids"][0]] = torch.nan
    bad = [i for i, ids in enumerate(rows["input_ids"]) if rows[7]["input_ids"][0] in ids]
    with pytest.raises(ValueError, match=rf"must be finite, got \[nan, nan\] in row {bad[0]} \({len(bad)} of 25"):
        cached_logits(model, rows, collator, tmp_path, disable_tqdm=True)
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"could not be written to .*To resolve"):
        cached_logits(tiny("bert"), make_rows(), collator, tmp_path / "cache", disable_tqdm=True)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device\. To resolve, free space"):
        cached_logits(tiny("bert"), make_rows(), collator, tmp_path, disable_tqdm=True)
    assert files(tmp_path) == []


TWO_PROCESSES = """
import os, sys
import numpy as np
import test_teacher as t

folder, rank = sys.argv[1], os.environ["RANK"]
model = t.tiny("bert") if rank == "0" else t.Mute(t.tiny("bert"))
logits = t.cached_logits(model, t.make_rows(), t.collator, folder, disable_tqdm=True)
assert t.torch.distributed.get_world_size() == 2
np.save(f"{folder}/rank{rank}", logits)
if rank == "0":  # the other does not ask
    alone = t.cached_logits(t.tiny("bert"), t.make_rows(), t.collator, f"{folder}/alone", disable_tqdm=True, alone=True)
    assert np.array_equal(alone, logits)
with t.torch.no_grad():
    for p in model.parameters():
        p.fill_(t.torch.nan)
try:
    t.cached_logits(model, t.make_rows(), t.collator, folder, disable_tqdm=True)
except (ValueError, OSError) as error:
    open(f"{folder}/error{rank}", "w").write(str(error))
"""


def test_two_processes_share_what_the_main_one_computes(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    logits = [np.load(tmp_path / f"rank{i}.npy") for i in range(2)]
    assert np.array_equal(*logits)
    np.testing.assert_allclose(logits[0], one_by_one(tiny("bert"), make_rows()), atol=1e-5)
    # A failure of the main process reaches the other one too, which does not wait forever.
    assert "must be finite" in (tmp_path / "error0").read_text()
    assert "main process left no teacher logits" in (tmp_path / "error1").read_text()


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_model_keeps_its_fingerprint_over_a_reload(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    before = model_fingerprint(model)
    model.save_pretrained(tmp_path / "a")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert model_fingerprint(reloaded) == before
    assert model_fingerprint(freeze(model).train()) == before
    model(input_ids=torch.ones(1, 2, dtype=torch.long), labels=torch.tensor([1]))  # sets config.problem_type
    assert model_fingerprint(model) == before


def test_what_a_model_computes_is_in_its_fingerprint() -> None:
    prints = {
        model_fingerprint(tiny("bert")),
        model_fingerprint(tiny("bert", seed=1)),
        model_fingerprint(tiny("bert", layer_norm_eps=1e-3)),
        model_fingerprint(tiny("bert").to(torch.bfloat16)),
        model_fingerprint(tiny("bert", "token-classification")),
    }
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.weight[1, 3] += 1e-6
    assert len(prints | {model_fingerprint(model)}) == 6


def test_a_dataset_fingerprint_is_about_content_only(tmp_path: Path) -> None:
    rows = make_rows(40)
    expected = dataset_fingerprint(rows)
    rows.save_to_disk(tmp_path / "rows")
    narrow = rows.cast(
        Features({"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": Value("int8")})
    )
    same = {
        "reloaded": load_from_disk(str(tmp_path / "rows")),
        "in chunks": concatenate_datasets([rows.select(range(7)), rows.select(range(7, 40))]),
        "selected": concatenate_datasets([make_rows(5, seed=9), rows]).select(range(5, 45)),
        "shuffled back": rows.select(list(range(39, -1, -1))).select(list(range(39, -1, -1))),
        "other order of columns": rows.select_columns(["labels", "attention_mask", "input_ids"]),
        "narrow integers": narrow,
        "numpy format": rows.with_format("numpy"),
        "more columns": rows.add_column("text", ["a"] * 40).select_columns(rows.column_names),
    }
    assert {name: dataset_fingerprint(d) for name, d in same.items()} == dict.fromkeys(same, expected)
    assert dataset_fingerprint(rows.add_column("text", ["a"] * 40), rows.column_names) == expected


def test_any_difference_of_content_shows_in_a_dataset_fingerprint() -> None:
    columns: list[dict[str, list[Any]]] = [
        {"a": [[1, 2], [3]]},
        {"a": [[1], [2, 3]]},
        {"a": [[1, 2], [4]]},
        {"a": [[3], [1, 2]]},
        {"a": [[1, 2, 3]]},
        {"a": [[1, 2], [3], []]},
        {"a": [[1, 2], [3], None]},
        {"b": [[1, 2], [3]]},
        {"a": [[0, 2], [3]]},
        {"a": [[None, 2], [3]]},
        {"a": [1, 2]},
        {"a": [1.5, 2]},
        {"a": ["ab", "c"]},
        {"a": ["a", "bc"]},
        {"a": ["ab", None]},
        {"a": [True, None]},
        {"a": [True, False]},
    ]
    prints = [dataset_fingerprint(Dataset.from_dict(c)) for c in columns]
    assert len(set(prints)) == len(prints)


# --- columns and batches ---------------------------------------------------------------------------------------------


def test_teacher_logits_become_a_column() -> None:
    rows = make_rows().shuffle(seed=3).select(range(10))
    logits = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    joined = with_teacher_logits(rows, logits)
    assert np.array_equal(np.asarray(joined["teacher_logits"][:], dtype=np.float32), logits)
    assert joined.features["teacher_logits"] == List(Value("float32"))
    assert joined["input_ids"][:] == rows["input_ids"][:]
    assert joined._fingerprint == with_teacher_logits(rows, logits)._fingerprint
    other = with_teacher_logits(joined, logits + 1)
    assert other.column_names == joined.column_names and other._fingerprint != joined._fingerprint
    assert np.array_equal(np.asarray(other["teacher_logits"][:], dtype=np.float32), logits + 1)
    with pytest.raises(ValueError, match=r"shape \(10, classes\), got \(9, 3\)"):
        with_teacher_logits(rows, logits[:9])


def test_freeze() -> None:
    model = tiny("bert").train()
    assert freeze(model) is model and not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0, 1], torch.tensor([1, 0, 1])),
        ([0.5, 2.0, -1.0], torch.tensor([0.5, 2.0, -1.0])),
        ([[1, 0], [1, 1], [0, 0]], torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])),
        ([True, False, True], torch.tensor([1, 0, 1])),
    ],
)
@pytest.mark.parametrize("name", ["labels", "label"])
def test_labels_of_every_kind(name: str, values: list[Any], expected: torch.Tensor) -> None:
    rows = make_rows(3, labels=False)
    batch = collator([{**row, name: value} for row, value in zip(rows, values)])
    assert batch["labels"].dtype == expected.dtype and torch.equal(batch["labels"], expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_to_a_multiple(side: str) -> None:
    pad = DistillCollator(make_tokenizer(padding_side=side))
    rows: list[dict[str, Any]] = [
        {"input_ids": [5] * n, "attention_mask": [1] * n, "token_type_ids": [1] * n, "teacher_logits": [0.25 * n, -1.0]}
        for n in (9, 4)
    ]
    batch = pad([{**row, "length": 3, "text": "dropped"} for row in rows])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "teacher_logits"}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("token_type_ids", 0)):
        assert batch[name].shape == (2, 16) and batch[name].dtype == torch.int64
        real = batch[name][1, :4] if side == "right" else batch[name][1, -4:]
        assert real.tolist() == rows[1][name] and batch[name].sum() == sum(sum(r[name]) for r in rows) + fill
    assert torch.equal(batch["teacher_logits"], torch.tensor([[2.25, -1.0], [1.0, -1.0]]))


def test_padding_stays_within_the_tokenizers_limit() -> None:
    rows = [{"input_ids": [5] * n} for n in (9, 4)]
    batch = DistillCollator(make_tokenizer(model_max_length=13))(rows)
    assert batch["input_ids"].shape == (2, 9) and batch["attention_mask"].sum() == 13
    assert DistillCollator(make_tokenizer(), pad_to_multiple_of=None)(rows)["input_ids"].shape == (2, 9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None], "1 rows without it"),
        (["a", "b"], "got 'a'"),
        ([[1], [1, 0]], r"lists of numbers of one length, got \[1\]"),
    ],
)
def test_bad_labels_are_refused(values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator([{**row, "labels": value} for row, value in zip(make_rows(2, labels=False), values)])


def test_the_collator_gives_what_a_loader_needs() -> None:
    rows = with_teacher_logits(make_rows(), np.ones((25, 2)))
    batches = list(torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=collator))  # type: ignore[arg-type]
    assert [len(b["labels"]) for b in batches] == [8, 8, 8, 1]
    assert tiny("bert")(**{k: v for k, v in batches[0].items() if k != "teacher_logits"}).loss.isfinite()


# --- rows without labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "none"),
    [("single_label", 1, -100), ("regression", 0.5, np.nan), ("multi_label", [1.0, 0.0], [np.nan, np.nan])],
)
def test_a_pool_joins_as_rows_without_labels(kind: str, value: Any, none: Any) -> None:
    task = Task("t", ("text",), kind=kind, label_names=() if kind == "regression" else ("a", "b"))
    labelled, pool = make_rows(3).remove_columns("labels"), make_rows(4, seed=1).add_column("source", ["web"] * 4)
    types = {"single_label": Value("int64"), "regression": Value("float32"), "multi_label": List(Value("float32"))}
    labelled = labelled.add_column("labels", [value] * 3, feature=types[kind])
    joined = join_unlabelled(labelled, pool, task)
    assert joined.column_names == ["input_ids", "attention_mask", "labels"] and joined.features == labelled.features
    assert joined["input_ids"][:] == labelled["input_ids"][:] + pool["input_ids"][:]
    np.testing.assert_array_equal(np.asarray(joined["labels"][:]), np.asarray([value] * 3 + [none] * 4))
    assert collator([joined[2], joined[3]])["labels"].dtype == (
        torch.int64 if kind == "single_label" else torch.float32
    )


def test_joining_with_nothing() -> None:
    task = Task("t", ("text",), label_names=("a", "b"))
    rows = make_rows(3)
    assert join_unlabelled(rows, None, task) is rows and join_unlabelled(None, rows, task) is rows
    with pytest.raises(ValueError, match="got neither"):
        join_unlabelled(None, None, task)
    with pytest.raises(ValueError, match=r"without \['attention_mask'\]"):
        join_unlabelled(rows, rows.remove_columns("attention_mask"), task)
