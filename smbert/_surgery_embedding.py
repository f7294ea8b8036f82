"""Surgery on the columns of the word embedding: the table becomes a product of two."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .modeling import SLIM_CLASSES, STOCK_CLASSES, encoder_layers, family_of, passed_by
from .surgery import PruningPlan, _target_config

__all__ = ["factorise_embedding"]


def factorise_embedding(model: PreTrainedModel, table: torch.Tensor, projection: torch.Tensor) -> PreTrainedModel:
    """A new model whose word embedding is `table[ids] @ projection.T`; the rest, and the input, stay as they are.

    Args:
        model: of any known family, without a head that is tied to its word embedding.
        table: (vocabulary, rank).
        projection: (width of the embedding, rank).

    Raises:
        ValueError: shapes that do not fit, a head that predicts words, or an embedding that is factorised already.
    """
    old: Any = model.get_input_embeddings()
    stock = STOCK_CLASSES.get(type(model), type(model))
    if model.get_output_embeddings() is not None or stock not in SLIM_CLASSES:
        raise ValueError(
            f"a word embedding can be factorised where no head shares it, got {type(model).__name__}. To resolve, load the checkpoint with "
            "a classification head."
        )
    if getattr(model.config, "embedding_rank", None):
        raise ValueError(
            "the word embedding is factorised already. To resolve, leave one of the two factorisations out."
        )
    size, width = old.weight.shape
    rank = table.shape[-1]
    if table.shape != (size, rank) or projection.shape != (width, rank) or not 1 <= rank < width:
        raise ValueError(
            f"`table` and `projection` must be ({size}, rank) and ({width}, rank) with a rank from 1 to {width - 1}, got "
            f"{tuple(table.shape)} and {tuple(projection.shape)}. To resolve, choose a smaller rank."
        )
    plan = PruningPlan.full(model)
    target: Any = SLIM_CLASSES[stock]
    config = _target_config(model, target, range(len(encoder_layers(model))), plan, passed_by(model.config))
    if family_of(model).shared_head_bias and config.kept_heads is None:
        config.kept_heads = [list(heads) for heads in plan.heads]
    config.embedding_rank = rank
    config.validate()
    with torch.device("meta"):
        result = target(config)
    if getattr(model, "pooler", result) is None:  # AutoModel(..., add_pooling_layer=False) is not in the config
        result.pooler = None
    place = next(name for name, module in model.named_modules() if module is old)
    new = {f"{place}.weight": table, f"{place}.projection.weight": projection}
    kept = model.state_dict()
    state = {
        name: (new[name] if name in new else kept[name]).detach().to(old.weight).clone() for name in result.state_dict()
    }
    result.load_state_dict(state, assign=True)
    for name, buffer in list(result.named_buffers()):
        if buffer.is_meta:  # not in the state dict
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, model.get_buffer(name).detach().clone())
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(old.weight.requires_grad if name in new else model.get_parameter(name).requires_grad)
    return result.train(model.training)
