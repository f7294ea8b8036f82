"""Classification heads: does a checkpoint's head fit a task, and if not, a fresh one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from .tasks import Task, prepare

HEAD = "ForSequenceClassification"


def is_finetuned(model: str | Path | PreTrainedModel) -> bool:
    """True if a checkpoint (or loaded model) says that it carries a trained classification head."""
    if isinstance(model, PreTrainedModel):
        return type(model).__name__.endswith(HEAD)
    file = Path(model) / "config.json"
    if file.is_file():
        named: Any = json.loads(file.read_text(encoding="utf-8")).get("architectures")
    else:
        named = AutoConfig.from_pretrained(str(model)).architectures
    return any(name.endswith(HEAD) for name in named or ())


def label_names(model: PreTrainedModel) -> list[str] | None:
    """The names of the model's labels, None where it only has numbers."""
    config: Any = model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def in_order_of(model: PreTrainedModel, task: Task, data: DatasetDict) -> tuple[Task, DatasetDict]:
    """The task and its prepared data with the classes numbered as a fine-tuned model numbers them.

    As they were, where the model has no names or others, and where the metric depends on which class is number 1.
    """
    own, spelling = label_names(model), {name.casefold(): name for name in task.label_names}
    wanted = tuple(spelling.get(name.casefold(), "") for name in own or ())
    if sorted(wanted) != sorted(task.label_names) or task.kind != "single_label" or "f1" in task.metrics:
        return task, data
    ordered = replace(task, label_names=wanted)
    return ordered, data if ordered == task else prepare(ordered, data, tuple(data))


def check_labels(model: PreTrainedModel, task: Task) -> None:
    """ValueError unless a fine-tuned model's labels are the task's, in number and in order."""
    if model.config.num_labels != task.num_labels:
        raise ValueError(
            f"`num_labels` must agree: the model was trained on {model.config.num_labels} labels, the data of {task.name!r} have "
            f"{task.num_labels}. To resolve, correct the data, or pass new_head=True (flag --new-head) for a fresh classifier."
        )
    if own := other_names(model, task):
        raise ValueError(
            f"label names must agree, in this order: the model has {own}, the data have {list(task.label_names)}. To resolve, rename "
            "the labels of one of them, or compress with new_head=True (flag --new-head) for a fresh classifier."
        )


def other_names(model: PreTrainedModel, task: Task) -> list[str]:
    """The model's label names where both have names and these are not the task's in this order, else none."""
    own, names = label_names(model), [name.casefold() for name in task.label_names]
    if own is None or not names or all(name.isdigit() for name in names):
        return []
    return [] if [name.casefold() for name in own] == names else list(own)


def with_head(model: PreTrainedModel, task: Task, fresh: bool = False) -> PreTrainedModel:
    """The model itself if its head fits the task, else (or if `fresh`) a copy of its encoder under a fresh head.

    The fresh head is initialised by the family's own rule from torch's global seed. Problem type and label names go to the config; a
    head that fits keeps its own names.
    """
    try:
        check_labels(model, task)
        fits = type(model).__name__.endswith(HEAD) and not fresh
    except ValueError:
        fits = False
    if not fits:
        config = copy.deepcopy(model.config)
        config.num_labels = task.num_labels
        # from_config overwrites the back end that a config keeps in private: ModernBERT would drop its sliding mask.
        new = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=model.config._attn_implementation, dtype=model.dtype
        )
        body = getattr(model, model.base_model_prefix, model)
        getattr(new, new.base_model_prefix).load_state_dict(body.state_dict(), strict=False)
        model = new.to(model.device).train(model.training)
    model.config.problem_type = task.problem_type  # type: ignore[assignment]
    if task.label_names and not (fits and label_names(model)):
        model.config.id2label = dict(enumerate(task.label_names))
        model.config.label2id = {name: i for i, name in enumerate(task.label_names)}
    return model
