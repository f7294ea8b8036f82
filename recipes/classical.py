"""Classical students of a fine-tuned classifier, beside the same students on gold labels.

    python recipes/classical.py --model TEACHER --task sst2 --data-dir glue --output out
    python recipes/classical.py --model TEACHER --train-file train.parquet --validation-file test.parquet --labels 2000 --output out

WHY these steps, in this order:
 1. Labels. With `--labels 2000` only so many rows keep theirs and the others become a pool of unlabelled text: there a teacher has
    something to give that labels cannot. On texts that all have labels it can only say how sure it is.
 2. Teacher. A raw checkpoint is fine-tuned first, on the same labels and no others. It is asked once about every text, before any
    student, so that all of them learn from the same soft labels. Texts of the pool that are also in the validation split are left
    out, and counted.
 3. Students, twice each, by the same function and with the same search for parameters: on the gold labels (the baseline), then on
    the teacher's soft labels. Only so does the difference say what the teacher is worth.
 4. Time, from raw text to label, with the tokenizer or vectorizer, teacher and students in turns in this one process.
 5. The report: metric, parameters, latency, and the majority class, above which a student has to be to have learned anything.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The folder of this script also holds a smbert.py, which must not hide the package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import rich  # noqa: E402
import torch  # noqa: E402
from transformers import set_seed  # noqa: E402

from smbert._int8_row import with_int8_teacher  # noqa: E402
from smbert._report_tables import INT8_TEACHER, TEACHER  # noqa: E402
from smbert._rows import at_most, read_files  # noqa: E402
from smbert.checkpoints import load_model  # noqa: E402
from smbert.classical import (  # noqa: E402
    STUDENTS,
    TeacherSource,
    check_kind,
    distill_classical,
    longest_row,
    settings_of,
    soft_label,
    texts_of,
)
from smbert.cli import add_data_flags, data_of, guarded, pairs  # noqa: E402
from smbert.compress import MAJORITY  # noqa: E402
from smbert.context import Context, device_of_run, on_device  # noqa: E402
from smbert.explain import as_classifier  # noqa: E402
from smbert.heads import is_finetuned, label_names, with_head  # noqa: E402
from smbert.inputs import as_tokenizer, tokenised  # noqa: E402
from smbert.measure import count_parameters, environment, size_mb, speedups  # noqa: E402
from smbert.report import Report, Row  # noqa: E402
from smbert.runner import Runner  # noqa: E402
from smbert.runtime import Classifier  # noqa: E402
from smbert.stages import Finetune  # noqa: E402
from smbert.tasks import majority_baseline  # noqa: E402
from smbert.text_latency import text_latency  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="teacher, folder or Hub id; fine-tuned on the labels where it is raw"
    )
    parser.add_argument("--teacher-epochs", type=float, default=3, help="of a raw teacher (default: %(default)s)")
    parser.add_argument("--teacher-lr", type=float, default=5e-5, help="of a raw teacher (default: %(default)s)")
    add_data_flags(parser)
    parser.add_argument("--labels", type=int, help="keep so many training labels, the other rows are the pool")
    parser.add_argument("--validation-samples", type=int, help="a fixed random subset of the validation rows")
    parser.add_argument("--unlabelled-file", help="texts without labels, for the pool")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), metavar="NAME")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="temperature=2 ..."
    )
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="ask the teacher in bfloat16; it is timed in float32")
    parser.add_argument(
        "--timing-seconds", type=float, default=10.0, help="per model and batch size (default: %(default)s)"
    )
    parser.add_argument("--no-int8-teacher", action="store_true", help="leave out the row of the teacher in int8")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bars")
    parser.add_argument("--output", required=True, help="folder for the report and the students")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    out, settings = Path(args.output), {"seed": args.seed, **pairs(args.changes, "--set")}
    settings_of(settings)
    set_seed(args.seed)  # of a raw checkpoint's head
    teacher = load_model(args.model, trust_remote_code=args.trust_remote_code)
    tokenizer = as_tokenizer(args.model, args.tokenizer, args.trust_remote_code)
    if args.train_file and args.label_names is None:
        args.label_names = label_names(teacher)
    task, data = data_of(args)
    check_kind(task)
    data["validation"] = at_most(data["validation"], args.validation_samples, "--validation-samples")
    quiet = args.disable_tqdm

    # 1. Labels.
    labelled, pool = data["train"], None
    if args.labels is not None:
        if not task.num_labels <= args.labels < len(labelled):
            raise ValueError(f"`--labels` must be from {task.num_labels} to {len(labelled) - 1}, got {args.labels}.")
        parts = labelled.train_test_split(train_size=args.labels, seed=args.seed, stratify_by_column=task.label_column)
        labelled, pool = parts["train"], parts["test"].remove_columns(task.label_column)
    if args.unlabelled_file:
        if pool is not None:
            raise ValueError("`--labels` and `--unlabelled-file` each make a pool. To resolve, pass one of them.")
        pool = read_files([args.unlabelled_file]).select_columns(list(task.text_columns))

    # 2. The teacher, once.
    if not is_finetuned(args.model):
        teacher = finetuned(args, teacher, tokenizer, task, labelled, data["validation"])
    teacher = on_device(teacher)
    source = TeacherSource(teacher, tokenizer, task, out / "cache", args.max_length, bf16=args.bf16, disable_tqdm=quiet)
    taught = soft_label(labelled, source)
    pool = None if pool is None else soft_label(pool, source)
    texts, gold = texts_of(data["validation"], task), list(data["validation"][task.label_column])
    metrics = {TEACHER: task.compute(source.logits(data["validation"]), gold)}
    models = {TEACHER: as_classifier(teacher, tokenizer, max_length=args.max_length).predict_proba}
    missing: list[str] = []
    if not args.no_int8_teacher:
        place = out / "teacher-int8"
        served, missing = with_int8_teacher({TEACHER: teacher}, tokenizer, place, args.max_length)
        if INT8_TEACHER in served:
            fast = Classifier(place, threads=args.threads or torch.get_num_threads(), spinning=False)
            metrics[INT8_TEACHER] = task.compute(fast.logits(texts), gold)
            if device_of_run().type == "cpu":  # it runs there, and has no place in turns with a GPU
                models[INT8_TEACHER] = fast.probabilities

    # 3. The students, on gold labels and on soft labels.
    found: dict[str, Any] = {}
    common: dict[str, Any] = {
        "task": task,
        "tokenizer": tokenizer,
        "held_out": data["validation"],
        "disable_tqdm": quiet,
    }
    for kind in args.students:
        table = teacher if kind == "static_embedding" else None  # its embeddings; the soft labels are in the rows
        for name, rows, more, extra in (
            (f"{kind}, gold labels", labelled, None, {"gold_weight": 1.0}),
            (f"{kind}, distilled", taught, pool, {}),
        ):
            found[name] = distill_classical(table, rows, more, kind, **{**common, **settings, **extra})
            found[name].save(out / "students" / name.replace(", ", "-").replace(" ", "-"))
            print(f"{name}: {task.compute(found[name].predict_logits(texts), gold)[task.headline]:.4f}", flush=True)

    # 4. Time.
    models |= {name: student.predict_proba for name, student in found.items()}
    probe = texts[:2000]
    timed = text_latency(models, probe, (1, min(32, len(probe))), min_seconds=args.timing_seconds, disable_tqdm=quiet)
    faster = speedups(timed)

    # 5. The report.
    report = Report(shlex.join(["python", "recipes/classical.py", *sys.argv[1:]]), environment(args.threads))

    def add(name: str, scores: dict[str, float], **more: Any) -> None:
        seed = None if name in (TEACHER, INT8_TEACHER, MAJORITY) else args.seed
        times = {"latency_ms": timed[name], "speedup": faster[name]} if name in timed else {}
        report.add(Row(name, task.name, seed, task.headline, scores[task.headline], scores, **times, **more))

    count = count_parameters(teacher)
    stored = {TEACHER: sum(p.numel() * p.element_size() for p in teacher.parameters()) / 1e6}
    if INT8_TEACHER in metrics:
        stored[INT8_TEACHER] = served[INT8_TEACHER].size_mb
    for name, mb in stored.items():
        add(
            name, metrics[name], params_total=count.total, params_encoder=count.encoder,
            params_embedding=count.embedding, size_mb=mb,
        )  # fmt: skip
    for name, student in found.items():
        add(
            name, task.compute(student.predict_logits(texts), gold), params_total=student.num_parameters,
            size_mb=size_mb(out / "students" / name.replace(", ", "-").replace(" ", "-")),
            train_seconds=student.training["seconds"],
        )  # fmt: skip
    majority = majority_baseline(task, data["train"], data["validation"])
    add(MAJORITY, majority)
    report.notes = missing + notes(report, found, labelled, pool, majority[task.headline])
    report.write(out)
    rich.print(report.table())
    print("\n".join(report.notes) + f"\n\nreport  {out / 'report.md'}\nstudents  {out / 'students'}")


def finetuned(args: argparse.Namespace, model: Any, tokenizer: Any, task: Any, labelled: Any, validation: Any) -> Any:
    """The raw checkpoint, fine-tuned on the labels that there are; found again by the same command."""
    splits = {"train": labelled, "validation": validation}
    context = Context(
        tokenizer=tokenizer,
        data=tokenised(task, splits, tokenizer, args.max_length or longest_row(model, tokenizer)),
        cache_dir=Path(args.output) / "cache",
        args={"disable_tqdm": True} if args.disable_tqdm else {},
        seed=args.seed,
    )
    stage = Finetune(epochs=args.teacher_epochs, learning_rate=args.teacher_lr)
    return Runner(args.output).run(stage, with_head(model, task), context, "00-teacher")[0]


def notes(report: Report, found: dict[str, Any], labelled: Any, pool: Any, majority: float) -> list[str]:
    """What the table does not say."""
    rows = {row.name: row for row in report.rows}
    largest = list(rows[TEACHER].latency_ms)[-1]
    size = int(largest.partition("x")[0])
    rates = [f"{n} {1e3 * size / row.latency_ms[largest]['p50']:,.0f}" for n, row in rows.items() if row.latency_ms]
    lines = [
        f"Latency: from raw text to label, tokenizer or vectorizer included; 1 and {size} validation texts a call.",
        f"Texts per second, {size} at a time: {'; '.join(rates)}.",
        f"{len(labelled):,} labelled texts, {0 if pool is None else len(pool):,} unlabelled ones for the distilled students.",
        "A student's parameters: the numbers that a prediction depends on, without the vocabulary; its MB: the saved folder.",
    ]
    for name, student in found.items():
        done = student.training
        left_out = [
            f"{done[k]} {k.replace('_', ' ')}"
            for k in done
            if k.endswith(("also_held_out", "also_labelled")) and done[k]
        ]
        above = 100 * ((rows[name].metric or 0.0) - majority)
        chosen = f", chosen {done['parameters']}" if done.get("parameters") else ""
        alone = name.endswith("distilled") and done["taught_by"] == "gold labels"
        kept = ["of gold labels alone, since the teacher's made it no better out of fold"] if alone else []
        lines.append(
            f"{name}: {above:+.1f} points over the majority class{chosen}{''.join(', ' + t for t in [*kept, *left_out])}."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
