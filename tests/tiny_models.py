"""Tiny random models of every family, and batches with real padding, for all tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from smbert.modeling import FAMILIES, HEADS

# Products of 32 x 32 gain nothing from threads, and lose much where other processes use the cores.
torch.set_num_threads(1)

# What a family's config needs beyond the common sizes. Every second layer of ModernBERT is global, the others look at a
# window of 4 tokens, so that both kinds matter on short inputs.
EXTRA: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "modernbert": {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "local_attention": 4,
    },
}


def tiny(
    family: str,
    head: str = "sequence-classification",
    layers: int = 4,
    num_labels: int = 2,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A random model in eval mode: hidden 32, 4 heads of 8, 64 FFN neurons, 100 tokens.

    Biases and weights are larger than a fresh model's, so that every head and neuron leaves its mark on the logits.
    """
    entry = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        entry.intermediate_size: 64,
        "max_position_embeddings": 64,
        "num_labels": num_labels,
        **EXTRA.get(family, {}),
    }
    if family == "modernbert":
        sizes["layer_types"] = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
    sizes.update(config)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        stock_config = getattr(transformers, entry.classes + "Config")(**sizes)
        model = getattr(transformers, entry.classes + HEADS[head][1])(stock_config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def batch(model: PreTrainedModel, n: int = 3, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Input ids and attention mask (n, length): the first row is full, each further row ends in more padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, model.config.vocab_size, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, n):
        mask[row, max(2, length - 2 * row) :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}
