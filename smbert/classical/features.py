"""Texts, and pairs of texts, as sparse rows of numbers for the classical students: scikit-learn throughout."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.pipeline import FeatureUnion

# Chinese and Japanese are written without spaces: there every character is a word, and word pairs catch the compounds.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Vowel signs of Indic and Thai writing, points of Arabic and Hebrew, accents that stand on their own: for `re` they are no letters.
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
LETTERS = rf"[^\W{UNSPACED}]+(?:[{MARKS}]+[^\W{UNSPACED}]*)*"  # of one word
WORD = rf"(?u)[{UNSPACED}]|{LETTERS}"
WEIGHTINGS = ("tfidf", "counts", "binary")
_HASH_BITS, _CROSS_BITS, _CROSS_WORDS = 20, 18, 24
_OVERLAPS = (
    "cosine",
    "jaccard of words",
    "share of first",
    "share of second",
    "length ratio",
    "jaccard of numbers",
    "same",
)


@dataclass(frozen=True)
class TextFeatures:
    """What a classical student sees of a text.

    Attributes:
        words: shortest and longest word n-gram, None for no words.
        chars: the same for character n-grams within words, which also suit scripts without spaces.
        weighting: "tfidf" (logarithmic counts x inverse document frequency, unit length), "counts" or "binary".
        min_df: texts that must have an n-gram for it to count.
        max_features: most n-grams of each of the two kinds, by frequency; None for all.
        hashed: a fixed number of hashed features instead of a vocabulary, so that texts can be streamed; "tfidf" then
            is counts of unit length, because nothing is known of the other texts.

    Raises:
        ValueError: n-grams that are no range, an unknown weighting, or no features at all.
    """

    words: tuple[int, int] | None = (1, 2)
    chars: tuple[int, int] | None = None
    weighting: str = "tfidf"
    min_df: int = 2
    max_features: int | None = 200_000
    hashed: bool = False

    def __post_init__(self) -> None:
        for name in ("words", "chars"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
                if len(value) != 2 or not 1 <= value[0] <= value[1]:
                    raise ValueError(
                        f"`{name}` must be (shortest, longest) n-gram with 1 <= shortest <= longest, got {value}. "
                        "To resolve, pass such as (1, 2)."
                    )
        if self.words is None and self.chars is None:
            raise ValueError("`words` or `chars` must be given, got neither. To resolve, pass words=(1, 2).")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"`weighting` must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}. To resolve, choose one."
            )
        for name, value in (("min_df", self.min_df), ("max_features", self.max_features)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}. To resolve, correct it.")


def vectorizer(features: TextFeatures, pairs: bool) -> Any:
    """The transformer, not fitted, from texts (or pairs of texts) to a sparse matrix (rows, features) >= 0."""
    kinds = [(name, ngrams) for name, ngrams in (("word", features.words), ("char_wb", features.chars)) if ngrams]
    parts = [(name, _one(features, name, ngrams)) for name, ngrams in kinds]
    single = parts[0][1] if len(parts) == 1 else FeatureUnion(parts)
    return PairFeatures(single) if pairs else single


def _one(features: TextFeatures, analyzer: str, ngrams: tuple[int, int]) -> Any:
    common: dict[str, Any] = {"analyzer": analyzer, "ngram_range": ngrams, "binary": features.weighting == "binary"}
    if analyzer == "word":
        common["token_pattern"] = WORD
    if features.hashed:
        norm = "l2" if features.weighting == "tfidf" else None
        return HashingVectorizer(n_features=2**_HASH_BITS, alternate_sign=False, norm=norm, **common)
    common.update(min_df=features.min_df, max_features=features.max_features)
    return TfidfVectorizer(sublinear_tf=True, **common) if features.weighting == "tfidf" else CountVectorizer(**common)


def count_vectorizers(transformer: Any) -> Iterator[CountVectorizer]:
    """All parts of a `vectorizer` that hold a vocabulary, in a fixed order."""
    if isinstance(transformer, PairFeatures):
        transformer = transformer.fitted_
    parts = (
        [part for _, part in transformer.transformer_list] if isinstance(transformer, FeatureUnion) else [transformer]
    )
    yield from (part for part in parts if isinstance(part, CountVectorizer))


def unknown_texts(transformer: Any, matrix: sp.csr_matrix) -> np.ndarray:
    """(rows,) bool: rows without a single known n-gram, about which a student can only answer with its prior."""
    if isinstance(transformer, PairFeatures):
        matrix = matrix[:, : 2 * transformer.width_]
    return np.diff(matrix.indptr) == 0


class PairFeatures(TransformerMixin, BaseEstimator):
    """Features of a sentence pair, for bag-of-words models that could not relate two texts by themselves.

    Blocks, all non-negative: n-grams of the first text, of the second, in both (product), in one only (absolute
    difference), hashed pairs of one word of each text that the other lacks, and seven measures of overlap. After the
    lexicalised classifier of Bowman et al., "A large annotated corpus for learning natural language inference",
    EMNLP 2015.

    Args:
        single: transformer of texts; one vocabulary serves both sides.
    """

    def __init__(self, single: Any) -> None:
        self.single = single

    def fit(self, pairs: Sequence[tuple[str, str]], y: Any = None) -> PairFeatures:
        # Fitted in place, so that a saved student holds one vocabulary and not two.
        self.fitted_ = self.single.fit([text for pair in pairs for text in pair])
        self.width_ = self.fitted_.transform([""]).shape[1]
        return self

    def transform(self, pairs: Sequence[tuple[str, str]]) -> sp.csr_matrix:
        """Pairs -> (pairs, 4 x features of a text + hashed word pairs + 7)."""
        first, second = (sp.csr_matrix(self.fitted_.transform([pair[side] for pair in pairs])) for side in (0, 1))
        words = [[_words(text) for text in pair] for pair in pairs]
        crossed = FeatureHasher(2**_CROSS_BITS, input_type="string", alternate_sign=False).transform(
            [_crossings(*both) for both in words]
        )
        overlap = sp.csr_matrix(np.array([_overlap(*both) for both in words]).reshape(len(pairs), -1))
        lengths = [np.sqrt(block.multiply(block).sum(axis=1)).A1 for block in (first, second)]
        dot = first.multiply(second).sum(axis=1).A1
        cosine = sp.csr_matrix((dot / np.maximum(lengths[0] * lengths[1], 1e-12))[:, None])
        blocks = [first, second, first.multiply(second), abs(first - second), crossed, cosine, overlap]
        return sp.csr_matrix(sp.hstack(blocks, format="csr"))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        names = self.fitted_.get_feature_names_out()
        plain = [f"{side}: {name}" for side in ("first", "second", "both", "one only") for name in names]
        hashed = [f"word pair #{number}" for number in range(2**_CROSS_BITS)]
        return np.array([*plain, *hashed, *_OVERLAPS], dtype=object)


def _words(text: str) -> list[str]:
    return re.findall(WORD, text.lower())


def _crossings(first: list[str], second: list[str]) -> list[str]:
    """Word pairs over what the texts do not share; the bound keeps long texts from squaring."""
    one, two = (
        [w for w in dict.fromkeys(a) if w not in b][:_CROSS_WORDS] for a, b in ((first, second), (second, first))
    )
    return [f"{a}|{b}" for a in one for b in two]


def _overlap(first: list[str], second: list[str]) -> list[float]:
    one, two = set(first), set(second)
    numbers = [{w for w in words if any(c.isdigit() for c in w)} for words in (one, two)]
    shared = len(one & two)
    return [
        shared / max(len(one | two), 1),
        shared / max(len(one), 1),
        shared / max(len(two), 1),
        min(len(first), len(second)) / max(len(first), len(second), 1),
        len(numbers[0] & numbers[1]) / max(len(numbers[0] | numbers[1]), 1),
        float(first == second),
    ]
