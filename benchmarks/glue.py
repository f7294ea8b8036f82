"""GLUE: teacher, teacher through the intermediate task, same shape without distillation, SmBERT; retention, size, latency.

    python benchmarks/glue.py --model DIR_OR_ID --tasks rte,mrpc,sst2,qnli,qqp --recipe recipes/smbert.yaml \
        --intermediate mnli --data-dir DIR --seeds 0,1,2 --output DIR

WHY the rows: SmBERT's encoder has seen the intermediate task, and the plain teacher has not. The teacher through the intermediate
task is the fair control, and the same shape without distillation tells what the distillation is worth.

 1. Once: the chain runs on the intermediate task (fine-tune, halve the depth twice, distill, prune, recover).
 2. Per task and seed (a cell): the teacher is fine-tuned, the compressed encoder learns from it, the controls are trained. With
    --pool-samples the student sees more text besides, soft-labelled by the task's teacher.
 3. All models of a cell are scored on the validation split and timed in turns in one process.

Each stage and each cell is skipped when it is done already: kill it at any time and run the same command again. The report holds
every cell in the folder, so that tasks with more seeds than others are a second command with the same --output.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import more_text
import numpy as np
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from smbert._int8_row import with_int8_teacher
from smbert.checkpoints import load_model
from smbert.cli import guarded, pairs
from smbert.compress import STUDENT, TEACHER, UNDISTILLED, rows_of, undistilled, untaught_start
from smbert.context import Context
from smbert.heads import with_head
from smbert.inputs import as_recipe, tokenised, tokenised_pool
from smbert.measure import environment
from smbert.recipe import Recipe
from smbert.report import Report, Row
from smbert.runner import Runner, context_at_end, run_recipe, write_json
from smbert.stages import Outline, TrainingStage, VocabPruning
from smbert.surgery import structure_of
from smbert.tasks import load_task, tokenize, write_submission
from smbert.teacher import freeze, predict_logits

THROUGH = "teacher through the intermediate task"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a raw encoder")
    parser.add_argument("--tasks", default="rte,mrpc,sst2,qnli,qqp", help="comma separated (default: %(default)s)")
    parser.add_argument("--recipe", default="smbert", help="name or YAML file (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="set a recipe key"
    )
    parser.add_argument(
        "--intermediate", help="run the chain on this task first (the paper: mnli); default: on each task itself"
    )
    parser.add_argument("--data-dir", help="folder of the tasks' folders (default: the Hub)")
    parser.add_argument("--seeds", default="0", help="comma separated (default: %(default)s)")
    parser.add_argument(
        "--control-seeds", default=None, help="seeds of the row through the intermediate task (default: all)"
    )
    parser.add_argument("--max-train-samples", type=int, help="a fixed random subset of each task's training rows")
    parser.add_argument("--intermediate-samples", type=int, help="the same for the intermediate task")
    parser.add_argument(
        "--intermediate-epochs", type=float, help="of the teacher on the intermediate task (default: the recipe's)"
    )
    more_text.add_arguments(parser, "the intermediate task's")
    parser.add_argument("--output", required=True, help="folder for stages, cells and the report")
    parser.add_argument(
        "--student-steps", type=int, help="of the last stage on the tasks themselves (default: the recipe's)"
    )
    parser.add_argument(
        "--control-steps", type=int, help="of the row without distillation (default: as many as the student's)"
    )
    parser.add_argument("--no-int8-teacher", action="store_true", help="leave out the row of the teacher in int8")
    parser.add_argument("--no-submissions", action="store_true", help="do not label the official test split")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.set_defaults(run=run)
    args = parser.parse_args(argv)
    return guarded(run, args)


def run(args: argparse.Namespace) -> None:
    more_text.check(args)
    out = Path(args.output)
    recipe = as_recipe(args.recipe)
    if changes := pairs(args.changes, "--set"):
        recipe = recipe.override(changes)
    if args.intermediate and any(isinstance(stage, VocabPruning) for stage in recipe.stages):
        raise ValueError(
            "`--recipe` must not prune the vocabulary together with `--intermediate`, whose encoder all tasks share with the checkpoint's own "
            "tokenizer. To resolve, leave out one of the two."
        )
    tasks, seeds = args.tasks.split(","), [int(s) for s in args.seeds.split(",")]
    controls = seeds if args.control_seeds is None else [int(s) for s in args.control_seeds.split(",") if s]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    common = {
        "tokenizer": tokenizer,
        "args": {"disable_tqdm": True} if args.disable_tqdm else {},
        "cache_dir": out / "cache",
    }
    encoder = tuned = None
    command = shlex.join(["python", "benchmarks/glue.py", *sys.argv[1:]])
    for seed in seeds:
        for name in tasks:
            file = out / "cells" / f"{name}-{seed}.json"
            if not file.is_file():
                if args.intermediate and encoder is None:
                    tuned, encoder = compressed_encoder(args, recipe, common, out / args.intermediate)
                rows, notes = cell(
                    args,
                    name,
                    seed,
                    recipe,
                    common,
                    out / f"{name}-{seed}",
                    encoder,
                    tuned if seed in controls else None,
                    not args.no_int8_teacher,
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {"command": command, "environment": environment(), "rows": rows, "notes": notes})
            report = report_of(out, command)
    print(report.markdown())


def report_of(out: Path, command: str) -> Report:
    """The report of all cells in the folder, written there."""
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "cells").glob("*.json"))]
    notes = dict.fromkeys(note for cell in cells for note in cell.get("notes", ()))
    report = Report(command=command, environment=cells[-1]["environment"], notes=list(notes))
    for row in [Row.from_dict(row) for cell in cells for row in cell["rows"]]:
        report.add(row)
    report.write(out)
    return report


def limited(recipe: Recipe, samples: int | None) -> Recipe:
    """The recipe with its training stages limited to so many rows."""
    if samples is None:
        return recipe
    stages = tuple(replace(s, max_train_samples=samples) if isinstance(s, TrainingStage) else s for s in recipe.stages)
    return replace(recipe, stages=stages, teacher=replace(recipe.teacher, max_train_samples=samples))


def compressed_encoder(
    args: argparse.Namespace, recipe: Recipe, common: dict[str, Any], folder: Path
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The checkpoint fine-tuned on the intermediate task, and its compressed form; made once, with seed 0."""
    task, data = load_task(args.intermediate, args.data_dir)
    context = Context(data=tokenised(task, data, common["tokenizer"], recipe.max_length), seed=0, **common)
    chain = limited(recipe, args.intermediate_samples)
    if args.intermediate_epochs is not None:
        chain = replace(chain, teacher=replace(chain.teacher, epochs=args.intermediate_epochs))
    chain = chain.through(task.name)
    # The intermediate task is the target here, and the last stage of the chain belongs to the cells.
    chain = replace(chain, stages=tuple(replace(s, task=None) if hasattr(s, "task") else s for s in chain.stages[:-1]))
    set_seed(0)
    model = load_model(args.model)
    chain.check(Outline(structure_of(model)), replace(context, teacher=model))
    runner = Runner(folder)
    small, _ = run_recipe(chain, model, context, runner)
    return load_model(folder / chain.folder_names[0]), small


