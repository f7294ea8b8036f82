"""One JSON shape, retention and means that can be checked by hand, files whole or not at all, cards that overwrite nobody's."""

from __future__ import annotations

import errno
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from smbert._report_plot import figure_of
from smbert._report_tables import INT8_TEACHER, count, duration, factor, over_tasks, significant
from smbert.report import Report, Row, model_card, write_model_card

ROW_KEYS = {
    *("name", "task", "seed", "metric_name", "metric", "metrics", "retention", "params_total", "params_encoder"),
    *("params_embedding", "macs", "size_mb", "latency_ms", "speedup", "train_seconds"),
}


def row(name: str, metric: float | None = 0.8, task: str = "mrpc", seed: int | None = 0, **values: Any) -> Row:
    return Row(name, task, seed, values.pop("metric_name", "f1"), metric, **values)


def measured(name: str, metric: float, parameters: float, ms: float, task: str = "tweets", seed: int = 0) -> Row:
    """A row with every measure, the teacher of which takes 596 ms."""
    return Row(
        name=name,
        task=task,
        seed=seed,
        metric_name="accuracy",
        metric=metric,
        metrics={"accuracy": metric, "f1_macro": metric - 0.01},
        params_total=int(parameters),
        params_encoder=int(parameters / 3),
        params_embedding=int(parameters / 2),
        macs=1_460_000_000,
        size_mb=parameters * 4 / 1e6,
        latency_ms={"1x128": {"p50": ms / 25, "p95": ms / 20}, "32x128": {"p50": ms, "p95": ms * 1.1}},
        speedup={"1x128": 400 / ms, "32x128": 596 / ms},
        train_seconds=300.0,
    )


def full_report(seeds: tuple[int, ...] = (0,), tasks: tuple[str, ...] = ("tweets",)) -> Report:
    report = Report(
        command="smbert compress",
        environment={"cpu": "AMD EPYC", "isa": ["avx2", "avx512f"], "threads": 2, "gpu": None, "smbert": "0.1.0"},
        target={"goal": "speedup", "asked": 6, "measured": 5.93, "met": True, "shape": "32x128"},
        notes=["Shared machine."],
        stages=[
            {"name": "01-depth", "seconds": 130.2, "metric": 0.71, "structure": [[12, 1536], [12, 1536], [6, 512]]}
        ],
    )
    for number, task in enumerate(tasks):
        for seed in seeds:
            shift = 0.004 * seed - 0.05 * number
            report.add(measured("teacher", 0.80 + shift, 22.7e6, 596, task, seed))
            report.add(measured(INT8_TEACHER, 0.796 + shift, 22.7e6, 213, task, seed))
            report.add(measured("same shape, no distillation", 0.73 + shift, 15.4e6, 101, task, seed))
            report.add(measured("smbert", 0.79 + shift, 15.4e6, 100.5, task, seed))
            report.add(Row("majority class", task, seed, "accuracy", 0.45, {"accuracy": 0.45, "f1_macro": 0.2}))
    return report


# The JSON shape


def test_the_documented_json_shape() -> None:
    values = json.loads(full_report().to_json())
    assert values["schema_version"] == 1
    assert set(values) == {"schema_version", "command", "environment", "rows", "target", "notes", "stages"}
    assert all(set(entry) == ROW_KEYS for entry in values["rows"])
    teacher = values["rows"][0]
    assert teacher["name"] == "teacher" and teacher["retention"] == 1.0
    assert set(teacher["latency_ms"]["1x128"]) == {"p50", "p95"} and set(teacher["speedup"]) == {"1x128", "32x128"}
    majority = values["rows"][-1]
    assert majority["params_total"] is None and majority["latency_ms"] == {} and majority["train_seconds"] is None
    assert set(json.loads(Report("c").to_json())) == {"schema_version", "command", "environment", "rows"}


def test_json_round_trip(tmp_path: Path) -> None:
    report = full_report((0, 1), ("mrpc", "rte"))
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(Report().to_json()) == Report()
    report.write(tmp_path)
    assert Report.read(tmp_path) == Report.read(tmp_path / "report.json") == report
    with pytest.raises(FileNotFoundError):
        Report.read(tmp_path / "absent")


