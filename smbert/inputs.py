"""What `compress()` is given, checked and put into the form that a run needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from .checkpoints import lacks_tokenizer
from .context import TaskData
from .processes import process_state
from .recipe import Recipe
from .stages import Stage
from .tasks import Task, custom_task_from, load_task, prepare, tokenize, turned_pairs
from .trainer import training_arguments

# What the stages set themselves, and where the user sets it.
STAGE_OWNED = {
    "output_dir": "output_dir of compress()",
    "seed": "seed of compress()",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "warmup_steps": "warmup_ratio",
    "weight_decay": "weight_decay",
}


# What a Trainer of ours cannot do, and the value that asks for nothing.
UNUSABLE: dict[str, Any] = {
    "do_eval": False,
    "eval_strategy": "no",
    "label_smoothing_factor": 0.0,
    "load_best_model_at_end": False,
    "neftune_noise_alpha": None,
}


def as_recipe(recipe: str | Path | Recipe | Sequence[Stage]) -> Recipe:
    """A recipe from its name, its file, its stages or itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return Recipe.from_yaml(recipe) if str(recipe).endswith((".yaml", ".yml")) else Recipe.named(str(recipe))
    return Recipe(stages=tuple(recipe))


def as_options(args: Mapping[str, Any] | TrainingArguments | None) -> dict[str, Any]:
    """The `TrainingArguments` fields that the user set; of an object, those that differ from the defaults of transformers.

    Raises:
        ValueError: a field that does not exist, one that stages set themselves, or one that they have no use for.
    """
    if isinstance(args, TrainingArguments):
        default, given = TrainingArguments(output_dir=args.output_dir).to_dict(), args.to_dict()
        args = {k: v for k, v in given.items() if k != "output_dir" and v != default[k]}
    options = dict(args or {})
    if unknown := sorted(set(options) - set(TrainingArguments.__dataclass_fields__)):
        raise ValueError(
            f"`args` must hold fields of TrainingArguments, got {', '.join(unknown)}. To resolve, correct the name."
        )
    if owned := sorted(set(options) & set(STAGE_OWNED)):
        places = ", ".join(f"{name} as {STAGE_OWNED[name]}" for name in owned)
        raise ValueError(f"`args` must not hold {', '.join(owned)}, which the stages set. To resolve, set {places}.")
    if useless := sorted(name for name in UNUSABLE if options.get(name, UNUSABLE[name]) != UNUSABLE[name]):
        raise ValueError(
            f"`args` must not hold {', '.join(useless)}: stages evaluate by themselves (`keep_best`) and have losses of their own. To "
            "resolve, leave it out."
        )
    process_state()  # decides on the back end before TrainingArguments can
    try:
        training_arguments(Path("unused"), options)
        json.dumps(options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`args` holds a value that cannot be used: {error}. To resolve, correct it.") from error
    return options


def as_data(
    task: str | Task | None,
    data_dir: str | Path | None,
    train: Dataset | None,
    evaluation: Dataset | None,
    text_columns: str | Sequence[str] | None,
    label_column: str | None,
) -> tuple[Task, DatasetDict]:
    """The target task and its checked splits.

    Raises:
        ValueError: neither a task nor data sets, or one of the two data sets alone, or bad rows.
    """
    if train is None and evaluation is None:
        if task is None:
            raise ValueError(
                "`task`, or `train_dataset` and `eval_dataset`, must be given. To resolve, pass one of the two."
            )
        return load_task(task, data_dir)
    if train is None or evaluation is None:
        missing = "train_dataset" if train is None else "eval_dataset"
        raise ValueError(f"`{missing}` must be given beside the other one. To resolve, pass both.")
    splits = {"train": train, "validation": evaluation}
    if not isinstance(task, Task):
        task = custom_task_from(splits, text_columns, label_column, name=task or "custom")
    return task, prepare(task, splits)


def as_tokenizer(
    model: str | Path | PreTrainedModel, tokenizer: str | Path | PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the checkpoint's own.

    Raises:
        ValueError: there is none.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    place = tokenizer if tokenizer is not None else model.name_or_path if isinstance(model, PreTrainedModel) else model
    if lacks_tokenizer(str(place)):
        raise ValueError(
            f"{place} holds no tokenizer. To resolve, pass `tokenizer` (flag --tokenizer), or save one there."
        )
    try:
        return AutoTokenizer.from_pretrained(str(place), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no tokenizer could be loaded from {str(place) or 'the model'!r}: {reason} To resolve, pass `tokenizer` (flag --tokenizer)."
        ) from error


def as_intermediate(
    intermediate: Mapping[str, Mapping[str, Dataset]] | Sequence[str],
    data_dir: str | Path | None,
    tokenize_all: Callable[[Task, Mapping[str, Dataset]], TaskData],
) -> dict[str, TaskData]:
    """Intermediate tasks by name, tokenised.

    Raises:
        ValueError: data that are not there or bad rows; the message says of which task.
    """
    out = {}
    for name in [intermediate] if isinstance(intermediate, str) else intermediate:
        try:
            if isinstance(intermediate, Mapping):
                splits = intermediate[name]
                task = custom_task_from(splits, name=name)
                out[name] = tokenize_all(task, prepare(task, splits))
            else:
                # The data folder of a single task cannot hold another one; its parent holds both.
                out[name] = tokenize_all(*load_task(name, data_dir))
        except ValueError as error:
            raise ValueError(f"intermediate task {name!r}: {error}") from error
    return out


def tokenised(task: Task, data: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """The training and validation rows as token ids."""
    rows = {split: tokenize(data[split], task, tokenizer, max_length) for split in ("train", "validation")}
    return TaskData(task, rows["train"], rows["validation"], data, max_length)  # type: ignore[arg-type]


def tokenised_pool(
    pool: Dataset | None, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset | None, Dataset | None]:
    """Unlabelled texts as token ids, and as checked texts: the `pool` and `pool_texts` of a Context.

    Raises:
        ValueError: columns that are not there, or rows that are no texts.
    """
    if pool is None:
        return None, None
    checked = prepare(task, {"unlabelled": pool}, required=("unlabelled",))["unlabelled"]
    return tokenize(checked, task, tokenizer, max_length), checked  # type: ignore[return-value]


def with_turned_pairs(pool: Dataset | None, train: Dataset, task: Task) -> Dataset:
    """The training pairs turned round, and after them the pool's texts.

    Raises:
        ValueError: a task of single texts, or a pool of other columns or with rows that are no texts.
    """
    turned = turned_pairs(train, task)
    if pool is None:
        return turned
    # Before `compress` checks it, since other columns would end in an error of datasets.
    checked = prepare(task, {"unlabelled": pool}, required=("unlabelled",))["unlabelled"]
    return concatenate_datasets([turned, checked.cast(turned.features)])
