"""benchmarks/frontier.py, its peers and recipes/frontier.py on tiny models: every method in every cell, resumed, and told what is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import NOISE, TELLING
from datasets import Dataset
from run_helpers import millisecond_per_mac, raw_checkpoint, splits, tiny_context, tiny_tokenizer
from safetensors.torch import save_file
from tiny_models import tiny
from transformers import PreTrainedTokenizerFast

from smbert._report_tables import INT8_TEACHER
from smbert.checkpoints import load_model, save_model
from smbert.family import TOLERANCE
from smbert.measure import macs
from smbert.recipe import Recipe
from smbert.report import Report
from smbert.retraining_free.cost_table import CostTable
from smbert.retraining_free.search import BudgetOutOfReach, check_reachable
from smbert.stages import DepthReduction, Distill, Finetune
from smbert.surgery import PruningPlan, keep_layers, keep_units, structure_of
from smbert.target import Sizes
from smbert.tasks import glue_task
from smbert.trainer import SmbertTrainer

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
FAMILY = """
name: tiny family
max_length: 32
teacher: {max_steps: 2, batch_size: 8}
stages:
  - {kind: retraining_free, speedup: 9, samples: 16, batch_size: 8, calibration: 8, search_steps: 0, ffn_levels: 4}
  - {kind: distill, max_steps: 2, batch_size: 8, objectives: [{kind: logits}, {kind: hidden}]}
"""
PAPER = """
name: tiny paper
max_length: 32
stages:
  - {kind: depth_reduction, layers: 1/2, max_steps: 30, batch_size: 8}
  - {kind: width_pruning, heads: 1/2, ffn: 1/2, samples: 8}
  - {kind: distill, max_steps: 10, batch_size: 8, objectives: [{kind: logits}]}
"""


def module(name: str) -> Any:
    """A script below benchmarks/, imported by its name as the scripts import each other."""
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("frontier", "frontier_methods", "frontier_peers", "more_text"):
        sys.modules.pop(name, None)


def by_macs(models: Mapping[str, Any], shapes: Any, **_: Any) -> dict[str, dict[str, dict[str, float]]]:
    """A machine on which a multiply-accumulate takes a millisecond."""
    return {
        n: {f"{b}x{s}": {"p50": float(macs(m)), "p95": float(macs(m))} for b, s in shapes} for n, m in models.items()
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    millisecond_per_mac(monkeypatch)
    compress = importlib.import_module("smbert.compress")  # by its entry: the name smbert.compress is the function's
    monkeypatch.setattr(compress, "latency", by_macs)
    monkeypatch.setattr(compress, "with_int8_teacher", lambda models, *_: (dict(models), []))
    monkeypatch.setattr(module("frontier_methods"), "latency", by_macs)
    monkeypatch.setattr("smbert.report.draw", lambda aggregates: b"plot")


@pytest.fixture
def command(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Two speed-ups of one task with one seed; the checkpoint lacks a pooler, and the small one has a tokenizer of its own."""
    encoder, rng = tiny("bert", head="encoder", max_position_embeddings=132), random.Random(0)
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if "pooler" not in name}
    encoder.save_pretrained(tmp_path / "raw", state_dict=weights)
    tokenizer.save_pretrained(tmp_path / "raw")
    keep_layers(encoder, [0]).save_pretrained(tmp_path / "mini")
    tiny_tokenizer().save_pretrained(tmp_path / "mini")
    (tmp_path / "data" / "rte").mkdir(parents=True)
    for split, n in (("train", 40), ("validation", 12)):
        texts = [[" ".join(rng.choices(NOISE + TELLING[i % 2], k=5)) for i in range(n)] for _ in range(2)]
        rows = {"sentence1": texts[0], "sentence2": texts[1], "label": [i % 2 for i in range(n)]}
        Dataset.from_dict(rows).to_parquet(str(tmp_path / "data" / "rte" / f"{split}.parquet"))
    (tmp_path / "family.yaml").write_text(FAMILY)
    (tmp_path / "paper.yaml").write_text(PAPER)
    return [
        "--model", str(tmp_path / "raw"), "--tasks", "rte", "--data-dir", str(tmp_path / "data"), "--speedups", "2,6",
        "--max-train-samples", "24", "--pool-samples", "36", "--recipe", str(tmp_path / "family.yaml"), "--paper-recipe", str(tmp_path / "paper.yaml"),
        "--set", "distill.max_steps=3", "--disable-tqdm", "--output", str(tmp_path / "out"),
    ]  # fmt: skip


