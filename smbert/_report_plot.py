"""The picture of a report: metric against parameters and against latency."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ._report_tables import TEACHER, Aggregate, over_tasks, significant

# Okabe and Ito's colours, which colour-blind readers tell apart; the baseline has its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6A3D9A")
_BASELINE = "#333333"
_GRID = "#E4E4E4"
_SHAPES = ("32x128", "1x128")  # preferred for the latency axis: at batch 1 a GPU sees depth only, at 32 width too


def draw(aggregates: Sequence[Aggregate]) -> bytes:
    """The PNG of `figure_of`."""
    file = io.BytesIO()
    figure_of(aggregates).savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def figure_of(aggregates: Sequence[Aggregate]) -> Figure:
    """Two panels. One task: its rows; several tasks: their means; without a common task, the first task."""
    tasks, shown = over_tasks(aggregates)
    if not shown:
        first = [a for a in aggregates if "metric" in a.mean][:1]
        tasks = [a.task for a in first]
        shown = [a for a in aggregates if a.task in tasks and "metric" in a.mean]
    figure = Figure(figsize=(12, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    shapes = list(dict.fromkeys(shape for a in shown for shape in a.keys("latency_ms")))
    shape = next((s for s in _SHAPES if s in shapes), shapes[0] if shapes else None)
    batch = f"one {shape.replace('x', ' x ')} batch, " if shape else ""
    latency = f"latency_ms.{shape}.p50"
    _panel(left, shown, "params_total", "parameters (millions)", 1e6)
    _panel(right, shown, latency, f"latency ({batch}median, ms)", 1)
    _scale_metric(left, shown, ("params_total", latency))
    if shown:
        name = "mean metric" if len(tasks) > 1 else shown[0].metric_name
        left.set_title(f"{name} against size", loc="left", fontsize=11)
        right.set_title(f"{name} against latency", loc="left", fontsize=11)
        left.set_ylabel(f"{name} {'over' if len(tasks) > 1 else 'on'} {', '.join(tasks)}")
        seeds = max(len(a.seeds) for a in shown)
        if seeds > 1:
            figure.suptitle(
                f"mean of up to {seeds} seeds, bars: sample standard deviation", fontsize=9, color="#777777"
            )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in pixels, so nothing may move any more
    for axes, path, scale in ((left, "params_total", 1e6), (right, latency, 1.0)):
        _label(axes, shown, path, scale)
    return figure


def _colour(shown: Sequence[Aggregate], name: str) -> str:
    others = [a.name for a in shown if a.name != TEACHER]
    return _BASELINE if name == TEACHER else _COLOURS[others.index(name) % len(_COLOURS)]


def _panel(axes: Axes, shown: Sequence[Aggregate], path: str, title: str, scale: float) -> None:
    """Points with spread; rows without the measure (majority class) and the baseline are lines across."""
    axes.set_xlabel(title)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelleft=True)
    present = [a for a in shown if path in a.mean]
    if not present:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#777777")
        axes.set_xticks([])
        return
    for a in shown:
        colour, y = _colour(shown, a.name), a.mean["metric"]
        if a.name == TEACHER:
            axes.axhline(y, color=colour, linewidth=0.9, linestyle="--", zorder=1)
        if path not in a.mean:
            axes.axhline(y, color=colour, linewidth=0.9, linestyle=":", zorder=1)
            continue
        axes.errorbar(
            a.mean[path] / scale,
            y,
            yerr=a.std.get("metric"),
            fmt="*" if a.name == TEACHER else "o",
            markersize=20 if a.name == TEACHER else 9,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.8,
            ecolor=colour,
            elinewidth=1.2,
            capsize=3,
            zorder=2 if a.name == TEACHER else 3,  # an int8 teacher of the same size stays visible on it
        )
    values = [a.mean[path] / scale for a in present]
    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.2, high * (high / low) ** 0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.15 * high or 1)


def _scale_metric(axes: Axes, shown: Sequence[Aggregate], paths: Sequence[str]) -> None:
    """Sets the shared vertical axis so that every point of either panel is seen."""
    metrics = [a.mean["metric"] for a in shown if any(path in a.mean for path in paths)]
    if not metrics:
        return
    low, high = min(metrics), max(metrics)
    # A reference far below the models would press them into one line; it is then only named at the lower edge.
    space = high - low or 0.1 * abs(high) or 0.1
    low = min([low, *(a.mean["metric"] for a in shown if low - 1.5 * space < a.mean["metric"] < low)])
    high = max(a.mean["metric"] for a in shown)
    space = 0.18 * (high - low) or space
    axes.set_ylim(low - space, high + space)


def _label(axes: Axes, shown: Sequence[Aggregate], path: str, scale: float) -> None:
    """Writes each name beside its point, at the nearest place that covers no point, no other name and no axis."""
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[union-attr, attr-defined]
    points = [(a, *axes.transData.transform((a.mean[path] / scale, a.mean["metric"]))) for a in shown if path in a.mean]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for _, x, y in points]
    frame = axes.get_window_extent(renderer)
    for a in shown if points else ():
        level = axes.transData.transform((1.0, a.mean["metric"]))[1]
        if level > frame.y0 and (path not in a.mean or a.name == TEACHER):
            taken.append(Bbox.from_extents(frame.x0, level - 2, frame.x1, level + 2))  # its line
        if path not in a.mean:
            arrow = "" if level > frame.y0 else "\N{DOWNWARDS ARROW} "
            text = axes.annotate(
                f"{arrow}{a.name} {a.mean['metric']:.3f}",
                (frame.x1 - 4, max(level, frame.y0) + 3),
                xycoords="figure pixels",
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=_colour(shown, a.name),
            )
            taken.append(text.get_window_extent(renderer))
    for a, x, y in points:
        value = a.mean[path] / scale
        unit = " ms" if scale == 1 else " M"
        words = textwrap.fill(a.name, 24) + f"\n{a.mean['metric']:.3f}, {significant(value)}{unit}"
        best: tuple[float, Bbox] | None = None
        text = axes.annotate(words, (x, y), xycoords="figure pixels", fontsize=8.5, color=_colour(shown, a.name))
        size = text.get_window_extent(renderer)
        for far in (13, 20, 30, 45, 60, 80, 100, 130, 160, 200, 250):
            for dx, dy in ((1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5), (0, 1), (0, -1), (1, 0), (-1, 0)):
                left = x + dx * far - (size.width if dx < 0 else size.width / 2 if dx == 0 else 0)
                bottom = y + dy * far - (size.height if dy < 0 else size.height / 2 if dy == 0 else 0)
                box = Bbox.from_bounds(left, bottom, size.width, size.height)
                cost = far + 3 * sum(_overlap(box, other) for other in taken) + 3 * _outside(box, frame)
                if best is None or cost < best[0]:
                    best = cost, box
        assert best is not None
        box = best[1]
        text.set_position((box.x0, box.y0))
        text.set(ha="left", va="bottom")
        taken.append(box)
        if best[0] > 30:  # far from its point: a thin line tells whose name it is
            near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            style = {"arrowstyle": "-", "color": _colour(shown, a.name), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", (x, y), near, xycoords="figure pixels", textcoords="figure pixels", arrowprops=style)


def _overlap(a: Bbox, b: Bbox) -> float:
    """Pixels that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    """Pixels of a box outside a frame."""
    return box.width * box.height - _overlap(box, frame)
