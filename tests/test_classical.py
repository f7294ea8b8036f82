"""Classical students: exact soft labels, a pool that helps, files without pickle, and input that cannot work."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NOISE, TELLING, make_texts
from datasets import Dataset, IterableDataset, load_dataset
from scipy.special import softmax
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.naive_bayes import MultinomialNB
from sklearn.tree import DecisionTreeClassifier
from tiny_models import tiny

from smbert.classical import (
    STUDENTS,
    ClassicalStudent,
    TextFeatures,
    distill_classical,
    files,
    load_student,
    soft_label,
)
from smbert.classical.kinds import KINDS, fit, fit_temperature, logits_of_targets, stacked
from smbert.classical.rows import Taught, TeacherSource, soft_targets
from smbert.classical.static import _hold_back
from smbert.tasks import Task, tokenize
from smbert.teacher import DistillCollator, predict_logits, with_teacher_logits

SHARED = Path(__file__).resolve().parents[2] / "shared"
TASK = Task("tiny", ("text",), label_names=("dull", "bright"), metrics=("accuracy",))
PAIRS = Task("pairs", ("a", "b"), label_names=("other", "same"), metrics=("accuracy",))
QUICK: dict[str, Any] = {"features": TextFeatures(min_df=1), "folds": 2, "disable_tqdm": True}
# Small enough for a few dozen rows; None is the kind's own grid.
GRIDS: dict[str, Any] = {"decision_tree": {"max_depth": [8]}, "random_forest": {"n_estimators": [20]}}


def knowing_logits(texts: list[str], sharpness: float = 1.5) -> np.ndarray:
    """What a teacher that knows every telling word would say: (rows, 2)."""
    count = np.array([[sum(w in TELLING[c] for w in text.split()) for c in (0, 1)] for text in texts], dtype=np.float32)
    return sharpness * (count - count.mean(axis=1, keepdims=True))


def taught(n: int, seed: int, labels: bool = True) -> Dataset:
    rows = make_texts(n, seed, labels)
    return with_teacher_logits(rows, knowing_logits(list(rows["text"])))


def accuracy(student: Any, rows: Dataset) -> float:
    return float((student.predict(list(rows["text"])) == np.array(list(rows["label"]))).mean())


def quick(kind: str, teacher: Any = None, train: Any = None, pool: Any = None, **settings: Any) -> Any:
    options = {**QUICK, "grid": GRIDS.get(kind), **settings}
    if kind == "static_embedding":
        options = {k: v for k, v in options.items() if k not in ("features", "folds", "grid")}
    return distill_classical(teacher, train, pool, kind, **options)


# --------------------------------------------------------------------------------------------------------------- soft labels


def some_rows(rows: int = 30, features: int = 6) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    matrix = draw.poisson(1.0, (rows, features)).astype(float)
    return matrix, softmax(draw.normal(size=(rows, 3)) + matrix[:, :3], axis=1)


def test_soft_targets_mix_temperature_and_gold() -> None:
    logits, gold = np.array([[0.0, 2.0], [4.0, 0.0]]), np.array([0, -1])
    found = soft_targets(logits, gold, 2, temperature=2.0, gold_weight=0.25)
    assert np.allclose(found[0], 0.25 * np.array([1, 0]) + 0.75 * softmax([0, 1.0]))
    assert np.allclose(found[1], softmax([2.0, 0]))  # no label: the teacher alone
    assert np.array_equal(soft_targets(None, np.array([1, 0]), 2, 1.0, 0.5), [[0, 1], [1, 0]])


def test_gold_labels_give_back_the_plain_estimator() -> None:
    matrix, soft = some_rows()
    gold = soft.argmax(axis=1)
    rows, classes, weights = stacked(matrix, np.eye(3)[gold])
    assert len(rows) == len(matrix) and (weights == 1).all() and sorted(classes) == sorted(gold)
    ours = fit(KINDS["logistic_regression"], matrix, np.eye(3)[gold], 0, 3.0, C=2.0)
    plain = LogisticRegression(C=2.0, max_iter=1000).fit(matrix, gold)
    assert np.allclose(ours.coef_, plain.coef_, atol=1e-3)
    assert type(fit(KINDS["linear_svm"], matrix, np.eye(3)[gold], 0, 3.0)).__name__ == "LinearSVC"


def test_logistic_regression_minimises_the_soft_cross_entropy() -> None:
    matrix, soft = some_rows()
    model = KINDS["logistic_regression"].build(0, C=5.0, tol=1e-8)
    rows, classes, weights = stacked(matrix, soft)
    model.fit(rows, classes, sample_weight=weights)
    gradient = 5.0 * (softmax(matrix @ model.coef_.T + model.intercept_, axis=1) - soft).T @ matrix + model.coef_
    assert np.abs(gradient).max() < 1e-2
    assert np.abs((softmax(matrix @ model.coef_.T + model.intercept_, axis=1) - soft).sum(axis=0)).max() < 1e-2


def test_naive_bayes_counts_fractions() -> None:
    matrix, soft = some_rows()
    model = fit(KINDS["multinomial_nb"], matrix, soft, 0, 3.0, alpha=0.5)
    counts = soft.T @ matrix + 0.5
    assert isinstance(model, MultinomialNB)
    assert np.allclose(model.feature_log_prob_, np.log(counts / counts.sum(axis=1, keepdims=True)))
    assert np.allclose(np.exp(model.class_log_prior_), soft.mean(axis=0))


def test_trees_split_on_weighted_gini() -> None:
    matrix, soft = some_rows()
    model = fit(KINDS["decision_tree"], matrix, soft, 0, 3.0, max_depth=2)
    share = soft.mean(axis=0)
    assert model.tree_.impurity[0] == pytest.approx(1 - (share**2).sum())
    left = matrix[:, model.tree_.feature[0]] <= model.tree_.threshold[0]
    assert model.tree_.weighted_n_node_samples[model.tree_.children_left[0]] == pytest.approx(soft[left].sum())


def test_the_svm_regresses_on_clipped_logits() -> None:
    logits = np.array([[5.0, -5.0, 0.0], [1.0, 0.5, -1.5]])
    assert np.allclose(logits_of_targets(softmax(logits, axis=1), 3.0), np.clip(logits, -3, 3), atol=1e-6)
    assert np.allclose(logits_of_targets(softmax([[1.0, 4.0]], axis=1), 9.0), [[1.5]])
    matrix, _ = some_rows()
    wanted = matrix[:, :3] - matrix[:, :3].mean(axis=1, keepdims=True)
    model = fit(KINDS["linear_svm"], matrix, softmax(wanted, axis=1), 0, 9.0, C=10.0)
    assert np.abs(model.predict(matrix) - wanted).max() < 0.3  # within a little more than epsilon


def test_the_temperature_that_was_planted_is_found() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(20_000, 3)) * 4
    gold = [draw.choice(3, p=p) for p in softmax(values / 2.5, axis=1)]
    assert fit_temperature(values, np.eye(3)[gold]) == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_four_right_answers_are_no_certainty(share: float) -> None:
    gold = np.eye(2)[[0, 1, 0, 1]]
    targets = share * gold + (1 - share) * gold[:, ::-1]
    temperature = fit_temperature(2 * gold - 1, targets)
    assert softmax([1 / temperature, -1 / temperature])[0] == pytest.approx((4 * share + 0.5) / 5, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------------- students


@pytest.mark.parametrize("kind", KINDS)
def test_a_taught_pool_beats_few_labels(kind: str) -> None:
    few, pool, test = make_texts(16, seed=1), taught(300, 2, labels=False), make_texts(200, seed=3)
    baseline = quick(kind, train=few)
    distilled = quick(kind, train=few, pool=pool)
    assert accuracy(distilled, test) >= accuracy(baseline, test) + 0.05
    assert accuracy(distilled, test) > 0.8
    assert baseline.training["taught_by"] == "gold labels" and distilled.training["taught_by"] == "soft labels"
    assert (distilled.training["labelled"], distilled.training["pool"]) == (16, 300)
    assert distilled.num_parameters > 0


def test_a_static_student_learns_from_the_teachers_table(tokenizer: Any) -> None:
    teacher, test = tiny("bert"), make_texts(200, seed=3)
    student = quick(
        "static_embedding", teacher, make_texts(16, 1), taught(300, 2, labels=False),
        tokenizer=tokenizer, learning_rate=0.05, epochs=6,
    )  # fmt: skip
    assert accuracy(student, test) > 0.85
    assert student.num_parameters == 100 * 32 + 100 + 32 * 2 + 2
    again = quick(
        "static_embedding", teacher, make_texts(16, 1), taught(300, 2, labels=False),
        tokenizer=tokenizer, learning_rate=0.05, epochs=6,
    )  # fmt: skip
    assert np.array_equal(again.predict_proba(["w5 w6"]), student.predict_proba(["w5 w6"]))
    empty, telling = student.predict_proba(["", "w5 w6 w7"])  # no tokens: the head's bias alone
    bias = student.model.head.bias.detach().numpy()
    assert np.allclose(empty, softmax(bias / student.temperature), atol=1e-6) and telling[0] > empty[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_few_labels_do_not_spoil_a_static_student(seed: int, tokenizer: Any) -> None:
    test, found = make_texts(200, seed=3), []
    for few in (make_texts(16, 1), None):
        student = quick(
            "static_embedding", tiny("bert"), few, taught(300, 2, labels=False),
            task=TASK, tokenizer=tokenizer, learning_rate=0.005, epochs=6, seed=seed,
        )  # fmt: skip
        found.append(accuracy(student, test))
        assert np.median(student.predict_proba(list(test["text"])).max(axis=1)) < 0.99
    assert found[0] > found[1] - 0.05


@pytest.mark.parametrize("kind", ["multinomial_nb", "linear_svm", "static_embedding"])
def test_a_teacher_is_heard_only_where_it_helps(kind: str, tokenizer: Any) -> None:
    teacher = (
        {"teacher": tiny("bert", seed=3, vocab_size=len(tokenizer)), "tokenizer": tokenizer}
        if kind == "static_embedding"
        else {}
    )
    rows, pool = taught(60, 3), taught(300, 4, labels=False)
    knows = quick(kind, train=rows, pool=pool, task=TASK, gold_weight="auto", **teacher)
    assert knows.training["taught_by"] == "soft labels" and knows.training["labelled"] == 60
    wrong = [
        rows_.add_column("teacher_logits", (-knowing_logits(list(rows_["text"]))).tolist())
        for rows_ in (rows.remove_columns("teacher_logits"), pool.remove_columns("teacher_logits"))
    ]
    alone = quick(kind, train=wrong[0], pool=wrong[1], task=TASK, gold_weight="auto", **teacher)
    plain = quick(kind, train=rows, task=TASK, gold_weight=1.0, **teacher)
    assert alone.training["taught_by"] == "gold labels"
    probe = list(make_texts(10, 9)["text"])
    assert np.allclose(alone.predict_proba(probe), plain.predict_proba(probe))


def test_the_teacher_is_asked_for_what_rows_do_not_carry(tokenizer: Any, tmp_path: Path) -> None:
    teacher, rows = tiny("bert", seed=3), make_texts(40, seed=1)
    direct = predict_logits(teacher, tokenize(rows, TASK, tokenizer, 60), DistillCollator(tokenizer), disable_tqdm=True)
    source = TeacherSource(teacher, tokenizer, TASK, tmp_path, disable_tqdm=True)
    labelled = soft_label(rows, source)
    assert np.allclose(np.array(list(labelled["teacher_logits"])), direct, atol=1e-5)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    asked = quick("multinomial_nb", teacher, rows, task=TASK, tokenizer=tokenizer, gold_weight=0.0)
    carried = quick("multinomial_nb", None, labelled, task=TASK, gold_weight=0.0)
    probe = list(make_texts(10, 9)["text"])
    assert np.allclose(asked.predict_proba(probe), carried.predict_proba(probe))
    gold = quick("multinomial_nb", None, rows, task=TASK)
    assert not np.allclose(gold.predict_proba(probe), carried.predict_proba(probe))


def test_it_answers_like_a_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    student = quick("logistic_regression", train=make_texts(60), task=TASK)
    one = student("w5 w6 w7")
    assert one == student(["w5 w6 w7"]) and one[0]["label"] == "dull" and 0.5 < one[0]["score"] <= 1
    every = student(["w5 w6", "w18 w19"], top_k=None)
    assert [len(a) for a in every] == [2, 2] and sum(a["score"] for a in every[0]) == pytest.approx(1)
    assert every[1][0]["label"] == "bright"
    assert student([]) == [] and student({"text": "w5"})[0]["label"] == "dull"
    assert not caplog.records
    proba = student.predict_proba(["", "совсем другое письмо"])  # nothing known: the prior, and a warning
    assert np.allclose(proba[0], proba[1]) and "2 of 2 texts" in caplog.text
    for bad in (None, [None], [3], ("w5", "w6", 1)):
        with pytest.raises(TypeError, match=r"To resolve|not iterable"):
            student(bad)
    with pytest.raises(ValueError, match="`top_k`"):
        student("w5", top_k=0)


def flipped(rows: Dataset, seed: int) -> Dataset:
    """A tenth of the labels are wrong: nobody can be right to be surer than 90 %."""
    draw = random.Random(seed)
    labels = [1 - y if draw.random() < 0.1 else y for y in rows["label"]]
    return rows.remove_columns("label").add_column("label", labels)


@pytest.mark.parametrize("kind", ["multinomial_nb", "linear_svm", "decision_tree"])
def test_probabilities_are_calibrated(kind: str) -> None:
    rows, test = flipped(make_texts(600, 4), 0), flipped(make_texts(400, 5), 1)
    student = quick(kind, train=rows, folds=5)
    plain = quick(kind, train=rows, folds=0)
    assert student.temperature != 1.0 and plain.temperature == 1.0
    gold = np.array(list(test["label"]))
    loss = {s: log_loss(gold, s.predict_proba(list(test["text"]))) for s in (student, plain)}
    assert loss[student] < loss[plain] + 0.02 and loss[student] < 0.6, loss.values()


def test_the_better_parameters_are_chosen() -> None:
    features = [TextFeatures(chars=(1, 1), words=None, min_df=1), TextFeatures(words=(1, 1), min_df=1)]
    student = quick("decision_tree", train=make_texts(120, 1), grid={"max_depth": [1, 12]}, features=features)
    done = student.training
    assert len(done["tried"]) == 4 and done["parameters"] == {"max_depth": 12}
    assert done["out_of_fold_accuracy"] == max(t["accuracy"] for t in done["tried"])
    assert student.pipeline[0].analyzer == "word" and student.pipeline[1].max_depth == 12


@pytest.mark.parametrize("kind", ["multinomial_nb", "complement_nb", "logistic_regression", "linear_svm"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("soft", [False, True])
def test_linear_students_are_their_weights(kind: str, classes: int, soft: bool) -> None:
    draw = np.random.default_rng(0)
    rows = make_texts(60, 1).to_dict()
    rows["label"] = [i % classes for i in range(60)]
    data = Dataset.from_dict(rows)
    data = with_teacher_logits(data, draw.normal(size=(60, classes))) if soft else data
    student = quick(kind, train=data)
    found = student.linear_weights()
    assert found is not None
    probe = ["w5 w6 w7", "w19 w40", ""]
    by_hand = softmax(student.features(probe) @ found[0].T + found[1], axis=1)
    assert np.allclose(by_hand, student.predict_proba(probe), atol=1e-9)
    assert len(student.feature_names()) == found[0].shape[1]


def test_trees_have_no_weights() -> None:
    assert quick("decision_tree", train=make_texts(40)).linear_weights() is None


# ---------------------------------------------------------------------------------------------------------------------- pairs


def pair_rows(n: int, seed: int) -> Dataset:
    """Same if the second text is the first in another order: no single word tells."""
    draw, rows = random.Random(seed), {"a": [], "b": [], "label": []}  # type: ignore[var-annotated]
    for i in range(n):
        words = draw.sample(NOISE, 5)
        other = draw.sample(words, 5) if i % 2 else draw.sample(NOISE, 5)
        rows["a"].append(" ".join(words))
        rows["b"].append(" ".join(other))
        rows["label"].append(i % 2)
    return Dataset.from_dict(rows)


@pytest.mark.parametrize("kind", ["logistic_regression", "linear_svm", "decision_tree", "multinomial_nb"])
def test_pairs_are_compared(kind: str, tmp_path: Path) -> None:
    test = pair_rows(60, 2)
    student = quick(kind, train=pair_rows(120, 1), task=PAIRS, folds=0)
    inputs = list(zip(test["a"], test["b"]))
    assert (student.predict(inputs) == np.array(list(test["label"]))).mean() > 0.9
    assert student({"text": "w30 w31", "text_pair": "w31 w30"}) == student(("w30 w31", "w31 w30"))
    student.save(tmp_path / "s")
    assert np.array_equal(load_student(tmp_path / "s").predict_proba(inputs), student.predict_proba(inputs))
    with pytest.raises(TypeError, match="pairs"):
        student(["w30 w31"])


# ---------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", STUDENTS)
def test_saved_and_loaded_it_is_the_same(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    teacher = tiny("bert") if kind == "static_embedding" else None
    options = {"tokenizer": tokenizer, "gold_weight": 1.0} if teacher else {}
    features = {} if teacher else {"features": TextFeatures(chars=(2, 3), max_features=50), "folds": 0}
    student = quick(kind, teacher, make_texts(60, 1), task=TASK, **options, **features)
    student.save(tmp_path / "s")
    loaded = load_student(tmp_path / "s")
    probe = [*make_texts(20, 7)["text"], ""]
    assert np.array_equal(loaded.predict_proba(probe), student.predict_proba(probe))
    assert loaded.about() == json.loads(json.dumps(student.about())) and loaded.label_names == ("dull", "bright")
    assert not [f for f in (tmp_path / "s").rglob("*") if f.suffix in (".pkl", ".pickle", ".bin", ".pt", ".joblib")]
    student.save(tmp_path / "s")  # in place of the earlier one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def reseal(folder: Path) -> None:
    """Makes student.json agree with changed files, as somebody who means harm would."""
    about = json.loads((folder / files.ABOUT).read_text())
    about["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in about["files"]}
    (folder / files.ABOUT).write_text(json.dumps(about))


class Harm:
    """Writes a file when it is built."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm-was-done"),)


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    import skops.io

    monkeypatch.chdir(tmp_path)
    quick("decision_tree", train=make_texts(60, 1)).save("s")
    place = tmp_path / "s" / files.PIPELINE
    sound = place.read_bytes()
    for content in (pickle.dumps(Harm()), skops.io.dumps(Harm()), skops.io.dumps({"f": Path.touch}), b""):
        place.write_bytes(content)
        with pytest.raises(ValueError, match="changed"):
            load_student("s")
        reseal(tmp_path / "s")
        with pytest.raises(ValueError, match="To resolve"):
            load_student("s")
    place.write_bytes(sound)
    reseal(tmp_path / "s")
    assert load_student("s").predict(["w5"]).shape == (1,)
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("field", ["left_child", "right_child", "feature"])
def test_a_tree_that_points_outside_is_refused(field: str) -> None:
    matrix, soft = some_rows()
    for tree in (DecisionTreeClassifier(max_depth=3), RandomForestClassifier(2, random_state=0)):
        tree.fit(matrix, soft.argmax(axis=1))
        one = tree.estimators_[1] if isinstance(tree, RandomForestClassifier) else tree
        files._check_tree(one)
        state = one.tree_.__getstate__()
        nodes = state["nodes"].copy()
        for wrong in (10_000, 0) if field != "feature" else (10_000, -5):
            state["nodes"] = nodes.copy()
            state["nodes"][field][0] = wrong
            one.tree_.__setstate__(state)
            with pytest.raises(ValueError, match="outside"):
                files._check_tree(one)


