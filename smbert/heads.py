"""Putting the right classification head on an encoder."""

from __future__ import annotations

import copy

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .tasks import Task


def fits(model: PreTrainedModel, task: Task) -> bool:
    """True if the model carries a head for this task: as many labels, and the same names where both name them."""
    if not type(model).__name__.endswith("ForSequenceClassification") or model.config.num_labels != task.num_labels:
        return False
    own = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(own))
    return unnamed or not task.label_names or own == list(task.label_names)


def with_head(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The model itself if its head fits the task, else a copy of its encoder under a fresh head.

    The fresh head is initialised by the family's own rule from torch's global seed. Label names and problem type go to the config.
    """
    if not fits(model, task):
        config = copy.deepcopy(model.config)
        config.num_labels = task.num_labels
        # A copied config keeps the back end in a private field that from_config overwrites: ModernBERT would drop its sliding mask.
        new = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=model.config._attn_implementation, dtype=model.dtype
        )
        prefix = new.base_model_prefix
        body = getattr(model, prefix, model)
        getattr(new, prefix).load_state_dict(body.state_dict(), strict=False)
        model = new.to(next(body.parameters()).device).train(model.training)
    model.config.problem_type = task.problem_type
    if task.label_names:
        model.config.id2label = dict(enumerate(task.label_names))
        model.config.label2id = {name: i for i, name in enumerate(task.label_names)}
    return model