def fake_peer(name: str, python: str, out: Path, *arguments: Any) -> dict[str, Any]:
    """What the two peers would leave: TextBrewer a folder, TextPruner weights and the logits that they give."""
    given = dict(zip(arguments[::2], arguments[1::2]))
    record: dict[str, Any] = {"seconds": 1.0}
    if name == "textbrewer":
        shutil.copytree(given["--student"], out)
        record["steps"] = given["--steps"]
    else:
        teacher = load_model(given["--teacher"])
        heads, ffn = tuple(range(4))[-given["--heads"] :], tuple(range(64))[-given["--ffn"] :]
        pruned = keep_units(teacher, PruningPlan((heads,) * 4, (ffn,) * 4))
        out.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in pruned.state_dict().items()}, out / "weights.safetensors")
        row = json.loads(Path(given["--validation"]).read_text().splitlines()[0])
        ids = {k: torch.tensor([v]) for k, v in row.items() if k != "labels"}
        record["logits"] = pruned(**ids).logits.tolist()
    (out / "peer.json").write_text(json.dumps(record))
    return record


def test_every_method_in_every_cell_and_resumed(
    quick: None,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frontier, methods, out = module("frontier"), module("frontier_methods"), tmp_path / "out"
    monkeypatch.setattr(methods, "run_peer", fake_peer)
    monkeypatch.setattr(frontier, "absent", lambda name, python: None)
    command += ["--peer-python", "some-python"]
    assert frontier.main([*command, "--methods", "truncated", "--at", "6"]) == 0
    assert [row.name for row in Report.read(out).rows if row.name.endswith("x")] == ["truncated 6x"]
    assert frontier.main(command) == 0
    assert "small was left out: no small checkpoint was named" in capsys.readouterr().err
    report = Report.read(out)
    rows = {row.name: row for row in report.rows}
    assert {f"{name} 2x" for name in methods.SIZED if name not in (*methods.OF_SMALL, "depth-first")} <= set(rows)
    # Four layers cannot be six times fewer, and one head of four in each layer is no sixth either.
    reached = {f"{name} 6x" for name in ("smbert", "paper-recipe", "depth-first", "truncated", "textbrewer")}
    assert {name for name in rows if name.endswith(" 6x")} == reached
    notes = "\n".join(report.notes)
    assert "rte, seed 0, 6x: theseus has no row: no shape (of whole layers) reaches 6x" in notes
    assert "textpruner has no row: no shape (of all layers, narrower)" in notes
    assert "2x: depth-first has no row: half of the layers are 2.0 times as fast without pruning" in notes
    assert "rte 2x: 3; rte 6x: 8" in notes and "frontier.png" in notes
    for row in report.rows:
        if row.name.endswith("x"):
            assert row.speedup["32x128"] >= float(row.name.split()[-1][:-1])
            assert row.retention == pytest.approx(row.metric / rows["teacher"].metric) and row.params_total and row.macs
    names = [row.name for row in report.rows]
    served = find_spec("onnx") and find_spec("onnxruntime")
    assert names.count("teacher") == 1 and names.count(INT8_TEACHER) == (1 if served else 0)
    assert rows["teacher"].speedup["32x128"] == 1 and rows["majority class"].metric == 0.5
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    # As many steps for everybody: one recovery at the first speed-up, two at the second, the faster member's of more steps.
    steps = {
        folder.name: sum(json.loads(f.read_text()).get("optimiser_steps", 0) for f in folder.glob("[0-9]*/stage.json"))
        for folder in [*(out / "rte-0").glob("*-[26]x"), *(out / "rte-0" / "family").glob("*x")]
    }
    peers = {"textbrewer-2x": 0, "textbrewer-6x": 0}  # it trains in its own process
    own = {f"{n}-2x": 3 for n in ("paper-recipe", "theseus", "truncated", "textpruner")}
    assert steps == {**peers, **own, "paper-recipe-6x": 8, "depth-first-6x": 8, "truncated-6x": 8, "2x": 3, "6x": 5}
    taught = [
        json.loads((out / "rte-0" / f"textbrewer-{s}x" / "student" / "peer.json").read_text())["steps"] for s in (2, 6)
    ]
    assert taught == [3, 8]
    # The task's other rows teach whoever learns from the teacher.
    seen = {
        folder.name: json.loads(next(folder.glob("[0-9]*-distill/stage.json")).read_text())["train_rows"]
        for folder in [out / "rte-0" / "paper-recipe-2x", *(out / "rte-0" / "family").glob("*x")]
    }
    assert seen == dict.fromkeys(("paper-recipe-2x", "2x", "6x"), 36)
    lines = [len((out / "rte-0" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "train-and-pool")]
    assert lines == [24, 36]

    # The small checkpoint comes with a second command, and nothing else is made again.
    done = lambda _, __, out, *___: json.loads((out / "peer.json").read_text())  # noqa: E731
    monkeypatch.setattr(methods, "run_peer", done)
    monkeypatch.setattr(frontier, "draw", lambda *_: None)
    command += ["--small-model", str(tmp_path / "mini")]
    assert frontier.main(command) == 0
    again = Report.read(out)
    added = [row for row in again.rows if "mini" in row.name or "smbert-small" in row.name]
    assert [row.name for row in added] == ["smbert-small 6x", "mini, fine-tuned", "mini, taught"]
    assert all(row.speedup["32x128"] == pytest.approx(4) and row.retention is not None for row in added[1:])
    assert added[0].speedup["32x128"] >= 6 and added[0].retention is not None
    assert any("2x: smbert-small has no row: mini is 4.0 times as fast" in note for note in again.notes)
    assert [row for row in again.rows if row not in added] == report.rows
    for name in ("mini-fine-tuned", "mini-taught"):
        record = json.loads((out / "rte-0" / name / "01-training" / "stage.json").read_text())
        rows = 24 if name == "mini-fine-tuned" else 36
        assert record["optimiser_steps"] == 8 and record["train_rows"] == rows

    monkeypatch.setattr(frontier, "cell", None)
    monkeypatch.setattr(SmbertTrainer, "train", None)
    assert frontier.main(command) == 0
    assert Report.read(out).rows == again.rows
    capsys.readouterr()
    assert frontier.main(command[:-2]) == 2 and "pass its --small-model again" in capsys.readouterr().err
    assert frontier.main([*command[:-1], str(tmp_path / "raw")]) == 2
    assert "other settings (small_model)" in capsys.readouterr().err
    assert frontier.main([*command, "--pool-samples", "30"]) == 2
    assert "other settings (pool_samples)" in capsys.readouterr().err
    assert frontier.main([*command, "--set", "distill.max_steps=4"]) == 2
    error = capsys.readouterr().err
    assert "other settings (recipe)" in error and "To resolve" in error
    fewer = tmp_path / "data" / "rte" / "validation.parquet"
    Dataset.from_parquet(str(fewer)).select(range(8)).to_parquet(str(fewer))
    assert frontier.main(command) == 2
    assert "other settings (validation rows of rte)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--methods", "smbert,lottery"], "`--methods` must be among smbert, smbert-small"),
        (["--speedups", "fast"], "`--speedups`"),
        (["--speedups", "1,2"], "`--speedups` must be above 1"),
        (["--at", "6,8"], "`--at` must be among --speedups 2,6, got '6,8'"),
        (["--recipe", "smbert", "--set", "max_length=32"], "exactly one retraining_free stage"),
        (["--tasks", "rte,poetry"], "poetry"),
        (["--pool-samples", "0"], "`--pool-samples` must be at least 1"),
        (["--pool-task", "poetry"], "poetry"),
    ],
)
def test_tells_what_is_wrong_before_any_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], told: str
) -> None:
    assert module("frontier").main([*command, "--methods", "smbert", *change]) == 2
    error = capsys.readouterr().err
    assert told in error and "To resolve" in error and not (tmp_path / "out").exists()


