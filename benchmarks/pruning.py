"""Pruning without retraining: the same fine-tuned teacher, data and MACs budgets for every method.

    python benchmarks/pruning.py --model FINETUNED_DIR --task mrpc --data-dir DIR --output DIR

WHY without retraining: training hides what pruning has broken, and here nothing does. WHY the same rows: all methods see the same
random training rows; magnitude sees none, and only taylor, fisher and torch-pruning (Taylor and Hessian) see their labels. Every
method may remove whole sub-layers.

 1. Once: the teacher's metric, and the time of one forward and backward pass over the rows, the unit of all pruning times (512 rows
    are timed).
 2. Per method and budget (a cell): prune, and evaluate on the whole validation split. What does not depend on the budget is made once:
    the cells of a scorer share its scores, whose seconds are part of each, and those of obs share one database of sizes, whose
    seconds stand beside those of the cell that built it.

Each cell is skipped when it is done already: kill it at any time and run the same command again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from training import peak_memory_mb
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from smbert._int8_row import with_int8_teacher
from smbert._report_tables import INT8_TEACHER, TEACHER
from smbert._sample_losses import label_losses
from smbert.allocate import plan_for
from smbert.checkpoints import load_model
from smbert.cli import guarded
from smbert.context import Context, device_of_run, on_device
from smbert.heads import check_labels, is_finetuned
from smbert.importance import Scores
from smbert.inputs import tokenised
from smbert.measure import count_parameters, environment, machine_line, macs
from smbert.runner import write_json
from smbert.stages import Stage, WidthPruning
from smbert.stages.retraining_free import RetrainingFreePruning
from smbert.surgery import keep_units, structure_of
from smbert.tasks import load_task
from smbert.teacher import dataset_fingerprint, model_fingerprint

SCORERS = ("magnitude", "taylor", "taylor_kl", "torch_pruning", "torch_pruning_hessian", "fisher")
METHODS = {"mask search": "fisher", "k-prune": "kprune", "obs": "obs"}
PASS_ROWS = 512  # are timed for the unit of all pruning times
LABELLED = ("taylor", "torch_pruning", "torch_pruning_hessian", "fisher")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model that is fine-tuned on the task")
    parser.add_argument("--task", default="mrpc", help="(default: %(default)s)")
    parser.add_argument("--data-dir", help="folder of the task's files (default: the Hub)")
    parser.add_argument(
        "--methods", default=",".join((*SCORERS, *METHODS)), help="comma separated (default: %(default)s)"
    )
    parser.add_argument(
        "--speedups", default="1.33,1.5,2,3,4", help="budgets: MACs over so much (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=2048, help="training rows that are seen (default: %(default)s)")
    parser.add_argument("--search-steps", type=int, default=90, help="of obs (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of rows (default: %(default)s)")
    parser.add_argument("--no-int8-teacher", action="store_true", help="leave out the teacher in int8")
    parser.add_argument("--output", required=True, help="folder for cells and the report")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    methods, speedups = args.methods.split(","), args.speedups.split(",")
    stages = {(name, s): stage_of(name, s, args) for name in methods for s in speedups}
    if not is_finetuned(args.model):
        raise ValueError(
            f"`--model` must be fine-tuned on {args.task}, and {args.model} has no task head. To resolve, run `smbert compress`, whose 00-teacher is."
        )
    task, data = load_task(args.task, args.data_dir)
    out, tokenizer = Path(args.output), AutoTokenizer.from_pretrained(args.model)
    model = on_device(load_model(args.model))
    check_labels(model, task)
    context = Context(
        tokenizer=tokenizer,
        data=tokenised(task, data, tokenizer, args.max_length),
        cache_dir=out / "cache",
        args={"disable_tqdm": True},
        seed=args.seed,
    )
    command = shlex.join(["python", "benchmarks/pruning.py", *sys.argv[1:]])
    identity = {
        "model": model_fingerprint(model),
        "task": task.name,
        "max_length": args.max_length,
        "data": [dataset_fingerprint(rows) for rows in (context.data.train, context.data.validation)],
        "samples": args.samples,
        "seed": args.seed,
        "search_steps": args.search_steps,
    }
    baseline = once(out / "cells" / "teacher.json", identity, lambda: teacher_cell(model, context, args.samples))
    int8 = None if args.no_int8_teacher else teacher_in_int8(out, identity, model, context)
    rows: list[dict[str, Any]] = []
    known: dict[str, Scored] = {}
    for (name, speedup), stage in stages.items():
        file = out / "cells" / f"{name.replace(' ', '-')}-{speedup}.json"
        rows.append(once(file, identity, lambda stage=stage: cell(stage, model, context, known)))  # type: ignore[misc]
        rows[-1].update(name=name, budget=float(speedup))
        rows[-1]["retention"] = rows[-1]["metric"] / baseline["metric"] if baseline["metric"] else None
        report = {
            "schema_version": 1, "teacher_int8": int8, "command": command, "environment": environment(), "task": args.task, "seed": args.seed,
            "samples": args.samples, "teacher": baseline, "rows": rows,
        }  # fmt: skip
        write_json(out / "pruning.json", report)
        (out / "pruning.md").write_text(markdown(report), encoding="utf-8")
        draw(report, out / "pruning.png")
    print(markdown(report))


def stage_of(name: str, speedup: str, args: argparse.Namespace) -> Stage:
    """The stage that prunes by a method to MACs over `speedup`."""
    try:
        if float(speedup) <= 1:
            raise ValueError
        share = str(1 / Fraction(speedup))
    except ValueError:
        raise ValueError(f"`--speedups` must be numbers above 1, got {speedup!r}. To resolve, correct it.") from None
    if name in SCORERS:
        return WidthPruning(
            heads=None, ffn=None, macs=share, scope="global", min_heads=0, min_ffn=0, scorer=name, samples=args.samples
        )
    if name in METHODS:
        return RetrainingFreePruning(
            method=METHODS[name], macs=share, samples=args.samples, calibration=min(256, args.samples // 2),
            search_steps=args.search_steps,
        )  # fmt: skip
    raise ValueError(
        f"`--methods` must be among {', '.join((*SCORERS, *METHODS))}, got {name!r}. To resolve, correct it."
    )


def once(file: Path, identity: Mapping[str, Any], make: Any) -> dict[str, Any]:
    """The content of a cell's file, made only if it is not there.

    Raises:
        ValueError: the file is of another teacher, other data or other settings.
    """
    if not file.is_file():
        value = {"of": identity, **make()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.pop("of") != identity:
        raise ValueError(
            f"{file} was made with another teacher, other data or other settings. To resolve, choose another `--output`."
        )
    return found


def teacher_cell(model: PreTrainedModel, context: Context, samples: int) -> dict[str, Any]:
    """The teacher's metrics, and the seconds of one forward and backward pass over so many rows in fp32, told by a part of them."""
    metrics = context.evaluate(model)
    samples = min(samples, len(context.data.train))
    rows = context.data.train.shuffle(seed=context.seed).select(range(min(samples, PASS_ROWS)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    batches = [context.collator([rows[i] for i in order[at : at + 32]]) for at in range(0, len(order), 32)]
    start = time.perf_counter()
    for batch in batches:
        inputs = {key: value.to(device_of_run()) for key, value in batch.items()}
        labels = {"labels": inputs.pop("labels")}
        label_losses("teacher", model, inputs, labels).sum().backward()
    synchronise()
    seconds = (time.perf_counter() - start) * samples / len(rows)
    model.zero_grad(set_to_none=True)
    return {**scores(metrics), "pass_seconds": seconds, **sizes(model)}


def teacher_in_int8(out: Path, identity: Mapping[str, Any], model: PreTrainedModel, context: Context) -> dict[str, Any]:
    """The metrics of the teacher in int8, or why there are none; only metrics are kept, so that a second run tries again."""
    file = out / "cells" / "teacher-int8.json"
    if file.is_file():
        return once(file, identity, dict)
    served, notes = with_int8_teacher({TEACHER: model}, context.tokenizer, out / "teacher-int8")
    if INT8_TEACHER not in served:
        return {"missing": notes[0]}
    return once(file, identity, lambda: scores(context.evaluate(served[INT8_TEACHER])))


class Scored(NamedTuple):
    """Scores of a scorer, and what they took."""

    scores: Scores
    seconds: float
    memory_mb: float


def cell(stage: Stage, model: PreTrainedModel, context: Context, known: dict[str, Scored]) -> dict[str, Any]:
    """One method at one budget; `known` is given the scores that it makes."""
    set_seed(context.seed)
    peak_memory_mb()
    start = time.perf_counter()
    if isinstance(stage, WidthPruning):
        if stage.scorer not in known:
            scored = stage.scores(model, context)
            synchronise()
            known[stage.scorer] = Scored(scored, time.perf_counter() - start, peak_memory_mb())
        own, start = known[stage.scorer], time.perf_counter()
        pruned = keep_units(model, plan_for(model, own.scores, stage.budget))
        rows_seen = 0 if stage.scorer == "magnitude" else min(stage.samples, len(context.data.train))
        seconds, memory, told = time.perf_counter() - start + own.seconds, max(own.memory_mb, peak_memory_mb()), {}
    else:
        pruned, info = stage.run(model, context, context.cache_dir)
        synchronise()
        seconds, memory, rows_seen = time.perf_counter() - start, peak_memory_mb(), info["sampled_rows"]
        told = {key: info[key] for key in ("database_seconds", "calibration_loss") if key in info}
    return {
        **scores(context.evaluate(pruned)), **sizes(pruned), "seconds": seconds, "rows_seen": rows_seen, "peak_memory_mb": memory, **told
    }  # fmt: skip


def synchronise() -> None:
    """Waits for a GPU, whose work goes on when a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def scores(metrics: Mapping[str, float]) -> dict[str, Any]:
    name = next(iter(metrics))
    return {"metric_name": name, "metric": metrics[name], "metrics": dict(metrics)}


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "macs": macs(model),
        "params_total": count_parameters(model).total,
        "layer_widths": [list(pair) for pair in structure_of(model).layer_widths],
    }


def markdown(report: Mapping[str, Any]) -> str:
    """One line per method with the retention at each budget, then what it took."""
    teacher, rows = report["teacher"], report["rows"]
    names, budgets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "budget"))
    found = {(row["name"], row["budget"]): row for row in rows}
    metric = teacher["metric_name"]
    lines = [f"# Pruning without retraining: {report['task']}", "", "```bash", report["command"], "```", ""]
    lines += [f"| method | {' | '.join(f'{b:g}x' for b in budgets)} | seconds | passes | MB |"]
    lines += ["|---|" + "---:|" * (len(budgets) + 3)]
    for name in names:
        own = [found[name, b] for b in budgets if (name, b) in found]
        cells = [
            f"{found[name, b]['metric']:.3f} ({100 * (found[name, b]['retention'] or 0):.1f} %)"
            if (name, b) in found
            else "–"
            for b in budgets
        ]
        mark = "" if name in LABELLED else " *"
        took = [min(row["seconds"] for row in own), max(row["seconds"] for row in own)]
        shown = f"{took[0]:.0f} – {took[1]:.0f}"
        passes = " – ".join(f"{t / teacher['pass_seconds']:.1f}" for t in took)
        memory = max(row["peak_memory_mb"] for row in own)
        lines.append(f"| {name}{mark} | {' | '.join(cells)} | {shown} | {passes} | {memory:.0f} |")
    lines += [
        "",
        f"{metric} on the validation split, in brackets as a share of the teacher's {teacher['metric']:.3f}; budgets are MACs of the "
        f"encoder at 128 tokens over so much. {report['samples']} training rows at most, seed {report['seed']}; * without their "
        "labels (magnitude without the rows, too). Seconds: least and most over the budgets; passes: the same in units of one forward "
        f"and backward pass of the teacher over these rows in fp32, {teacher['pass_seconds']:.1f} s. MB: peak memory of the process with "
        "teacher and data (on a GPU: the GPU's).",
    ]
    databases = [row["database_seconds"] for row in rows if "database_seconds" in row]
    if databases:
        lines += [
            "",
            f"The longest of obs built the database of all sizes, {max(databases):.0f} s; the others read it.",
        ]
    if int8 := report["teacher_int8"]:
        share = (
            f" ({100 * int8['metric'] / teacher['metric']:.1f} %)" if int8.get("metric") and teacher["metric"] else ""
        )
        lines += ["", int8.get("missing") or f"Beside all of them, the {INT8_TEACHER}: {int8['metric']:.3f}{share}."]
    lines += ["", machine_line(report["environment"])]
    return "\n".join([*lines, "", "![retention against MACs](pruning.png)", ""])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Lines of the metric against the budget, the teacher's as a level."""
    figure = Figure(figsize=(7, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in report["rows"]):
        points = sorted((row["budget"], row["metric"]) for row in report["rows"] if row["name"] == name)
        axes.plot(*zip(*points), marker="o", markersize=4, label=name)
    axes.axhline(report["teacher"]["metric"], color="0.6", linestyle="--", linewidth=1, label="teacher")
    axes.set_xlabel("MACs: times fewer")
    axes.set_ylabel(f"{report['task']} {report['teacher']['metric_name']}, not retrained")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=5, loc="outside upper center")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