def test_folders_that_are_no_students(tmp_path: Path) -> None:
    student = quick("multinomial_nb", train=make_texts(40))
    with pytest.raises(ValueError, match=r"student\.json"):
        load_student(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="earlier student"):
        student.save(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    student.save(tmp_path / "s")
    (tmp_path / "s" / files.VOCABULARY).unlink()
    with pytest.raises(ValueError, match="missing"):
        load_student(tmp_path / "s")
    for key, value, message in (("schema_version", 99, "schema_version"), ("kind", "oracle", "oracle")):
        about = {**json.loads((tmp_path / "s" / files.ABOUT).read_text()), "files": {}, key: value}
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / files.ABOUT).write_text(json.dumps(about))
        with pytest.raises(ValueError, match=message):
            load_student(tmp_path / "t")


# -------------------------------------------------------------------------------------------------------------------- streams


def stream(rows: Dataset, most: list[int] | None = None) -> IterableDataset:
    """A stream that can be read again and again."""

    def read() -> Any:
        for row in rows:
            if most is not None:
                most.append(1)
            yield row

    return IterableDataset.from_generator(read)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.stream is not None])
def test_a_streamed_pool(kind: str, tmp_path: Path) -> None:
    few, test = make_texts(20, seed=1), make_texts(200, seed=3)
    pool = taught(300, 2, labels=False)
    student = quick(kind, train=few, pool=stream(pool), held_out=pool.select(range(5)), chunk_rows=64, epochs=2)
    assert accuracy(student, test) > 0.8
    assert student.training["streamed"] and student.training["pool"] == 295
    assert student.training["pool_also_held_out"] == 5
    assert type(student.pipeline[0]).__name__ == "HashingVectorizer"
    student.save(tmp_path / "s")
    probe = list(test["text"])
    assert np.array_equal(load_student(tmp_path / "s").predict_proba(probe), student.predict_proba(probe))
    assert student.feature_names() is None


