"""The frontier after recovery: smbert's family against what else makes a small model, at the same speed-ups and training steps.

    python benchmarks/frontier.py --model DIR_OR_ID --tasks mrpc,rte --data-dir DIR --speedups 2,4,6,10,15 --seeds 0 \
        --small-model DIR_OR_ID --peer-python textpruner-env/bin/python --output DIR

Methods: smbert (the family of `smbert compress --speedups`), smbert-small (likewise, from a ready small checkpoint that the teacher has
taught), paper-recipe (the SmBERT chain), theseus (module replacing alone), depth-first (module replacing to half of the layers, then
the family's stages), truncated (the same shape fine-tuned on labels), small and small-taught (a ready small checkpoint, fine-tuned, or
taught by the task's teacher), textbrewer (GeneralDistiller), textpruner. A peer whose package is not there is left out, and the
report says so.

With --pool-samples whatever learns from the teacher sees more text besides, without labels: the task's other rows, then --pool-task's.

WHY the same steps: a member of the family has been recovered once for each speed-up up to its own, and whatever it is compared with
trains for as long; the small checkpoint for as long as the last member, and its own family is recovered in addition. All start from, or
learn from, one teacher and see the same rows; a pool is for what learns from it. WHY in turns: a speed-up is the teacher's time over
the model's in one process, all models of a cell one after the other.

 1. Per task and seed: the teacher.
 2. Per task, seed and speed-up (a cell): every method's model, evaluated on the validation split and timed. A method that needs a shape
    takes the largest of its kind that reaches the speed-up on this machine, or 95 % of it as a member of the family may; that is
    measured once (shapes.json).

Each stage and each cell is skipped when it is done already: kill it at any time and run the same command again. Methods, tasks and
seeds may be added by a second command with the same --output; the report holds every cell that is there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import more_text
from datasets import DatasetDict
from frontier_methods import FIXED, OF_SMALL, SIZED, Bench, Shapes, Skipped
from frontier_peers import absent
from matplotlib.figure import Figure
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from smbert._int8_row import with_int8_teacher
from smbert._report_tables import INT8_TEACHER, over_tasks
from smbert.checkpoints import load_model
from smbert.cli import guarded, numbers, pairs
from smbert.compress import MAJORITY, TEACHER, rows_of
from smbert.context import Context
from smbert.heads import with_head
from smbert.inputs import as_recipe, tokenised, tokenised_pool
from smbert.measure import environment
from smbert.recipe import Recipe
from smbert.report import Report, Row
from smbert.runner import Runner, write_json
from smbert.stages import Outline, RetrainingFreePruning
from smbert.surgery import structure_of
from smbert.tasks import load_task
from smbert.teacher import dataset_fingerprint, freeze, model_fingerprint

METHODS = {**SIZED, **FIXED}
SHAPE = "32x128"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a raw encoder")
    parser.add_argument("--tasks", default="mrpc,rte", help="comma separated (default: %(default)s)")
    parser.add_argument("--data-dir", help="folder of the tasks' folders (default: the Hub)")
    parser.add_argument("--seeds", default="0", help="comma separated (default: %(default)s)")
    parser.add_argument("--max-train-samples", type=int, help="a fixed random subset of each task's training rows")
    more_text.add_arguments(parser, "none")
    parser.add_argument("--speedups", default="2,4,6,10,15", help="at a batch of 32 x 128 (default: %(default)s)")
    parser.add_argument(
        "--at",
        help="those of --speedups whose cells are wanted now; small and small-taught go with the last (default: all)",
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma separated (default: %(default)s)")
    parser.add_argument("--recipe", default="frontier", help="of the family: name or YAML file (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
        help="set a key of --recipe; distill.max_steps=300 sets the steps of one recovery",
    )  # fmt: skip
    parser.add_argument("--paper-recipe", default="smbert", help="the SmBERT chain (default: %(default)s)")
    parser.add_argument("--small-model", help="folder or Hub id of a ready small checkpoint, such as MiniLM-L6")
    parser.add_argument("--peer-python", help="interpreter of TextPruner's environment")
    parser.add_argument("--no-int8-teacher", action="store_true", help="leave out the row of the teacher in int8")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.add_argument("--output", required=True, help="folder for stages, cells and the report")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    out, command = Path(args.output), shlex.join(["python", "benchmarks/frontier.py", *sys.argv[1:]])
    speedups = sorted(set(numbers(args.speedups, "--speedups")))
    if speedups[0] <= 1:
        raise ValueError(f"`--speedups` must be above 1, got {args.speedups!r}. To resolve, try 2,4,6.")
    now = numbers(args.at, "--at") if args.at else speedups
    if not set(now) <= set(speedups):
        raise ValueError(f"`--at` must be among --speedups {args.speedups}, got {args.at!r}. To resolve, leave it out.")
    more_text.check(args)
    recipe, paper = as_recipe(args.recipe), as_recipe(args.paper_recipe)
    if changes := pairs(args.changes, "--set"):
        recipe = recipe.override(changes)
    if sum(isinstance(stage, RetrainingFreePruning) for stage in recipe.stages) != 1:
        raise ValueError("`--recipe` must have exactly one retraining_free stage. To resolve, use frontier.")
    methods, left_out = asked_methods(args)
    for reason in left_out:
        print(reason, file=sys.stderr)
    encoder = encoder_of(args.model)
    settings = {
        "model": model_fingerprint(encoder), "speedups": speedups, "max_train_samples": args.max_train_samples,
        "pool_samples": args.pool_samples, "pool_task": args.pool_task, "turned_pairs": args.turned_pairs or None,  # older folders have none
        "recipe": recipe.to_dict(), "paper_recipe": paper.to_dict(),
    }  # fmt: skip
    data = {name: load_task(name, args.data_dir) for name in args.tasks.split(",")}  # all, before any work
    same_settings(out / "settings.json", settings)
    for name, (_, splits) in data.items():
        rows = {f"{split} rows of {name}": dataset_fingerprint(splits[split]) for split in ("train", "validation")}
        same_settings(out / f"data-{name}.json", rows)
    same_small_model(out / "small.json", args.small_model)
    shapes = Shapes(encoder, out / "shapes.json")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for seed in (int(s) for s in args.seeds.split(",")):
        for name, (task, splits) in data.items():
            wanted = {
                file: (chosen, speedup)
                for file, chosen, speedup in cells(out, name, seed, methods, speedups, args.small_model)
                if speedup in now
            }
            if wanted:
                texts = limited(splits, args.max_train_samples, seed)
                more = None
                if args.pool_samples:
                    own = len(texts["train"])
                    more = more_text.unlabelled(
                        task,
                        splits["train"],
                        own,
                        args.pool_samples,
                        seed,
                        args.pool_task,
                        args.data_dir,
                        turned=args.turned_pairs,
                    )
                pool, pool_texts = tokenised_pool(more, task, tokenizer, recipe.max_length)
                context = Context(
                    tokenizer=tokenizer,
                    data=tokenised(task, texts, tokenizer, recipe.max_length),
                    pool=pool,
                    pool_texts=pool_texts,
                    cache_dir=out / "cache",
                    args={"disable_tqdm": True} if args.disable_tqdm else {},
                    seed=seed,
                )
                set_seed(seed)  # of the head
                headed, folder = with_head(load_model(args.model), task), out / f"{name}-{seed}"
                bench = Bench(
                    folder, headed, with_teacher(recipe, paper, headed, context, folder), texts, recipe, paper, speedups, shapes,
                    args.small_model, args.peer_python,
                )  # fmt: skip
            for file, (chosen, speedup) in wanted.items():
                measured = cell(bench, chosen, speedup, not args.no_int8_teacher)
                made = {"command": command, "environment": environment(), **measured}
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, made)
                report_of(out, command, left_out)
    print(report_of(out, command, left_out).markdown())


def asked_methods(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The methods of the command line that can run here, and why the others cannot."""
    asked = args.methods.split(",")
    if unknown := [name for name in asked if name not in METHODS]:
        raise ValueError(f"`--methods` must be among {', '.join(METHODS)}, got {unknown}. To resolve, correct it.")
    reasons = {}
    if args.small_model is None:
        reasons |= dict.fromkeys(OF_SMALL, "no small checkpoint was named. To resolve, pass --small-model.")
    for name, python in (("textbrewer", sys.executable), ("textpruner", args.peer_python)):
        if name in asked and (reason := absent(name, python)):
            reasons[name] = reason
    return [name for name in asked if name not in reasons], [
        f"{name} was left out: {reasons[name]}" for name in asked if name in reasons
    ]


