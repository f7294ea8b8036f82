"""Tables of a report: rows averaged over seeds, then tasks, as Markdown and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .report import Report, Row

TEACHER = "teacher"  # name of the row that retention and speed-up refer to
INT8_TEACHER = "teacher in int8 (ONNX Runtime)"
MISSING = "–"


@dataclass(frozen=True)
class Aggregate:
    """One model on one task over all its seeds.

    Attributes:
        mean: measures by their path in a row's JSON, such as "metric" or "latency_ms.32x128.p50".
        std: sample standard deviation of those that two or more seeds have.
    """

    name: str
    task: str
    metric_name: str
    seeds: tuple[int | None, ...]
    mean: Mapping[str, float]
    std: Mapping[str, float]

    def keys(self, prefix: str) -> list[str]:
        """What follows `prefix` in the paths, up to the next dot, without repetition: keys("latency_ms") -> ["1x128"]."""
        rest = (path[len(prefix) + 1 :].split(".")[0] for path in self.mean if path.startswith(prefix + "."))
        return list(dict.fromkeys(rest))


def aggregate(rows: Sequence[Row]) -> list[Aggregate]:
    """Rows grouped by task, then by name, each in order of appearance."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: tasks.index(row.task)):
        groups.setdefault((row.task, row.name), []).append(row)
    found = []
    for (task, name), group in groups.items():
        columns: dict[str, list[float]] = {}
        for row in group:
            for path, value in _flat(row.to_dict()).items():
                columns.setdefault(path, []).append(value)
        mean = {path: statistics.fmean(values) for path, values in columns.items()}
        std = {path: statistics.stdev(values) for path, values in columns.items() if len(values) > 1}
        found.append(Aggregate(name, task, group[0].metric_name, tuple(row.seed for row in group), mean, std))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of a row by their paths; the seed is a name, not a measure."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, int | float) and prefix + key != "seed":
            flat[prefix + key] = value
    return flat


def over_tasks(aggregates: Sequence[Aggregate]) -> tuple[list[str], list[Aggregate]]:
    """Means over tasks, only ever over the same tasks for all: those of everybody who has all of them; else the common ones.

    Returns:
        The tasks and one aggregate per name; its retention is that of the mean, not the mean of the retentions. Both are
        empty unless there are two tasks.
    """
    by_name: dict[str, dict[str, Aggregate]] = {}
    for a in aggregates:
        if "metric" in a.mean:
            by_name.setdefault(a.name, {})[a.task] = a
    tasks = list(dict.fromkeys(a.task for a in aggregates))
    names = [name for name, found in by_name.items() if set(found) == set(tasks)]
    if len(names) < 2:
        names = list(by_name)
        tasks = [task for task in tasks if all(task in found for found in by_name.values())]
    if len(tasks) < 2:
        return [], []
    means = {}
    for name in names:
        group = [by_name[name][task] for task in tasks]
        shared = [path for path in group[0].mean if all(path in a.mean for a in group)]
        paths = [path for path in shared if path != "retention" and not path.startswith("metrics.")]
        means[name] = {path: statistics.fmean(a.mean[path] for a in group) for path in paths}
    # A quotient of means needs every retention to exist: an error metric among the tasks makes it void.
    valid = all("retention" in by_name[name][task].mean for name in names for task in tasks)
    if valid and TEACHER in means and means[TEACHER]["metric"]:
        for mean in means.values():
            mean["retention"] = mean["metric"] / means[TEACHER]["metric"]
    title = f"mean of {len(tasks)} tasks"
    return tasks, [Aggregate(name, title, "", (), mean, {}) for name, mean in means.items()]


