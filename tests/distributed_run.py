"""What each process of tests/test_distributed.py runs: compress() with stages that train, and pruning without. Arguments: MODEL OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from run_helpers import FAST, QUIET, splits, tiny_context, tiny_recipe
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification

import smbert
from smbert.processes import process_state
from smbert.stages.retraining_free import METHODS
from smbert.surgery import structure_of
from smbert.teacher import model_fingerprint
from smbert.trainer import SmbertTrainer


def pruned_without_retraining(folder: Path) -> dict[str, Any]:
    """Fingerprint, widths, and answers to two rows, of a tiny model pruned by each method."""
    context, model = tiny_context(folder), tiny("bert")
    two = {k: v for k, v in context.collator([context.data.validation[i] for i in (0, 1)]).items() if k != "labels"}
    found: dict[str, Any] = {}
    for method in METHODS:
        stage = smbert.RetrainingFreePruning(
            method=method, macs="50%", samples=32, calibration=8, batch_size=4, search_steps=4
        )
        pruned, _ = stage.run(model, context, folder)
        with torch.no_grad():
            answers = pruned.eval()(**two).logits.tolist()
        found[method] = [model_fingerprint(pruned), [list(pair) for pair in structure_of(pruned).layer_widths], answers]
    return found


def main(model: str, out: str) -> None:
    state = process_state()
    assert state.num_processes == 2 and dist.get_world_size() == 2 and dist.get_backend() == "gloo"
    sys.modules["smbert.compress"].SHAPES = ((1, 16),)  # type: ignore[attr-defined]
    data = splits()
    untrained = pruned_without_retraining(Path(f"{out}-pruned"))
    # Neither head nor last layer gets a gradient from the queries, keys and values of the last layer.
    relation = smbert.compress(
        model, [smbert.Distill(objectives=({"kind": "relation"},), **FAST)], train_dataset=data["train"], eval_dataset=data["validation"],
        output_dir=f"{out}-relation", args=QUIET, baseline=False, int8_teacher=False,
    )  # fmt: skip
    scored, plans, trained = [], [], []
    batches: list[list[str]] = []
    width: Any = sys.modules["smbert.stages.width"]
    score, keep_units = width.score, width.keep_units

    def spy_score(model, batches, *args, **kwargs):
        scored.append(sum(len(batch["input_ids"]) for batch in batches))
        return score(model, batches, *args, **kwargs)

    def spy_plan(model, plan):
        plans.append(plan.to_dict())
        return keep_units(model, plan)

    def spy_run(run):
        def spied(*args):
            result, info = run(*args)
            trained.append(model_fingerprint(result))
            return result, info

        return spied

    def spy_loss(self, model, inputs, *args, **kwargs):
        batches.append([str(row[row > 0].tolist()) for row in inputs["input_ids"]])
        return compute_loss(self, model, inputs, *args, **kwargs)

    compute_loss = SmbertTrainer.compute_loss
    SmbertTrainer.compute_loss = spy_loss  # type: ignore[method-assign]
    # What a rank has before the main process's files are read by all.
    width.score, width.keep_units = spy_score, spy_plan
    for stage in smbert.STAGES.values():
        stage.run = spy_run(stage.run)  # type: ignore[method-assign]
    runs = []
    for _ in range(2):  # the second is a resumed one
        result = smbert.compress(
            model, tiny_recipe(), train_dataset=data["train"], eval_dataset=data["validation"], output_dir=out, args=QUIET, baseline=False,
            int8_teacher=False,
        )  # fmt: skip
        runs.append(model_fingerprint(result.model))
    loaded = AutoModelForSequenceClassification.from_pretrained(result.model_dir)
    about = {
        "relation": model_fingerprint(relation.model),
        "runs": runs,
        "loaded": model_fingerprint(loaded),
        "rows_scored": scored,
        "plans": plans,
        "trained": trained,
        "batches": batches,
        "retraining_free": untrained,
    }
    (Path(out) / f"rank{state.process_index}.json").write_text(json.dumps(about))
    state.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
