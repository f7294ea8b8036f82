"""A small student from few labels and much unlabelled text, against what the labels alone are worth.

    python recipes/unlabelled.py --teacher DIR_OR_ID --student DIR_OR_ID --task sst2 --data-dir DIR --labels 1000 --seeds 0,1,2 --output DIR

WHY these steps:
 1. Labels are dear, text is cheap. A large checkpoint learns well from the N labels that there are: the teacher.
 2. It labels the whole pool once, with logits and not classes, since how sure it is teaches more than what it says. Shards on disk:
    the pool may be larger than memory, `accelerate launch` shares it out, and a killed run goes on. Texts of the evaluation set stay out.
 3. The student learns from the pool. It sees many times as many texts as there are labels, so it overfits less and ends near the teacher.
 4. The controls say what that was worth: the student on the same N labels, and on 2N. "same shape, no distillation" is the first.

The pool is the rest of the training text, or --pool FILE ... (csv, json, parquet). Students may have another tokenizer than the teacher.
Document: "BERT-small taught on unlabelled text" of the project's sources.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# The folder of this script also holds a smbert.py, which must not hide the package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from datasets import Dataset, concatenate_datasets  # noqa: E402
from transformers import AutoTokenizer, set_seed  # noqa: E402

from smbert._int8_row import with_int8_teacher  # noqa: E402
from smbert._report_tables import INT8_TEACHER  # noqa: E402
from smbert._rows import at_most, read_files  # noqa: E402
from smbert.checkpoints import load_model  # noqa: E402
from smbert.cli import guarded  # noqa: E402
from smbert.compress import STUDENT, TEACHER, UNDISTILLED, rows_of  # noqa: E402
from smbert.context import Context, TaskData  # noqa: E402
from smbert.heads import check_labels, is_finetuned, with_head  # noqa: E402
from smbert.inputs import tokenised  # noqa: E402
from smbert.measure import environment  # noqa: E402
from smbert.pool import label_pool, read_pool  # noqa: E402
from smbert.processes import process_state  # noqa: E402
from smbert.report import Report, Row  # noqa: E402
from smbert.runner import Runner  # noqa: E402
from smbert.stages import Distill, Finetune  # noqa: E402
from smbert.tasks import Task, load_files, load_task, prepare, tokenize  # noqa: E402

DOUBLED = "same shape, twice the labels"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher",
        required=True,
        help="raw checkpoint that is fine-tuned on the labels, or one that is fine-tuned already",
    )
    parser.add_argument("--student", required=True, help="small checkpoint")
    parser.add_argument("--task", help="GLUE task")
    parser.add_argument("--data-dir", help="folder of the task's data (default: the Hub)")
    parser.add_argument("--train-file")
    parser.add_argument("--validation-file")
    parser.add_argument("--text-columns", nargs="+")
    parser.add_argument("--label-column")
    parser.add_argument("--pool", nargs="+", metavar="FILE", help="unlabelled texts in the same text columns")
    parser.add_argument("--pool-samples", type=int, help="at most so many texts of the pool")
    parser.add_argument("--validation-samples", type=int, help="a fixed random subset of the validation rows")
    parser.add_argument("--labels", type=int, default=1000, help="N, labelled rows (default: %(default)s)")
    parser.add_argument(
        "--seeds", default="0", help="comma separated; each draws its own labels (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--teacher-epochs", type=float, default=5, help="on the N labels (default: %(default)s)")
    parser.add_argument("--student-epochs", type=float, default=3, help="on the pool (default: %(default)s)")
    parser.add_argument("--control-epochs", type=float, default=8, help="of the controls (default: %(default)s)")
    parser.add_argument("--teacher-lr", type=float, default=5e-5, help="(default: %(default)s)")
    parser.add_argument("--student-lr", type=float, default=2e-4, help="of student and controls (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the soft labels (default: %(default)s)")
    parser.add_argument("--no-int8-teacher", action="store_true", help="leave out the row of the teacher in int8")
    parser.add_argument("--output", required=True, help="folder for stages, shards and the report")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.set_defaults(run=run)
    args = parser.parse_args(argv)
    return guarded(run, args)


def run(args: argparse.Namespace) -> None:
    if args.train_file:
        task, data = load_files(
            args.train_file, args.validation_file, text_columns=args.text_columns, label_column=args.label_column
        )
    elif args.task:
        task, data = load_task(args.task, args.data_dir)
    else:
        raise ValueError("--task or --train-file must be given. To resolve, name a GLUE task or your own files.")
    train, validation = data["train"], data["validation"]
    if not 1 <= args.labels <= len(train):
        raise ValueError(
            f"--labels must be from 1 to {len(train)}, the labelled rows, got {args.labels}. To resolve, lower it."
        )
    validation = at_most(validation, args.validation_samples, "--validation-samples")
    pool = prepare(task, {"unlabelled": read_files(args.pool)}, ("unlabelled",))["unlabelled"] if args.pool else None
    report = Report(command=shlex.join(["python", "recipes/unlabelled.py", *sys.argv[1:]]), environment=environment())
    for seed in [int(s) for s in args.seeds.split(",")]:
        for row in one_seed(args, seed, task, train, validation, pool, report):
            report.add(row)
        if process_state().is_main_process:
            report.write(args.output)
    if process_state().is_main_process:
        print(report.markdown())


def one_seed(
    args: argparse.Namespace,
    seed: int,
    task: Task,
    train: Dataset,
    validation: Dataset,
    pool: Dataset | None,
    report: Report,
) -> list[Row]:
    """Teacher, taught student and the two controls, on labels that the seed draws."""
    out = Path(args.output) / f"seed-{seed}"
    drawn = train.shuffle(seed=seed)
    labelled = drawn.select(range(args.labels))
    text = [*task.text_columns]
    rest = pool if pool is not None else drawn.select(list(range(args.labels, len(drawn))))  # an empty range fails
    if args.pool_samples is not None and args.pool_samples < len(rest):
        rest = rest.select(range(args.pool_samples))
    texts = concatenate_datasets([labelled.select_columns(text), rest.select_columns(text)])

    contexts = {}
    for name, checkpoint in ((TEACHER, args.teacher), (STUDENT, args.student)):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        contexts[name] = Context(
            tokenizer=tokenizer,
            data=tokenised(task, {"train": labelled, "validation": validation}, tokenizer, args.max_length),
            cache_dir=out / "cache",
            args={"disable_tqdm": True} if args.disable_tqdm else {},
            seed=seed,
        )
    runner, models, seconds = Runner(out), {}, {}

    def train_one(name: str, stage: Any, checkpoint: str, context: Context, folder: str) -> None:
        set_seed(seed)  # of the new head
        models[name], record = runner.run(stage, with_head(load_model(checkpoint), task), context, folder)
        seconds[name] = record["seconds"]

    if is_finetuned(args.teacher):
        models[TEACHER] = load_model(args.teacher)
        check_labels(models[TEACHER], task)
        if (note := "The teacher came fine-tuned, on labels that are not counted here.") not in report.notes:
            report.notes.append(note)
    else:
        tuning = Finetune(epochs=args.teacher_epochs, learning_rate=args.teacher_lr)
        train_one(TEACHER, tuning, args.teacher, contexts[TEACHER], "00-teacher")

    teacher, student = contexts[TEACHER], contexts[STUDENT]
    counts = label_pool(
        models[TEACHER], teacher.tokenizer, task, texts, out / "pool",
        exclude=validation, max_length=args.max_length, disable_tqdm=args.disable_tqdm,
    )  # fmt: skip
    report.notes.append(
        f"Seed {seed}: {counts.labelled} of {counts.rows} texts of the pool were kept; {counts.in_excluded} stand in the "
        f"evaluation set, {counts.repeated} were repeated, {counts.empty} empty."
    )
    taught = read_pool(out / "pool").tokenised(task, student.tokenizer, args.max_length)
    from_pool = replace(student, data=replace(student.data, train=taught))
    distilling = Distill(
        objectives=({"kind": "logits", "weight": 1.0, "temperature": args.temperature},),
        epochs=args.student_epochs,
        learning_rate=args.student_lr,
        dropout=0.0,
    )
    train_one(STUDENT, distilling, args.student, from_pool, "01-distill")

    control = Finetune(epochs=args.control_epochs, learning_rate=args.student_lr)
    train_one(UNDISTILLED, control, args.student, student, "02-labels")
    if len(drawn) >= 2 * args.labels:
        twice = tokenize(drawn.select(range(2 * args.labels)), task, student.tokenizer, args.max_length)
        doubled = replace(student, data=TaskData(task, twice, student.data.validation))
        train_one(DOUBLED, control, args.student, doubled, "03-twice_the_labels")
    elif (note := f"Only {len(drawn)} rows have labels: no control with twice the labels.") not in report.notes:
        report.notes.append(note)
    splits = {"train": labelled, "validation": validation}
    timed = models
    try:
        if not process_state().is_main_process:
            return []
        if not args.no_int8_teacher:
            timed, notes = with_int8_teacher(models, teacher.tokenizer, out / "teacher-int8")
            report.notes += [note for note in notes if note not in report.notes]
        return rows_of(timed, student, seconds, splits, contexts={TEACHER: teacher, INT8_TEACHER: teacher})
    finally:  # the next seed would run beside the timing; and a failure must not leave the others waiting
        process_state().wait_for_everyone()


if __name__ == "__main__":
    sys.exit(main())
