"""One table and one picture of several frontier.py folders, one for each task: the README's.

    python benchmarks/frontier_tasks.py RTE MRPC SST2 QNLI --output DIR

WHY beside frontier.py: its folder has one set of settings, and tasks of other sizes want other steps and other text. Mean retention is
the mean of the tasks' retentions, and only of members that all tasks have.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from frontier import SHAPE
from matplotlib.figure import Figure

from smbert._model_card import write_whole
from smbert._report_tables import TEACHER
from smbert.cli import guarded
from smbert.report import Row

SHAPES = ("1x128", SHAPE)
Rows = Mapping[str, Mapping[str, Row]]  # name of a model -> task -> row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="outputs of frontier.py, of one task and one seed each")
    parser.add_argument("--output", required=True, help="folder for tasks.md and tasks.png")
    return guarded(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    rows, tasks = rows_by_model([Path(folder) for folder in args.folders])
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    shown = table(rows, tasks)
    write_whole(out / "tasks.md", shown.encode())
    write_whole(out / "tasks.png", picture(rows, tasks))
    print(shown)


def rows_by_model(folders: Sequence[Path]) -> tuple[Rows, list[str]]:
    """The rows of all reports, members by rising speed-up between the teacher and the others; and the tasks in the order of the folders."""
    found: dict[str, dict[str, Row]] = {}
    tasks: list[str] = []
    for folder in folders:
        file = folder / "report.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no report.json. To resolve, name an output folder of frontier.py.")
        rows = [Row.from_dict(row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
        own = {row.task for row in rows}
        if len(own) != 1 or len({row.seed for row in rows}) != 1 or own & set(tasks):
            raise ValueError(
                f"{folder} must hold one seed of one task that no other folder has, got {', '.join(sorted(own))}. "
                "To resolve, run frontier.py with an --output for each."
            )
        tasks.append(own.pop())
        for row in rows:
            found.setdefault(row.name, {})[row.task] = row

    def place(name: str) -> tuple[int, float]:
        speeds = [row.speedup[SHAPE] for row in found[name].values() if SHAPE in row.speedup]
        return (0, 0.0) if name == TEACHER else (1, statistics.fmean(speeds)) if speeds else (2, 0.0)

    return {name: found[name] for name in sorted(found, key=place)}, tasks


def mean_retention(own: Mapping[str, Row], tasks: Sequence[str]) -> float | None:
    """None unless every task has this model and a retention."""
    values = [row.retention for row in own.values() if row.retention is not None]
    return statistics.fmean(values) if len(values) == len(tasks) else None


def table(rows: Rows, tasks: Sequence[str]) -> str:
    """Markdown: metric, retention and speed-up at 32 x 128 of each task, then means over the tasks that have the model."""
    metrics = {task: next(own[task].metric_name for own in rows.values() if task in own) for task in tasks}
    titles = ["model", *(f"{task} {metrics[task]}" for task in tasks), "mean retention", "parameters", "encoder"]
    lines = [[*titles, *(f"speed-up {shape}" for shape in SHAPES)], ["---"] * (len(titles) + len(SHAPES))]
    for name, own in rows.items():
        line = [name, *(told_of(own.get(task)) for task in tasks)]
        mean = mean_retention(own, tasks)
        line.append("" if mean is None else f"{100 * mean:.1f} %")
        for field in ("params_total", "params_encoder"):
            sizes = [size for row in own.values() if (size := getattr(row, field)) is not None]
            line.append(f"{statistics.fmean(sizes) / 1e6:.2f} M" if sizes else "")
        for shape in SHAPES:
            speeds = [row.speedup[shape] for row in own.values() if shape in row.speedup]
            line.append(f"{statistics.fmean(speeds):.2f}x" if speeds else "")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def told_of(row: Row | None) -> str:
    if row is None or row.metric is None:
        return ""
    told = [] if row.retention is None else [f"({100 * row.retention:.1f} %)"]
    told += [f"{row.speedup[SHAPE]:.2f}x"] if SHAPE in row.speedup and row.name != TEACHER else []
    return " ".join([f"{row.metric:.3f}".removeprefix("0"), *told])


def picture(rows: Rows, tasks: Sequence[str]) -> bytes:
    """PNG: the families' retention against their measured speed-up, a thin line for each task, and the mean; no peers."""
    timed = {
        name: own
        for name, own in rows.items()
        if (name == TEACHER or name.startswith("smbert ")) and all(SHAPE in row.speedup for row in own.values())
    }
    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    for task in tasks:
        points = [
            (row.speedup[SHAPE], 100 * row.retention)
            for own in timed.values()
            if (row := own.get(task)) and row.retention
        ]
        axes.plot(*zip(*sorted(points)), marker="o", markersize=3, linewidth=1, alpha=0.8, label=task)
    means = [
        (statistics.fmean(row.speedup[SHAPE] for row in own.values()), 100 * kept)
        for own in timed.values()
        if (kept := mean_retention(own, tasks)) is not None
    ]
    axes.plot(*zip(*sorted(means)), marker="o", markersize=5, linewidth=2.4, color="0.1", zorder=3, label="mean")
    axes.set_xlabel(f"measured speed-up at {SHAPE.replace('x', ' x ')}")
    axes.set_ylabel("% of the teacher")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=len(tasks) + 1, loc="outside upper center")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(main())
