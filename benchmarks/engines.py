"""Engines side by side: torch, ONNX Runtime and OpenVINO, in fp32, bf16 and int8, for the teacher and for what was made of it.

    python benchmarks/engines.py teacher=DIR smbert=DIR --task mrpc --data-dir DIR --max-drop 0.5 --parity 1,7,64 --output DIR

WHY a process for each: in one process the engines' thread pools and allocators disturb each other (some medians tripled), and cold start
and memory only have a meaning for a process. The figures are of different processes, so the machine must be otherwise idle; speed-ups are
against the first model in torch fp32, and `--rounds` repeats everything and keeps the medians.

1. Export every checkpoint for every engine below OUTPUT/artefacts; with --max-drop int8 has to pass the quality gate.
2. Run every engine: first answer from a cold start, batch x length on random tokens, single texts of the task, the whole validation split
   in batches of 32, and of the sizes of --parity.
3. Write engines.json, engines.md and engines.png. "difference" is the largest between an engine's logits and torch's in fp32 on the split.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import rich
from matplotlib.figure import Figure
from transformers import AutoConfig

import smbert  # noqa: F401  registers the slim configs
from smbert.cli import guarded
from smbert.export import Gate, export
from smbert.measure import environment, machine_line
from smbert.tasks import Task, load_task

# Static int8 has ranges from 256 training rows; int8 alone finds them as it goes.
ENGINES = (
    "torch-fp32", "torch-bf16", "onnx-fp32", "onnx-int8", "onnx-int8-static",
    "openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int8-static",
)  # fmt: skip
REFERENCE = "torch-fp32"


def main(argv: Sequence[str] | None = None) -> int:
    usual = [e for e in ENGINES if not e.endswith("static") and (find_spec("openvino") or not e.startswith("openvino"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="NAME=DIR", help="fine-tuned checkpoints; the first is the baseline"
    )
    parser.add_argument(
        "--engines",
        default=",".join(usual),
        help=f"comma separated, of {', '.join(ENGINES)} (default: %(default)s; those of openvino where it is installed)",
    )
    parser.add_argument("--task", required=True, help="GLUE task of the checkpoints")
    parser.add_argument("--data-dir", help="folder of the task's files (default: the Hub)")
    parser.add_argument("--max-drop", type=float, help="most points that int8 may lose against torch (default: any)")
    parser.add_argument(
        "--max-length", type=int, default=128, help="most tokens of a task's row (default: %(default)s)"
    )
    parser.add_argument("--batches", default="1,32", help="comma separated (default: %(default)s)")
    parser.add_argument("--lengths", default="128,512", help="comma separated (default: %(default)s)")
    parser.add_argument(
        "--parity", default="", help="batch sizes in which the whole split is answered again, such as 1,7,64"
    )
    parser.add_argument("--rows", type=int, help="at most so many validation rows (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: each engine's own)")
    parser.add_argument("--rounds", type=int, default=1, help="repeat every process (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed runs (default: %(default)s)")
    parser.add_argument("--min-runs", type=int, default=50, help="timed runs (default: %(default)s)")
    parser.add_argument("--min-seconds", type=float, default=5.0, help="or so many seconds (default: %(default)s)")
    parser.add_argument(
        "--output", required=True, help="folder for artefacts, engines.json, engines.md and engines.png"
    )
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    folders = {name: place for name, _, place in (entry.rpartition("=") for entry in args.models)}
    if "" in folders or len(folders) < len(args.models):
        raise ValueError(f"models must look like NAME=DIR, each name once, got {args.models}. To resolve, name them.")
    engines = args.engines.split(",")
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        raise ValueError(f"`--engines` must be among {', '.join(ENGINES)}, got {unknown}. To resolve, correct it.")
    if not all(size.isdecimal() and int(size) for size in args.parity.split(",") if args.parity):
        raise ValueError(f"`--parity` must look like 1,7,64, got {args.parity!r}. To resolve, correct it.")
    if args.parity and REFERENCE not in engines:
        raise ValueError(f"`--parity` needs {REFERENCE} to compare with. To resolve, add it to --engines.")
    if args.rounds < 1:
        raise ValueError(f"`--rounds` must be at least 1, got {args.rounds}. To resolve, correct it.")
    task, data = load_task(args.task, args.data_dir, required=("validation",))
    rows = (
        data["validation"]
        if args.rows is None
        else data["validation"].select(range(min(args.rows, len(data["validation"]))))
    )
    gate = Gate(task, rows, args.max_drop)
    calibration = (
        Gate(task, data["train"].shuffle(seed=0).select(range(min(256, len(data["train"]))))).texts
        if "train" in data
        else []
    )
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    gold = np.asarray(rows[task.label_column][:])

    found: list[dict[str, Any]] = []
    places: dict[tuple[str, str], tuple[str, str]] = {}
    for name, folder in folders.items():
        for engine in engines:
            library, setting, *method = engine.split("-")
            place = folder
            if library != "torch":
                made = export(
                    folder,
                    out / "artefacts" / f"{name}-{engine}",
                    engine=library,
                    precision=setting,
                    method=method[0] if method else "dynamic",
                    gate=gate if setting == "int8" else Gate(task, rows),
                    calibration=calibration,
                    max_length=args.max_length,
                )
                place, setting = str(made.folder), str(made.setting)
            places[name, engine] = place, setting
    results: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in places}
    for _ in range(args.rounds):
        for (name, engine), (place, _) in places.items():
            spec = spec_for(args, engine, place, folders[name], gate.texts)
            results[name, engine].append(in_a_process(spec, out))
    for (name, engine), (_, setting) in places.items():
        several = results[name, engine]
        logits = logits_of(several[0])
        about_row = {"model": name, "engine": engine, "setting": setting}
        if (name, REFERENCE) in results:
            expected = logits_of(results[name, REFERENCE][0])["32"]
            about_row["difference"] = {size: float(np.abs(own - expected).max()) for size, own in logits.items()}
        found.append({**about_row, **medians(several), **metrics_of(task, logits["32"], gold)})
    baseline = found[0]["latency_ms"]
    for row in found:
        row["speedup"] = {k: baseline[k]["p50"] / v["p50"] for k, v in row["latency_ms"].items() if k in baseline}

    versions = {name: version(name) for name in ("onnxruntime", "openvino") if find_spec(name)}
    about = {**environment(args.threads), **versions, "rows": len(rows), "task": task.name}
    command = shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]])
    report = {"command": command, "environment": about, "rows": found}
    (out / "engines.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "engines.md").write_text(markdown(report), encoding="utf-8")
    draw(found, out / "engines.png")
    rich.print(markdown_table(found))


def logits_of(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The whole split, (rows, labels), by the batch size in which it was answered."""
    return {size: np.asarray(rows, dtype=np.float32) for size, rows in result["logits"].items()}


