"""Tasks: metrics against hand formulas and `evaluate`, GLUE from folders and from the Hub."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from smbert.tasks import (
    GLUE,
    Task,
    glue_task,
    load_task,
    majority_baseline,
    prepare,
    turned_pairs,
)

SHARED_GLUE = Path(__file__).resolve().parents[2] / "shared" / "data" / "glue"
TRUE_COLUMNS = {"cola": ("sentence",), "mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}


def logits_of(classes: list[int], width: int) -> np.ndarray:
    return np.eye(width)[classes] - 0.5


def rows(n: int = 4, columns: tuple[str, ...] = ("sentence1", "sentence2"), labels: list | None = None) -> Dataset:
    data: dict[str, list] = {c: [f"{c} word {i}" for i in range(n)] for c in columns}
    return Dataset.from_dict({**data, "label": labels if labels is not None else [i % 2 for i in range(n)]})


# ---------------------------------------------------------------------------------------------------------------- tasks


def test_the_nine_glue_tasks() -> None:
    assert list(GLUE) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    assert {n: t.headline for n, t in GLUE.items()} == {
        "cola": "matthews_correlation",
        "sst2": "accuracy",
        "mrpc": "f1",
        "qqp": "f1",
        "stsb": "spearmanr",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
        "wnli": "accuracy",
    }
    assert {n for n, t in GLUE.items() if set(t.metrics) == {"accuracy", "f1"}} == {"mrpc", "qqp"}
    assert GLUE["stsb"].num_labels == 1 and GLUE["stsb"].problem_type == "regression"
    assert GLUE["mnli"].num_labels == 3 and GLUE["mnli"].validation_splits == ("validation", "validation_mismatched")
    assert GLUE["rte"].validation_splits == ("validation",)
    # The numbering of the Hub: entailment is 0 in RTE, 1 in WNLI.
    assert GLUE["rte"].label_names.index("entailment") == 0 and GLUE["wnli"].label_names.index("entailment") == 1


@pytest.mark.parametrize("name", ["SST-2", "sst_2", "sst2"])
def test_glue_names_are_lenient(name: str) -> None:
    assert glue_task(name).name == "sst2"


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of cola, sst2.*got 'imdb'.*To resolve.*load_files"):
        glue_task("imdb")


def test_turned_pairs() -> None:
    columns = {"sentence2": ["b0", "b1"], "label": [0, 1], "idx": [7, 8], "sentence1": ["a0", "a1"]}
    turned = turned_pairs(Dataset.from_dict(columns), glue_task("rte"))
    assert turned.to_dict() == {"sentence1": ["b0", "b1"], "sentence2": ["a0", "a1"]}
    with pytest.raises(ValueError, match=r"two text columns .* 'sst2'"):
        turned_pairs(Dataset.from_dict({"sentence": ["a"]}), glue_task("sst2"))
    with pytest.raises(ValueError, match="no column 'sentence2'"):
        turned_pairs(Dataset.from_dict({"sentence1": ["a"]}), glue_task("rte"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ranking"}, "`kind` must be one of"),
        ({"text_columns": ()}, "one or two columns"),
        ({"text_columns": ("a", "b", "c")}, "one or two columns"),
        ({"text_columns": ("a", "a")}, "one or two columns"),
        ({"text_columns": ("label",)}, "none of them the label column 'label'"),
        ({"label_names": ("yes",)}, "at least 2 different names"),
        ({"label_names": ("yes", "yes")}, "at least 2 different names"),
        ({"kind": "regression", "label_names": ("yes", "no")}, "must be empty for a regression task"),
        ({"metrics": ("bleu",)}, "`metrics` must be among accuracy, f1"),
        ({"metrics": ("pearson",)}, "`metrics` must be among"),
        ({"metrics": ("accuracy",), "headline": "f1"}, "`headline` one of them"),
        ({"label_names": ("a", "b", "c"), "metrics": ("f1",)}, "'f1' needs 2 classes, got 3"),
        ({"kind": "regression", "label_names": (), "headline": "mse"}, "grows with quality"),
    ],
)
def test_faulty_tasks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Task(**{"name": "t", "text_columns": ("text",), "label_names": ("no", "yes"), **options})
    assert "To resolve" in str(error.value)


# -------------------------------------------------------------------------------------------------------------- metrics


def test_accuracy_and_f1_by_hand() -> None:
    scores = GLUE["mrpc"].compute(logits_of([1, 1, 1, 0, 0, 1], 2), [1, 0, 1, 1, 0, 1])
    assert scores == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(2 * 3 / (2 * 3 + 1 + 1))}


def test_matthews_by_hand() -> None:
    tp, tn, fp, fn = 3, 1, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    scores = GLUE["cola"].compute(logits_of([1, 1, 1, 0, 0, 1], 2), [1, 0, 1, 1, 0, 1])
    assert scores == {"matthews_correlation": pytest.approx(expected)}


def test_correlations_by_hand_with_ties() -> None:
    predictions, labels = np.array([0.5, 2.0, 2.0, 4.5, 1.0]), np.array([0.0, 3.0, 1.0, 5.0, 1.0])
    ranks = np.array([[1.0, 3.5, 3.5, 5.0, 2.0], [1.0, 4.0, 2.5, 5.0, 2.5]])
    scores = GLUE["stsb"].compute(predictions[:, None], labels)
    assert scores["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    assert scores["spearmanr"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert GLUE["stsb"].compute(predictions, labels) == scores  # (rows,) and (rows, 1) are the same


def test_multi_label_f1_by_hand() -> None:
    task = Task("topics", ("text",), "multi_label", ("a", "b", "c"))
    labels = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    decided = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 0]])
    per_label = [1.0, 2 / 3, 0.0]
    tp, fp, fn = 3, 1, 2
    assert task.compute(decided - 0.5, labels) == {
        "f1_micro": pytest.approx(2 * tp / (2 * tp + fp + fn)),
        "f1_macro": pytest.approx(sum(per_label) / 3),
    }


def test_regression_reports_mse_and_macro_f1_is_the_mean_over_classes() -> None:
    scores = Task("stars", ("text",), "regression").compute([[1.0], [2.0], [4.0]], [1.0, 3.0, 2.0])
    assert scores["mse"] == pytest.approx(5 / 3)
    task = Task("t", ("text",), label_names=("x", "y", "z"))
    scores = task.compute(logits_of([0, 1, 1, 2], 3), [0, 1, 2, 2])
    assert scores["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_undefined_scores_are_zero_and_valid_json() -> None:
    scores = GLUE["stsb"].compute([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert scores == {"pearson": 0.0, "spearmanr": 0.0}
    assert GLUE["stsb"].compute([2.0], [1.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert GLUE["mrpc"].compute(logits_of([0, 0], 2), [1, 0])["f1"] == 0.0
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "message"),
    [
        ("rte", np.zeros((2, 3)), [0, 1], r"must have shape \(2, 2\)"),
        ("rte", np.zeros((3, 2)), [0, 1], r"must have shape \(2, 2\)"),
        ("rte", np.zeros(2), [0, 1], r"must have shape \(2, 2\)"),
        ("rte", np.zeros((0, 2)), [], "at least one row"),
        ("stsb", np.zeros((2, 2)), [0.0, 1.0], r"must have shape \(2,\)"),
        ("rte", np.array([[0.0, 1.0], [np.nan, 0.0]]), [0, 1], "finite, got .* in row 1"),
        ("rte", np.zeros((2, 2)), [0, -1], "from 0 to 1, got -1 in row 1"),
        ("rte", np.zeros((2, 2)), [2, 0], "from 0 to 1, got 2 in row 0"),
    ],
)
def test_compute_refuses(name: str, predictions: np.ndarray, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GLUE[name].compute(predictions, labels)


@pytest.mark.parametrize("name", list(GLUE))
def test_metrics_equal_those_of_evaluate(name: str) -> None:
    evaluate = pytest.importorskip("evaluate")
    try:
        socket.create_connection(("huggingface.co", 443), timeout=1).close()
        metric = evaluate.load("glue", name)
    except Exception as error:
        pytest.skip(f"evaluate's GLUE metrics are modules on the Hub, which is out of reach: {error}")
    generator = np.random.default_rng(0)
    task = GLUE[name]
    predictions = generator.normal(size=(200, task.num_labels)).astype(np.float32)
    labels: np.ndarray = generator.integers(0, task.num_labels, size=200)
    if task.kind == "regression":
        labels = generator.uniform(0, 5, size=200).astype(np.float32)
    decided = predictions[:, 0] if task.kind == "regression" else predictions.argmax(axis=1)
    expected = metric.compute(predictions=decided, references=labels)
    ours = task.compute(predictions, labels)
    assert set(ours) == set(expected)
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, abs=1e-6)


def test_majority_baselines() -> None:
    train, validation = rows(5, labels=[1, 1, 1, 0, 0]), rows(4, labels=[1, 0, 0, 0])
    data = prepare(GLUE["mrpc"], {"train": train, "validation": validation})
    assert majority_baseline(GLUE["mrpc"], data["train"], data["validation"]) == {
        "accuracy": 0.25,
        "f1": pytest.approx(0.4),
    }
    task = Task("stars", ("text",), "regression")
    train, validation = rows(2, ("text",), [1.0, 4.0]), rows(2, ("text",), [2.0, 4.5])
    assert majority_baseline(task, train, validation)["mse"] == pytest.approx((0.5**2 + 2.0**2) / 2)
    task = Task("topics", ("text",), "multi_label", ("a", "b"))
    train, validation = rows(3, ("text",), [[1, 0], [1, 1], [1, 0]]), rows(2, ("text",), [[1, 0], [0, 1]])
    assert majority_baseline(task, train, validation)["f1_micro"] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------- GLUE from folders


def write_glue(folder: Path, name: str = "mrpc", suffix: str = "parquet", n: int = 6) -> Path:
    target = folder / name
    target.mkdir(parents=True)
    task = GLUE[name]
    for split in ("train", "validation", "test"):
        labels = [-1] * n if split == "test" else [i % max(task.num_labels, 2) for i in range(n)]
        data = rows(n, task.text_columns, labels)
        file = str(target / f"{split}.{suffix}")
        {"parquet": data.to_parquet, "csv": data.to_csv, "json": data.to_json, "jsonl": data.to_json}[suffix](file)
    return target


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    folder = write_glue(tmp_path, suffix=suffix)
    task, data = load_task("mrpc", tmp_path)
    assert task is GLUE["mrpc"]
    assert {s: (len(d), d.column_names) for s, d in data.items()} == {
        "train": (6, ["sentence1", "sentence2", "label"]),
        "validation": (6, ["sentence1", "sentence2", "label"]),
        "test": (6, ["sentence1", "sentence2"]),  # unlabelled: -1 in every row
    }
    assert list(data["train"]["label"]) == [0, 1, 0, 1, 0, 1] and data["train"]["sentence1"][3] == "sentence1 word 3"
    _, directly = load_task("mrpc", folder)
    assert directly["train"].to_dict() == data["train"].to_dict()


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "rte").mkdir(exist_ok=True)
        part = Dataset.from_dict({"sentence1": [f"a{i}", "b"], "sentence2": ["c", "d"], "label": [0, 1]})
        part.to_parquet(str(tmp_path / "rte" / f"train-0000{i}-of-00002.parquet"))
    rows(2).to_parquet(str(tmp_path / "rte" / "validation-00000-of-00001.parquet"))
    _, data = load_task("rte", tmp_path)
    assert list(data["train"]["sentence1"]) == ["a0", "b", "a1", "b"]


def test_mnli_has_two_validation_splits(tmp_path: Path) -> None:
    (tmp_path / "mnli").mkdir()
    for name, n in (("train", 3), ("validation_matched", 4), ("validation_mismatched", 5), ("test_mismatched", 6)):
        labels = [-1] * n if name.startswith("test") else [i % 3 for i in range(n)]
        rows(n, ("premise", "hypothesis"), labels).to_parquet(str(tmp_path / "mnli" / f"{name}.parquet"))
    task, data = load_task("mnli", tmp_path)
    assert {s: len(d) for s, d in data.items()} == {
        "train": 3,
        "validation": 4,
        "validation_mismatched": 5,
        "test_mismatched": 6,
    }
    assert all(split in data for split in task.validation_splits)


def test_bare_folder_of_several_tasks_is_never_joined(tmp_path: Path) -> None:
    write_glue(tmp_path, "mrpc")
    write_glue(tmp_path, "rte")
    with pytest.raises(ValueError, match=r"no sub-folder 'qqp' with data; those with data are mrpc, rte.*To resolve"):
        load_task("qqp", tmp_path)


def test_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mrpc")  # RTE has the same columns: nothing else would notice
    with pytest.raises(ValueError, match=r"folder of task 'mrpc', but the task is 'rte'"):
        load_task("rte", folder)


def test_missing_empty_and_doubled_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`data_dir` must be an existing folder, got .*nowhere"):
        load_task("rte", tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"holds no data files .found: nothing.*To resolve, provide .*rte/train.parquet"
    ):
        load_task("rte", tmp_path)
    rows().to_csv(str(write_glue(tmp_path, "rte") / "train.csv"))
    with pytest.raises(ValueError, match=r"train split more than once: train.csv, train.parquet"):
        load_task("rte", tmp_path)


def test_missing_split_is_named(tmp_path: Path) -> None:
    (write_glue(tmp_path, "rte") / "validation.parquet").unlink()
    with pytest.raises(ValueError, match=r"'rte' needs the split validation; the data has test, train.*To resolve"):
        load_task("rte", tmp_path)
    _, data = load_task("rte", tmp_path, required=("train",))
    assert set(data) == {"train", "test"}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "rte")
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"could not read .*train.parquet as parquet: .*To resolve"):
        load_task("rte", folder)
    (folder / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.parquet' is empty"):
        load_task("rte", folder)


def test_hub_offline_fails_at_once_in_one_line(tmp_path: Path) -> None:
    # An online attempt would retry for more than 20 s: no connection may even be tried.
    code = (
        "import socket\nfrom smbert.tasks import load_task\n"
        "socket.getaddrinfo = socket.socket.connect = lambda *a, **k: exit('tried to connect')\n"
        "try:\n    load_task('wnli')\nexcept ValueError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (message,) = done.stdout.strip().splitlines()
    assert "could not load GLUE task 'wnli' from the Hub (nyu-mll/glue)" in message
    assert "To resolve" in message and "HF_HUB_OFFLINE" in message and "wnli/train.parquet" in message


def test_hub_errors_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: str) -> None:
        raise ConnectionError(f"no route to {arguments}\nwith many\nmore lines")

    monkeypatch.setattr("smbert.tasks.load_dataset", fails)
    with pytest.raises(ValueError, match=r"no route to \('nyu-mll/glue', 'cola'\)\. To resolve") as error:
        load_task("cola")
    assert "\n" not in str(error.value)


def test_hub_data_is_checked_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["unacceptable", "acceptable"])
    hub = {s: rows(4, ("sentence",)).cast_column("label", names) for s in ("train", "validation")}
    hub["test"] = rows(2, ("sentence",), [-1, -1]).cast_column("label", names)
    monkeypatch.setattr("smbert.tasks.load_dataset", lambda *_: DatasetDict(hub))
    _, data = load_task("cola")
    assert list(data["train"]["label"]) == [0, 1, 0, 1] and data["test"].column_names == ["sentence"]


def test_custom_task_needs_a_folder(tmp_path: Path) -> None:
    task = Task("reviews", ("text",), label_names=("bad", "good"))
    with pytest.raises(ValueError, match=r"`data_dir` must be given for task 'reviews'"):
        load_task(task)
    (tmp_path / "reviews").mkdir()
    for split in ("train", "dev"):
        rows(4, ("text",), ["good", "bad", "good", "bad"]).to_csv(str(tmp_path / "reviews" / f"{split}.csv"))
    _, data = load_task(task, tmp_path)
    assert list(data["validation"]["label"]) == [1, 0, 1, 0]


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="needs shared/data/glue beside the repository")
@pytest.mark.parametrize("name", ["rte", "mrpc", "stsb"])
def test_the_real_sets(name: str) -> None:
    task, data = load_task(name, SHARED_GLUE)
    sizes = {"rte": (2490, 277, 3000), "mrpc": (3668, 408, 1725), "stsb": (5749, 1500, 1379)}
    assert tuple(len(data[s]) for s in ("train", "validation", "test")) == sizes[name]
    assert ("label" in data["test"].column_names) == (name == "mrpc")
    baseline = majority_baseline(task, data["train"], data["validation"])
    expected = {
        "rte": {"accuracy": 146 / 277},
        "mrpc": {"accuracy": 279 / 408, "f1": 2 * 279 / (279 + 408)},
        "stsb": {"pearson": 0.0, "spearmanr": 0.0},
    }
    assert baseline == pytest.approx(expected[name])
