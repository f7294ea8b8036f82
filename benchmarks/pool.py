"""Soft labels for a pool of a million texts: peak memory, and rows per second.

    python benchmarks/pool.py --model DIR --rows 50000,1000000 --output DIR

WHY two sizes: memory is bounded by a shard, so the large pool has to peak where the small one does. WHY a process for each: the peak
of a process never falls again. WHY generated texts: only how many there are matters here, and each is another one.
The teacher is the checkpoint under a fresh head: its answers are not looked at.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from training import peak_memory_mb
from transformers import AutoTokenizer, set_seed

from smbert.checkpoints import load_model
from smbert.cli import guarded
from smbert.heads import with_head
from smbert.measure import environment, machine_line
from smbert.pool import label_pool
from smbert.runner import write_json
from smbert.tasks import Task

TASK = Task("generated", ("text",), label_names=("down", "up"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--rows", default="50000,1000000", help="comma separated (default: %(default)s)")
    parser.add_argument("--words", type=int, default=6, help="of each text (default: %(default)s)")
    parser.add_argument("--shard-rows", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder for pool.json and pool.md")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    sizes = args.rows.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"`--rows` must look like 50000,1000000, got {args.rows!r}. To resolve, correct it.")
    if args.child:
        print(json.dumps(labelled(args, int(sizes[0]))))
        return
    out, rows = Path(args.output), []
    out.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        command = [
            sys.executable,
            __file__,
            "--child",
            "--model",
            args.model,
            "--rows",
            size,
            "--words",
            str(args.words),
        ]
        command += ["--shard-rows", str(args.shard_rows), "--output", args.output]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # it said why
            raise SystemExit(done.returncode)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        report = {
            "schema_version": 1, "command": shlex.join(["python", "benchmarks/pool.py", *sys.argv[1:]]),
            "environment": environment(), "shard_rows": args.shard_rows, "words": args.words, "rows": rows,
        }  # fmt: skip
        write_json(out / "pool.json", report)
        (out / "pool.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


def labelled(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    """One pool of so many rows, labelled in this process."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    set_seed(0)
    teacher = with_head(load_model(args.model), TASK)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalnum())

    def texts() -> Iterator[dict[str, str]]:
        draw = random.Random(0)
        for number in range(rows):
            yield {"text": " ".join([str(number), *draw.choices(words, k=args.words)])}

    before = peak_memory_mb()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = label_pool(
            teacher, tokenizer, TASK, IterableDataset.from_generator(texts), folder,
            shard_rows=args.shard_rows, max_length=32, batch_size=256, disable_tqdm=True,
        )  # fmt: skip
        seconds, written = time.perf_counter() - start, sum(f.stat().st_size for f in Path(folder).rglob("*.parquet"))
    return {
        "rows": rows, "labelled": counts.labelled, "shards": counts.shards, "seconds": seconds,
        "start_mb": before, "peak_memory_mb": peak_memory_mb(), "written_mb": written / 1e6,
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Soft labels for a large pool", "", "```bash", report["command"], "```", ""]
    lines += ["| rows | shards | labelled | peak memory MB | rows/s | written MB |", "|---:|---:|---:|---:|---:|---:|"]
    for r in report["rows"]:
        speed = r["rows"] / r["seconds"]
        numbers = [f"{r[k]:,}" for k in ("rows", "shards", "labelled")]
        lines.append(f"| {' | '.join(numbers)} | {r['peak_memory_mb']:,.0f} | {speed:,.0f} | {r['written_mb']:,.1f} |")
    first = report["rows"][0]
    lines += [
        "",
        f"Generated texts of a number and {report['words']} words, shards of {report['shard_rows']:,} rows, a process for each size. Peak "
        f"memory is the whole process; {first['start_mb']:,.0f} MB of it are there before the first row (interpreter, libraries, teacher).",
        "",
        machine_line(report["environment"]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