@pytest.mark.parametrize("version", ["2", "0", "null", '"1"', "true"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r"`schema_version` must be 1, got .*To resolve, read the report with"):
        Report.from_json(f'{{"schema_version": {version}, "rows": []}}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "`schema_version` must be 1, got None"),
        ('{"rows": []}', "`schema_version` must be 1, got None"),
        ('{"schema_version": 1, "colour": 2}', "got colour too"),
        ('{"schema_version": 1, "rows": [{"name": "a", "task": "b", "f1": 2}]}', "got f1 too"),
        ('{"schema_version": 1, "rows": [{"name": "a"}]}', "got none for task"),
    ],
)
def test_wrong_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_json(text)


def test_numbers_become_python_numbers() -> None:
    made = row("a", np.float32(0.5), params_total=np.int64(7), metrics={"f1": np.float64(0.5)}, seed=np.int32(3))  # type: ignore[arg-type]
    assert type(made.metric) is float and type(made.params_total) is int and type(made.seed) is int
    assert json.loads(json.dumps(made.to_dict()))["metric"] == 0.5
    assert row("a", 0.25).metrics == {"f1": 0.25}  # the headline is always among the metrics
    assert list(row("a", 0.25, metrics={"accuracy": 0.5}).metrics) == ["f1", "accuracy"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"metric": float("nan")}, ValueError, "`metric` must be finite, got nan"),
        ({"metrics": {"f1": float("inf")}}, ValueError, "`metrics.f1` must be finite"),
        ({"latency_ms": {"1x128": {"p50": float("nan")}}}, ValueError, "`latency_ms.1x128.p50` must be finite"),
        ({"size_mb": "90"}, TypeError, "`size_mb` must be a number or None, got '90'"),
        ({"macs": True}, TypeError, "`macs` must be a number"),
        ({"speedup": 6}, TypeError, "`speedup` must be a mapping, got 6"),
        ({"name": None}, TypeError, "`name` must be a text"),
    ],
)
def test_what_json_cannot_say_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Row(**{"name": "a", "task": "mrpc", **values})


# Retention


def test_retention_is_of_the_same_task_and_seed() -> None:
    report = Report()
    report.add(row("smbert", 0.60, "rte", 1))
    assert report.rows[0].retention is None  # no teacher yet
    for task, seed, metric in (("rte", 0, 0.7), ("rte", 1, 0.75), ("mrpc", 0, 0.9)):
        report.add(row("teacher", metric, task, seed))
    report.add(row("smbert", 0.81, "mrpc", 0))
    report.add(row("smbert", 0.9, "mrpc", 7))
    found = {(r.name, r.task, r.seed): r.retention for r in report.rows}
    assert found["smbert", "rte", 1] == pytest.approx(0.8)
    assert found["smbert", "mrpc", 0] == pytest.approx(0.9)
    assert found["smbert", "mrpc", 7] is None
    assert found["teacher", "rte", 0] == 1.0


def test_a_teacher_without_a_seed_stands_for_all_seeds() -> None:
    report = Report(rows=[row("smbert", 0.4, seed=3), row("teacher", 0.8, seed=None), row("smbert", 0.6, seed=4)])
    assert [r.retention for r in report.rows] == [pytest.approx(0.5), 1.0, pytest.approx(0.75)]
    report.add(row("teacher", 0.4, seed=3))  # the teacher of the same seed comes first
    assert report.rows[0].retention == 1.0


def test_a_row_is_replaced_and_retention_follows() -> None:
    report = Report(rows=[row("teacher", 0.8), row("smbert", 0.4)])
    report.add(row("teacher", 0.5))
    assert len(report.rows) == 2 and report.rows[1].retention == pytest.approx(0.8)
    assert [r.name for r in report.rows] == ["teacher", "smbert"]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (row("teacher", 0.0), row("smbert", 0.4)),
        (row("teacher", -0.1), row("smbert", 0.4)),
        (row("teacher", None), row("smbert", 0.4)),
        (row("teacher", 0.8), row("smbert", None)),
        (row("teacher", 0.8, metric_name="accuracy"), row("smbert", 0.4)),
        (row("teacher", 0.8, metric_name="mse"), row("smbert", 0.4, metric_name="mse")),
    ],
)
def test_no_retention_where_it_says_nothing(teacher: Row, student: Row) -> None:
    assert Report(rows=[teacher, student]).rows[1].retention is None


