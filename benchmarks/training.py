"""Speed of every stage against plain fine-tuning of the same student, in one run.

    python benchmarks/training.py --model DIR_OR_ID --task mrpc --data-dir DIR --rounds 5 --output DIR

WHY ratios: samples/s belong to one machine on one day; what a stage costs beyond plain fine-tuning belongs to the code.

 (a) distillation from cached teacher logits      over plain fine-tuning of the same student           at most 1.10
 (b) live logits, hidden and attention objectives over one student step and one teacher forward        at most 1.15
 (c) a Theseus step, draws fixed by a seed        over a plain step of the layers that it really runs  at most 1.10
 (d) a pruning stage, all samples scored once     over one epoch of fine-tuning on them                at most 1.00
 (e) dynamic padding, grouped by length           over padding to the maximum length                   at most 1.00

The student has every fourth layer of the model, and Theseus halves the depth. In each round each epoch (training_epochs.py) runs once,
in an order that rotates; round 0 warms up. A ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from training_epochs import Epochs

from smbert.cli import guarded
from smbert.measure import environment, machine_line, supports_bf16
from smbert.runner import write_json

TIMED = {
    "plain fine-tuning": Epochs.plain,
    "padded to the maximum length": Epochs.padded,
    "cached teacher logits": Epochs.cached,
    "live objectives": Epochs.live,
    "teacher forward": Epochs.teacher,
    "theseus": Epochs.theseus,
    "layers that theseus ran": Epochs.theseus_layers,
    "pruning stage": Epochs.pruning,
}
# What is held against the sum of what, and the bound.
COMPARISONS = (
    ("a", "cached teacher logits", ["plain fine-tuning"], 1.10),
    ("b", "live objectives", ["plain fine-tuning", "teacher forward"], 1.15),
    ("c", "theseus", ["layers that theseus ran"], 1.10),
    ("d", "pruning stage", ["plain fine-tuning"], 1.00),
    ("e", "plain fine-tuning", ["padded to the maximum length"], 1.00),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id: the teacher, from which the students are cut")
    parser.add_argument("--task", default="mrpc", help="(default: %(default)s)")
    parser.add_argument("--data-dir", help="folder of the task's files (default: the Hub)")
    parser.add_argument("--samples", type=int, default=512, help="rows of an epoch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after round 0 (default: %(default)s)")
    parser.add_argument("--freeze-embeddings", action="store_true", help="as the key of the stages")
    parser.add_argument("--output", required=True, help="folder for training.json and training.md")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.rounds < 1:
        raise ValueError(f"`--rounds` must be at least 1, got {args.rounds}. To resolve, try 5.")
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    memory = dict.fromkeys(TIMED, 0.0)
    with tempfile.TemporaryDirectory() as workdir:
        epochs = Epochs(
            args.model,
            args.task,
            args.data_dir,
            Path(workdir),
            args.samples,
            args.batch_size,
            args.max_length,
            args.freeze_embeddings,
        )
        for seed in tqdm(range(args.rounds + 1), desc="rounds"):
            first = seed % len(TIMED)
            for name in [*TIMED][first:] + [*TIMED][:first]:
                peak_memory_mb()
                elapsed = TIMED[name](epochs, seed)
                if seed > 0:
                    seconds[name].append(elapsed)
                    memory[name] = max(memory[name], peak_memory_mb())
    report = {
        "schema_version": 1,
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "environment": {**environment(), "training": "bf16 autocast" if supports_bf16() else "fp32"},
        "rows": [
            {
                "name": name,
                "task": args.task,
                "samples_per_second": epochs.samples / float(np.median(seconds[name])),
                "epoch_seconds": seconds[name],
                "peak_memory_mb": memory[name],
            }
            for name in TIMED
        ],
        "ratios": [compared(seconds, *comparison) for comparison in COMPARISONS],
        "teacher_logits_seconds": epochs.cache_seconds,
    }
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "training.json", report)
    (out / "training.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


def compared(
    seconds: Mapping[str, list[float]], letter: str, name: str, against: list[str], bound: float
) -> dict[str, Any]:
    """One line of the table: the median ratio and whether it keeps to its bound."""
    reference = np.sum([seconds[other] for other in against], axis=0)  # (rounds,)
    ratio = float(np.median(np.array(seconds[name]) / reference))
    return {"letter": letter, "name": name, "against": against, "ratio": ratio, "bound": bound, "met": ratio <= bound}


def peak_memory_mb() -> float:
    """Most memory since the last call: the GPU's, else that of the process with all its models (where Linux tells; else since its start)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak


def markdown(report: Mapping[str, Any]) -> str:
    lines = ["# Training speed", "", "```bash", report["command"], "```", ""]
    lines += ["| | time of | over the time of | ratio | at most | |", "|---|---|---|---:|---:|---|"]
    for r in report["ratios"]:
        verdict = "PASS" if r["met"] else "over"
        lines.append(
            f"| ({r['letter']}) | {r['name']} | {' + '.join(r['against'])} | {r['ratio']:.3f} | {r['bound']:.2f} | {verdict} |"
        )
    lines += ["", "| | samples/s | peak memory (MB) |", "|---|---:|---:|"]
    lines += [f"| {r['name']} | {r['samples_per_second']:.1f} | {r['peak_memory_mb']:.0f} |" for r in report["rows"]]
    lines += ["", f"Teacher logits, once for all epochs: {report['teacher_logits_seconds']:.1f} s.", ""]
    lines += [machine_line(report["environment"]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