def test_a_stream_is_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import smbert.classical.fitting as module

    sizes: list[int] = []
    step = module.fit_chunk

    def watched(estimator: Any, matrix: Any, *rest: Any) -> None:
        sizes.append(matrix.shape[0])
        step(estimator, matrix, *rest)

    monkeypatch.setattr(module, "fit_chunk", watched)
    quick("multinomial_nb", train=make_texts(100, 1), pool=stream(taught(200, 2, labels=False)), chunk_rows=32)
    assert max(sizes) <= 32 and sum(sizes) == 300  # every row once: the held-back ones at the end


def test_the_teacher_is_asked_once_for_each_chunk_of_a_stream(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(model: Any, rows: Dataset, *rest: Any, **options: Any) -> np.ndarray:
        asked.append(len(rows))
        return predict_logits(model, rows, *rest, **options)

    for module in ("smbert.classical.rows", "smbert.teacher"):
        monkeypatch.setattr(f"{module}.predict_logits", counted)
    pool = stream(make_texts(100, 2, labels=False))
    quick("logistic_regression", tiny("bert"), pool=pool, task=TASK, tokenizer=tokenizer, chunk_rows=40, epochs=3)
    assert asked == [40, 40, 20]


def test_a_stream_without_labels_and_a_stream_for_a_tree(caplog: pytest.LogCaptureFixture) -> None:
    student = quick("logistic_regression", pool=stream(taught(200, 2, labels=False)), teacher=None, task=TASK)
    assert accuracy(student, make_texts(100, 3)) > 0.8 and "not calibrated" in caplog.text
    with pytest.raises(ValueError, match="streamed pool"):
        quick("decision_tree", train=make_texts(20), pool=stream(taught(20, 2)))


# ------------------------------------------------------------------------------------------------------------------ bad input


def test_no_labels_at_all(tokenizer: Any) -> None:
    unlabelled = make_texts(40, labels=False)
    with pytest.raises(ValueError, match="got neither"):
        quick("multinomial_nb")
    with pytest.raises(ValueError, match="label_column"):
        quick("multinomial_nb", train=unlabelled)
    with pytest.raises(ValueError, match="`task` must be given"):
        quick("multinomial_nb", tiny("bert"), pool=unlabelled, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="`teacher` must be given"):
        quick("multinomial_nb", train=make_texts(20), pool=unlabelled)
    # A teacher's word is enough.
    student = quick("multinomial_nb", pool=taught(200, 2, labels=False), task=TASK)
    assert accuracy(student, make_texts(100, 3)) > 0.8 and student.training["labelled"] == 0


def test_a_single_class() -> None:
    rows = Dataset.from_dict({"text": ["w5 w6", "w7"], "label": [0, 0]})
    with pytest.raises(ValueError, match="at least 2 classes"):
        quick("multinomial_nb", train=rows)
    with pytest.raises(ValueError, match="one label only"):
        quick("multinomial_nb", train=rows, task=TASK)


def test_a_class_with_one_row(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"text": ["w5 w6", "w5 w7", "w18"], "label": [0, 0, 1]})
    student = quick("logistic_regression", train=rows, grid={"C": [100.0]})
    assert student.predict(["w18"]).tolist() == [1] and "nothing is tuned" in caplog.text
    assert student.training["out_of_fold_accuracy"] is None


