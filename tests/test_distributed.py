"""Two processes make one plan and one model, under the launcher that a user would take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import pruned_without_retraining
from run_helpers import raw_checkpoint, same_weights, stage_folders, tiny_context, tiny_recipe
from transformers import AutoModelForSequenceClassification

from smbert.report import Report
from smbert.runner import Runner, finished_stage, run_recipe
from smbert.surgery import structure_of
from smbert.teacher import freeze, model_fingerprint

NAMES = ["00-teacher", "01-depth_reduction", "02-distill", "03-width_pruning", "04-finetune"]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """compress() on a raw checkpoint, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    model = raw_checkpoint(folder / "model")
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "distributed_run.py"), str(model), str(folder / "out")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "out"


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank{i}.json").read_text()) for i in (0, 1)]


def test_each_rank_has_the_same_plan_and_the_same_weights(ranks: list[dict[str, Any]]) -> None:
    one, two = ranks
    assert one["plans"] == two["plans"] and len(one["plans"]) == 1
    assert [len(heads) for heads in one["plans"][0]["heads"]] == [3, 3]
    # The teacher and four stages, before anything was read from a file; the resumed run trained nothing.
    assert one["trained"] == two["trained"] and len(one["trained"]) == 5 == len(set(one["trained"]))
    assert one["runs"] == two["runs"] and len(set(one["runs"])) == 1


def test_a_loss_that_leaves_the_head_alone_trains(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["relation"] == ranks[1]["relation"]


def test_the_rows_are_shared_out(ranks: list[dict[str, Any]]) -> None:
    assert [rank["rows_scored"] for rank in ranks] == [[4], [4]]
    # Four stages train for two steps of eight rows: four on each rank, and not the same four.
    one, two = ([{*rows} for rows in rank["batches"]] for rank in ranks)
    assert [len(rows) for rows in one] == [len(rows) for rows in two] == [4] * 8
    assert all(not a & b for a, b in zip(one, two, strict=True))


def test_files_are_whole_and_load(out: Path, ranks: list[dict[str, Any]]) -> None:
    assert stage_folders(out) == NAMES
    for name, fingerprint in zip(NAMES, ranks[0]["trained"], strict=True):
        record = json.loads((out / name / "stage.json").read_text())
        assert finished_stage(out / name, record["inputs"]) == record
        assert model_fingerprint(AutoModelForSequenceClassification.from_pretrained(out / name)) == fingerprint
    assert not [p for p in out.rglob(".*") if p.name.endswith((".part", ".partial", ".previous"))]
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert model_fingerprint(model) == ranks[0]["loaded"] == ranks[0]["runs"][0]
    assert structure_of(model).layer_widths == ((3, 48), (3, 48))
    assert [row.name for row in Report.read(out).rows] == ["teacher", "smbert", "majority class"]


def test_the_plan_is_that_of_one_process(out: Path, tmp_path: Path) -> None:
    """Half of the rows on each rank: the plan agrees only if the scores are added before anything is chosen."""
    student = AutoModelForSequenceClassification.from_pretrained(out / "02-distill")
    teacher = freeze(AutoModelForSequenceClassification.from_pretrained(out / "00-teacher"))
    context = tiny_context(tmp_path, seed=42, teacher=teacher)
    run_recipe(replace(tiny_recipe(), stages=tiny_recipe().stages[2:3]), student, context, Runner(tmp_path))
    assert same_weights(tmp_path / "01-width_pruning", out / "03-width_pruning")


def test_pruning_without_retraining_is_that_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Moments, Fisher information and losses are sums over the ranks, each of which has seen half of the rows."""
    one, two = (rank["retraining_free"] for rank in ranks)
    assert one == two
    alone = pruned_without_retraining(tmp_path)
    for method, (_, widths, answers) in one.items():
        assert widths == alone[method][1], method
        torch.testing.assert_close(torch.tensor(answers), torch.tensor(alone[method][2]), rtol=1e-3, atol=1e-4)