def encoder_of(checkpoint: str) -> PreTrainedModel:
    """The bare encoder; a pooler that the checkpoint lacks gets the same random weights each time, so that it is known again."""
    set_seed(0)
    return load_model(checkpoint, head="encoder")


def same_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where the folder holds cells of other settings."""
    settings = json.loads(json.dumps(settings))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    known = json.loads(file.read_text(encoding="utf-8"))
    if changed := sorted(key for key in settings if settings[key] != known.get(key)):
        raise ValueError(
            f"{file.parent} was made with other settings ({', '.join(changed)}). To resolve, choose another `--output`."
        )


def same_small_model(file: Path, small: str | None) -> None:
    """Raises ValueError for another small checkpoint than that of the folder's cells, or none; a first one may come later."""
    if small is not None:
        same_settings(file, {"small_model": model_fingerprint(encoder_of(small))})
    elif file.is_file():
        raise ValueError(f"{file.parent} holds models of a small checkpoint. To resolve, pass its --small-model again.")


def limited(splits: DatasetDict, samples: int | None, seed: int) -> DatasetDict:
    """The splits with so many random training rows, which are then all that any method sees."""
    if samples is None or samples >= len(splits["train"]):
        return splits
    return DatasetDict({**splits, "train": splits["train"].shuffle(seed=seed).select(range(samples))})