def test_a_class_that_nobody_has_seen() -> None:
    task = Task("three", ("text",), label_names=("dull", "bright", "unseen"), metrics=("accuracy",))
    for kind in KINDS:
        student = quick(kind, train=make_texts(40), task=task)
        proba = student.predict_proba(["w5 w6", ""])
        assert proba.shape == (2, 3) and np.isfinite(proba).all() and (proba.argmax(axis=1) < 2).all(), kind


def test_empty_strings() -> None:
    rows = make_texts(40).to_dict()
    rows["text"][3] = rows["text"][8] = ""
    student = quick("logistic_regression", train=Dataset.from_dict(rows))
    assert student.training["texts_without_features"] == 2
    with pytest.raises(ValueError, match=r"min_df.*To resolve|To resolve.*min_df"):
        quick("logistic_regression", train=Dataset.from_dict({"text": ["", " ", "", "..."], "label": [0, 1, 0, 1]}))
    with pytest.raises(ValueError, match="must hold strings"):
        quick("logistic_regression", train=Dataset.from_dict({"text": ["a", None, "b"], "label": [0, 1, 0]}), task=TASK)


def test_a_pool_that_overlaps_the_test_set(caplog: pytest.LogCaptureFixture) -> None:
    few, test = make_texts(20, 1), make_texts(30, 3)
    texts = [*make_texts(50, 2)["text"], *(t.upper() + " " for t in list(test["text"])[:7]), *list(few["text"])[:3]]
    pool = with_teacher_logits(Dataset.from_dict({"text": texts}), knowing_logits([t.lower() for t in texts]))
    with caplog.at_level(logging.INFO):
        student = quick("multinomial_nb", train=few, pool=pool, held_out=test)
    done = student.training
    assert (done["pool"], done["pool_also_held_out"], done["pool_also_labelled"]) == (50, 7, 3)
    assert "7 texts of the pool were left out" in caplog.text
    clean = quick("multinomial_nb", train=few, pool=pool.select(range(50)))
    probe = list(test["text"])
    assert np.array_equal(student.predict_proba(probe), clean.predict_proba(probe))
    flattered = quick("multinomial_nb", train=few, held_out=few)
    assert flattered.training["labelled_also_held_out"] == 20 and "flatters" in caplog.text
    with pytest.raises(ValueError, match="no row is left"):
        quick("multinomial_nb", pool=pool.select(range(50, 57)), held_out=test, task=TASK)
    with pytest.raises(ValueError, match="`held_out`"):
        quick("multinomial_nb", train=few, held_out=Dataset.from_dict({"sentence": ["w5"]}))


