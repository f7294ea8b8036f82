"""LIME: a planted model is recovered, a constant one gives zeros, and what is written can be read by anybody."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_texts
from datasets import Dataset
from rich.console import Console
from scipy.special import expit, log_softmax, softmax
from tiny_models import tiny

from smbert.classical import TextFeatures, distill_classical
from smbert.explain import Classifier, LimeSettings, as_classifier, exact_weights, explain, explain_all
from smbert.explain.comparison import jaccard, spearman
from smbert.explain.html import segments
from smbert.explain.lime import ridge
from smbert.explain.terminal import terminal_view
from smbert.tasks import Task, tokenize
from smbert.teacher import DistillCollator, predict_logits

NAMES = ("bad", "good")
LONG = "a film that is good and bad at once , with words that say nothing at all about it , I 'd say"
FEW = LimeSettings(samples=200)


def planted(weights: dict[str, float], name: str = "planted") -> Classifier:
    """The probability of `good` is linear in the words that a text has."""

    def predict(texts: list[Any]) -> np.ndarray:
        texts = [t if isinstance(t, str) else " ".join(t) for t in texts]
        good = np.array([0.5 + sum(w for word, w in weights.items() if word in t.lower().split()) for t in texts])
        return np.stack([1 - good, good], axis=1)

    return as_classifier(predict, name=name, label_names=NAMES)


CONSTANT = as_classifier(lambda texts: np.tile([0.25, 0.75], (len(texts), 1)), name="constant", label_names=NAMES)


def by_word(one: Any) -> dict[str, float]:
    return {unit.text: weight for unit, weight in zip(one.units, one.weights)}


# ------------------------------------------------------------------------------------------------------------------------ LIME


def test_a_planted_model_is_recovered() -> None:
    one = explain(planted({"good": 0.3, "bad": -0.2, "nothing": 0.1}), LONG, label=1, settings=LimeSettings(alpha=0.01))
    found = by_word(one)
    assert found["good"] == pytest.approx(0.3, abs=0.01) and found["bad"] == pytest.approx(-0.2, abs=0.01)
    assert [word for word, _ in one.top(3)] == ["good", "bad", "nothing"]
    assert max(abs(w) for word, w in found.items() if word not in ("good", "bad", "nothing")) < 0.01
    assert one.r2 is not None and one.r2 > 0.99 and one.intercept == pytest.approx(0.5, abs=0.02)
    assert one.probabilities == pytest.approx((0.3, 0.7))
    other = explain(planted({"good": 0.3, "bad": -0.2}), LONG, label=0, settings=LimeSettings(alpha=0.01))
    assert by_word(other)["good"] == pytest.approx(-0.3, abs=0.01)


def test_a_constant_model_gives_zeros() -> None:
    one = explain(CONSTANT, LONG, settings=FEW)
    assert set(one.weights) == {0.0} and one.r2 is None and one.label == 1
    assert one.intercept == pytest.approx(0.75)


def test_the_fidelity_tells_a_model_that_is_not_linear() -> None:
    """Good only if both words are there: no sum of words can say that."""

    def both(texts: list[str]) -> np.ndarray:
        good = np.array([float("good" in t.split() and "once" in t.split()) for t in texts])
        return np.stack([1 - good, good], axis=1)

    one = explain(as_classifier(both, label_names=NAMES), LONG, label=1)
    assert {word for word, _ in one.top(2)} == {"good", "once"}
    assert one.r2 is not None and 0.2 < one.r2 < 0.95


def test_closeness_is_the_kernel_of_the_paper() -> None:
    masks = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)
    wanted = np.array([0.9, 0.5, 0.4, 0.1])
    settings = LimeSettings(kernel_width=0.5, alpha=0.7)
    weights, intercept, r2 = ridge(masks, wanted, settings)
    ones = np.ones(4)
    distance = np.array([1 - m @ ones / math.sqrt(m.sum() * 4) for m in masks.astype(float)])
    close = np.exp(-(distance**2) / (2 * 0.5**2))
    x = masks - np.average(masks, axis=0, weights=close)
    y = wanted - np.average(wanted, weights=close)
    by_hand = np.linalg.solve((x * close[:, None]).T @ x + 0.7 * np.eye(4), (x * close[:, None]).T @ y)
    assert np.allclose(weights, by_hand)
    left = ((wanted - masks @ by_hand - intercept) ** 2 * close).sum()
    assert r2 == pytest.approx(1 - left / (y**2 * close).sum())


def test_the_same_seed_asks_the_same() -> None:
    model = planted({"good": 0.3, "film": 0.1})
    one, two, other = (explain(model, LONG, settings=LimeSettings(samples=100, seed=s)) for s in (1, 1, 2))
    assert one == two and one.weights != other.weights
    short = [explain(model, "good film it is", settings=LimeSettings(seed=s)).weights for s in (1, 2)]
    assert short[0] == short[1]  # all 16 variants are fewer than the samples


def test_words_are_left_out_everywhere_at_once() -> None:
    seen: list[str] = []

    def predict(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.full((len(texts), 2), 0.5)

    explain(as_classifier(predict, label_names=NAMES), "Good, don't! A good one.", settings=FEW)
    assert len(seen) == len(set(seen)) == 2**4  # good, don't, a, one
    assert seen[0] == "Good, don't! A good one." and ", don't! A  one." in seen and ", !   ." in seen


def test_runs_of_words() -> None:
    one = explain(planted({"good": 0.3}), "it is a good film to see", settings=LimeSettings(ngram=2))
    assert [unit.text for unit in one.units] == ["it is", "a good", "film to", "see"]
    assert one.top(1)[0][0] == "a good"


@pytest.mark.parametrize("text", ["", "   ", "...", "?!"])
def test_texts_without_words(text: str) -> None:
    one = explain(planted({"good": 0.3}), text, settings=FEW)
    assert one.units == () and one.weights == () and one.r2 is None and len(one.probabilities) == 2


def test_text_in_another_script() -> None:
    def predict(texts: list[str]) -> np.ndarray:
        good = np.array([0.2 + 0.6 * ("好" in t or "хорош" in t) for t in texts])
        return np.stack([1 - good, good], axis=1)

    model = as_classifier(predict, label_names=NAMES)
    assert explain(model, "这部电影很好看").top(1)[0][0] == "好"
    assert explain(model, "фильм был хорош").top(1)[0][0] == "хорош"
    words = explain(model, "हिन्दी की फ़िल्म cafe\u0301s").units
    assert [unit.text for unit in words] == ["हिन्दी", "की", "फ़िल्म", "cafe\u0301s"]


def test_pairs_have_two_sides() -> None:
    def predict(pairs: list[tuple[str, str]]) -> np.ndarray:
        good = np.array([0.2 + 0.5 * ("dog" in b) for a, b in pairs])
        return np.stack([1 - good, good], axis=1)

    one = explain(as_classifier(predict, label_names=NAMES), ("the dog runs", "a dog sleeps"), settings=FEW)
    sides = {(unit.text, unit.spans[0][0]): weight for unit, weight in zip(one.units, one.weights)}
    assert sides["dog", 1] > 0.4 and abs(sides["dog", 0]) < 0.05


# ------------------------------------------------------------------------------------------------------------------ classifiers


def test_a_transformer_is_asked_in_batches(tokenizer: Any) -> None:
    model = tiny("bert", seed=3)
    rows = make_texts(9, seed=1)
    classifier = as_classifier(model, tokenizer, batch_size=4)
    task = Task("tiny", ("text",), label_names=NAMES)
    direct = predict_logits(model, tokenize(rows, task, tokenizer, 60), DistillCollator(tokenizer), disable_tqdm=True)
    assert np.allclose(classifier.predict_proba(list(rows["text"])), softmax(direct, axis=1), atol=1e-5)
    assert np.isfinite(classifier.predict_proba([("w5 w6", "w7"), ("w5", "w8 w9")])).all()
    one = explain(classifier, "w5 w30 w31 w6 w18", settings=FEW)
    assert len(one.weights) == 5 and any(one.weights)
    model.config.problem_type = "multi_label_classification"
    assert np.allclose(classifier.predict_proba(list(rows["text"])), expit(direct), atol=1e-5)


def student_of(kind: str = "logistic_regression", **options: Any) -> Any:
    options = {"features": TextFeatures(min_df=1), "folds": 2, **options}
    return distill_classical(None, make_texts(80, 1), student=kind, **options)


@pytest.mark.parametrize("kind", ["logistic_regression", "multinomial_nb", "linear_svm"])
def test_linear_students_give_their_exact_weights(kind: str) -> None:
    student, text = student_of(kind), "w5 w6 w40 w41"
    exact = dict(exact_weights(student, text, 0) or ())
    logs = log_softmax(student.predict_logits([text])[0])
    assert sum(exact.values()) == pytest.approx(logs[0] - logs.mean())
    assert exact["w5"] > 0 and {"w5", "w6", "(intercept)"} <= set(exact)
    one = explain(as_classifier(student), text, label=0)
    assert dict(one.exact or ()) == exact
    assert {word for word, _ in one.top(2)} == {"w5", "w6"}


def test_trees_and_hashed_students_have_none() -> None:
    assert explain(as_classifier(student_of("decision_tree")), "w5 w6", settings=FEW).exact is None
    hashed = student_of("multinomial_nb", features=TextFeatures(hashed=True), folds=0)
    assert explain(as_classifier(hashed), "w5 w6", settings=FEW).exact is None


# ----------------------------------------------------------------------------------------------------------------------- report


def test_agreement_by_hand() -> None:
    assert jaccard([3, 2, 1, 0.5], [0.1, -9, 8, 0.2], 2) == pytest.approx(1 / 3)
    assert jaccard([1, 2], [0, 0], 2) is None
    assert jaccard([1, 2, 3, 4], [4, 3, 2, 1], 10) == 0.0  # half of four words, not all of them
    assert spearman([1, 2, 3], [-5, 0, 9]) == pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2], [0, 0]) is None and spearman([1], [2]) is None


def test_overlap_tells_a_student_that_looks_elsewhere() -> None:
    texts = [LONG, LONG.replace("film", "play")]
    teacher = planted({"good": 0.3, "bad": -0.2, "words": 0.05}, "teacher")
    alike = planted({"good": 0.2, "bad": -0.15, "words": 0.02}, "alike")
    other = planted({"once": 0.3, "nothing": -0.2, "all": 0.1}, "other")
    near = explain_all([teacher, alike], texts, settings=FEW, seeds=2, k=3).report
    far = explain_all([teacher, other], texts, settings=FEW, seeds=2, k=3).report
    assert near["overlap"]["jaccard"] == 1.0 and near["overlap"]["spearman"] > far["overlap"]["spearman"]
    assert far["overlap"]["jaccard"] == 0.0 and 0 < far["overlap"]["chance"] < 0.2
    assert near["fidelity"]["teacher"] > 0.9 and near["stability"]["teacher"]["jaccard"] == 1.0
    assert (near["texts"], near["k"], near["seeds"]) == (2, 3, 2)


def test_the_first_classifier_chooses_the_label() -> None:
    disagreeing = explain_all(
        [planted({"good": 0.3}), planted({"good": -0.3}, "contrary")], [LONG], settings=FEW, seeds=1
    )
    one, two = disagreeing.rows[0]
    assert one.label == two.label == 1 and by_word(two)["good"] < 0
    assert disagreeing.report["overlap"]["same_label"] == 0.0
    constant = explain_all([CONSTANT, CONSTANT], [LONG], settings=FEW, seeds=2).report
    assert constant["overlap"]["jaccard"] is None and constant["fidelity"] == {
        "constant (1)": None,
        "constant (2)": None,
    }


# ----------------------------------------------------------------------------------------------------------------------- output


class Page(HTMLParser):
    """Collects marks, text and everything that would be fetched or run; raises where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.marks: list[tuple[str, float, str]] = []
        self.text, self.foreign, self.tags = "", [], set()  # type: ignore[var-annotated]
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.foreign += [v for k, v in found.items() if k in ("src", "href") or k.startswith("on")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "mark":
            self.marks.append((found["class"], float(found["style"].removeprefix("--w:")), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            kind, strength, text = self.marks.pop()
            self.marks.append((kind, strength, text + data))
        if "style" not in self.open:
            self.text += data


def test_the_page(tmp_path: Path) -> None:
    evil = LONG + ' <script>alert("x")</script> & good'
    found = explain_all(
        [planted({"good": 0.3, "bad": -0.2}, "<teacher>"), CONSTANT], [evil, "", LONG], settings=FEW, seeds=1
    )
    found.save(tmp_path)
    page = Page((tmp_path / "explanations.html").read_text(encoding="utf-8"))
    assert not page.foreign and not page.tags & {"script", "link", "img", "iframe"}
    assert evil in page.text and "<teacher>" in page.text
    marked = {text: (kind, strength) for kind, strength, text in page.marks}
    assert marked["good"][0] == "for" and marked["bad"][0] == "against"
    assert marked["good"][1] == pytest.approx(0.6) and marked["bad"][1] < 0.6
    data = json.loads((tmp_path / "explanations.json").read_text(encoding="utf-8"))
    assert data["models"] == ["<teacher>", "constant"] and len(data["rows"]) == 3
    one = data["rows"][0][0]
    assert "".join(piece for piece, _ in segments(one, 0)) == evil
    assert sorted(p.name for p in tmp_path.iterdir()) == ["explanations.html", "explanations.json"]


def test_exact_weights_are_on_the_page() -> None:
    page = Page(explain_all([as_classifier(student_of())], ["w5 w6 w40"], settings=FEW, seeds=1).html())
    assert "exact weights" in page.text and "w5 w6" in page.text


def test_the_terminal_view() -> None:
    found = explain_all(
        [planted({"good": 0.3, "bad": -0.2}), CONSTANT], [LONG, "[bold]good[/nothing]", ""], settings=FEW, seeds=2
    )
    out = StringIO()
    Console(file=out, width=120, color_system="truecolor", force_terminal=True).print(
        terminal_view(found.to_dict(), limit=2)
    )
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert "fidelity" in shown and "good +0." in shown and "[bold]good[/nothing]" in shown and "1 more texts" in shown
    assert any("planted: good" in line and "constant: good" in line for line in shown.splitlines())  # side by side
    assert re.search(r"\x1b\[[0-9;]*48;2;[0-9;]*mgood", out.getvalue())


# -------------------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_explained(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="`tokenizer`"):
        as_classifier(tiny("bert"))
    with pytest.raises(ValueError, match="sequence classifier"):
        as_classifier(tiny("bert", head="encoder"), tokenizer)
    with pytest.raises(ValueError, match="sequence classifier"):
        as_classifier(tiny("bert", num_labels=1), tokenizer)
    with pytest.raises(ValueError, match="`label_names`"):
        as_classifier(lambda texts: np.ones((len(texts), 2)))
    with pytest.raises(TypeError, match="`model`"):
        as_classifier("bert-base")  # type: ignore[arg-type]
    for bad in (None, 3, ("a", "b", "c"), ("a", None)):
        with pytest.raises(TypeError, match="`text`"):
            explain(CONSTANT, bad)
    with pytest.raises(ValueError, match="`label`"):
        explain(CONSTANT, "a", label=2)
    with pytest.raises(ValueError, match="same labels"):
        explain_all([CONSTANT, as_classifier(tiny("bert", num_labels=3), tokenizer)], ["a"])
    contrary = as_classifier(CONSTANT.predict_proba, label_names=NAMES[::-1])
    with pytest.raises(ValueError, match="same order"):
        explain_all([CONSTANT, contrary], ["a"])
    for arguments in ({"texts": []}, {"seeds": 0}, {"k": 0}):
        with pytest.raises(ValueError, match="To resolve"):
            explain_all([CONSTANT], **{"texts": ["a"], **arguments})
    for settings in ({"samples": 1}, {"ngram": 0}, {"kernel_width": 0}, {"alpha": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="To resolve"):
            LimeSettings(**settings)


def test_numbered_labels_match_any_names(tokenizer: Any) -> None:
    rows = Dataset.from_dict({"text": ["w5 w6", "w18 w19"] * 4, "label": ["dull", "bright"] * 4})
    student = distill_classical(None, rows, student="multinomial_nb", features=TextFeatures(min_df=1), folds=0)
    found = explain_all(
        [as_classifier(tiny("bert"), tokenizer), as_classifier(student)], ["w5 w18"], settings=FEW, seeds=1
    )
    assert found.label_names == ("bright", "dull")