def with_teacher(recipe: Recipe, paper: Recipe, raw: Any, context: Context, folder: Path) -> Context:
    """The context with the fine-tuned teacher, after both recipes have been checked against the checkpoint."""
    for chain in (recipe, paper):
        chain.check(Outline(structure_of(raw)), replace(context, teacher=raw))
    teacher, _ = Runner(folder).run(recipe.teacher, raw, context, "00-teacher")
    return replace(context, teacher=freeze(teacher))


def cells(
    out: Path, task: str, seed: int, methods: Sequence[str], speedups: Sequence[float], small: str | None
) -> list[tuple[Path, list[str], float]]:
    """Files of the cells that lack a method that was asked for, with all methods that they shall hold, and their speed-up."""
    sized, fixed = ([name for name in methods if name in kind] for kind in (SIZED, FIXED))
    found = [(f"{task}-{seed}-{s:g}x", sized, s) for s in speedups]
    found.append((f"{task}-{seed}-{Path(small or '').name}", fixed, speedups[-1]))
    wanted = []
    for name, chosen, speedup in found:
        file = out / "cells" / f"{name}.json"
        done = json.loads(file.read_text(encoding="utf-8"))["methods"] if file.is_file() else []
        if set(chosen) - set(done):  # trained models stay; only measuring is repeated, in turns with the new ones
            wanted.append((file, [name for name in METHODS if name in {*chosen, *done}], speedup))
    return wanted