def test_retention_given_by_hand_stays_without_a_teacher() -> None:
    assert Report(rows=[row("smbert", 0.8, retention=0.94)]).rows[0].retention == 0.94


# Means


def test_seeds_become_mean_and_sample_deviation() -> None:
    metrics = [0.61, 0.65, 0.72]
    report = Report(
        rows=[row("smbert", m, "rte", s, size_mb=10.0) for s, m in enumerate(metrics)] + [row("teacher", 0.7, "rte")]
    )
    smbert, teacher = report.aggregates()
    assert smbert.seeds == (0, 1, 2) and teacher.seeds == (0,)
    assert smbert.mean["metric"] == pytest.approx(np.mean(metrics))
    assert smbert.std["metric"] == pytest.approx(np.std(metrics, ddof=1)) == pytest.approx(statistics.stdev(metrics))
    assert smbert.mean["size_mb"] == 10.0 and smbert.std["size_mb"] == 0.0
    assert teacher.std == {} and "size_mb" not in teacher.mean and "seed" not in smbert.mean
    assert "| smbert | 3 | 0.660 ± 0.056 |" in report.markdown()


def test_mean_over_tasks_has_the_retention_of_the_mean() -> None:
    report = Report(
        rows=[
            *(row("teacher", 0.9, "mrpc"), row("teacher", 0.6, "rte", metric_name="accuracy")),
            *(row("smbert", 0.6, "mrpc"), row("smbert", 0.6, "rte", metric_name="accuracy")),
            row("only here", 0.99, "mrpc"),
        ]
    )
    tasks, means = over_tasks(report.aggregates())
    assert tasks == ["mrpc", "rte"] and [a.name for a in means] == ["teacher", "smbert"]
    assert means[1].mean["metric"] == pytest.approx(0.6)
    assert means[1].mean["retention"] == pytest.approx(0.6 / 0.75)  # not (2/3 + 1) / 2
    text = report.markdown()
    assert "Mean over mrpc, rte (retention of the mean)" in text and "| smbert | 0.600 | 80.0 |" in text
    assert "| mrpc | smbert | 0.600 f1 |" in text and "| rte | smbert | 0.600 accuracy |" in text


def test_mean_over_tasks_compares_like_with_like() -> None:
    both = [row("teacher", 0.9, t) for t in ("a", "b", "c")]
    unfinished = Report(rows=[*both, row("smbert", 0.5, "a"), row("smbert", 0.7, "c")])
    tasks, means = over_tasks(unfinished.aggregates())
    assert tasks == ["a", "c"] and means[1].mean["metric"] == pytest.approx(0.6)
    assert over_tasks(Report(rows=both[:1]).aggregates()) == ([], [])
    assert over_tasks(Report(rows=[row("teacher", 0.9, "a"), row("smbert", 0.8, "b")]).aggregates()) == ([], [])
    errors = [row(n, 0.5, t, metric_name=m) for n in ("teacher", "smbert") for t, m in (("a", "f1"), ("b", "mse"))]
    assert all("retention" not in a.mean for a in over_tasks(Report(rows=errors).aggregates())[1])


# Text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        *((count(v), e) for v, e in ((38_610_432, "38.61 M"), (110e6, "110.0 M"), (2_734_000_000, "2.734 G"))),
        *((count(v), e) for v, e in ((999, "999"), (1000, "1.000 k"), (999_999, "1.000 M"), (14_178_816, "14.18 M"), (0, "0"))),
        *((significant(v), e) for v, e in ((596.3, "596"), (20.55, "20.6"), (7.9, "7.90"), (0.0412, "0.041"), (1500, "1,500"))),
        *((significant(v), e) for v, e in ((9.999, "10.0"), (99.99, "100"))),
        *((duration(v), e) for v, e in ((7, "7.0 s"), (42.2, "42 s"), (130.2, "2.2 min"), (2100, "35 min"), (11_100, "3 h 05 min"))),
        *((factor(v), e) for v, e in ((0.658, "0.66x"), (5.934, "5.93x"), (12.34, "12.3x"))),
    ],
)  # fmt: skip
def test_numbers_are_readable(shown: str, expected: str) -> None:
    assert shown == expected


