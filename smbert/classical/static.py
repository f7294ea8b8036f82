"""A student without layers: the teacher's token embeddings, pooled with learned weights, then a linear classifier.

The model family of fastText (Joulin et al., "Bag of Tricks for Efficient Text Classification", EACL 2017), begun from the
teacher's embedding table and with its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .kinds import fit_temperature
from .rows import Taught
from .students import Student

KIND, WEIGHTS = "static_embedding", "model.safetensors"
_BATCH, _FEWEST_HELD_BACK, _MOST_HELD_BACK = 64, 20, 2_000

Tokens = tuple[Tensor, Tensor]  # ids (tokens,) of all texts one after the other, lengths (texts,)


class StaticModel(nn.Module):
    """Weighted mean of token embeddings and a linear head; for pairs on (u, v, |u - v|, u * v).

    Args:
        vocabulary: tokens.
        width: of an embedding.
        classes: of the head.
        pairs: two texts per row.
    """

    def __init__(self, vocabulary: int, width: int, classes: int, pairs: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(vocabulary, width))
        self.token_weight = nn.Parameter(torch.zeros(vocabulary, 1))
        self.head = nn.Linear(width * (4 if pairs else 1), classes)

    def pool(self, tokens: Tokens) -> Tensor:
        """(texts, width); a text without tokens is zeros."""
        ids, lengths = tokens
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        # Sparse gradients: a batch touches some hundred of many thousand rows.
        weights = functional.embedding(ids, self.token_weight, sparse=True).squeeze(1).exp()
        total = torch.zeros(len(lengths)).index_add(0, text, weights)
        offsets = lengths.cumsum(0) - lengths
        return functional.embedding_bag(
            ids, self.embedding, offsets, mode="sum", per_sample_weights=weights / total[text], sparse=True
        )

    def forward(self, sides: Sequence[Tokens]) -> Tensor:
        """The tokens of one text per row, or of two for pairs -> logits (rows, classes)."""
        pooled = [self.pool(side) for side in sides]
        if len(pooled) == 2:
            first, second = pooled
            pooled = [first, second, (first - second).abs(), first * second]
        return self.head(torch.cat(pooled, dim=1))


class StaticStudent(Student):
    """`StaticModel` with the tokenizer of its teacher."""

    def __init__(self, model: StaticModel, tokenizer: PreTrainedTokenizerBase, **about: Any) -> None:
        super().__init__(kind=KIND, **about)
        self.model = model.eval()
        self.tokenizer = tokenizer

    def scores(self, texts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        ids = encode(self.tokenizer, texts, len(self.text_columns))
        nothing = self.tokenizer.unk_token_id
        unknown = [all(token == nothing for side in row for token in side) for row in zip(*ids)]
        out = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                out.append(self.model([as_tokens(side[start : start + _BATCH]) for side in ids]).double().numpy())
        return np.concatenate(out), np.array(unknown)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _write(self, folder: Path) -> None:
        save_file(self.model.state_dict(), folder / WEIGHTS)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def read(cls, folder: Path, about: dict[str, Any]) -> StaticStudent:
        """The student whose student.json is `about`.

        Raises:
            ValueError: the weights are damaged or do not fit.
        """
        names = ("label_names", "text_columns", "temperature", "training")
        try:
            weights = load_file(folder / WEIGHTS)
            classes, pairs = len(about["label_names"]), len(about["text_columns"]) == 2
            vocabulary, width = weights["embedding"].shape
            model = StaticModel(vocabulary, width, classes, pairs)
            model.load_state_dict(weights)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None asks at a terminal
        except Exception as error:  # safetensors, torch and transformers raise their own
            raise ValueError(
                f"{folder} must hold a static student's weights and tokenizer, but loading gave {error!r}. "
                "To resolve, make the student again."
            ) from error
        return cls(model, tokenizer, **{name: about[name] for name in names})


@dataclass(frozen=True)
class StaticTraining:
    """How a static student is trained.

    Attributes:
        epochs: most passes over the rows; the best one, by log loss on rows held back, is kept.
        learning_rate: of Adam.
        seed: of the order of rows, the rows held back and the head.
    """

    epochs: int = 8
    learning_rate: float = 2e-3
    seed: int = 42


def fit_static(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    taught: Taught,
    training: StaticTraining,
) -> tuple[StaticModel, float, dict[str, Any]]:
    """Trains on soft cross-entropy.

    Returns:
        The model, its temperature, and what happened: the epoch that was kept and the accuracy on the labelled rows held back.
    """
    pairs = bool(taught.texts) and not isinstance(taught.texts[0], str)
    classes = taught.targets.shape[1]
    table: Tensor = teacher.get_input_embeddings().weight.detach().float().cpu()  # type: ignore[union-attr, operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = StaticModel(table.shape[0], table.shape[1], classes, pairs)
    with torch.no_grad():
        model.embedding.copy_(table / table.std())  # of unit size, whatever the teacher's, so that one rate suits all
    ids = encode(tokenizer, taught.texts, 2 if pairs else 1)
    train, held = _hold_back(taught, training.seed)
    judged = taught.gold[held] >= 0
    judged = judged if judged.any() else ~judged  # by the teacher's own answers, where there are no others
    wanted = torch.from_numpy(taught.targets).float()
    truth = np.where((taught.gold >= 0)[:, None], np.eye(classes)[np.maximum(taught.gold, 0)], taught.targets)[held]
    sparse = torch.optim.SparseAdam([model.embedding, model.token_weight], lr=training.learning_rate)
    dense = torch.optim.Adam(model.head.parameters(), lr=training.learning_rate)
    best: tuple[float, dict[str, Tensor], float, dict[str, Any]] | None = None
    for epoch in range(training.epochs):
        order = np.random.default_rng([training.seed, epoch]).permutation(train)
        model.train()
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            logits = model([as_tokens([side[i] for i in rows]) for side in ids])
            sparse.zero_grad()
            dense.zero_grad()
            functional.cross_entropy(logits, wanted[torch.from_numpy(rows)]).backward()
            sparse.step()
            dense.step()
        model.eval()
        with torch.inference_mode():
            parts = [held[start : start + _BATCH] for start in range(0, len(held), _BATCH)]
            values = np.concatenate([model([as_tokens([s[i] for i in part]) for s in ids]).numpy() for part in parts])
        temperature = fit_temperature(values, truth)
        shifted = values / temperature
        logs = shifted - np.logaddexp.reduce(shifted, axis=1, keepdims=True)
        loss = float(-(truth * logs).sum(axis=1).mean())
        if best is None or loss < best[0]:
            accuracy = float((values.argmax(1) == truth.argmax(1))[judged].mean())
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            best = (loss, state, temperature, {"epochs": epoch + 1, "held_back": len(held), "accuracy": accuracy})
    assert best is not None  # there is at least one epoch
    model.load_state_dict(best[1])
    return model, best[2], best[3]


def _hold_back(taught: Taught, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and a tenth to judge by: of the labelled rows, and of the others too where that would be too few.

    Of the labelled rows it is the same tenth with and without others, so that two students can be compared by them.
    """
    labelled, others = np.flatnonzero(taught.gold >= 0), np.flatnonzero(taught.gold < 0)
    # The temperature explains away a handful of rows in any epoch, so that they could not tell a good one.
    groups = [labelled] if len(labelled) >= 10 * _FEWEST_HELD_BACK else [labelled, others]
    rng = np.random.default_rng(seed)
    held = np.concatenate([rng.permutation(g)[: min(max(len(g) // 10, 1), _MOST_HELD_BACK)] for g in groups])
    return np.setdiff1d(np.arange(len(taught.gold)), held), held


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Any], sides: int) -> list[list[list[int]]]:
    """Texts or pairs -> for each side the token ids of each text, without special tokens and whole."""
    split = [list(texts)] if sides == 1 else [[text[side] for text in texts] for side in range(2)]
    wanted: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [tokenizer(side, **wanted)["input_ids"] if side else [] for side in split]


def as_tokens(rows: Sequence[Sequence[int]]) -> Tokens:
    """Lists of ids -> one vector of ids and the lengths."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return torch.tensor([token for row in rows for token in row], dtype=torch.long), lengths
