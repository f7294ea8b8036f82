"""Every script below benchmarks/ on tiny checkpoints and tiny data: that it runs, resumes, and that its figures belong together."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import NOISE, TELLING
from datasets import Dataset
from tiny_models import tiny
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from smbert._report_tables import INT8_TEACHER
from smbert.measure import latency
from smbert.report import Report
from smbert.stages import Finetune
from smbert.surgery import keep_layers, structure_of

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PNG = b"\x89PNG"

RECIPE = """
name: tiny
max_length: 32
teacher: {max_steps: 2, batch_size: 8}
stages:
  - {kind: depth_reduction, layers: 1/2, base: 0.5, slope: null, max_steps: 2, batch_size: 8}
  - {kind: width_pruning, heads: 1/2, ffn: 1/2, samples: 8, multiple_of: 4}
  - {kind: distill, max_steps: 2, batch_size: 8, objectives: [{kind: logits}, {kind: hidden}, {kind: gold}]}
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def loader(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield loader
    sys.modules.pop("training_epochs", None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A raw BERT of 4 layers with positions for the harness's latency at 128 tokens."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny("bert", head="encoder", max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(teacher: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = teacher.with_name("small")
    keep_layers(tiny("bert", head="encoder", max_position_embeddings=128), [0]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MRPC as csv, RTE and MNLI as parquet, in the columns of GLUE."""
    folder, rng = tmp_path_factory.mktemp("glue"), random.Random(0)

    def rows(n: int, columns: Sequence[str], classes: int) -> Dataset:
        texts = [
            [" ".join(rng.choices(NOISE + TELLING[i % 2], k=rng.randint(2, 9))) for _ in columns] for i in range(n)
        ]
        return Dataset.from_dict(
            {**dict(zip(columns, map(list, zip(*texts)))), "label": [i % classes for i in range(n)]}
        )

    for task, columns, classes, validation, suffix in (
        ("mrpc", ("sentence1", "sentence2"), 2, "validation", "csv"),
        ("rte", ("sentence1", "sentence2"), 2, "validation", "parquet"),
        ("mnli", ("premise", "hypothesis"), 3, "validation_matched", "parquet"),
    ):
        (folder / task).mkdir()
        for split, n in (("train", 24), (validation, 12)):
            getattr(rows(n, columns, classes), f"to_{suffix}")(str(folder / task / f"{split}.{suffix}"))
    return folder


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------- latency


def test_latency_times_all_models_in_both_dtypes(load, teacher, small, data_dir, tmp_path):
    status = load("latency").main(
        [f"teacher={teacher}", f"small={small}", "--batches", "1,4", "--lengths", "8,16", "--task", "rte",
         "--data-dir", str(data_dir), "--max-length", "32", "--warmup", "0", "--min-runs", "2", "--min-seconds", "0",
         "--output", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    report = Report.read(tmp_path / "latency.json")
    int8 = [INT8_TEACHER] if find_spec("onnx") and find_spec("onnxruntime") else []
    bf16 = ["teacher, bf16", "small, bf16"]
    assert [row.name for row in report.rows] == ["teacher, fp32", "small, fp32", *int8, *bf16]
    assert bool(report.notes) != bool(int8)
    shapes = ["1x8", "4x8", "1x16", "4x16", "1xrte", "4xrte"]
    for row, baseline in zip(report.rows, [report.rows[0]] * (2 + len(int8)) + [report.rows[-2]] * 2):
        assert list(row.latency_ms) == list(row.speedup) == shapes
        for shape in shapes:
            own, base = row.latency_ms[shape], baseline.latency_ms[shape]
            assert 0 < own["p50"] <= own["p95"]
            assert row.speedup[shape] == pytest.approx(base["p50"] / own["p50"])
    assert report.rows[1].params_encoder * 4 == report.rows[0].params_encoder
    assert report.environment["threads"] == torch.get_num_threads()
    assert "| small, bf16 |" in (tmp_path / "latency.md").read_text(encoding="utf-8")
    assert (tmp_path / "latency.png").read_bytes().startswith(PNG)


def test_latency_gives_every_model_the_same_rows(load, teacher, small, data_dir):
    args = type("Args", (), {"task": "mrpc", "data_dir": str(data_dir), "max_length": 32})
    found = load("latency").real_batches(args, {"a": str(teacher), "b": str(small)}, 4)
    assert [len(batches) for batches in found.values()] == [3, 3]  # 12 rows
    for one, other in zip(*found.values()):
        assert one["input_ids"].shape[0] == 4 and (one["attention_mask"] == 0).any()
        assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["MODEL"], "NAME=DIR"),
        (["a=MODEL", "a=MODEL"], "each name once"),
        (["a=MODEL", "--dtypes", "int8"], "fp32, bf16"),
        (["a=MODEL", "--task", "rte", "--batches", "13"], "fewer than 13"),
    ],
)
def test_latency_tells_what_is_wrong(load, teacher, data_dir, tmp_path, capsys, arguments, told):
    given = [word.replace("MODEL", str(teacher)) for word in arguments]
    status = load("latency").main([*given, "--data-dir", str(data_dir), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2 and told in error and "To resolve" in error
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- training


def test_training_compares_every_stage(load, teacher, data_dir, tmp_path, capsys):
    training = load("training")
    status = training.main(
        ["--model", str(teacher), "--task", "mrpc", "--data-dir", str(data_dir), "--samples", "16", "--batch-size", "8",
         "--max-length", "32", "--rounds", "1", "--output", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    report = read(tmp_path / "training.json")
    assert report["schema_version"] == 1 and report["environment"]["cpu"]
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == list(training.TIMED)
    for row in rows.values():
        assert len(row["epoch_seconds"]) == 1 and row["peak_memory_mb"] > 0  # the warm-up round is not among them
        assert row["samples_per_second"] == pytest.approx(16 / row["epoch_seconds"][0])
    assert [(r["letter"], r["bound"]) for r in report["ratios"]] == [
        ("a", 1.1),
        ("b", 1.15),
        ("c", 1.1),
        ("d", 1),
        ("e", 1),
    ]
    for r in report["ratios"]:
        against = sum(rows[name]["epoch_seconds"][0] for name in r["against"])
        assert r["ratio"] == pytest.approx(rows[r["name"]]["epoch_seconds"][0] / against)
        assert r["met"] == (r["ratio"] <= r["bound"])
    shown = (tmp_path / "training.md").read_text(encoding="utf-8")
    assert shown in capsys.readouterr().out and all(word in shown for word in ("(e)", "1.15", "samples/s"))


def test_ratios_are_medians_of_the_rounds(load):
    training = load("training")
    seconds = {"x": [2.0, 9.0, 3.0], "y": [1.0, 1.0, 1.0], "z": [1.0, 2.0, 1.0]}
    assert training.compared(seconds, "q", "x", ["y", "z"], 1.5) == {
        "letter": "q", "name": "x", "against": ["y", "z"], "ratio": 1.5, "bound": 1.5, "met": True,
    }  # fmt: skip
    assert not training.compared(seconds, "q", "x", ["y", "z"], 1.49)["met"]


@pytest.fixture
def epochs(load, teacher, data_dir, tmp_path) -> Any:
    load("training")
    return sys.modules["training_epochs"].Epochs(str(teacher), "mrpc", str(data_dir), tmp_path, 16, 8, 32, True)


def layers_run(epoch: Any, seed: int) -> list[list[tuple[bool, bool]]]:
    """Per forward: (learns, has dropout) of every layer that ran."""
    seen: list[list[tuple[bool, bool]]] = []

    def note(module: nn.Module, *_: Any) -> None:
        if type(module).__name__ == "BertEmbeddings":
            seen.append([])
        elif type(module).__name__ == "BertLayer":
            drops = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())
            seen[-1].append((all(p.requires_grad for p in module.parameters()), drops))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        epoch(seed)
    finally:
        handle.remove()
    return seen


def test_theseus_is_compared_with_the_layers_that_it_ran(epochs):
    draws = {sum(epochs._draws(seed)[1]): seed for seed in range(8)}
    assert set(draws) == {1, 2}  # one module replaced, and both: 3 layers and 2
    for seed in draws.values():
        theseus, reference = layers_run(epochs.theseus, seed), layers_run(epochs.theseus_layers, seed)
        assert theseus == reference and len(theseus) == 2  # two steps of the epoch
        assert theseus[0] == theseus[1] == [(r, r) for r in epochs._draws(seed)[1] for _ in range(1 if r else 2)]


def test_the_students_are_a_quarter_and_a_half(epochs):
    depths = [structure_of(m).num_layers for m in (epochs._teacher, epochs._student, epochs._successor)]
    assert depths == [4, 1, 2]


def test_padding_and_freezing_are_as_said(epochs):
    rows = [epochs._rows[i] for i in range(4)]
    padded, plain = epochs._pad(rows), epochs._context.collator(rows)
    length = plain["input_ids"].shape[1]
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (4, 32) and length < 32
    assert torch.equal(padded["input_ids"][:, :length], plain["input_ids"])
    assert not padded["attention_mask"][:, length:].any() and torch.equal(padded["labels"], plain["labels"])
    before = {name: p.detach().clone() for name, p in epochs._student.named_parameters()}
    epochs.plain(0)
    moved = {name for name, p in epochs._student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("embeddings.weight" in name for name in moved)


# ------------------------------------------------------------------------------------------------------------------- bf16


def test_bf16_fills_every_cell_once(load, teacher, data_dir, tmp_path, monkeypatch, capsys):
    command = ["--model", str(teacher), "--tasks", "mrpc,rte", "--data-dir", str(data_dir), "--max-train-samples", "16",
               "--max-length", "32", "--epochs", "1", "--batch-size", "8", "--seeds", "3", "--disable-tqdm",
               "--output", str(tmp_path)]  # fmt: skip
    bf16, trained = load("bf16"), []
    train = Finetune.train

    def counting(self, holder, rows, context, workdir, data):
        trained.append((data.task.name, context.seed, context.args["bf16"], len(rows)))
        return train(self, holder, rows, context, workdir, data)

    monkeypatch.setattr(Finetune, "train", counting)
    assert bf16.main(command) == 0
    assert trained == [(t, 3, b, 16) for t in ("mrpc", "rte") for b in (False, True)]
    first = Report.read(tmp_path / "bf16.json")
    assert {(row.task, row.name, row.seed) for row in first.rows} == {
        (t, p, 3) for t in ("mrpc", "rte") for p in ("fp32", "bf16")
    }
    assert all(row.metric is not None and row.train_seconds is not None for row in first.rows)
    shown = (tmp_path / "bf16.md").read_text(encoding="utf-8")
    assert "| mrpc | f1 | 1 |" in shown and "| rte | accuracy | 1 |" in shown and shown in capsys.readouterr().out

    # A killed run: one cell was not finished.
    (tmp_path / "rte-3-bf16" / "row.json").unlink()
    for file in (tmp_path / "rte-3-bf16" / "00-finetune").iterdir():
        file.unlink()
    (tmp_path / "rte-3-bf16" / "00-finetune").rmdir()
    trained.clear()
    assert bf16.main(command) == 0
    assert trained == [("rte", 3, True, 16)]
    again = Report.read(tmp_path / "bf16.json")
    assert [row.metric for row in again.rows] == [row.metric for row in first.rows]


def test_bf16_summary_compares_only_seeds_of_both(load):
    bf16 = load("bf16")
    row, report = bf16.Row, bf16.Report("bf16.py", {"cpu": "any"})
    for name, seed, metric, seconds in (("fp32", 0, 0.8, 20.0), ("bf16", 0, 0.9, 5.0), ("fp32", 1, 0.1, 99.0)):
        report.add(row(name, "rte", seed, "accuracy", metric, train_seconds=seconds))
    assert "| rte | accuracy | 1 | 0.800 | 0.900 | +0.100 | 20.0 | 5.0 | 4.00x |" in bf16.summary(report)
    assert bf16.spread([0.5, 0.7]) == "0.600 ± 0.141"


# ------------------------------------------------------------------------------------------------------------------- glue


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file; the latency of its models is timed in a few runs only."""
    # By its entry: the name smbert.compress is the function's.
    monkeypatch.setattr(importlib.import_module("smbert.compress"), "latency", partial(latency, warmup=0, min_runs=3))
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


def test_glue_through_an_intermediate_task(load, teacher, data_dir, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["--model", str(teacher), "--tasks", "rte", "--recipe", str(recipe), "--intermediate", "mnli",
               "--data-dir", str(data_dir), "--seeds", "0", "--max-train-samples", "16", "--intermediate-samples", "16",
               "--intermediate-epochs", "0.5", "--pool-samples", "30", "--student-steps", "4", "--control-steps", "3", "--no-int8-teacher", "--disable-tqdm", "--output", str(out)]  # fmt: skip
    glue = load("glue")
    assert glue.main(command) == 0
    report = Report.read(out)
    names = [
        "teacher",
        "teacher through the intermediate task",
        "smbert",
        "same shape, no distillation",
        "majority class",
    ]
    assert [(row.task, row.name) for row in report.rows] == [("rte", name) for name in names]
    first, _, smbert, twin, _ = report.rows
    assert smbert.params_total == twin.params_total < first.params_total
    assert smbert.retention == pytest.approx(smbert.metric / first.metric)
    assert first.speedup["32x128"] == 1.0 and smbert.speedup["32x128"] > 0
    assert (out / "report.png").read_bytes().startswith(PNG) and (out / "report.md").is_file()
    tuned = read(out / "mnli" / "01-finetune" / "stage.json")
    assert (tuned["stage"]["epochs"], tuned["train_rows"]) == (0.5, 16)
    (taught,) = (out / "rte-0" / "smbert").glob("*-distill")
    assert read(taught / "stage.json")["optimiser_steps"] == 4
    assert (
        read(taught / "stage.json")["train_rows"] == 30
    )  # 16 of its own, its other 8 and 6 of the other task without labels
    (control,) = (out / "rte-0" / "undistilled").glob("*-finetune")
    assert read(control / "stage.json")["optimiser_steps"] == 3
    assert read(out / "rte-0" / "00-teacher" / "stage.json")["train_rows"] == 16

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(glue, "cell", refuse)
    monkeypatch.setattr(glue, "compressed_encoder", refuse)
    assert glue.main(command) == 0
    assert Report.read(out).rows == report.rows
    # A second command with other seeds adds to the report and takes nothing away.
    (out / "cells" / "rte-1.json").write_text(
        (out / "cells" / "rte-0.json").read_text().replace('"seed": 0', '"seed": 1')
    )
    assert glue.main(command) == 0
    assert {row.seed for row in Report.read(out).rows} == {0, 1}


def test_glue_on_the_tasks_themselves(load, teacher, data_dir, recipe, tmp_path):
    command = ["--model", str(teacher), "--tasks", "mrpc", "--recipe", str(recipe), "--data-dir", str(data_dir),
               "--set", "teacher.max_steps=1", "--disable-tqdm", "--output", str(tmp_path / "out")]  # fmt: skip
    assert load("glue").main(command) == 0
    report = Report.read(tmp_path / "out")
    served = find_spec("onnx") and find_spec("onnxruntime")
    int8 = ["teacher in int8 (ONNX Runtime)"] if served else []
    names = ["teacher", *int8, "smbert", "same shape, no distillation", "majority class"]
    assert [row.name for row in report.rows] == names and len(report.notes) == 1 - len(int8)


def test_glue_reads_a_student_of_fewer_pieces_with_its_own_tokenizer(
    load, teacher, data_dir, recipe, tokenizer, tmp_path, monkeypatch, capsys
):
    command = ["--model", str(tmp_path / "raw"), "--tasks", "mrpc", "--recipe", str(recipe), "--data-dir", str(data_dir),
               "--set", "teacher.max_steps=1", "--no-int8-teacher", "--disable-tqdm", "--output", str(tmp_path / "out")]  # fmt: skip
    recipe.write_text(RECIPE + "  - {kind: vocab_pruning}\n", encoding="utf-8")
    whole, known = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    pieces = Tokenizer(models.WordPiece({**known, "neverread": len(known)}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.post_processor = whole.pre_tokenizer, whole.post_processor
    shutil.copytree(teacher, tmp_path / "raw")
    names = {**tokenizer.special_tokens_map, "model_input_names": tokenizer.model_input_names}
    PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=60, **names).save_pretrained(tmp_path / "raw")
    glue, sizes = load("glue"), {}
    rows_of = glue.rows_of

    def noting(models, context, *args, contexts, **kwargs):
        for name, model in models.items():
            sizes[name] = (len(contexts.get(name, context).tokenizer), structure_of(model).vocab_size)
        return rows_of(models, context, *args, contexts=contexts, **kwargs)

    monkeypatch.setattr(glue, "rows_of", noting)
    assert glue.main(command) == 0
    assert sizes["teacher"][0] > sizes["smbert"][0] == sizes["smbert"][1]
    assert sizes["same shape, no distillation"] == sizes["smbert"]
    capsys.readouterr()
    assert glue.main([*command, "--intermediate", "mnli"]) == 2
    assert "must not prune the vocabulary" in capsys.readouterr().err


def test_glue_refuses_an_unknown_task(load, teacher, data_dir, recipe, tmp_path, capsys):
    command = ["--model", str(teacher), "--tasks", "nosuch", "--recipe", str(recipe), "--data-dir", str(data_dir)]
    assert load("glue").main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "nosuch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------- pool


def test_pool_labels_each_size_in_a_process_of_its_own(load, teacher, tmp_path, capsys):
    pool = load("pool")
    argv = ["--model", str(teacher), "--rows", "6,14", "--shard-rows", "5", "--output", str(tmp_path)]
    assert pool.main(argv) == 0
    rows = read(tmp_path / "pool.json")["rows"]
    assert [(r["rows"], r["labelled"], r["shards"]) for r in rows] == [(6, 6, 2), (14, 14, 3)]
    assert all(r["peak_memory_mb"] > 0 and r["written_mb"] > 0 for r in rows)
    assert "| 14 | 3 | 14 |" in (tmp_path / "pool.md").read_text(encoding="utf-8")
    argv[argv.index("6,14")] = "6,x"
    capsys.readouterr()
    assert pool.main(argv) == 2 and "`--rows`" in capsys.readouterr().err
    argv[1], argv[argv.index("6,x")] = str(tmp_path), "6"  # no checkpoint
    with pytest.raises(SystemExit, match="2"):
        pool.main(argv)