def spec_for(
    args: argparse.Namespace, engine: str, place: str, checkpoint: str, texts: Sequence[Any]
) -> dict[str, Any]:
    """What a process has to know; lengths that the model has no positions for are left out."""
    config = AutoConfig.from_pretrained(checkpoint)
    lengths = [int(length) for length in args.lengths.split(",") if int(length) <= config.max_position_embeddings]
    return {
        "engine": engine, "folder": place, "texts": list(texts), "vocabulary": config.vocab_size, "max_length": args.max_length,
        "shapes": [(int(batch), length) for length in lengths for batch in args.batches.split(",")],
        "parity": [int(size) for size in args.parity.split(",") if size], "threads": args.threads, "warmup": args.warmup, "min_runs": args.min_runs, "min_seconds": args.min_seconds,
    }  # fmt: skip


def in_a_process(spec: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Runs engine_process.py and adds the seconds from its start to its first answer."""
    spec_file, result_file = out / ".spec.json", out / ".result.json"
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    script = Path(__file__).with_name("engine_process.py")
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    if spec["threads"]:
        environ["OMP_NUM_THREADS"] = str(spec["threads"])
    try:
        start = time.time()
        done = subprocess.run(
            [sys.executable, str(script), str(spec_file), str(result_file)], env=environ, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{spec['engine']} on {spec['folder']} failed: {last}. To resolve, leave that engine out.")
        result = json.loads(result_file.read_text(encoding="utf-8"))
    finally:
        spec_file.unlink(missing_ok=True)
        result_file.unlink(missing_ok=True)
    result["cold_start_seconds"] = result.pop("first_answer_at") - start
    return result


def medians(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of several rounds."""
    plain = ("mb", "cold_start_seconds", "first_answer_rss_mb", "peak_rss_mb", "texts_per_second")
    out: dict[str, Any] = {key: float(np.median([r[key] for r in several])) for key in plain}
    out["latency_ms"] = {
        shape: {q: float(np.median([r["latency_ms"][shape][q] for r in several])) for q in ("p50", "p95")}
        for shape in several[0]["latency_ms"]
    }
    return out


def metrics_of(task: Task, logits: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    metrics = task.compute(logits, gold)
    return {"metric_name": task.headline, "metric": metrics[task.headline], "metrics": metrics}


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    shapes = list(dict.fromkeys(shape for row in rows for shape in row["latency_ms"]))
    sizes = list(dict.fromkeys(size for row in rows for size in row.get("difference", ())))
    heads = [
        "model",
        "engine",
        rows[0]["metric_name"],
        *(f"difference at {size}" for size in sizes),
        "MB",
        "cold start s",
        "MB at first answer",
        "peak MB",
        "texts/s",
        *shapes,
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [
            f"{v['p50']:.1f} / {v['p95']:.1f} ({row['speedup'][s]:.1f}x)"
            if (v := row["latency_ms"].get(s)) and s in row["speedup"]
            else ""
            for s in shapes
        ]
        engine = row["engine"] if row["setting"] in row["engine"] else f"{row['engine']} ({row['setting']})"
        differences = [f"{row['difference'][size]:.0e}" if "difference" in row else "" for size in sizes]
        figures = [f"{row['metric']:.4f}", *differences, f"{row['mb']:.1f}", f"{row['cold_start_seconds']:.2f}"]
        figures += [f"{row[key]:.0f}" for key in ("first_answer_rss_mb", "peak_rss_mb", "texts_per_second")]
        lines.append(f"| {' | '.join([row['model'], engine, *figures, *cells])} |")
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    machine = machine_line(report["environment"])
    return (
        f"# Engines\n\n```bash\n{report['command']}\n```\n\n{markdown_table(report['rows'])}\n\n"
        "ms per batch, median / 95th percentile; in brackets how many times faster than the first row. 1x128 is batch x length on random "
        "tokens, 1xtext single validation texts from string to logits, texts/s the whole split in batches of 32 of similar length, "
        f"difference the largest between its logits and those of {REFERENCE} in batches of 32, when the split is answered in batches of that "
        f"size; cold start from the start of the process to its first answer. Each engine ran in a process of its own.\n\n{machine}\n\n![engines](engines.png)\n"
    )


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The metric against texts per second, one marker per engine and one line per model."""
    figure = Figure(figsize=(7, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == name]
        axes.plot(
            [r["texts_per_second"] for r in own],
            [r["metric"] for r in own],
            ":",
            lw=0.8,
            color=f"C{number}",
            label=name,
        )
        for row in own:
            mark = "os^DvP<>X"[ENGINES.index(row["engine"])]
            axes.scatter(
                row["texts_per_second"], row["metric"], marker=mark, s=30 + row["mb"] / 3, color=f"C{number}", alpha=0.7
            )
            axes.annotate(
                row["engine"],
                (row["texts_per_second"], row["metric"]),
                fontsize=6,
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set_xscale("log")
    axes.set_xlabel("texts per second (size of a marker: MB)")
    axes.set_ylabel(rows[0]["metric_name"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