def test_a_cell_is_made_again_only_for_a_new_method(tmp_path: Path) -> None:
    cells, file = module("frontier").cells, tmp_path / "cells" / "rte-0-2x.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"methods": ["smbert", "theseus"]}))
    assert cells(tmp_path, "rte", 0, ["theseus"], [2.0], None) == []
    assert cells(tmp_path, "rte", 0, ["truncated", "small"], [2.0], "hub/mini") == [
        (file, ["smbert", "theseus", "truncated"], 2.0),
        (tmp_path / "cells" / "rte-0-mini.json", ["small"], 2.0),
    ]


def test_a_member_out_of_reach_is_skipped_and_other_errors_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, context = module("frontier_methods"), tiny_context(tmp_path)
    with pytest.raises(BudgetOutOfReach, match="must be at least") as unreachable:
        check_reachable([], CostTable("latency_ms", 10, {}, {}), 5)
    bench = methods.Bench(tmp_path, tiny("bert"), context, splits(), Recipe(()), Recipe(()), [2.0, 4.0], {})

    def fails_with(error: Exception) -> Any:
        def family(*_: Any, output_dir: Path, **__: Any) -> None:
            save_model(tiny("bert"), output_dir / "2x" / "model")
            record = output_dir / "2x" / "01-retraining_free" / "stage.json"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({"seconds": 3, "latency_ms": {"predicted": 10.2, "measured": 10}}))
            raise error

        return family

    monkeypatch.setattr(methods, "compress_family", fails_with(unreachable.value))
    made = methods.smbert(bench, 2.0)
    assert structure_of(made.model).num_layers == 4 and made.seconds == 3
    assert made.note.startswith("family 2x, ") and made.note.endswith("10.2 / 10.0 (+2.0 %)")
    with pytest.raises(methods.Skipped, match="must be at least"):
        methods.smbert(bench, 4.0)
    monkeypatch.setattr(methods, "compress_family", fails_with(ValueError("the folder was made with other settings")))
    with pytest.raises(ValueError, match="other settings"):
        methods.smbert(bench, 4.0)