def significant(value: float) -> str:
    """About three digits, without exponents: 596, 20.6, 7.90, 0.041."""
    for least, digits in ((99.95, 0), (9.995, 1), (0.9995, 2)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"


def count(value: float) -> str:
    """A number of parameters or operations with four digits: 38.61 M, 2.734 G."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.99995 * factor:
            scaled = value / factor
            return f"{scaled:.{3 if scaled < 9.9995 else 2 if scaled < 99.995 else 1}f} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Such as 7.0 s, 42 s, 2.2 min, 35 min, 3 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 119.5:
        return f"{minutes:.1f} min" if minutes < 9.95 else f"{minutes:.0f} min"
    return f"{round(minutes) // 60} h {round(minutes) % 60:02d} min"


def factor(value: float) -> str:
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x"


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Aggregate], str | None]
    numeric: bool = True


def _measure(title: str, path: str, show: Callable[[float], str], spread: bool = False) -> _Column:
    def cell(a: Aggregate) -> str | None:
        if path not in a.mean:
            return None
        return show(a.mean[path]) + (f" ± {show(a.std[path])}" if spread and path in a.std else "")

    return _Column(title, cell)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _score(value: float) -> str:
    return f"{value:.3f}"


def _headline(a: Aggregate) -> str | None:
    value = _measure("", "metric", _score, spread=True).cell(a)
    return None if value is None else f"{value} {a.metric_name}".strip()


def _latency(shape: str) -> Callable[[Aggregate], str | None]:
    def cell(a: Aggregate) -> str | None:
        path = f"latency_ms.{shape}."
        figures = [significant(a.mean[path + key]) for key in ("p50", "p95") if path + key in a.mean]
        return " / ".join(figures) or None

    return cell


def _union(aggregates: Sequence[Aggregate], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for a in aggregates for key in a.keys(prefix)))


def _metrics(aggregates: Sequence[Aggregate]) -> list[str]:
    """The metrics that all scored rows share, the headline first; none where tasks differ in them."""
    scored = [a for a in aggregates if "metric" in a.mean]
    if len({(a.metric_name, frozenset(a.keys("metrics"))) for a in scored}) != 1:
        return []
    return list(dict.fromkeys([scored[0].metric_name, *scored[0].keys("metrics")])) if scored[0].metric_name else []


def _filled(columns: list[_Column], aggregates: Sequence[Aggregate]) -> list[_Column]:
    return [column for column in columns if any(column.cell(a) is not None for a in aggregates)]


def _markdown_columns(aggregates: Sequence[Aggregate]) -> list[_Column]:
    columns = [_Column("model", lambda a: a.name, numeric=False)]
    if len({a.task for a in aggregates}) > 1:
        columns.insert(0, _Column("task", lambda a: a.task, numeric=False))
    if any(len(a.seeds) > 1 for a in aggregates):
        columns.append(_Column("seeds", lambda a: str(len(a.seeds))))
    names = _metrics(aggregates)
    columns += [_measure(name, f"metrics.{name}", _score, spread=True) for name in names]
    columns += [] if names else [_Column("metric", _headline)]
    return _filled(
        [
            *columns,
            _measure("retention (%)", "retention", _percent, spread=True),
            _measure("parameters", "params_total", count),
            _measure("in encoder", "params_encoder", count),
            _measure("in embeddings", "params_embedding", count),
            _measure("MACs", "macs", count),
            _measure("MB", "size_mb", significant),
            *(_Column(f"{shape} p50 / p95 (ms)", _latency(shape)) for shape in _union(aggregates, "latency_ms")),
            *(_measure(f"speed-up {shape}", f"speedup.{shape}", factor) for shape in _union(aggregates, "speedup")),
            _measure("training", "train_seconds", duration),
        ],
        aggregates,
    )


def _stacked(*paths: tuple[str, Callable[[float], str]]) -> Callable[[Aggregate], str | None]:
    """A cell of several lines, the first of which must be there."""

    def cell(a: Aggregate) -> str | None:
        if paths[0][0] not in a.mean:
            return None
        return "\n".join(show(a.mean[path]) for path, show in paths if path in a.mean)

    return cell


def _with_spread(path: str) -> Callable[[Aggregate], str | None]:
    def cell(a: Aggregate) -> str | None:
        if path not in a.mean:
            return None
        return _score(a.mean[path]) + (f"\n±{_score(a.std[path])}" if path in a.std else "")

    return cell


def _terminal_columns(aggregates: Sequence[Aggregate]) -> list[_Column]:
    """Two lines to a cell, so that the usual table fits 80 characters."""
    names = _metrics(aggregates)
    scores = [_Column(name.replace("_", "\n"), _with_spread(f"metrics.{name}")) for name in names]
    shapes = _union(aggregates, "latency_ms")
    return _filled(
        [
            _Column("model", lambda a: a.name, numeric=False),
            *(scores or [_Column("metric", _with_spread("metric"))]),
            _Column("retained", _stacked(("retention", lambda value: _percent(value) + " %"))),
            _Column("params\nencoder", _stacked(("params_total", count), ("params_encoder", count))),
            _Column("MACs\nMB", _stacked(("macs", count), ("size_mb", significant))),
            *(
                _Column(
                    f"{shape}\nms", _stacked((f"latency_ms.{shape}.p50", significant), (f"speedup.{shape}", factor))
                )
                for shape in shapes
            ),
            _Column("train\nmin", _stacked(("train_seconds", lambda seconds: f"{seconds / 60:.1f}"))),
        ],
        aggregates,
    )


def terminal_table(aggregates: Sequence[Aggregate]) -> Table:
    """One table with a section for each task, and their mean at the end; speed-ups stand below the latencies."""
    tasks, means = over_tasks(aggregates)
    everything = [*aggregates, *means]
    columns, shared = _terminal_columns(everything), _metrics(everything)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        table.add_column(
            Text(column.title, justify=justify),
            justify=justify,
            no_wrap=column.numeric,
            overflow="fold",
            min_width=None if column.numeric else 12,
        )
    previous = None
    for a in everything:
        if a.task != previous:
            table.add_section()
            seeds = max(len(other.seeds) for other in everything if other.task == a.task)
            facts = [a.task, "" if shared else a.metric_name, f"{seeds} seeds" if seeds > 1 else ""]
            table.add_row(Text("\n".join(filter(None, facts)), style="bold"))
        previous = a.task
        table.add_row(*(Text(column.cell(a) or MISSING) for column in columns))
    if tasks:
        table.caption = Text(f"mean over {', '.join(tasks)}; retained: of the teacher's mean")
    return table


def markdown_table(aggregates: Sequence[Aggregate]) -> str:
    if not aggregates:
        return "No rows yet.\n"
    columns = _markdown_columns(aggregates)
    lines = ["| " + " | ".join(_escaped(column.title) for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.numeric else "---" for column in columns) + "|")
    for a in aggregates:
        lines.append("| " + " | ".join(_escaped(column.cell(a) or MISSING) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _structure(value: Any) -> str:
    """[[8, 2048], [8, 2048], [6, 1024]] -> "2 x (8 heads, 2048 neurons), 1 x (6 heads, 1024 neurons)"."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        return MISSING if value is None else str(value)
    runs: list[list[Any]] = []
    for heads, ffn in value:
        if runs and runs[-1][1:] == [heads, ffn]:
            runs[-1][0] += 1
        else:
            runs.append([1, heads, ffn])
    return ", ".join(f"{n} x ({heads} heads, {ffn} neurons)" for n, heads, ffn in runs) or "no layers"


def prediction(latency_ms: Mapping[str, float]) -> str:
    """What a pruning to a budget of time predicted, beside what was measured then."""
    predicted, measured = latency_ms["predicted"], latency_ms["measured"]
    return f"{significant(predicted)} / {significant(measured)} ({100 * (predicted / measured - 1):+.1f} %)"


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    timed = any("latency_ms" in stage for stage in stages)
    lines = ["| stage | time | metric | layers |", "|---|---:|---:|---|"]
    if timed:
        lines = [lines[0] + " ms predicted / measured |", lines[1] + "---:|"]
    for stage in stages:
        seconds, metric = stage.get("seconds"), stage.get("metric")
        cells = (
            str(stage.get("name", MISSING)),
            MISSING if seconds is None else duration(seconds),
            MISSING if metric is None else _score(metric),
            _structure(stage.get("structure")),
            *([prediction(stage["latency_ms"]) if "latency_ms" in stage else MISSING] if timed else []),
        )
        lines.append("| " + " | ".join(map(_escaped, cells)) + " |")
    return "\n".join(lines) + "\n"


def target_sentence(target: Mapping[str, Any]) -> str:
    shape = f" at {target['shape']}" if target.get("shape") else ""
    verdict = "met" if target.get("met") else "NOT met"
    goal = target.get("goal", "target")
    return f"Target: {goal} {target.get('asked')}{shape} asked, {target.get('measured')} measured: **{verdict}**."


def markdown_report(report: Report) -> str:
    aggregates = report.aggregates()
    names = list(dict.fromkeys(a.task for a in aggregates))
    parts = [f"# SmBERT report: {', '.join(names)}\n" if names else "# SmBERT report\n"]
    if report.command:
        parts.append(f"```bash\n{report.command}\n```\n")
    if report.target:
        parts.append(target_sentence(report.target) + "\n")
    parts.append(markdown_table(aggregates))
    tasks, means = over_tasks(aggregates)
    if means:
        parts.append(f"Mean over {', '.join(tasks)} (retention of the mean):\n")
        parts.append(markdown_table(means))
    parts.append("![metric against parameters and against latency](report.png)\n")
    if report.stages:
        parts.append("## Stages\n")
        parts.append(_stages(report.stages))
        parts.append(
            "The metric after a stage is of a sample of the validation rows, that of the table above of all.\n"
        )
    parts.append("## How to read it\n")
    parts.append("\n".join(f"- {line}" for line in [*_explanations(aggregates), *report.notes]) + "\n")
    if report.environment:
        parts.append("## Machine\n")
        lines = ["| | |", "|---|---|"]
        for key, value in report.environment.items():
            shown = (
                ", ".join(map(str, value))
                if isinstance(value, list | tuple)
                else MISSING
                if value is None
                else str(value)
            )
            lines.append(f"| {_escaped(key)} | {_escaped(shown)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _explanations(aggregates: Sequence[Aggregate]) -> list[str]:
    lines = ["Retention: the metric divided by the teacher's on the same task and seed."]
    if any(len(a.seeds) > 1 for a in aggregates):
        lines.append("Several seeds: mean ± sample standard deviation.")
    if any("macs" in a.mean for a in aggregates):
        lines.append("MACs: multiply-accumulate operations of the encoder for one sequence of 128 tokens.")
    if _union(aggregates, "latency_ms"):
        lines.append(
            "Latency: median and 95th percentile of one batch (batch x tokens), all models timed in turns in one process; "
            "speed-up: the teacher's median divided by the model's."
        )
    if any(a.name == INT8_TEACHER for a in aggregates):
        lines.append(
            "Teacher in int8: exported with dynamic ranges, one scale per output of a weight; ONNX Runtime on as many threads as torch, which do "
            "not spin between answers. benchmarks/engines.py gives every engine a process of its own."
        )
    lines.append(f"{MISSING}: not measured.")
    return lines
