"""The runtime without torch: what it answers, what it refuses, and that it needs no more than it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from run_helpers import WORDS, tiny_tokenizer
from tiny_models import tiny

pytest.importorskip("onnx", reason="needs onnx (pip install smbert[onnx])")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install smbert[onnx])")

from smbert.export import export
from smbert.runtime import Classifier

TEXTS = [" ".join(WORDS[i : i + 1 + 3 * (i % 4)]) for i in range(20)]


def exported(folder: Path, **config) -> Path:
    tiny("bert", layers=1, **config).save_pretrained(folder / "checkpoint")
    tiny_tokenizer().save_pretrained(folder / "checkpoint")
    return export(folder / "checkpoint", folder / "export", max_length=24).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {0: "down", 1: "up", 2: "level"}
    return exported(
        tmp_path_factory.mktemp("runtime"), num_labels=3, id2label=names, label2id={n: i for i, n in names.items()}
    )


@pytest.fixture(scope="module")
def classify(folder: Path) -> Classifier:
    return Classifier(folder, threads=1)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def change(folder: Path, **values) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_one_text_and_many(classify: Classifier) -> None:
    logits = classify.logits(TEXTS)
    assert logits.shape == (20, 3) and logits.dtype == np.float32
    many = classify(TEXTS)
    exp = np.exp(logits.astype(np.float64))
    for row, answer in zip(exp / exp.sum(axis=1, keepdims=True), many, strict=True):
        assert answer == {"label": ("down", "up", "level")[row.argmax()], "score": pytest.approx(row.max(), abs=1e-6)}
    one = classify(TEXTS[3])
    assert one["label"] == many[3]["label"] and one["score"] == pytest.approx(many[3]["score"], abs=1e-6)
    pair, pairs = (TEXTS[0], TEXTS[1]), classify([(TEXTS[0], TEXTS[1])])
    assert classify(pair)["score"] == pytest.approx(pairs[0]["score"], abs=1e-6)
    assert classify([]) == [] and classify.logits([]).shape == (0, 3)


def test_order_batches_and_threads_change_nothing(folder: Path, classify: Classifier) -> None:
    expected = np.concatenate([classify.logits([text]) for text in TEXTS])
    for size in (1, 7, 64):
        assert np.abs(Classifier(folder, batch_size=size, threads=1).logits(TEXTS) - expected).max() < 1e-5
    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(lambda i: classify.logits(TEXTS[i % 20 :]), range(40)))
    assert all(np.abs(part - expected[i % 20 :]).max() < 1e-5 for i, part in enumerate(parts))


def test_texts_of_similar_length_share_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classify = Classifier(folder, batch_size=5, threads=1)
    shapes = []
    make = classify._batch

    def watched(encodings):
        batch = make(encodings)
        shapes.append((batch["input_ids"].shape, min(len(e.ids) for e in encodings)))
        return batch

    monkeypatch.setattr(classify, "_batch", watched)
    classify.logits(TEXTS)
    assert [shape for shape, _ in shapes] == [(5, 3), (5, 6), (5, 9), (5, 12)]
    assert all(shortest == longest for (_, longest), shortest in shapes)


def test_regression_and_several_labels(tmp_path: Path) -> None:
    score = Classifier(exported(tmp_path / "a", num_labels=1), threads=1)
    assert score(TEXTS[0]) == {"score": pytest.approx(float(score.logits(TEXTS[:1])[0, 0]), abs=1e-5)}
    several = Classifier(exported(tmp_path / "b", num_labels=3, problem_type="multi_label_classification"), threads=1)
    for logits, answer in zip(several.logits(TEXTS), several(TEXTS), strict=True):
        assert list(answer["scores"].values()) == pytest.approx(list(1 / (1 + np.exp(-logits))), abs=1e-5)
        assert answer["labels"] == [f"LABEL_{i}" for i in range(3) if logits[i] > 0]


def test_long_and_empty_texts(classify: Classifier) -> None:
    words = [WORDS[i % 40] for i in range(200)]
    # 24 tokens, of which two are special.
    assert np.allclose(classify.logits([" ".join(words)]), classify.logits([" ".join(words[:22])]), atol=1e-5)
    short = " ".join(words[:4])
    assert np.allclose(
        classify.logits([(short, " ".join(words))]), classify.logits([(short, " ".join(words[:17]))]), atol=1e-5
    )
    assert classify("")["label"] in classify.labels and np.isfinite(classify.logits(["", " "])).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([3], "text 0 must be a str, or a pair of them, got int"),
        (["a", None], "text 1 must be .* got NoneType"),
        ([b"caf\xe9"], "got bytes. To resolve, decode it"),
        ([("a", 1)], "text 0 must be .* got int"),
        (b"bytes", "must be a list of texts, got bytes"),
        (7, "must be a list of texts, got int"),
    ],
)
def test_what_is_no_text(classify: Classifier, texts, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        classify(texts)


def test_bytes_that_are_no_utf8(classify: Classifier) -> None:
    smuggled = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"text 1 holds '\\udce9', which UTF-8 cannot say.*errors=\"replace\""):
        classify(["fine", smuggled])


def test_single_texts_and_pairs_are_not_mixed_up(copied: Path) -> None:
    change(copied, texts_per_row=2)
    pairs = Classifier(copied, threads=1)
    assert pairs(("a", "b")) == pairs([["a", "b"]])[0]
    with pytest.raises(ValueError, match=r"text 0 must be a pair of texts.*got 1"):
        pairs("alone")
    change(copied, texts_per_row=1)
    with pytest.raises(ValueError, match=r"text 0 must be one text.*got 2"):
        Classifier(copied, threads=1)(("a", "b"))
    change(copied, texts_per_row=None)
    with pytest.raises(ValueError, match=r"must be a pair of texts.*got 3"):
        Classifier(copied, threads=1)(("a", "b", "c"))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "runtime.py"])
def test_a_changed_file_is_refused(copied: Path, name: str) -> None:
    with (copied / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
        Classifier(copied)
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"must hold {name}"):
        Classifier(copied)


def test_folders_without_a_usable_manifest(copied: Path, tmp_path: Path) -> None:
    file = copied / "manifest.json"
    whole = file.read_text()
    file.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        Classifier(copied)
    change_to = json.loads(whole)
    for values, message in (
        ({**change_to, "format": 2}, "must be of format 1, got 2"),
        ({k: v for k, v in change_to.items() if k != "labels"}, "must say labels"),
        ({**change_to, "files": {}}, "must give the hash of model.onnx, tokenizer.json"),
    ):
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            Classifier(copied)
    file.unlink()  # an ONNX file from elsewhere
    with pytest.raises(ValueError, match=r"must hold a manifest\.json.*smbert export"):
        Classifier(copied)
    with pytest.raises(ValueError, match=r"must hold a manifest\.json"):
        Classifier(tmp_path / "nowhere")


@pytest.mark.parametrize("options", [{"threads": 0}, {"batch_size": 0}, {"batch_size": 2.5}, {"threads": True}])
def test_bad_options(folder: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Classifier(folder, **options)


def test_it_needs_neither_torch_nor_transformers_nor_smbert(folder: Path, classify: Classifier) -> None:
    """In an isolated interpreter in which these cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'smbert', 'datasets', 'scipy', 'sklearn', 'onnx'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "import json, runtime\n"
        f"print(json.dumps(runtime.Classifier({str(folder)!r}, threads=1)({TEXTS[:4]!r})))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'smbert') and sys.modules[m]]\n"
    )
    done = subprocess.run([sys.executable, "-I", "-B", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for found, expected in zip(json.loads(done.stdout), classify(TEXTS[:4]), strict=True):
        assert found["label"] == expected["label"] and found["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_the_check_of_an_environment_without_torch(tmp_path: Path) -> None:
    """It passes where torch cannot be imported, and fails where it can, and where an answer differs."""
    script = Path(__file__).with_name("runtime_without_torch.py")

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)

    made = python(str(script), "make", str(tmp_path))
    assert made.returncode == 0, made.stderr
    blocked = (
        "import runpy, sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'datasets'): sys.modules[name] = None\n"
        f"sys.argv = ['', 'check', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = python("-c", blocked)
    assert done.returncode == 0 and "classes: 30 answers as torch's" in done.stdout, done.stderr
    assert "must not have torch" in python(str(script), "check", str(tmp_path)).stderr
    file = tmp_path / "regression" / "expected.json"
    expected = json.loads(file.read_text())
    expected["logits"][7][0] += 0.001
    file.write_text(json.dumps(expected))
    assert "regression: logits differ by 1.0e-03 in batches of 1" in python("-c", blocked).stderr


def test_engines_that_are_unknown_or_not_installed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    change(copied, engine="openvino")
    with pytest.raises(ValueError, match=r"exported for openvino, which is not installed. To resolve, pip install"):
        Classifier(copied)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    change(copied, engine="onnx")
    with pytest.raises(ValueError, match="exported for onnxruntime, which is not installed"):
        Classifier(copied)
    change(copied, engine="tpu")
    with pytest.raises(ValueError, match="the engine must be onnx or openvino, got 'tpu'"):
        Classifier(copied)


def test_pairs_as_a_script(copied: Path) -> None:
    change(copied, texts_per_row=2)
    command = [sys.executable, "-B", str(copied / "runtime.py"), *TEXTS[:3]]
    done = subprocess.run([*command, TEXTS[0]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "texts come in pairs, got 3. To resolve" in done.stderr


def test_as_a_script(folder: Path, classify: Classifier) -> None:
    command = [sys.executable, "-B", str(folder / "runtime.py"), TEXTS[0], TEXTS[1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == [a["label"] for a in classify(TEXTS[:2])]
