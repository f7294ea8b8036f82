"""Vocabulary pruning: which pieces of a tokenizer stay, and the tokenizer that knows these pieces only.

    counts = count_pieces([rows], size)                      # of tokenised text
    ids = choose_pieces(tokenizer, counts, limit=10_000)     # specials, single characters and bytes are always in
    small = prune_tokenizer(tokenizer, ids)                  # id ids[i] becomes id i

Text whose pieces all stay is segmented as before, by each kind of tokenizer for its own reason: WordPiece takes the longest piece and
Unigram the likeliest path, and neither finds a better one among fewer; byte-level BPE merges by rank, and with a piece stay all the
merges that can make it. Other text falls back on shorter pieces, in the end on single characters.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ._surgery_vocab import keep_vocabulary
from .checkpoints import lacks_tokenizer

KINDS = ("WordPiece", "BPE", "Unigram")


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of a fast tokenizer's tokenizer.json.

    Raises:
        ValueError: the tokenizer is slow, or of a kind that cannot lose pieces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"`tokenizer` must be a fast one, whose pieces can be edited, got {type(tokenizer).__name__}. "
            "To resolve, save its fast version (tokenizer.json) beside the model, or leave vocabulary pruning out."
        )
    parts = json.loads(backend.to_str())
    kind = parts["model"].get("type")
    if kind not in KINDS:
        raise ValueError(
            f"a tokenizer must be one of {', '.join(KINDS)} to lose pieces, got {kind}: it has no shorter pieces that could spell "
            "what is dropped. To resolve, leave vocabulary pruning out."
        )
    return parts


def count_pieces(columns: Iterable[Dataset], size: int) -> np.ndarray:
    """How often each id occurs in the `input_ids` of tokenised data sets: (size,) int64.

    Raises:
        ValueError: an id is not below `size`.
    """
    counts = np.zeros(size, dtype=np.int64)
    for rows in columns:
        for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
            for chunk in table.column("input_ids").chunks:
                ids = chunk.flatten().cast(pa.int64()).to_numpy(zero_copy_only=False)
                found = np.bincount(ids, minlength=size)
                if len(found) > size:
                    raise ValueError(
                        f"token ids must be below {size}, the size of the vocabulary, got {len(found) - 1}. "
                        "To resolve, pass the rows of the model's own tokenizer."
                    )
                counts += found
    return counts


def choose_pieces(
    tokenizer: PreTrainedTokenizerBase,
    counts: np.ndarray,
    *,
    coverage: float = 1.0,
    limit: int | None = None,
    always: Collection[int] = (),
) -> list[int]:
    """The ids that stay, ascending: what must, then the most frequent ones until `coverage` or `limit` is reached.

    Args:
        tokenizer: fast; WordPiece, BPE or Unigram.
        counts: occurrences of each id in the corpus, (at least as many as the tokenizer has ids,).
        coverage: share of the corpus's tokens whose pieces stay.
        limit: most pieces; None for any number.
        always: further ids that stay.

    Raises:
        ValueError: an empty corpus, a coverage outside (0, 1], or a limit below what must stay.
    """
    parts = tokenizer_parts(tokenizer)
    if not 0 < coverage <= 1:
        raise ValueError(f"`coverage` must be above 0 and at most 1, got {coverage!r}. To resolve, try 0.999.")
    total = int(counts.sum())
    if total == 0:
        raise ValueError(
            "the corpus holds no token. To resolve, give one with texts like those that the model will read."
        )
    needs = _parts_of_pieces(parts)
    kept: set[int] = set()
    for piece in _indispensable(parts) | set(always):
        kept |= _with_parts(piece, needs, kept)
    if limit is not None and len(kept) > limit:
        raise ValueError(
            f"a vocabulary must keep at least {len(kept)} pieces here (special tokens, single characters or bytes), and the limit "
            f"is {limit}. To resolve, allow more."
        )
    covered = int(counts[sorted(kept)].sum())
    # Stable, so that every process agrees on ties.
    for piece in np.argsort(-counts, kind="stable").tolist():
        if counts[piece] == 0 or covered >= coverage * total:
            break
        new = _with_parts(piece, needs, kept)
        if limit is None or len(kept) + len(new) <= limit:
            covered += int(counts[sorted(new)].sum())
            kept |= new
    return sorted(kept)


def prune_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> PreTrainedTokenizerFast:
    """A fast tokenizer that knows the given ids only; id `ids[i]` becomes id `i`.

    Args:
        tokenizer: left as it is.
        ids: ascending, from `choose_pieces`.

    Raises:
        ValueError: a kind that cannot lose pieces, or one whose numbering does not survive it.
    """
    parts = tokenizer_parts(tokenizer)
    names = {i: piece for piece, i in tokenizer.get_vocab().items()}
    new_id = {old: new for new, old in enumerate(ids)}
    model = parts["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        model["unk_id"] = new_id.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new_id[i] for piece, i in model["vocab"].items() if i in new_id}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [m for m in model["merges"] if all(p in known for p in (*_pair(m), _merged(m, model)))]
    parts["added_tokens"] = [{**token, "id": new_id[token["id"]]} for token in parts["added_tokens"]]
    _renumber(parts["post_processor"], new_id)
    # Both are set anew by every call.
    parts["truncation"] = parts["padding"] = None
    backend = Tokenizer.from_str(json.dumps(parts))
    if backend.get_vocab(with_added_tokens=True) != {names[old]: new for old, new in new_id.items()}:
        raise ValueError(
            "this tokenizer numbers its pieces in a way that does not survive the loss of some. "
            "To resolve, leave vocabulary pruning out, and report this with its tokenizer.json."
        )
    return _wrapped(backend, tokenizer)


def kept_ids(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[int]:
    """The ids under `old` of the pieces of `new`, in the order of the new ids.

    Raises:
        ValueError: `new` was not made from `old`.
    """
    before = old.get_vocab()
    pieces = sorted(new.get_vocab().items(), key=lambda entry: entry[1])
    if any(piece not in before for piece, _ in pieces) or [i for _, i in pieces] != list(range(len(pieces))):
        raise ValueError(
            "the pruned tokenizer must be made from the other one. To resolve, pass the tokenizer it came from."
        )
    return [before[piece] for piece, _ in pieces]


def with_pieces_of(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model itself if the tokenizer in its folder or of its Hub id has the pieces of `tokenizer`, else a copy that knows these only.

    Raises:
        ValueError: `tokenizer` was not made from that one.
    """
    if lacks_tokenizer(folder):
        return model
    try:
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except OSError:  # nor has a Hub id of a model alone
        return model
    return model if own.get_vocab() == tokenizer.get_vocab() else keep_vocabulary(model, kept_ids(own, tokenizer))


