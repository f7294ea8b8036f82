"""LIME for text: leave words out, and fit a ridge regression weighted by closeness to the whole text.

Ribeiro et al., "Why Should I Trust You?", KDD 2016. The number of words left out, the cosine distance and the kernel are
those of the paper's own code; the regression is scikit-learn's.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import Ridge

from ..classical.features import LETTERS, UNSPACED

# A word with its apostrophes; where scripts have no spaces, a character.
_UNIT = re.compile(rf"[{UNSPACED}]|{LETTERS}(?:['’]{LETTERS})*")
# Below it a probability has not moved: rounding would otherwise be explained.
_CONSTANT = 1e-7


@dataclass(frozen=True)
class LimeSettings:
    """How a text is probed.

    Attributes:
        samples: texts with words left out, the whole text among them; all 2^n where that is fewer.
        ngram: 1 leaves out words, all occurrences of a word at once; more leaves out runs of so many words.
        kernel_width: how fast a sample's weight falls with its cosine distance from the whole text.
        alpha: of the ridge regression.
        seed: of the words left out.

    Raises:
        ValueError: a value out of range.
    """

    samples: int = 1000
    ngram: int = 1
    kernel_width: float = 0.25
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, sound, rule in (
            ("samples", self.samples >= 10, "at least 10"),
            ("ngram", self.ngram >= 1, "at least 1"),
            ("kernel_width", self.kernel_width > 0, "above 0"),
            ("alpha", self.alpha >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not sound:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)}. To resolve, correct it.")


@dataclass(frozen=True)
class Unit:
    """What is left out together.

    Attributes:
        text: the word, or the run of words.
        spans: (side, start, end) of every occurrence; side is 0, or 1 in the second text of a pair.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]


def units_of(texts: tuple[str, ...], ngram: int) -> tuple[Unit, ...]:
    """Distinct words without regard to case, each side of a pair for itself; or runs of words in their places."""
    units: list[Unit] = []
    for side, text in enumerate(texts):
        places = [match.span() for match in _UNIT.finditer(text)]
        if ngram > 1:
            runs = [places[i : i + ngram] for i in range(0, len(places), ngram)]
            units += [Unit(text[run[0][0] : run[-1][1]], ((side, run[0][0], run[-1][1]),)) for run in runs]
            continue
        grouped: dict[str, list[tuple[int, int]]] = {}
        for start, end in places:
            grouped.setdefault(text[start:end].casefold(), []).append((start, end))
        units += [Unit(text[g[0][0] : g[0][1]], tuple((side, *span) for span in g)) for g in grouped.values()]
    return tuple(units)


def masks_of(units: int, settings: LimeSettings) -> np.ndarray:
    """(samples, units) of 0 and 1, the first row all 1; the number of zeros is uniform, as in the paper's code."""
    if 2 ** min(units, 60) <= settings.samples:
        every = np.array(list(itertools.product((1, 0), repeat=units)), dtype=bool)
        return every.reshape(2**units, units)
    draw = np.random.default_rng(settings.seed)
    removed = draw.integers(1, units, endpoint=True, size=settings.samples)
    masks = draw.random((settings.samples, units)).argsort(axis=1) >= removed[:, None]
    masks[0] = True
    return masks


def without(texts: tuple[str, ...], units: tuple[Unit, ...], mask: np.ndarray) -> tuple[str, ...]:
    """The texts without the units whose mask is 0."""
    gone: list[list[tuple[int, int]]] = [[] for _ in texts]
    for number in np.flatnonzero(~mask):
        for side, start, end in units[number].spans:
            gone[side].append((start, end))
    left = []
    for text, spans in zip(texts, gone):
        position, parts = 0, []
        for start, end in sorted(spans):
            parts.append(text[position:start])
            position = end
        left.append("".join([*parts, text[position:]]))
    return tuple(left)


def ridge(masks: np.ndarray, wanted: np.ndarray, settings: LimeSettings) -> tuple[np.ndarray, float, float | None]:
    """Weights (units,), intercept and weighted R^2 of the linear model of the probabilities `wanted` (samples,)."""
    units = masks.shape[1]
    if units == 0 or np.ptp(wanted) < _CONSTANT:
        return np.zeros(units), float(wanted[0]), None
    # The cosine of a mask and of all ones is the root of the share that is left.
    distance = 1 - np.sqrt(masks.mean(axis=1))
    closeness = np.exp(-((distance / settings.kernel_width) ** 2) / 2)
    model = Ridge(alpha=settings.alpha).fit(masks.astype(np.float64), wanted, sample_weight=closeness)
    r2 = float(model.score(masks.astype(np.float64), wanted, sample_weight=closeness))
    return model.coef_, float(model.intercept_), r2 if math.isfinite(r2) else None
