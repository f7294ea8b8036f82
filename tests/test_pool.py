"""Pools of unlabelled text: every row once, nothing of the evaluation set, resumable shard by shard."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_texts
from datasets import Dataset, IterableDataset
from tiny_models import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from smbert.pool import LOGITS, PoolReport, label_pool, read_pool, text_key
from smbert.stages import Distill, Outline
from smbert.surgery import structure_of
from smbert.tasks import Task, tokenize
from smbert.teacher import DistillCollator, predict_logits

pool_module = importlib.import_module("smbert.pool")


@pytest.fixture
def teacher() -> PreTrainedModel:
    set_seed(0)
    return tiny("bert")


@pytest.fixture
def texts() -> Dataset:
    """50 texts, no two alike."""
    seen, kept = set(), []
    for text in make_texts(200, seed=5, labels=False)["text"][:]:
        if text_key([text]) not in seen:
            seen.add(text_key([text]))
            kept.append(text)
    return Dataset.from_dict({"text": kept[:50], "other": range(50)})


def label(teacher: Any, tokenizer: Any, task: Any, texts: Any, folder: Path, **kwargs: Any) -> PoolReport:
    return label_pool(
        teacher, tokenizer, task, texts, folder, **{"shard_rows": 20, "max_length": 32, "disable_tqdm": True, **kwargs}
    )


def test_logits_are_the_teachers(teacher, tokenizer, tiny_task, texts, tmp_path):
    report = label(teacher, tokenizer, tiny_task, texts, tmp_path)
    assert report == PoolReport(rows=50, labelled=50, shards=3)
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == [f"shard-00000{i}.parquet" for i in range(3)]
    pool = read_pool(tmp_path)
    assert pool.report == report and pool.rows["text"][:] == texts["text"][:]
    expected = predict_logits(teacher, tokenize(texts, tiny_task, tokenizer, 32), DistillCollator(tokenizer))
    got = np.asarray(pool.rows[LOGITS][:])
    assert got.shape == (50, 2) and np.ptp(expected) > 0.01
    # bf16 where the hardware has it, and half precision on disk
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max() + 1e-3)
    assert teacher.training is False and next(teacher.parameters()).requires_grad  # the caller's model is as it was


def test_texts_of_the_evaluation_set_repeats_and_empty_texts_stay_out(teacher, tokenizer, tiny_task, texts, tmp_path):
    own = texts["text"][:]
    held_out = Dataset.from_dict({"text": [f"  {own[3].upper()} ", own[4]], "label": [0, 1]})
    rows = Dataset.from_dict({"text": [*own[:10], own[0], "", "   ", None, *own[10:20]]})
    report = label(teacher, tokenizer, tiny_task, rows, tmp_path, exclude=held_out, shard_rows=100)
    assert report == PoolReport(rows=24, labelled=18, in_excluded=2, repeated=1, empty=3, shards=1)
    kept = read_pool(tmp_path).rows["text"][:]
    assert kept == [t for i, t in enumerate(own[:20]) if i not in (3, 4)]


def test_a_stream_gives_the_same_pool(teacher, tokenizer, tiny_task, texts, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(texts.to_list()))
    label(teacher, tokenizer, tiny_task, texts, tmp_path / "map")
    label(teacher, tokenizer, tiny_task, stream, tmp_path / "stream")
    for number in range(3):
        name = f"shard-00000{number}.parquet"
        assert (tmp_path / "map" / name).read_bytes() == (tmp_path / "stream" / name).read_bytes()


def test_a_second_run_makes_only_what_is_missing(teacher, tokenizer, tiny_task, texts, tmp_path, monkeypatch):
    label(teacher, tokenizer, tiny_task, texts, tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.parquet")}
    (tmp_path / "shard-000001.parquet").unlink()
    made = []
    original = pool_module._label
    monkeypatch.setattr(pool_module, "_label", lambda *args: (made.append(args[5].name), original(*args)))
    label(teacher, tokenizer, tiny_task, texts, tmp_path)
    assert made == ["shard-000001.parquet"]
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.parquet")}
    assert {n: content for n, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert after["shard-000000.parquet"] == before["shard-000000.parquet"]


def test_a_run_that_dies_leaves_whole_shards(teacher, tokenizer, tiny_task, texts, tmp_path, monkeypatch):
    original, calls = pool_module.predict_logits, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pool_module, "predict_logits", dies)
    with pytest.raises(KeyboardInterrupt):
        label(teacher, tokenizer, tiny_task, texts, tmp_path / "killed")
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["shard-000000.parquet"]
    with pytest.raises(ValueError, match=r"killed is not finished.*To resolve, run label_pool again"):
        read_pool(tmp_path / "killed")
    monkeypatch.undo()
    label(teacher, tokenizer, tiny_task, texts, tmp_path / "killed")
    assert len(read_pool(tmp_path / "killed").rows) == 50
    label(teacher, tokenizer, tiny_task, texts, tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def of_two(monkeypatch: pytest.MonkeyPatch, rank: list[int], other_process: Any) -> None:
    """Two processes in one, of which the first waits for what `other_process` does."""
    work = iter([other_process])

    def wait() -> None:
        if rank == [0]:
            next(work, lambda: None)()

    monkeypatch.setattr(
        pool_module,
        "process_state",
        lambda: SimpleNamespace(
            num_processes=2, process_index=rank[0], is_main_process=rank == [0], wait_for_everyone=wait
        ),
    )


def test_two_processes_label_disjoint_shards(teacher, tokenizer, tiny_task, texts, tmp_path, monkeypatch):
    label(teacher, tokenizer, tiny_task, texts, tmp_path / "alone")
    made: dict[int, list[str]] = {0: [], 1: []}
    rank, original = [0], pool_module._label
    monkeypatch.setattr(pool_module, "_label", lambda *args: (made[rank[0]].append(args[5].name), original(*args)))

    def other_process() -> None:
        rank[0] = 1
        reports.append(label(teacher, tokenizer, tiny_task, texts, tmp_path / "both"))
        rank[0] = 0

    reports: list[PoolReport] = []
    of_two(monkeypatch, rank, other_process)
    reports.append(label(teacher, tokenizer, tiny_task, texts, tmp_path / "both"))
    assert made == {0: ["shard-000000.parquet", "shard-000002.parquet"], 1: ["shard-000001.parquet"]}
    assert reports[0] == reports[1] == PoolReport(rows=50, labelled=50, shards=3)
    assert read_pool(tmp_path / "both").rows.to_list() == read_pool(tmp_path / "alone").rows.to_list()


def test_the_failure_of_another_process_is_seen(teacher, tokenizer, tiny_task, texts, tmp_path, monkeypatch):
    of_two(monkeypatch, [0], lambda: None)
    with pytest.raises(ValueError, match=r"holds the shards \[0, 2\], must hold 0 to 2: another process .*To resolve"):
        label(teacher, tokenizer, tiny_task, texts, tmp_path)
    with pytest.raises(ValueError, match="not finished"):
        read_pool(tmp_path)
    # It refused a shard of an earlier pool and left it there.
    stale = Dataset.from_dict({"text": [*texts["text"][:20], "w1", *texts["text"][21:]]})
    monkeypatch.undo()
    label(teacher, tokenizer, tiny_task, stale, tmp_path / "stale")
    of_two(monkeypatch, [0], lambda: None)
    with pytest.raises(ValueError, match=r"shard-000001\.parquet was made with another source"):
        label(teacher, tokenizer, tiny_task, texts, tmp_path / "stale")


def test_shards_of_an_earlier_longer_pool_are_not_used(teacher, tokenizer, tiny_task, texts, tmp_path):
    label(teacher, tokenizer, tiny_task, texts, tmp_path)
    with pytest.raises(ValueError, match=r"holds the shards \[0, 1, 2\], must hold \[0, 1\]: .*To resolve, delete"):
        label(teacher, tokenizer, tiny_task, texts.select(range(40)), tmp_path)
    with pytest.raises(ValueError, match="not finished"):
        read_pool(tmp_path)
    (tmp_path / "shard-000002.parquet").unlink()
    assert label(teacher, tokenizer, tiny_task, texts.select(range(40)), tmp_path).labelled == 40
    assert len(read_pool(tmp_path).rows) == 40


def test_a_damaged_shard_is_named_and_made_again(teacher, tokenizer, tiny_task, texts, tmp_path):
    label(teacher, tokenizer, tiny_task, texts, tmp_path)
    file = tmp_path / "shard-000001.parquet"
    whole = file.read_bytes()
    # A flipped bit in the values, where the footer is whole, and a file that was cut off.
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 0xFF
    for damaged, mended in ((bytes(flipped), False), (whole[: len(whole) // 2], True)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-000001\.parquet is damaged .*To resolve"):
            read_pool(tmp_path)
        if mended:
            label(teacher, tokenizer, tiny_task, texts, tmp_path)
            assert file.read_bytes() == whole
    assert len(read_pool(tmp_path).rows) == 50


def test_shards_of_another_teacher_or_pool_are_refused(teacher, tokenizer, tiny_task, texts, tmp_path):
    label(teacher, tokenizer, tiny_task, texts, tmp_path)
    another = copy.deepcopy(teacher)
    with torch.no_grad():
        another.classifier.bias.add_(1)
    for changes, word in (
        ({"teacher": another}, "model"),
        ({"texts": texts.select(range(1, 50))}, "source"),
        ({"exclude": texts.select([0])}, "excluded"),
        ({"max_length": 16}, "max_length"),
    ):
        given = {"teacher": teacher, "texts": texts} | changes
        with pytest.raises(ValueError, match=f"another {word}.*To resolve"):
            label(given.pop("teacher"), tokenizer, tiny_task, given.pop("texts"), tmp_path, **given)
    label(teacher, tokenizer, tiny_task, texts.select(range(20)), tmp_path / "parts")
    (tmp_path / "parts" / "shard-000001.parquet").write_bytes((tmp_path / "shard-000002.parquet").read_bytes())
    with pytest.raises(ValueError, match="is not finished"):
        read_pool(tmp_path / "parts")


def test_bad_input(teacher, tokenizer, tiny_task, texts, tmp_path):
    def message(data: Any = texts, task: Task = tiny_task, **kwargs: Any) -> str:
        with pytest.raises(ValueError) as error:
            label(teacher, tokenizer, task, data, tmp_path / "bad", **kwargs)
        assert not list(tmp_path.glob("bad/*.parquet"))
        return str(error.value)

    assert "other" in message(texts.remove_columns("text"))
    assert "must hold texts, got 7" in message(Dataset.from_dict({"text": [7]}))
    assert "at least one text" in message(texts.select([]))
    assert "shard_rows" in message(shard_rows=0)
    three = replace(tiny_task, label_names=("a", "b", "c"))
    assert "trained on 2 labels, the data of" in message(task=three)
    named = replace(tiny_task, label_names=("dull", "bright"))
    teacher.config.id2label = {0: "bright", 1: "dull"}
    assert "in this order: the model has ['bright', 'dull']" in message(task=named)
    teacher.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    with torch.no_grad():
        teacher.classifier.weight.fill_(float("nan"))
    assert "must be finite" in message()
    with pytest.raises(ValueError, match="holds no labelled pool"):
        read_pool(tmp_path / "nowhere")


def test_a_student_with_another_tokenizer_learns_from_the_pool(teacher, tokenizer, tiny_task, texts, context, tmp_path):
    label(teacher, tokenizer, tiny_task, texts, tmp_path / "pool")
    vocabulary = tokenizer.get_vocab()
    other = PreTrainedTokenizerFast.from_pretrained(_reordered(tokenizer, tmp_path / "tokenizer"))
    assert other.get_vocab() != vocabulary
    rows = read_pool(tmp_path / "pool").tokenised(tiny_task, other, 32)
    assert rows[LOGITS][0] == read_pool(tmp_path / "pool").rows[LOGITS][0]
    student_context = replace(context, tokenizer=other, data=replace(context.data, train=rows), teacher=None, pool=None)
    stage = Distill(objectives=({"kind": "logits", "weight": 1.0},), max_steps=30, learning_rate=5e-3, batch_size=16)
    set_seed(2)
    student = tiny("bert")
    stage.outline(Outline(structure_of(student)), student_context)
    _, record = stage.run(student, student_context, tmp_path / "work")
    assert record["teacher_ran_live"] is False and record["train_rows"] == 50
    losses = [entry["loss/logits"] for entry in record["loss_log"]]
    assert losses[-1] < losses[0]

    with pytest.raises(ValueError, match="logits and gold objectives only, got hidden"):
        Distill(objectives=({"kind": "hidden", "weight": 1.0},)).outline(
            Outline(structure_of(student)), student_context
        )


def _reordered(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """The same words under other ids."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"]}
    plain = [w for w in words if w not in special]
    content["model"]["vocab"] |= dict(zip(plain, [words[w] for w in reversed(plain)]))
    file.write_text(json.dumps(content))
    return folder