def segmentation_change(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, float]:
    """What the loss of pieces does to texts: the share that is cut up differently, and the mean change of their lengths.

    Returns:
        `texts_changed` and `mean_length_change` (0.02: 2 % more tokens), special tokens not counted.
    """
    if not texts:
        raise ValueError("`texts` must hold at least one text. To resolve, pass held-out texts.")
    before, after = (
        [t.convert_ids_to_tokens(ids) for ids in t(list(texts), add_special_tokens=False)["input_ids"]]
        for t in (old, new)
    )
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    lengths = [sum(map(len, tokens)) for tokens in (before, after)]
    return {"texts_changed": changed / len(texts), "mean_length_change": lengths[1] / max(1, lengths[0]) - 1}


def _indispensable(parts: Mapping[str, Any]) -> set[int]:
    """Ids of the special and added tokens, of the unknown token, and of single characters and bytes."""
    model = parts["model"]
    unigram = model["type"] == "Unigram"
    pieces: list[tuple[str, int]] = (
        [(piece, i) for i, (piece, _) in enumerate(model["vocab"])] if unigram else list(model["vocab"].items())
    )
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    kept = {token["id"] for token in parts["added_tokens"]}
    for piece, i in pieces:
        bare = piece.removeprefix(before).removesuffix(after) if len(piece) > 1 else piece
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        if len(bare) <= 1 or is_byte or piece == model.get("unk_token"):
            kept.add(i)
    if unigram:
        if model["unk_id"] is not None:
            kept.add(model["unk_id"])
        # What an unknown character costs is counted from the lowest score of the vocabulary.
        kept.add(min(range(len(pieces)), key=lambda i: model["vocab"][i][1]))
    return kept


def _parts_of_pieces(parts: Mapping[str, Any]) -> dict[int, set[int]]:
    """For BPE, what each piece is merged from, whichever merge makes it; for the other kinds nothing."""
    model = parts["model"]
    needs: dict[int, set[int]] = {}
    for merge in model.get("merges") or ():
        vocab = model["vocab"]
        needs.setdefault(vocab[_merged(merge, model)], set()).update(vocab[p] for p in _pair(merge))
    return needs


def _with_parts(piece: int, needs: Mapping[int, set[int]], known: Collection[int]) -> set[int]:
    """The piece and all that it is merged from, less what is `known` already."""
    found: set[int] = set()
    waiting = [piece]
    while waiting:
        one = waiting.pop()
        if one not in known and one not in found:
            found.add(one)
            waiting.extend(needs.get(one, ()))
    return found


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merged(merge: Any, model: Mapping[str, Any]) -> str:
    left, right = _pair(merge)
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _renumber(processor: Any, new_id: Mapping[int, int]) -> None:
    """Puts new ids into a post-processor of tokenizer.json."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, new_id)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id[i] for i in token["ids"]]
    for end in ("sep", "cls"):
        if end in processor:
            processor[end] = [processor[end][0], new_id[processor[end][1]]]


def _wrapped(backend: Tokenizer, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The backend behind the interface of transformers, with the settings of another tokenizer."""
    settings = (
        "model_max_length",
        "model_input_names",
        "padding_side",
        "truncation_side",
        "clean_up_tokenization_spaces",
    )
    options: dict[str, Any] = {name: getattr(like, name) for name in settings if hasattr(like, name)}
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        options[f"{name}_token"] = getattr(like, f"{name}_token", None)
    named = {str(token) for token in options.values() if isinstance(token, str)}
    extra = [token for token in like.all_special_tokens if token not in named]
    if extra:
        options["extra_special_tokens"] = extra
    if hasattr(like, "add_prefix_space"):
        options["add_prefix_space"] = like.add_prefix_space
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