def cell(bench: Bench, methods: Sequence[str], speedup: float, int8_teacher: bool) -> dict[str, Any]:
    """The rows of one task, seed and speed-up, and why methods have none."""
    models, seconds, contexts = {TEACHER: bench.teacher}, {}, {}
    about: dict[str, Any] = {"task": bench.context.data.task.name, "seed": bench.context.seed, "speedup": speedup}
    notes: list[str] = []
    skipped: dict[str, str] = {}
    for name in methods:
        try:
            made = METHODS[name](bench, speedup)
        except Skipped as error:
            skipped[name] = str(error)
            continue
        title = row_name(name, speedup, bench.small)
        models[title], seconds[title] = made.model, made.seconds
        if made.context is not None:
            contexts[title] = made.context
        if made.note is not None:
            notes.append(f"{about['task']}, seed {about['seed']}: {made.note}.")
    if int8_teacher:
        models, more = with_int8_teacher(models, bench.context.tokenizer, bench.folder / "teacher-int8")
        notes += more
    rows = rows_of(models, bench.context, seconds, bench.texts, contexts=contexts)
    return {
        **about, "steps": bench.steps(speedup), "methods": list(methods), "skipped": skipped, "notes": notes,
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip


def row_name(method: str, speedup: float, small: str | None) -> str:
    if method in FIXED:
        return f"{Path(small or '').name}, {'taught' if method == 'small-taught' else 'fine-tuned'}"
    return f"{method} {speedup:g}x"


def report_of(out: Path, command: str, left_out: Sequence[str]) -> Report:
    """The report of all cells in the folder, written there with its picture."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in (out / "cells").glob("*.json")]
    found.sort(key=lambda c: (c["task"], c["seed"], set(c["methods"]) <= set(FIXED), c["speedup"]))
    report = Report(command=command, environment=found[-1]["environment"] if found else environment())
    for row in (Row.from_dict(row) for made in found for row in made["rows"]):
        known = any((r.name, r.task, r.seed) == (row.name, row.task, row.seed) for r in report.rows)
        # Every cell has those; their milliseconds are those of the first.
        if not (row.name in (TEACHER, INT8_TEACHER, MAJORITY) and known):
            report.add(row)
    steps = dict.fromkeys(f"{c['task']} {c['speedup']:g}x: {c['steps']}" for c in found)
    report.notes = [
        f"Training steps of every method after the teacher's: {'; '.join(steps)}; smbert-small has the small checkpoint's and then its own family's.",
        "Each speed-up is against the teacher as its own cell timed it; the teacher's milliseconds here are the first cell's.",
        *left_out,
    ]
    report.notes += dict.fromkeys(note for made in found for note in made.get("notes", ()))
    for made in found:
        where = f"{made['task']}, seed {made['seed']}, {made['speedup']:g}x"
        report.notes += [f"{where}: {name} has no row: {reason}." for name, reason in made["skipped"].items()]
    report.notes.append("![retention against the measured speed-up](frontier.png)")
    report.write(out)
    draw(report, sorted({c["speedup"] for c in found}), out / "frontier.png")
    return report


def draw(report: Report, speedups: Sequence[float], path: Path) -> None:
    """Retention against the measured speed-up: a line for each method, a point for each model that is of one size."""
    tasks, shown = over_tasks(report.aggregates())
    if not shown:  # one task, or none that all have
        tasks = list(dict.fromkeys(row.task for row in report.rows))[:1]
        shown = [a for a in report.aggregates() if a.task in tasks]
    speed = f"speedup.{SHAPE}"
    points = {a.name: (a.mean[speed], 100 * a.mean["retention"]) for a in shown if {speed, "retention"} <= set(a.mean)}
    lines = {m: [f"{m} {s:g}x" for s in speedups if f"{m} {s:g}x" in points] for m in SIZED}
    others = [n for n in points if n != TEACHER and not any(n in names for names in lines.values())]
    figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
    axes = figure.subplots()
    for method, names in lines.items():
        if names:
            emphasis = {"linewidth": 2.2, "zorder": 3} if method == "smbert" else {"linewidth": 1.0, "alpha": 0.8}
            axes.plot(*zip(*sorted(points[n] for n in names)), marker="o", markersize=4, label=method, **emphasis)
    for name, mark in zip(others, "sD^vP*X"):
        axes.plot(*points[name], marker=mark, linestyle="none", label=name)
    axes.axhline(100, color="0.6", linestyle="--", linewidth=1, label="teacher")
    axes.set_xlabel(f"measured speed-up at {SHAPE.replace('x', ' x ')}")
    axes.set_ylabel(f"% of the teacher on {', '.join(tasks)}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=5, loc="outside upper center")
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
