"""Explanations as one HTML page that needs no other file and runs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5c6577; --ground: #fbfbfd; --card: #fff; --line: #dfe3ea;
        --for: 37, 99, 235; --against: 217, 119, 6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf1; --soft: #9aa4b5; --ground: #12151b; --card: #1a1e26; --line: #313846;
          --for: 59, 130, 246; --against: 217, 119, 6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; } h3 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .875rem; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; } .wide { overflow-x: auto; }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; min-width: 0; }
.head { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; flex-wrap: wrap; }
.bar { height: .4rem; border-radius: .2rem; background: var(--line); margin: .4rem 0 .7rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: rgb(var(--for)); }
.text { line-height: 1.9; overflow-wrap: anywhere; white-space: pre-wrap; margin: .3rem 0; }
.text.long { max-height: 24rem; overflow-y: auto; }
mark { color: inherit; border-radius: .2rem; padding: .08em .12em; }
mark.for { background: rgba(var(--for), var(--w)); } mark.against { background: rgba(var(--against), var(--w)); }
mark.against { text-decoration: underline dotted; text-underline-offset: .2em; }
.top { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .7rem; font-size: .875rem; margin-top: .6rem;
       align-items: center; } .top span { overflow-wrap: anywhere; max-width: 14rem; }
.top i { display: block; height: .7rem; border-radius: .15rem; min-width: 1px; }
.top i.for { background: rgb(var(--for)); } .top i.against { background: rgb(var(--against)); }
.top b { font-weight: 400; font-variant-numeric: tabular-nums; }
details { margin-top: .7rem; font-size: .875rem; } summary { cursor: pointer; color: var(--soft); }
"""

# Shades stay light enough for the letters on them to be read.
_FAINTEST, _STRONGEST = 0.08, 0.6
_LONG, _SHOWN = 1500, 10


def page(data: Mapping[str, Any]) -> str:
    """The page for what `Explanations.to_dict` gives."""
    names, rows = data["label_names"], data["rows"]
    title = " and ".join(data["models"])
    settings = data["settings"]
    unit = "single words" if settings["ngram"] == 1 else f"runs of {settings['ngram']} words"
    parts = [
        f"<h1>Explanations: {escape(title)}</h1>",
        f'<p class="soft">LIME: {settings["samples"]} variants of each text with {unit} left out. A shaded word '
        'adds to the probability of the named label (<mark class="for" style="--w:.5">for</mark>) or takes from it '
        '(<mark class="against" style="--w:.5">against</mark>); the stronger the shade, the more. Hover for figures.</p>',
        _report(data["report"]),
    ]
    for number, row in enumerate(rows, 1):
        parts.append(f"<h2>Text {number}</h2>")
        parts.append('<div class="pair">' + "".join(_card(one, names) for one in row) + "</div>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Explanations: {escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _report(report: Mapping[str, Any]) -> str:
    k = report["k"]
    lines = [
        f"<tr><td>{escape(name)}</td><td>{_figure(fidelity)}</td><td>{_figure(report['stability'][name]['jaccard'])}</td>"
        f"<td>{_figure(report['stability'][name]['spearman'])}</td></tr>"
        for name, fidelity in report["fidelity"].items()
    ]
    table = (
        f'<div class="wide"><table><tr><th>over {report["texts"]} texts, {report["seeds"]} seeds</th>'
        f"<th>fidelity (weighted R²)</th><th>stability: top-{k} Jaccard</th><th>stability: rank correlation</th></tr>"
        f"{''.join(lines)}</table></div>"
    )
    if "overlap" not in report:
        return table
    overlap = report["overlap"]
    return table + (
        f"<p>The two agree on the label of {_figure(overlap['same_label'], percent=True)} of the texts. Their top-{k} words "
        f"overlap by {_figure(overlap['jaccard'])} (Jaccard; {_figure(overlap['chance'])} by chance), their rankings "
        f"correlate by {_figure(overlap['spearman'])} (Spearman).</p>"
    )


def _card(one: Mapping[str, Any], names: Sequence[str]) -> str:
    probability = one["probabilities"][one["label"]]
    decided = names[max(range(len(names)), key=lambda i: one["probabilities"][i])]
    label = escape(names[one["label"]])
    long = " long" if sum(map(len, one["texts"])) > _LONG else ""
    shaded = "".join(
        f'<p class="text{long}" dir="auto">{"".join(_shaded(one, side))}</p>' for side in range(len(one["texts"]))
    )
    fidelity = "the probability never moves" if one["r2"] is None else f"R² {one['r2']:.2f}"
    return (
        f'<div class="card"><div class="head"><h3>{escape(one["model"])}</h3><span class="soft">{fidelity}</span></div>'
        f'<p>says <strong>{escape(decided)}</strong> <span class="soft">· probability of {label}: {probability:.3f}</span></p>'
        f'<div class="bar"><i style="width:{100 * probability:.1f}%"></i></div>{shaded}{_top(one)}{_exact(one, label)}</div>'
    )


def segments(one: Mapping[str, Any], side: int) -> Iterator[tuple[str, float | None]]:
    """A text from its first to its last character in pieces, each with the weight of its unit, None between units."""
    spans = sorted(
        (start, end, weight)
        for unit, weight in zip(one["units"], one["weights"])
        for at, start, end in unit["spans"]
        if at == side
    )
    position, text = 0, one["texts"][side]
    for start, end, weight in spans:
        if position < start:
            yield text[position:start], None
        yield text[start:end], weight
        position = end
    if position < len(text):
        yield text[position:], None


def _shaded(one: Mapping[str, Any], side: int) -> Iterator[str]:
    most = max(map(abs, one["weights"]), default=0.0)
    for piece, weight in segments(one, side):
        strength = 0.0 if weight is None or most == 0 else abs(weight) / most
        if weight is None or strength < _FAINTEST:
            yield escape(piece)
        else:
            side_of = "for" if weight > 0 else "against"
            yield f'<mark class="{side_of}" style="--w:{_STRONGEST * strength:.3f}" title="{weight:+.4f}">{escape(piece)}</mark>'


def _top(one: Mapping[str, Any]) -> str:
    order = sorted(range(len(one["units"])), key=lambda i: -abs(one["weights"][i]))[:_SHOWN]
    most = max((abs(one["weights"][i]) for i in order), default=0.0)
    lines = []
    for i in order:
        weight = one["weights"][i]
        if weight:
            width, side = 100 * abs(weight) / most, "for" if weight > 0 else "against"
            word = escape(one["units"][i]["text"])
            lines.append(
                f'<span dir="auto">{word}</span><i class="{side}" style="width:{width:.1f}%"></i><b>{weight:+.4f}</b>'
            )
    return f'<div class="top">{"".join(lines)}</div>' if lines else ""


def _exact(one: Mapping[str, Any], label: str) -> str:
    """The linear student's own weights, folded away."""
    if one["exact"] is None:
        return ""
    lines = "".join(
        f'<tr><td dir="auto">{escape(name)}</td><td>{value:+.4f}</td></tr>'
        for name, value in one["exact"][: 2 * _SHOWN]
    )
    return (
        f'<details><summary>exact weights of the linear model ({len(one["exact"])} n-grams)</summary><p class="soft">What '
        f"each n-gram adds to the log probability of {label}, less the mean over the labels.</p><table>{lines}</table></details>"
    )


def _figure(value: float | None, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if percent else f"{value:.2f}"
