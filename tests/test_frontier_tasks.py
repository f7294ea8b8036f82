"""benchmarks/frontier_tasks.py: one table and one picture of several tasks' reports."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from smbert.report import Report, Row

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("frontier_tasks")
    for name in ("frontier_tasks", "frontier", "frontier_methods", "frontier_peers", "more_text"):
        sys.modules.pop(name, None)


def folder_of(place: Path, task: str, metric_name: str, models: dict[str, tuple[float, float]]) -> str:
    """A report of models with a metric and a speed-up, after a teacher of .8 and before a majority class of .4."""
    report = Report(command="python benchmarks/frontier.py", environment={})
    for name, (metric, speed) in {"teacher": (0.8, 1.0), **models}.items():
        report.add(
            Row(
                name, task, 0, metric_name, metric, retention=metric / 0.8, params_total=round(8e6 / speed),
                params_encoder=round(4e6 / speed), speedup={"1x128": speed / 2, "32x128": speed},
            )
        )  # fmt: skip
    report.add(Row("majority class", task, 0, metric_name, 0.4, retention=0.5))
    report.write(place / task)
    return str(place / task)


def test_means_are_of_members_that_all_tasks_have(join: Any, tmp_path: Path) -> None:
    folders = [
        folder_of(tmp_path, "rte", "accuracy", {"smbert 2x": (0.8, 2.0), "smbert 8x": (0.6, 8.0)}),
        folder_of(tmp_path, "mrpc", "f1", {"smbert 2x": (0.72, 4.0)}),
    ]
    assert join.main([*folders, "--output", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "tasks.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == ["model", "rte accuracy", "mrpc f1", "mean retention"]
    assert [line[0] for line in cells[2:]] == ["teacher", "smbert 2x", "smbert 8x", "majority class"]
    assert cells[3][1:] == [
        ".800 (100.0 %) 2.00x", ".720 (90.0 %) 4.00x", "95.0 %", "3.00 M", "1.50 M", "1.50x", "3.00x",
    ]  # fmt: skip
    assert cells[4][1:] == [".600 (75.0 %) 8.00x", "", "", "1.00 M", "0.50 M", "4.00x", "8.00x"]
    assert cells[2][1] == ".800 (100.0 %)" and cells[5][1] == ".400 (50.0 %)"
    assert cells[5][3:] == ["50.0 %", "", "", "", ""]
    drawn = (tmp_path / "out" / "tasks.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    with_peer = folder_of(tmp_path / "peer", "mrpc", "f1", {"smbert 2x": (0.72, 4.0), "truncated 2x": (0.5, 2.0)})
    assert join.main([folders[0], with_peer, "--output", str(tmp_path / "out")]) == 0
    assert "| truncated 2x |  | .500 (62.5 %) 2.00x |" in (tmp_path / "out" / "tasks.md").read_text()
    assert (tmp_path / "out" / "tasks.png").read_bytes() == drawn  # the picture is of the families


def test_folders_that_do_not_go_together_are_refused_before_anything_is_written(
    join: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rte = folder_of(tmp_path, "rte", "accuracy", {"smbert 2x": (0.8, 2.0)})
    same = folder_of(tmp_path / "again", "rte", "accuracy", {"smbert 2x": (0.8, 2.0)})
    for folders, message in (([rte, same], "no other folder has, got rte"), ([str(tmp_path)], "has no report.json")):
        assert join.main([*folders, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    several = json.loads((Path(rte) / "report.json").read_text())
    several["rows"].append({**several["rows"][0], "seed": 1})
    (Path(rte) / "report.json").write_text(json.dumps(several))
    assert join.main([rte, "--output", str(tmp_path / "out")]) == 2
    assert "must hold one seed of one task" in capsys.readouterr().err
