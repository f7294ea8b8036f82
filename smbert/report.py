"""The report: what was measured, in one JSON shape that recipes and benchmarks share.

    {"schema_version": 1,
     "command": "smbert compress ...",             # makes the figures again
     "environment": {...},                         # `measure.environment`: CPU, threads, versions
     "rows": [{
        "name": "teacher",                         # "teacher" is the baseline of its task and seed
        "task": "mrpc", "seed": 0,                 # seed null: valid for all seeds, as a ready-made teacher is
        "metric_name": "f1", "metric": 0.892,      # the headline metric
        "metrics": {"f1": 0.892, "accuracy": 0.853},
        "retention": 1.0,                          # metric / the teacher's; null where that says nothing
        "params_total": 0, "params_encoder": 0, "params_embedding": 0,
        "macs": 0,                                 # of the encoder, for one sequence of 128 tokens
        "size_mb": 0.0,                            # 10^6 bytes
        "latency_ms": {"32x128": {"p50": 0.0, "p95": 0.0}},    # batch x tokens
        "speedup": {"32x128": 1.0},                # by p50, against the teacher timed in the same call
        "train_seconds": 0.0}],
     "target": {"goal": "speedup", "asked": 6, "measured": 6.1, "met": true, "shape": "32x128"},   # optional
     "notes": ["..."],                                                                             # optional
     "stages": [{"name": "...", "seconds": 0.0, "metric": 0.0, "structure": [[8, 2048], ...],      # optional
                 "latency_ms": {"predicted": 0.0, "measured": 0.0}}]}    # of a pruning to a budget of time

Anything that was not measured is null (or an empty object) in JSON and "–" in a table.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ._model_card import model_card, write_model_card, write_whole
from ._report_plot import draw
from ._report_tables import TEACHER, Aggregate, aggregate, markdown_report, terminal_table
from .metrics import METRICS

__all__ = ["SCHEMA_VERSION", "Report", "Row", "model_card", "write_model_card"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One model on one task with one seed; the module's docstring explains the fields.

    Raises:
        ValueError: a number is not finite: JSON cannot say it, and a mean would hide it.
        TypeError: something else stands where a number or a mapping is due.
    """

    name: str
    task: str
    seed: int | None = None
    metric_name: str = ""
    metric: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    retention: float | None = None
    params_total: int | None = None
    params_encoder: int | None = None
    params_embedding: int | None = None
    macs: int | None = None
    size_mb: float | None = None
    latency_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    speedup: Mapping[str, float] = field(default_factory=dict)
    train_seconds: float | None = None

    def __post_init__(self) -> None:
        texts = ("name", "task", "metric_name")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in texts:
                if not isinstance(value, str):
                    raise TypeError(f"`{entry.name}` must be a text, got {value!r}.")
            elif entry.name in ("metrics", "latency_ms", "speedup"):
                object.__setattr__(self, entry.name, _plain_mapping(entry.name, value))
            else:
                object.__setattr__(self, entry.name, _plain_number(entry.name, value))
        if self.metric is not None and self.metric_name not in self.metrics:
            object.__setattr__(self, "metrics", {self.metric_name: self.metric, **self.metrics})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Raises ValueError for unknown and missing fields."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a report's row has the fields {', '.join(sorted(known))}, got {', '.join(unknown)} too.")
        if missing := sorted({"name", "task"} - set(values)):
            raise ValueError(f"a report's row must have the fields name and task, got none for {', '.join(missing)}.")
        return cls(**values)


@dataclass
class Report:
    """Rows with the command and the machine that they belong to; the module's docstring shows the JSON.

    Attributes:
        command: the command that made the report.
        environment: from `measure.environment`.
        rows: use `add`, which fills in the retention.
        target: what was asked for and whether it was met; None without a target.
        notes: sentences that a reader of the figures should know.
        stages: what every stage of the recipe did.
    """

    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    target: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows, self.rows = self.rows, []
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Adds a row, in the place of an earlier one of the same name, task and seed, and fills in all retentions."""
        keys = [(r.name, r.task, r.seed) for r in self.rows]
        key = (row.name, row.task, row.seed)
        if key in keys:
            self.rows[keys.index(key)] = row
        else:
            self.rows.append(row)
        teachers = {(r.task, r.seed): r for r in self.rows if r.name == TEACHER}
        for index, other in enumerate(self.rows):
            teacher = teachers.get((other.task, other.seed), teachers.get((other.task, None)))
            if teacher is not None:
                self.rows[index] = replace(other, retention=_retention(other, teacher))

    def aggregates(self) -> list[Aggregate]:
        """Mean and sample standard deviation over seeds, for each task and name in the order of the rows."""
        return aggregate(self.rows)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "environment": self.environment,
            "rows": [row.to_dict() for row in self.rows],
        }
        optional = {"target": self.target, "notes": self.notes, "stages": self.stages}
        return values | {key: value for key, value in optional.items() if value}

    def to_json(self) -> str:
        """Raises ValueError for numbers that JSON does not have (NaN, infinity)."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ValueError: not JSON, another schema version, or unknown fields.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"a report must be JSON, got an error: {error}. To resolve, write the report again."
            ) from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise ValueError(
                f"`schema_version` must be {SCHEMA_VERSION}, got {version!r}. "
                "To resolve, read the report with the smbert version that wrote it, or write it again."
            )
        known = {"schema_version", *(entry.name for entry in fields(cls))}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a report has the fields {', '.join(sorted(known))}, got {', '.join(unknown)} too.")
        rows = [Row.from_dict(row) for row in values.get("rows", [])]
        return cls(**{key: value for key, value in values.items() if key != "schema_version"} | {"rows": rows})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """The report in a folder or a file; raises FileNotFoundError where there is none."""
        path = Path(path)
        return cls.from_json((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8"))

    def table(self) -> Table:
        """For the terminal: `rich.print(report.table())`."""
        return terminal_table(self.aggregates())

    def markdown(self) -> str:
        return markdown_report(self)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes report.json, report.md and report.png; each appears whole or not at all.

        Raises:
            OSError: a file could not be written; the earlier one is left as it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents: dict[str, Callable[[], bytes]] = {
            "report.json": lambda: self.to_json().encode(),
            "report.md": lambda: self.markdown().encode(),
            "report.png": lambda: draw(self.aggregates()),
        }
        for name, content in contents.items():
            write_whole(folder / name, content())


def _retention(row: Row, teacher: Row) -> float | None:
    """metric / the teacher's; None where the quotient says nothing: another metric, errors, a teacher at or below 0."""
    metric = METRICS.get(row.metric_name)
    if row.metric is None or not teacher.metric or row.metric_name != teacher.metric_name:
        return None
    if teacher.metric < 0 or (metric is not None and not metric.higher_is_better):
        return None
    return row.metric / teacher.metric


def _plain_number(name: str, value: Any) -> int | float | None:
    """A Python number for a number of any kind (numpy's are no JSON)."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number or None, got {value!r}.")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {number}. To resolve, leave out what was not measured.")
    return number


def _plain_mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a mapping, got {value!r}.")
    return {
        str(key): _plain_mapping(f"{name}.{key}", inner)
        if isinstance(inner, Mapping)
        else _plain_number(f"{name}.{key}", inner)
        for key, inner in value.items()
    }
