"""Explanations in the terminal: the text shaded by weight, the words that count most, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .html import segments

# Blue and orange, from faint to strong, on which white letters can be read.
_FOR = ("on #1e3a5f", "on #1d4ed8")
_AGAINST = ("on #5b3a10", "on #b45309")
_FAINTEST, _STRONG = 0.15, 0.5


def terminal_view(data: Mapping[str, Any], limit: int = 5) -> RenderableType:
    """What `Explanations.to_dict` gives, the first `limit` texts: `rich.print(terminal_view(...))`."""
    parts: list[RenderableType] = [report_table(data["report"])]
    for number, row in enumerate(data["rows"][:limit], 1):
        beside = Table.grid(expand=True)
        for _ in row:
            beside.add_column(ratio=1)
        beside.add_row(*(_panel(one, data["label_names"]) for one in row))
        parts += [Text(f"text {number}", style="bold"), beside]
    if len(data["rows"]) > limit:
        parts.append(Text(f"and {len(data['rows']) - limit} more texts on the page", style="dim"))
    return Group(*parts)


def report_table(report: Mapping[str, Any]) -> Table:
    """Fidelity, stability and overlap."""
    table = Table("model", "fidelity R²", f"top-{report['k']} over seeds", "ranks over seeds")
    for name, fidelity in report["fidelity"].items():
        stable = report["stability"][name]
        table.add_row(Text(name), _figure(fidelity), _figure(stable["jaccard"]), _figure(stable["spearman"]))
    if "overlap" in report:
        overlap = report["overlap"]
        table.caption = (
            f"between the two: top-{report['k']} Jaccard {_figure(overlap['jaccard'])} (chance {_figure(overlap['chance'])}), "
            f"rank correlation {_figure(overlap['spearman'])}, same label {_figure(overlap['same_label'])}"
        )
    return table


def _panel(one: Mapping[str, Any], names: Sequence[str]) -> Panel:
    most = max(map(abs, one["weights"]), default=0.0)
    text = Text()
    for side in range(len(one["texts"])):
        if side:
            text.append("\n")
        for piece, weight in segments(one, side):
            text.append(piece, _style(weight, most))
    order = sorted(range(len(one["units"])), key=lambda i: -abs(one["weights"][i]))[:6]
    words = Text(", ".join(f"{one['units'][i]['text']} {one['weights'][i]:+.3f}" for i in order if one["weights"][i]))
    fidelity = "constant" if one["r2"] is None else f"R² {one['r2']:.2f}"
    title = Text(f"{one['model']}: {names[one['label']]} {one['probabilities'][one['label']]:.3f}, {fidelity}")
    return Panel(Group(text, Text(""), words), title=title)


def _style(weight: float | None, most: float) -> str:
    if weight is None or most == 0 or abs(weight) < _FAINTEST * most:
        return ""
    return "white " + (_FOR if weight > 0 else _AGAINST)[abs(weight) >= _STRONG * most]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
