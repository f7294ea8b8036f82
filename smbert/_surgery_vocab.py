"""Surgery on the vocabulary: the rows of the word embedding, and of the head that predicts words."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["keep_vocabulary", "token_ids_in_config"]


def keep_vocabulary(model: PreTrainedModel, ids: Sequence[int]) -> PreTrainedModel:
    """A new model that knows the given token ids only; id `ids[i]` becomes id `i`, and the input stays as it is.

    For inputs of kept tokens the result computes what the model computes. Tied tensors stay tied.

    Args:
        model: of any known family, with or without a head.
        ids: ascending, distinct ids, all of the special tokens among them. Where positions are counted from the id of the
            padding (RoBERTa, MPNet), all ids up to it must stay, so that it does not move.

    Raises:
        ValueError: ids that are not ascending or not there, or without a special token of the config.
    """
    table: Any = model.get_input_embeddings()
    kept, size = [operator.index(i) for i in ids], table.weight.shape[0]
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(
            f"`ids` must be ascending, distinct numbers from 0 to {size - 1} for this vocabulary, got {len(kept)} numbers. "
            "To resolve, pass sorted(set(ids))."
        )
    new_id = {old: new for new, old in enumerate(kept)}
    special = token_ids_in_config(model)
    if missing := sorted(special - new_id.keys()):
        raise ValueError(
            f"`ids` must hold the special tokens that the config names, and {missing} are missing. To resolve, add them."
        )
    result = copy.deepcopy(model)
    config: Any = result.config
    rows = torch.tensor(kept, device=table.weight.device)
    head: Any = result.get_output_embeddings()
    # A parameter that several modules share is cut once, so that they go on sharing it.
    cut = {
        id(p): nn.Parameter(p.detach().index_select(0, rows), requires_grad=p.requires_grad)
        for p in (result.get_input_embeddings().weight, *(head.parameters() if head is not None else ()))
    }
    for module in result.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in cut:
                setattr(module, name, cut[id(parameter)])
    table = result.get_input_embeddings()
    table.num_embeddings = len(kept)
    if table.padding_idx is not None:
        table.padding_idx = new_id[table.padding_idx]
    if head is not None:
        head.out_features = len(kept)
    entries = _token_id_entries(config)
    config.vocab_size = len(kept)
    for name, value in entries.items():
        setattr(config, name, [new_id[i] for i in value] if isinstance(value, list) else new_id[value])
    return result


def token_ids_in_config(model: PreTrainedModel) -> set[int]:
    """The ids that a vocabulary cannot lose: those the config names, and those that positions are counted from."""
    table: Any = model.get_input_embeddings()
    size = table.weight.shape[0]
    entries = _token_id_entries(model.config).values()
    found = {i for value in entries for i in (value if isinstance(value, list) else [value])}
    embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    first = positions.padding_idx if isinstance(positions, nn.Embedding) else None
    if table.padding_idx is not None:
        found.add(int(table.padding_idx))
    # RoBERTa's and MPNet's first position is the one after the padding's id.
    return {i for i in found if 0 <= i < size} | set(range(0 if first is None else first + 1))


def _token_id_entries(config: Any) -> dict[str, Any]:
    """`pad_token_id` and its like; a default of transformers that lies outside the vocabulary is no token of the model."""
    size = config.vocab_size

    def inside(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size

    return {
        name: value
        for name, value in config.to_dict().items()
        if name.endswith("_token_id")
        and (inside(value) or (isinstance(value, list) and value and all(map(inside, value))))
    }
