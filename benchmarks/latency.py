"""Latency of compressed models against their teacher: batch x length, fp32 and bf16, random tokens and a task's real lengths.

    python benchmarks/latency.py teacher=DIR smbert=DIR "no distillation=DIR" --task mrpc --data-dir DIR --output DIR

WHY the first model in int8 too: a smaller model has to be worth more than ONNX Runtime's int8 of the large one (CPU only).
WHY in turns: a machine's speed drifts with its load and its temperature, so all models take turns within one process, and a speed-up
is only ever computed between figures of the same turns. The first model is the baseline. WHY real lengths too: a batch of
sentences is shorter than 128 tokens and partly padding, and small models gain less there than on full batches.

Columns named 1x128 are batch x length without padding; 1xmrpc and 32xmrpc are rows of the task as they come, padded to the longest.
bf16 is autocast over fp32 weights. It has turns of its own, so its speed-ups are against the baseline in bf16.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, PreTrainedModel

from smbert._int8_row import Served, with_int8_teacher
from smbert._report_tables import INT8_TEACHER, TEACHER
from smbert.checkpoints import load_model
from smbert.cli import guarded
from smbert.context import device_of_run, on_device
from smbert.measure import count_parameters, environment, latency, latency_on, machine_line, macs, speedups
from smbert.report import Report, Row
from smbert.tasks import load_task, tokenize
from smbert.teacher import DistillCollator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR", help="checkpoints; the first is the baseline")
    parser.add_argument("--batches", default="1,32", help="comma separated (default: %(default)s)")
    parser.add_argument("--lengths", default="128,512", help="comma separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="fp32,bf16", help="comma separated (default: %(default)s)")
    parser.add_argument("--task", help="also time rows of this task's validation split")
    parser.add_argument("--data-dir", help="folder of the task's files (default: the Hub)")
    parser.add_argument(
        "--max-length", type=int, default=128, help="most tokens of a task's row (default: %(default)s)"
    )
    parser.add_argument("--no-int8-teacher", action="store_true", help="leave out the first model in int8")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed runs (default: %(default)s)")
    parser.add_argument("--min-runs", type=int, default=50, help="timed runs (default: %(default)s)")
    parser.add_argument("--min-seconds", type=float, default=5.0, help="or so many seconds (default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder for latency.json, latency.md and latency.png")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    folders = {name: place for name, _, place in (entry.rpartition("=") for entry in args.models)}
    if "" in folders or len(folders) < len(args.models):
        raise ValueError(f"models must look like NAME=DIR, each name once, got {args.models}. To resolve, name them.")
    if unknown := [name for name in args.dtypes.split(",") if name not in DTYPES]:
        raise ValueError(f"`--dtypes` must be among {', '.join(DTYPES)}, got {unknown}. To resolve, correct it.")
    models = {name: on_device(load_model(place)) for name, place in folders.items()}
    batches = [int(batch) for batch in args.batches.split(",")]
    shapes = [(batch, int(length)) for length in args.lengths.split(",") for batch in batches]
    mix = {batch: real_batches(args, folders, batch) for batch in batches} if args.task else {}

    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    first, int8, notes = next(iter(models)), {}, []
    if device_of_run().type == "cpu" and not args.no_int8_teacher:
        tokenizer = AutoTokenizer.from_pretrained(folders[first])
        served, notes = with_int8_teacher(
            {TEACHER: models[first]}, tokenizer, out / "teacher-int8", threads=args.threads
        )
        int8 = {name.replace(TEACHER, first): model for name, model in served.items() if name == INT8_TEACHER}

    report = Report(shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]]), environment(args.threads))
    limits: dict[str, Any] = {k: getattr(args, k) for k in ("warmup", "min_runs", "min_seconds", "threads")}
    for dtype in args.dtypes.split(","):
        turns = {**models, **(int8 if dtype == "fp32" else {})}
        timed = latency(turns, shapes, dtype=DTYPES[dtype], **limits)
        for batch, inputs in mix.items():
            label = f"{batch}x{args.task}"
            given = {name: inputs[first if name in int8 else name] for name in turns}
            on_text = latency_on(turns, given, label=label, dtype=DTYPES[dtype], **limits)
            timed = {name: {**timed[name], **on_text[name]} for name in turns}
        faster = speedups(timed, first)
        for name, model in turns.items():
            told = name if name in int8 else f"{name}, {dtype}"
            report.add(row(told, args.task or "random tokens", model, models[first], timed[name], faster[name]))

    report.notes = notes
    (out / "latency.json").write_text(report.to_json(), encoding="utf-8")
    (out / "latency.md").write_text(markdown(report), encoding="utf-8")
    draw(report, out / "latency.png")
    rich.print(report.table())
    print(machine_line(report.environment))


def real_batches(args: argparse.Namespace, folders: dict[str, str], batch: int) -> dict[str, list[dict[str, Any]]]:
    """The same random rows for every model through its own tokenizer, 64 batches at most."""
    task, data = load_task(args.task, args.data_dir, required=("validation",))
    count = min(64, len(data["validation"]) // batch)
    if count == 0:
        raise ValueError(f"{args.task} has fewer than {batch} validation rows. To resolve, lower `--batches`.")
    rows = data["validation"].shuffle(seed=0).select(range(count * batch))
    found = {}
    for name, place in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokens, collator = tokenize(rows, task, tokenizer, args.max_length), DistillCollator(tokenizer)
        every = [tokens[i] for i in range(len(tokens))]
        found[name] = [dict(collator(every[i : i + batch])) for i in range(0, len(every), batch)]
    return found


def row(
    name: str, task: str, model: PreTrainedModel | Served, first: PreTrainedModel, timed: Any, faster: dict[str, float]
) -> Row:
    served = isinstance(model, Served)
    count = count_parameters(first if served else model)
    stored_mb = model.size_mb if served else sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return Row(
        name, task, None, "", None,
        params_total=count.total, params_encoder=count.encoder, params_embedding=count.embedding, macs=macs(model, 128),
        size_mb=stored_mb, latency_ms=timed, speedup=faster,
    )  # fmt: skip


def markdown(report: Report) -> str:
    """The table with median / 95th percentile in ms and the speed-up, and the machine."""
    shapes = list(report.rows[0].latency_ms)
    lines = [
        f"# Latency\n\n```bash\n{report.command}\n```\n\n| model | parameters | in encoder | {' | '.join(shapes)} |"
    ]
    lines.append("|---|" + "---:|" * (2 + len(shapes)))
    for r in report.rows:
        cells = [f"{r.latency_ms[s]['p50']:.1f} / {r.latency_ms[s]['p95']:.1f} ({r.speedup[s]:.2f}x)" for s in shapes]
        sizes = [f"{(n or 0) / 1e6:.2f} M" for n in (r.params_total, r.params_encoder)]
        lines.append(f"| {' | '.join([r.name, *sizes, *cells])} |")
    machine = machine_line(report.environment)
    return (
        "\n".join(lines)
        + "".join(f"\n\n{note}" for note in report.notes)
        + "\n\nms per batch, median / 95th percentile; in brackets how many times faster than the first model in the same dtype, "
        f"timed in the same turns.\n\n{machine}\n\n![latency](latency.png)\n"
    )


def draw(report: Report, path: Path) -> None:
    """Bars of the medians, grouped by shape, with the speed-up above each."""
    shapes, rows = list(report.rows[0].latency_ms), report.rows
    figure = Figure(figsize=(2.2 + 1.6 * len(shapes), 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(rows)
    for number, r in enumerate(rows):
        at = np.arange(len(shapes)) + (number - (len(rows) - 1) / 2) * width
        bars = axes.bar(at, [r.latency_ms[s]["p50"] for s in shapes], 0.92 * width, label=r.name)
        axes.bar_label(bars, [f"{r.speedup[s]:.1f}x" for s in shapes], fontsize=6.5, padding=1)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("ms per batch (median)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