def with_pool(args: argparse.Namespace, recipe: Recipe, context: Context) -> tuple[Recipe, Context]:
    """The student's rows filled up with text that carries no label."""
    own, task = context.data.train.shuffle(seed=context.seed), context.data.task
    assert context.data.texts is not None
    source = args.pool_task or args.intermediate
    if args.max_train_samples is not None and args.max_train_samples < len(own):
        own = own.select(range(args.max_train_samples))  # the rows that the teacher saw
    texts = more_text.unlabelled(
        task,
        context.data.texts["train"],
        len(own),
        args.pool_samples,
        context.seed,
        source,
        args.data_dir,
        turned=args.turned_pairs,
    )
    if texts is None:
        return recipe, context
    pool, texts = tokenised_pool(texts, task, context.tokenizer, recipe.max_length)
    filled = replace(context, data=replace(context.data, train=own), pool=pool, pool_texts=texts)
    return limited(recipe, len(own) + len(texts)), filled


def cell(
    args: argparse.Namespace,
    name: str,
    seed: int,
    recipe: Recipe,
    common: dict[str, Any],
    folder: Path,
    encoder: PreTrainedModel | None,
    tuned: PreTrainedModel | None,
    int8_teacher: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of one task and seed, and what the report should say of them."""
    task, data = load_task(name, args.data_dir)
    recipe = limited(recipe, args.max_train_samples)
    context = Context(data=tokenised(task, data, common["tokenizer"], recipe.max_length), seed=seed, **common)
    set_seed(seed)
    raw = with_head(load_model(args.model), task)
    if encoder is None:  # else checked on the intermediate task
        recipe.check(Outline(structure_of(raw)), replace(context, teacher=raw))
    teacher, record = Runner(folder).run(recipe.teacher, raw, context, "00-teacher")
    models, seconds = {TEACHER: teacher}, {TEACHER: record["seconds"]}
    if tuned is not None:
        set_seed(seed)
        models[THROUGH], record = Runner(folder / "through").run(
            recipe.teacher, with_head(copy.deepcopy(tuned), task), context, "00-teacher"
        )
        seconds[THROUGH] = record["seconds"]
    if args.student_steps:
        recipe = replace(recipe, stages=(*recipe.stages[:-1], replace(recipe.stages[-1], max_steps=args.student_steps)))
    taught = replace(context, teacher=freeze(copy.deepcopy(teacher)))
    chain, start = recipe, copy.deepcopy(teacher)
    if encoder is not None:
        set_seed(seed)
        chain, start = replace(recipe, stages=recipe.stages[-1:]), with_head(copy.deepcopy(encoder), task)
    if args.pool_samples:
        chain, taught = with_pool(args, chain, taught)
    runner = Runner(folder / "smbert")
    small, records = run_recipe(chain, start, taught, runner)
    contexts = {STUDENT: context_at_end(chain, taught, runner)}  # vocab_pruning leaves another tokenizer
    models[STUDENT], seconds[STUDENT] = small, sum(r["seconds"] for r in records)
    untaught = untaught_start(recipe, raw, context)
    control = undistilled(recipe, small, untaught, len(context.data.train))
    if args.control_steps:
        control = control.override({"finetune.max_steps": args.control_steps})
    runner = Runner(folder / "undistilled")
    twin, records = run_recipe(control, untaught, context, runner)
    contexts[UNDISTILLED] = context_at_end(control, context, runner)
    models[UNDISTILLED], seconds[UNDISTILLED] = twin, sum(r["seconds"] for r in records)
    if "test" in data and len(data["test"]) and not args.no_submissions:
        for label, model in models.items():
            submission(
                model,
                task,
                data,
                contexts.get(label, context),
                folder / "submission" / label.replace(" ", "_").replace(",", ""),
                recipe.max_length,
            )
    timed, notes = models, []
    if int8_teacher:
        timed, notes = with_int8_teacher(models, context.tokenizer, folder / "teacher-int8")
        notes = [f"{note} A cell is measured anew where its file in cells/ is deleted." for note in notes]
    return [row.to_dict() for row in rows_of(timed, context, seconds, data, contexts=contexts)], notes


def submission(model: PreTrainedModel, task: Any, data: Any, context: Context, folder: Path, max_length: int) -> None:
    """The GLUE server's file, where the official test split is complete."""
    rows = tokenize(data["test"], task, context.tokenizer, max_length)
    logits: np.ndarray = predict_logits(model, rows, context.collator, disable_tqdm=context.disable_tqdm)
    try:
        write_submission(task, logits, folder)
    except ValueError as error:
        print(f"no submission file: {error}")


if __name__ == "__main__":
    sys.exit(main())
