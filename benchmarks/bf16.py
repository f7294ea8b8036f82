"""What bf16 autocast costs in quality and gains in time, against fp32: the same model, data and seeds, fine-tuned in both.

    python benchmarks/bf16.py --model DIR_OR_ID --tasks rte,mrpc,sst2 --data-dir DIR --seeds 0,1,2 --output DIR

WHY: smbert trains in bf16 wherever the hardware multiplies bf16, unless told otherwise. This is the evidence that it may. Both are
scored in fp32, so that only the training differs. The spread over seeds says how large a difference means nothing.

A cell is one task, seed and precision. Cells that are done are skipped, and an interrupted one goes on from its checkpoint: kill it at
any time and run the same command again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import AutoTokenizer, set_seed

from smbert.checkpoints import load_model
from smbert.cli import guarded
from smbert.context import Context, on_device
from smbert.inputs import tokenised
from smbert.measure import environment, machine_line
from smbert.report import Report, Row
from smbert.runner import Runner, write_json
from smbert.stages import Finetune
from smbert.tasks import load_task

PRECISIONS = ("fp32", "bf16")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a raw encoder")
    parser.add_argument("--tasks", default="rte,mrpc,sst2", help="comma separated (default: %(default)s)")
    parser.add_argument("--data-dir", help="folder of the tasks' folders (default: the Hub)")
    parser.add_argument("--max-train-samples", type=int, help="a fixed random subset of each task's training rows")
    parser.add_argument("--max-length", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=3.0, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--freeze-embeddings", action="store_true", help="as the key of the stages")
    parser.add_argument("--seeds", default="0", help="comma separated (default: %(default)s)")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.add_argument("--output", required=True, help="folder for the models, bf16.json and bf16.md")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    out, tokenizer = Path(args.output), AutoTokenizer.from_pretrained(args.model)
    stage = Finetune(
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_train_samples=args.max_train_samples,
        freeze_embeddings=args.freeze_embeddings,
    )
    report = Report(shlex.join(["python", "benchmarks/bf16.py", *sys.argv[1:]]), environment())
    for name in args.tasks.split(","):
        task, data = load_task(name, args.data_dir)
        splits = tokenised(task, data, tokenizer, args.max_length)
        for seed in map(int, args.seeds.split(",")):
            for precision in PRECISIONS:
                options = {"bf16": precision == "bf16", "disable_tqdm": args.disable_tqdm}
                context = Context(tokenizer, splits, cache_dir=out / "cache", args=options, seed=seed)
                report.add(cell(args.model, stage, context, precision, out / f"{task.name}-{seed}-{precision}"))
                write(report, out)
    print(summary(report))


def cell(model: str, stage: Finetune, context: Context, precision: str, folder: Path) -> Row:
    """Fine-tuned and scored once; the row is kept beside the model."""
    task, file = context.data.task, folder / "row.json"
    set_seed(context.seed)  # the same fresh head in both precisions
    tuned, record = Runner(folder).run(stage, load_model(model), context, "00-finetune")
    if not file.is_file():
        metrics = context.evaluate(on_device(tuned))
        headline = task.headline
        row = Row(
            precision,
            task.name,
            context.seed,
            headline,
            metrics[headline],
            metrics,
            train_seconds=record["train_seconds"],
        )
        write_json(file, row.to_dict())
    return Row.from_dict(json.loads(file.read_text(encoding="utf-8")))


def write(report: Report, out: Path) -> None:
    """After every cell, so that a killed run leaves what it knows."""
    write_json(out / "bf16.json", report.to_dict())
    (out / "bf16.md").write_text(summary(report), encoding="utf-8")


def summary(report: Report) -> str:
    """Per task the means over the seeds that both precisions have, their difference, and the speed-up."""
    lines = ["# bf16 against fp32 in training", "", "```bash", report.command, "```", ""]
    lines += ["| task | metric | seeds | fp32 | bf16 | difference | fp32 (s) | bf16 (s) | faster |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for task in dict.fromkeys(row.task for row in report.rows):
        found = {p: {r.seed: r for r in report.rows if (r.task, r.name) == (task, p)} for p in PRECISIONS}
        seeds = [seed for seed in found["fp32"] if seed in found["bf16"]]
        if not seeds:
            continue
        scores = {p: [float(found[p][seed].metric or 0.0) for seed in seeds] for p in PRECISIONS}
        seconds = {p: fmean(float(found[p][seed].train_seconds or 0.0) for seed in seeds) for p in PRECISIONS}
        difference = fmean(scores["bf16"]) - fmean(scores["fp32"])
        cells: list[Any] = [task, found["fp32"][seeds[0]].metric_name, len(seeds)]
        cells += [spread(scores[p]) for p in PRECISIONS]
        cells += [f"{difference:+.3f}", *(f"{seconds[p]:.1f}" for p in PRECISIONS)]
        cells.append(f"{seconds['fp32'] / seconds['bf16']:.2f}x" if seconds["bf16"] else "–")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    machine = machine_line(report.environment)
    return "\n".join([*lines, "", "Means over seeds ± sample standard deviation.", "", machine, ""])


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