def test_markdown_has_everything() -> None:
    text = full_report().markdown()
    header = next(line for line in text.splitlines() if line.startswith("| model"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns == [
        *("model", "accuracy", "f1_macro", "retention (%)", "parameters", "in encoder", "in embeddings", "MACs", "MB"),
        *("1x128 p50 / p95 (ms)", "32x128 p50 / p95 (ms)", "speed-up 1x128", "speed-up 32x128", "training"),
    ]
    smbert = next(line for line in text.splitlines() if line.startswith("| smbert |"))
    assert [cell.strip() for cell in smbert.strip("|").split("|")] == [
        *("smbert", "0.790", "0.780", "98.8", "15.40 M", "5.133 M", "7.700 M", "1.460 G", "61.6"),
        *("4.02 / 5.03", "100 / 111", "3.98x", "5.93x", "5.0 min"),
    ]
    majority = next(line for line in text.splitlines() if line.startswith("| majority class |"))
    assert majority.count("–") == len(columns) - 4  # all but name, two metrics and retention
    assert "```bash\nsmbert compress\n```" in text
    assert "Target: speedup 6 at 32x128 asked, 5.93 measured: **met**." in text
    assert "| 01-depth | 2.2 min | 0.710 | 2 x (12 heads, 1536 neurons), 1 x (6 heads, 512 neurons) |" in text
    assert "- Shared machine." in text and "| isa | avx2, avx512f |" in text and "| gpu | – |" in text
    assert "report.png" in text


def test_markdown_of_awkward_reports() -> None:
    assert "No rows yet." in Report().markdown()
    text = Report(
        rows=[Row("a|b", "mrpc")], target={"goal": "params", "asked": "35%", "measured": 9, "met": False}
    ).markdown()
    assert r"| a\|b |" in text and "Target: params 35% asked, 9 measured: **NOT met**." in text
    stages: list[dict[str, Any]] = [
        {"name": "00-teacher", "seconds": 3.0, "metric": None, "structure": []},
        {"name": "x", "structure": "as it was"},
    ]
    text = Report(stages=stages).markdown()
    assert "| 00-teacher | 3.0 s | – | no layers |" in text and "| x | – | – | as it was |" in text
    stages[1]["latency_ms"] = {"predicted": 612.0, "measured": 600.0}
    text = Report(stages=stages).markdown()
    assert "| layers | ms predicted / measured |\n|---|---:|---:|---|---:|\n" in text
    assert "| no layers | – |" in text and "| as it was | 612 / 600 (+2.0 %) |" in text


def printed(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


@pytest.mark.parametrize("report", [full_report(), full_report((0, 1, 2), ("mrpc", "rte"))])
def test_the_usual_table_fits_a_terminal(report: Report) -> None:
    text = printed(report, 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for shown in ("15.40 M", "5.93x", "1.460 G", "distillation", "retained", "–"):
        assert shown in text
    lines = [line.split() for line in printed(report, 120).splitlines()]
    found = next(line for line in lines if line[:1] == ["smbert"])
    assert found[-1] == "5.0" and "4.02" in found


def test_terminal_table_of_several_tasks_and_seeds() -> None:
    text = printed(full_report((0, 1, 2), ("mrpc", "rte")), 120)
    assert text.count("3 seeds") == 2 and "mean of 2 tasks" in text and "±0.004" in text
    assert "mean over mrpc, rte" in text


def test_names_are_no_markup() -> None:
    assert "[bold]a" in printed(Report(rows=[row("[bold]a")]), 80)
    assert printed(Report(), 80).strip() == ""


# The plot


def _boxes(report: Report) -> list[tuple[Any, list[Any], list[Any]]]:
    """For each panel: the axes, the boxes of its labels, and the pixels of its points."""
    figure = figure_of(report.aggregates())
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    panels = []
    for axes in figure.axes:
        labels = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
        markers: list[Any] = [container[0] for container in axes.containers]
        points = [axes.transData.transform((marker.get_xdata()[0], marker.get_ydata()[0])) for marker in markers]
        panels.append((axes, labels, points))
    return panels


def crowd() -> Report:
    report = Report(rows=[measured("teacher", 0.892, 117e6, 1500)])
    for i in range(9):
        name = f"variant {i}" + " with a rather long name" * (i % 2)
        report.add(measured(name, 0.80 + 0.01 * i, 100e6 - 1e6 * (i % 4), 30 + 30 * (i % 3)))
    return report


@pytest.mark.parametrize("report", [full_report(), full_report((0, 1, 2), ("mrpc", "rte")), crowd()])
def test_labels_cover_neither_each_other_nor_points(report: Report) -> None:
    for axes, labels, points in _boxes(report):
        frame = axes.get_window_extent()
        assert len(points) == len(
            [a for a in report.aggregates() if a.task == report.rows[0].task and "params_total" in a.mean]
        )
        assert len(labels) >= len(points)
        for i, label in enumerate(labels):
            assert (
                frame.x0 - 1 <= label.x0
                and label.x1 <= frame.x1 + 1
                and frame.y0 - 1 <= label.y0
                and label.y1 <= frame.y1 + 1
            )
            for x, y in points:
                assert not (label.x0 < x < label.x1 and label.y0 < y < label.y1)
            for other in labels[i + 1 :]:
                assert not label.overlaps(other)


def test_axes_have_units_and_the_baseline_a_line() -> None:
    (left, _, _), (right, _, _) = _boxes(full_report())
    assert left.get_xlabel() == "parameters (millions)" and left.get_ylabel() == "accuracy on tweets"
    assert right.get_xlabel() == "latency (one 32 x 128 batch, median, ms)"
    for axes in (left, right):
        assert any(line.get_linestyle() == "--" and line.get_ydata()[0] == pytest.approx(0.8) for line in axes.lines)
        texts = " ".join(text.get_text() for text in axes.texts)
        assert "teacher\n0.800" in texts and "smbert\n0.790" in texts and "majority class 0.450" in texts
    assert left.get_xlim()[0] == 0  # sizes are seen in proportion
    assert _boxes(crowd())[1][0].get_xscale() == "log"
    assert _boxes(full_report((0,), ("mrpc", "rte")))[0][0].get_ylabel() == "mean metric over mrpc, rte"


@pytest.mark.parametrize(
    "report",
    [
        Report(),
        Report(rows=[Row("teacher", "rte")]),
        Report(rows=[row("teacher", params_total=30)]),
        Report(rows=[row("teacher", 0.0, params_total=0), row("smbert", 0.0, latency_ms={"8x64": {"p50": 3.0}})]),
    ],
)
def test_what_was_not_measured_is_said(report: Report) -> None:
    panels = _boxes(report)
    texts = [" ".join(text.get_text() for text in axes.texts) for axes, _, _ in panels]
    assert ("not measured" in texts[0]) == (not any(r.params_total is not None for r in report.rows))
    assert ("not measured" in texts[1]) == (not any(r.latency_ms for r in report.rows))


def test_a_point_of_one_panel_only_is_seen() -> None:
    rows = [measured("teacher", 0.80, 22.7e6, 596), measured("smbert", 0.79, 15.4e6, 100)]
    slow = row("untimed", 0.30, "tweets", metric_name="accuracy", params_total=9_000_000)
    for axes, _, _ in _boxes(Report(rows=[*rows, slow])):
        assert axes.get_ylim()[0] < 0.30 and axes.get_ylim()[1] > 0.80


# Files


def test_write_makes_three_whole_files(tmp_path: Path) -> None:
    report = full_report()
    report.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report.to_dict()
    assert (folder / "report.md").read_text(encoding="utf-8") == report.markdown()
    image = (folder / "report.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n") and image.endswith(b"IEND\xaeB`\x82") and len(image) > 10_000
    report.add(row("another"))
    report.write(folder)
    assert "another" in (folder / "report.md").read_text(encoding="utf-8")
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_full_disk_leaves_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    report = full_report()
    report.write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    report.add(row("another"))

    def full(path: Any, *rest: Any) -> None:
        if step == "write_bytes":
            Path(path).touch()  # what a full disk leaves of a file
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "write_bytes" else os, step, full)
        with pytest.raises(
            OSError, match=r"No space left on device; the earlier file.*To resolve, make room.*report\.json"
        ) as caught:
            report.write(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# Model card


def card(report: Report | None = None, parent: str = "google-bert/bert-base-uncased", **values: Any) -> str:
    return model_card(
        report or full_report(), "smbert", "name: smbert\nstages: []\n", parent, "import smbert\n", "tweets", **values
    )


def test_the_hub_can_read_the_card() -> None:
    text = card(language="en", licence="apache-2.0", dataset="org/tweets", split="test")
    read = ModelCard(text)
    data = read.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert (
        data["base_model"] == "google-bert/bert-base-uncased"
        and data["license"] == "apache-2.0"
        and data["language"] == "en"
    )
    assert "smbert" in data["tags"] and data["metrics"] == ["accuracy", "f1"] and data["datasets"] == ["org/tweets"]
    results = {result.metric_name: result for result in read.data.get("eval_results") or []}
    assert results["accuracy"].metric_value == 0.79 and results["accuracy"].metric_type == "accuracy"
    assert results["f1_macro"].metric_value == 0.78 and results["f1_macro"].metric_type == "f1"
    assert results["accuracy"].dataset_type == "org/tweets" and results["accuracy"].dataset_split == "test"
    for shown in (
        "```python\nimport smbert\n```",
        "```yaml\nname: smbert\nstages: []\n```",
        "| teacher |",
        "| smbert |",
        "Seed: 0.",
    ):
        assert shown in text
    assert "majority" not in text  # the card compares the model with its teacher


def test_a_card_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    text = card(Report(rows=[Row("smbert", "tweets")]))
    data = ModelCard(text).data.to_dict()
    assert not {"license", "language", "datasets", "metrics", "model-index"} & set(data)


@pytest.mark.parametrize("parent", ["/home/somebody/secret/my-bert", "./secret/my-bert", "../secret/my-bert"])
def test_a_local_parent_shows_its_name_only(parent: str) -> None:
    text = card(parent=parent)
    assert "base_model" not in text and "secret" not in text and "`my-bert`" in text


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mini").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(parent="models/mini") and "base_model: models/maxi" in card(parent="models/maxi")


def test_several_seeds_are_averaged_in_the_card() -> None:
    text = card(full_report((0, 1, 2)))
    results = {r.metric_name: r.metric_value for r in ModelCard(text).data.get("eval_results") or []}
    assert results["accuracy"] == pytest.approx(0.794) and "Seed: 0, 1, 2." in text


def test_a_card_needs_its_row() -> None:
    with pytest.raises(
        ValueError, match=r"must be a row of the report \(.*'smbert' on 'tweets'.*\), got 'smbert' on 'rte'"
    ):
        model_card(full_report(), "smbert", "", "a/b", "", "rte")


def test_own_cards_are_replaced(tmp_path: Path) -> None:
    assert write_model_card(tmp_path, card()) == tmp_path / "README.md"
    assert ModelCard.load(tmp_path / "README.md").data.to_dict()["library_name"] == "transformers"
    changed = card(licence="mit")
    assert write_model_card(tmp_path, changed) == tmp_path / "README.md"
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith(changed)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("edited", [False, True])
def test_somebody_elses_readme_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture, edited: bool) -> None:
    readme = tmp_path / "README.md"
    if edited:  # written by smbert, then improved by its owner
        write_model_card(tmp_path, card())
        readme.write_text(readme.read_text(encoding="utf-8").replace("# bert-base", "# My bert-base"), encoding="utf-8")
    else:
        readme.write_text("# My model\n", encoding="utf-8")
    before = readme.read_bytes()
    with caplog.at_level("WARNING", logger="smbert"):
        assert write_model_card(tmp_path, card()) == tmp_path / "README.smbert.md"
    assert readme.read_bytes() == before
    assert "was not written by smbert and is left alone; the model card is in README.smbert.md" in caplog.text
    assert (tmp_path / "README.smbert.md").read_text(encoding="utf-8").startswith(card())