def test_steps_are_shared_out_as_the_recipe_shares_them(tmp_path: Path) -> None:
    methods, context = module("frontier_methods"), tiny_context(tmp_path)
    rows = len(context.data.train)
    few = replace(context, data=replace(context.data, train=context.data.train.select(range(20))))
    assert methods.steps_of(Finetune(epochs=1.5, batch_size=8), few) == 5  # three batches an epoch
    assert methods.steps_of(Finetune(epochs=2, batch_size=8, max_train_samples=8), few) == 2
    assert methods.steps_of(Finetune(max_steps=7), few) == 7
    with_pool = replace(few, pool=context.data.train.remove_columns("labels"))
    for stage, seen in (
        (Distill(batch_size=4), 20 + rows),
        (Distill(batch_size=4, data="pool"), rows),
        (Distill(batch_size=4, data="task"), 20),
        (Finetune(batch_size=4), 20),
    ):
        assert methods.steps_of(replace(stage, epochs=1), with_pool) == -(-seen // 4)
    chain = Recipe((DepthReduction(max_steps=250, slope=0.1), Distill(max_steps=450), Finetune(max_steps=50)))
    depth, distill, last = methods.with_steps(chain, 15, few).stages
    assert [s.max_steps for s in (depth, distill, last)] == [5, 9, 1] and depth.slope is None
    assert [s.max_steps for s in methods.with_steps(chain, 1, few).stages] == [1, 1, 1]


def test_text_without_labels_is_the_tasks_other_rows_and_then_another_tasks(tmp_path: Path) -> None:
    unlabelled, rows = module("more_text").unlabelled, 12
    columns = {"premise": [f"p{i}" for i in range(rows)], "hypothesis": [f"h{i}" for i in range(rows)]}
    (tmp_path / "mnli").mkdir()
    labelled = Dataset.from_dict({**columns, "label": [i % 3 for i in range(rows)]})
    labelled.to_parquet(str(tmp_path / "mnli" / "train.parquet"))
    pairs = {"sentence1": [f"a{i}" for i in range(10)], "sentence2": [f"b{i}" for i in range(10)]}
    train = Dataset.from_dict({**pairs, "label": [i % 2 for i in range(10)]})
    seen = set(train.shuffle(seed=3).select(range(6))["sentence1"])
    found = unlabelled(glue_task("rte"), train, 6, 15, 3, "mnli", str(tmp_path))
    assert found.column_names == ["sentence1", "sentence2"] and len(found) == 9
    assert set(found["sentence1"][:4]) == set(train["sentence1"]) - seen
    assert all(
        one[0] == "p" and other == f"h{one[1:]}"
        for one, other in zip(found["sentence1"], found["sentence2"])
        if one[0] != "a"
    )
    assert len(unlabelled(glue_task("rte"), train, 6, 99, 3, "mnli", str(tmp_path))) == 4 + rows
    turned = unlabelled(glue_task("rte"), train, 6, 15, 3, "mnli", str(tmp_path), turned=True)
    assert set(zip(turned["sentence1"][:6], turned["sentence2"][:6])) == {(f"b{a[1:]}", a) for a in seen}
    assert turned[6:]["sentence1"] == found[:3]["sentence1"]
    assert unlabelled(glue_task("rte"), train, 6, 6, 3, "mnli", str(tmp_path)) is None
    assert unlabelled(glue_task("rte"), train, 10, 99, 3) is None
    single = Dataset.from_dict({"sentence": ["one", "two"], "label": [0, 1]})
    assert len(unlabelled(glue_task("sst2"), single, 1, 99, 3, "mnli", str(tmp_path))) == 1  # pairs are no single texts
    assert unlabelled(glue_task("sst2"), single, 2, 99, 3, turned=True) is None


def test_shapes_are_the_largest_that_are_fast_enough_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, model = module("frontier_methods"), tiny("bert")
    monkeypatch.setattr(methods, "latency", by_macs)
    shapes = methods.Shapes(model, tmp_path / "shapes.json")
    assert [shapes.largest("depth", s) for s in (2.0, 4.0, 9.0)] == [Sizes(2, 4, 64), Sizes(1, 4, 64), None]
    assert [shapes.largest("width", s) for s in (2.0, 9.0)] == [Sizes(4, 2, 32), None]
    whole, cut = macs(model), methods.cut_to
    uniform = {speedup: shapes.largest("uniform", speedup) for speedup in (2.0, 4.0)}
    known = [macs(cut(model, sizes)) for sizes in methods.candidates(model)]
    for speedup, sizes in uniform.items():
        assert macs(cut(model, sizes)) == max(own for own in known if own <= whole / (TOLERANCE[0] * speedup))
    assert shapes.largest("depth", 2.1) == Sizes(2, 4, 64)  # 2.0 times as fast is as good as asked, see smbert.family
    monkeypatch.setattr(methods, "latency", None)
    again = methods.Shapes(model, tmp_path / "shapes.json")
    assert {speedup: again.largest("uniform", speedup) for speedup in uniform} == uniform
    assert again.largest("depth", 9.0) is None


# --------------------------------------------------------------------------------------------------------------------- peers


def test_a_peer_that_is_not_there_or_fails_is_named(tmp_path: Path) -> None:
    peers = module("frontier_peers")
    assert peers.absent("json", sys.executable) is None
    for name, python, hint in (
        ("textpruner", None, "--peer-python"),
        ("textpruner", "/no/such/python", "--peer-python"),
    ):
        assert f"{name} is not installed. To resolve" in peers.absent(name, python) and hint in peers.absent(
            name, python
        )
    with pytest.raises(ValueError, match=r"textbrewer failed: .*To resolve, run it alone: .*--output"):
        peers.run_peer("textbrewer", sys.executable, tmp_path / "out", "--no-such-flag", 1)
    with pytest.raises(ValueError, match=r"textpruner is not installed. To resolve, .*--peer-python"):
        peers.run_peer("textpruner", None, tmp_path / "out")
    methods, context = module("frontier_methods"), replace(tiny_context(tmp_path), teacher=tiny("bert"))
    (tmp_path / "shapes.json").write_text('{"width": {"2": {"layers": 4, "heads": 2, "ffn": 32}}}')
    shapes = methods.Shapes(tiny("bert"), tmp_path / "shapes.json")
    bench = methods.Bench(tmp_path, tiny("bert"), context, splits(), Recipe(()), Recipe(()), [2.0], shapes)
    with pytest.raises(ValueError, match="--peer-python"):  # a result that is there no longer
        methods.textpruner(bench, 2.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "peer.json").write_text('{"seconds": 1}')
    assert peers.run_peer("textpruner", None, tmp_path / "out") == {"seconds": 1}


def test_textbrewer_teaches_a_student_in_a_process_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("textbrewer")
    peers, context = module("frontier_peers"), tiny_context(tmp_path)
    teacher = tiny("bert")
    student = keep_units(keep_layers(teacher, [0, 1]), PruningPlan(((0, 1, 2),) * 2, (tuple(range(16)),) * 2))
    save_model(teacher, tmp_path / "teacher")
    save_model(student, tmp_path / "student")
    rows = peers.rows_file(context, "train", tmp_path)
    arguments = ("--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--train", rows, "--steps", 5)
    record = peers.run_peer("textbrewer", sys.executable, tmp_path / "out", *arguments, "--batch-size", 8)
    assert record["steps"] == 5 and record["peer"].startswith("textbrewer")
    taught = load_model(tmp_path / "out")
    assert structure_of(taught).layer_widths == ((3, 16), (3, 16))
    # Five steps at that learning rate bring its answers nearer to the teacher's, and leave the teacher as it was.
    batch = {k: v for k, v in context.collator(list(context.data.train)).items() if k != "labels"}
    with torch.no_grad():
        before, after = ((m(**batch).logits - teacher(**batch).logits).square().mean() for m in (student, taught))
    assert after < before
    assert not list((tmp_path / "out").glob("*.pkl"))


def stub_of_textpruner(asked: dict[str, Any]) -> ModuleType:
    """Its names as they are in 1.1.post2; the pruner keeps the last heads and neurons of BERT, in place, as the real one would."""
    stub = ModuleType("textpruner")
    stub.__version__ = "0"  # type: ignore[attr-defined]

    class TransformerPruner:
        def __init__(self, model: Any, transformer_pruning_config: Any, general_config: Any) -> None:
            self.model = model

        def prune(self, dataloader: Any, save_model: bool) -> None:
            asked["rows"] = sum(len(batch["labels"]) for batch in dataloader)
            heads, ffn = asked["target_num_of_heads"], asked["target_ffn_size"]
            plan = PruningPlan((tuple(range(4))[-heads:],) * 4, (tuple(range(64))[-ffn:],) * 4)
            self.model.bert = keep_units(self.model, plan).bert

    def config(**values: Any) -> None:
        asked.update(values)

    stub.TransformerPruner, stub.TransformerPruningConfig, stub.GeneralConfig = TransformerPruner, config, config  # type: ignore[attr-defined]
    return stub


def test_textpruners_weights_answer_here_as_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, context, asked = module("frontier_peers"), tiny_context(tmp_path), dict[str, Any]()
    monkeypatch.setitem(sys.modules, "textpruner", stub_of_textpruner(asked))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script takes its own folder away
    spec = importlib.util.spec_from_file_location("peers_textpruner", BENCHMARKS / "peers" / "textpruner.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    teacher = tiny("bert")
    save_model(teacher, tmp_path / "teacher")
    files = [peers.rows_file(context, split, tmp_path) for split in ("train", "validation")]
    argv = ["--teacher", tmp_path / "teacher", "--heads", 2, "--ffn", 24, "--train", files[0], "--validation", files[1]]
    assert script.main([*map(str, argv), "--output", str(tmp_path / "pruned")]) == 0
    assert asked["pruning_method"] == "iterative" and asked["n_iters"] == 4 and asked["rows"] == 32
    record = json.loads((tmp_path / "pruned" / "peer.json").read_text())
    sizes = Sizes(4, 2, 24)
    model = peers.with_weights(tmp_path / "pruned", teacher, sizes, context, record["logits"])
    assert structure_of(model).layer_widths == ((2, 24),) * 4
    assert context.evaluate(model)["accuracy"] == pytest.approx(record["metrics"]["accuracy"])
    with pytest.raises(ValueError, match="answer differently here"):
        peers.with_weights(tmp_path / "pruned", teacher, sizes, context, (torch.tensor(record["logits"]) + 1).tolist())


# -------------------------------------------------------------------------------------------------------------------- recipe


def test_the_recipe_runs_with_the_numbers_of_its_yaml(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("recipe_frontier", ROOT / "recipes" / "frontier.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert "WHY these steps" in script.__doc__ and len((ROOT / "recipes" / "frontier.py").read_text().splitlines()) < 45
    model, data, out = raw_checkpoint(tmp_path / "model"), splits(), tmp_path / "out"
    for name in ("train", "validation"):
        data[name].to_csv(tmp_path / f"{name}.csv", index=False)
    short = ["teacher.max_steps=1", "distill.max_steps=1"]
    short += [f"retraining_free.{key}" for key in ("samples=16", "calibration=8", "search_steps=0", "ffn_levels=4")]
    argv = [
        "--model", str(model), "--train-file", str(tmp_path / "train.csv"), "--validation-file", str(tmp_path / "validation.csv"),
        "--output-dir", str(out), "--disable-tqdm", "--speedups", "1.5", *(w for change in short for w in ("--set", change)),
    ]  # fmt: skip
    assert script.recipe_main("frontier", argv) == 0
    assert "smbert 1.5x" in capsys.readouterr().out
    made, written = Recipe.from_yaml(out / "1.5x" / "model" / "recipe.yaml"), Recipe.named("frontier")
    assert made.stages[1] == replace(written.stages[1], max_steps=1)