def test_a_bad_pool_is_found_before_the_teacher_works(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherSource, "logits", lambda *_: pytest.fail("the teacher was asked"))
    train, bad = make_texts(20, 1), Dataset.from_dict({"text": ["w5", None]})
    for pool, held_out, message in (
        (bad.rename_column("text", "sentence"), None, "unlabelled split has no column 'text'"),
        (bad, None, "unlabelled split must hold strings, got None in row 1"),
        (None, bad, "`held_out` split must hold strings, got None in row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            quick("multinomial_nb", tiny("bert"), train, pool, tokenizer=tokenizer, held_out=held_out)


def test_a_teacher_of_other_labels(tokenizer: Any) -> None:
    rows = make_texts(20)
    with pytest.raises(ValueError, match=r"labels must be the task's.*To resolve"):
        quick("multinomial_nb", tiny("bert", num_labels=3), rows, task=TASK, tokenizer=tokenizer)
    other = tiny("bert")
    other.config.id2label = {0: "bright", 1: "dull"}
    with pytest.raises(ValueError, match="in this order"):
        quick("multinomial_nb", other, rows, task=TASK, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="classification head"):
        quick("multinomial_nb", tiny("bert", head="encoder"), rows, task=TASK, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="2 classes"):
        quick("multinomial_nb", train=with_teacher_logits(rows, np.zeros((20, 3))), task=TASK)
    with pytest.raises(ValueError, match="`tokenizer`"):
        quick("multinomial_nb", tiny("bert"), rows, task=TASK)


def test_text_in_another_script() -> None:
    """Learned where it is the language of the task: with spaces, and without."""
    for good, bad, filler in (("отличный", "скучный", "фильм"), ("好", "坏", "电影"), ("素晴", "退屈", "映画でした")):
        space = " " if good == "отличный" else ""
        texts = [f"{filler}{space}{word}{space}{filler}" for word in (bad, good) * 10]
        student = quick("logistic_regression", train=Dataset.from_dict({"text": texts, "label": [0, 1] * 10}))
        assert student.predict([f"{good}{space}{filler}", f"{filler}{space}{bad}"]).tolist() == [1, 0], good


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "`temperature`"),
        ({"gold_weight": 1.5}, "`gold_weight`"),
        ({"gold_weight": "half"}, "`gold_weight`"),
        ({"gold_weight": "auto", "folds": 0}, "`gold_weight` auto needs labelled rows, folds of them"),
        ({"folds": 1}, "`folds`"),
        ({"chunk_rows": 0}, "`chunk_rows`"),
        ({"grid": {"depth": [3]}}, "depth"),
        ({"grid": {"C": []}}, "`grid`"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick("logistic_regression", train=make_texts(20), **settings)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="sharpness"):
        quick("logistic_regression", train=make_texts(20), sharpness=3)
    with pytest.raises(ValueError, match="logistic_regression"):
        quick("k_means", train=make_texts(20))
    with pytest.raises(ValueError, match="single_label"):
        quick("linear_svm", train=Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 0.1]}))
    with pytest.raises(ValueError, match="`teacher` must be given"):
        quick("static_embedding", train=make_texts(20))
    for wrong in ({"words": (2, 1)}, {"words": None}, {"weighting": "bm25"}, {"min_df": 0}):
        with pytest.raises(ValueError, match="To resolve"):
            TextFeatures(**wrong)


# ------------------------------------------------------------------------------------------------------------------ real data


def test_on_real_reviews() -> None:
    folder = SHARED / "data" / "imdb"
    if not folder.is_dir():
        pytest.skip("the IMDB reviews are not here")
    rows = load_dataset("parquet", data_files={s: str(folder / f"{s}.parquet") for s in ("train", "test")})
    train, test = (rows[s].shuffle(seed=0).select(range(n)) for s, n in (("train", 600), ("test", 300)))
    majority = max(np.bincount(list(test["label"]))) / len(test)
    for kind in ("logistic_regression", "multinomial_nb"):
        student = distill_classical(None, train, student=kind, folds=0)
        assert isinstance(student, ClassicalStudent)
        assert accuracy(student, test) > majority + 0.15, kind


def test_few_labels_are_judged_by_the_same_rows_with_and_without_a_pool() -> None:
    gold = np.array([0, 1] * 30)
    alone = Taught(["w"] * 60, np.eye(2)[gold], gold)
    joined = alone + Taught(["v"] * 300, np.full((300, 2), 0.5), np.full(300, -1))
    (_, few), (train, held) = (_hold_back(rows, seed=3) for rows in (alone, joined))
    assert len(few) == 6 and held[:6].tolist() == few.tolist() and len(held) == 36 and (joined.gold[held[6:]] < 0).all()
    assert sorted([*train, *held]) == list(range(360))
    many = Taught(["w"] * 205, np.full((205, 2), 0.5), np.zeros(205, int)) + joined.select(np.arange(60, 360))
    assert (many.gold[_hold_back(many, seed=3)[1]] == 0).all() and len(_hold_back(many, seed=3)[1]) == 20
