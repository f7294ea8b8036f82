"""Saving and loading models: folders that are whole or untouched, and faults that are named before anything runs."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .modeling import HEADS, family_of

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def save_model(model: PreTrainedModel, folder: str | Path, tokenizer: Any = None) -> None:
    """Saves a model (safetensors and JSON only) so that `folder` is either as it was or complete.

    It is written to the sibling `.NAME.partial`, which then takes the place of `folder`. Files of the old folder that
    are neither a checkpoint's weights or code nor written anew (a README, a tokenizer) are carried over.

    Args:
        model: of a stock or a slim class.
        folder: made if need be, parents included.
        tokenizer: saved beside the model when given.

    Raises:
        ValueError: `folder` is a file.
        OSError: the disk is full or not writable; the previous contents of `folder` are intact.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, got the file {folder}. To resolve, choose another name.")
    partial, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if previous.exists() and not folder.exists():  # killed between the two renames of put_in_place
            previous.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if folder.exists():
            _carry_over(folder, partial)
        put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not save the model to {folder}: {error}. Its previous contents are intact. "
            "To resolve, free disk space or choose a writable folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, in place of an earlier one, which comes back if that fails.

    Raises:
        OSError: `folder` is as it was.
    """
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    try:
        partial.rename(folder)
    except OSError:
        if previous.exists():
            previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    config = old / "config.json"
    shipped = config.is_file() and '"modeling.' in config.read_text(encoding="utf-8")  # its auto_map names the file
    for path in old.iterdir():
        weights = re.fullmatch(r"(model.*\.safetensors|pytorch_model.*\.bin)(\.index\.json)?", path.name)
        stale = weights or (shipped and path.name == "modeling.py")
        if not stale and not (new / path.name).exists():
            if path.is_dir():
                shutil.copytree(path, new / path.name)
            else:
                shutil.copy2(path, new / path.name)


def load_model(
    path_or_id: str | Path,
    head: str = "sequence-classification",
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = torch.float32,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a checkpoint of a known family with the given head, in eval mode.

    Args:
        path_or_id: folder, or id on the Hugging Face Hub.
        head: key of `HEADS`: encoder, sequence-classification, token-classification, question-answering, ...
        num_labels: labels of a new head; None keeps the checkpoint's number.
        trust_remote_code: run the modelling code of a checkpoint whose classes are not installed.
        dtype: of the weights; None or "auto" keeps the checkpoint's.
        **kwargs: fields of the config (`id2label`, `problem_type`) are set there, everything else goes to
            `from_pretrained`. `ignore_mismatched_sizes=True` replaces a classifier of another number of labels by a
            fresh one.

    Raises:
        ValueError: the folder, its config or its weights are missing or damaged, the family or the head is unknown, or
            `num_labels` is not the number of labels of the checkpoint's classifier.
    """
    if head not in HEADS:
        raise ValueError(f"`head` must be one of {', '.join(HEADS)}, got {head!r}.")
    auto, ending = HEADS[head]
    place = _checked_place(str(path_or_id), kwargs.get("subfolder", ""))
    id2label = kwargs.pop("id2label", None)
    hub = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
    hub_kwargs = {key: kwargs[key] for key in hub if key in kwargs}
    try:
        values, _ = PreTrainedConfig.get_config_dict(place, **hub_kwargs)
        family_of(str(values.get("model_type")))  # refuses a stranger before any of its code is asked for
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **hub_kwargs)
        trained = any(name.endswith(ending) for name in config.architectures or ()) and "Classification" in ending
        fresh = kwargs.pop("ignore_mismatched_sizes", False) or not trained
        _set_labels(config, num_labels, id2label, fresh, place)
        for key in [key for key in kwargs if hasattr(config, key)]:
            setattr(config, key, kwargs.pop(key))
        model, info = getattr(transformers, auto).from_pretrained(
            place,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told apart below: a fresh head is fine, a fresh layer is not
            **kwargs,
        )
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"`path_or_id` must be a readable checkpoint, but {place} could not be loaded: {error}. "
            "To resolve, check the name and the connection, or save or download the checkpoint anew."
        ) from error
    _check_loaded(info, config, place, fresh)
    return model.eval()


def lacks_tokenizer(place: str | Path) -> bool:
    """Whether a folder holds no tokenizer, in whose place transformers would make an empty one; False for a Hub id."""
    return Path(place).is_dir() and not any(Path(place, name).is_file() for name in _TOKENIZER_FILES)


def in_fp32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or an fp32 copy of one with other weights: transformers loads a half-precision checkpoint as it is stored."""
    if {p.dtype for p in model.parameters() if p.is_floating_point()} <= {torch.float32}:
        return model
    return copy.deepcopy(model).float()


def _check_loaded(info: dict[str, Any], config: Any, place: str, fresh: bool) -> None:
    """Only a head may lack weights: a body of other weights than its config describes computes something else."""
    layers = re.escape(family_of(config).layers) + r"\.\d+"
    in_layers, in_body = re.compile(rf"(^|\.){layers}\."), re.compile(rf"(^|\.)({layers}|embeddings)\.")
    sizes = {name: f"{name}: {list(there)}, not {list(due)}" for name, there, due in info["mismatched_keys"]}
    for found, names in (
        ("missing", [name for name in info["missing_keys"] if in_body.search(name) and name not in sizes]),
        ("not used", [name for name in info["unexpected_keys"] if in_layers.search(name)]),
        ("of another size", [text for name, text in sizes.items() if in_body.search(name) or not fresh]),
    ):
        if names:
            raise ValueError(
                f"{place} must hold the weights of the {config.num_hidden_layers} layers and sizes that its config "
                f"describes, but {len(names)} are {found}, such as {min(names)}. "
                "To resolve, save or download the checkpoint anew."
            )


def _set_labels(config: Any, num_labels: int | None, id2label: dict | None, fresh: bool, place: str) -> None:
    """Sets the number and names of the labels; names of a trained classifier may change, their number may not."""
    if id2label is not None:
        if num_labels not in (None, len(id2label)):
            raise ValueError(f"`num_labels` must be {len(id2label)}, the length of `id2label`, got {num_labels}.")
        num_labels = len(id2label)
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"`num_labels` must be at least 1, got {num_labels}. To resolve, use 1 for regression.")
    if num_labels is not None and num_labels != config.num_labels:
        if not fresh:
            raise ValueError(
                f"`num_labels` must be {config.num_labels}, the labels that {place} was trained on "
                f"({', '.join(map(str, config.id2label.values()))}), got {num_labels}. To resolve, leave it out, "
                "correct the data, or pass ignore_mismatched_sizes=True for a fresh classifier."
            )
        config.problem_type = None  # of the old labels; left in place it would choose the wrong loss
        config.num_labels = num_labels
    if id2label is not None:
        config.id2label = {int(index): name for index, name in id2label.items()}
        config.label2id = {name: int(index) for index, name in id2label.items()}


def _checked_place(place: str, subfolder: str) -> str:
    """Refuses a broken folder by name before transformers sees it; a name that may be a Hub id passes."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", place):
            raise ValueError(
                f"`path_or_id` must be a folder or a Hub id, and no folder {place} is there. To resolve, check it."
            )
        return place
    inner = folder / subfolder
    try:
        values = json.loads((inner / "config.json").read_text(encoding="utf-8"))
        family_of(str(values["model_type"]))
    except FileNotFoundError:
        raise ValueError(f"{inner} must hold a config.json, and has none. To resolve, save the model there.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{inner / 'config.json'} must be JSON with a `model_type`, but reading it gave {error!r}. "
            "To resolve, save the model anew."
        ) from error
    _check_weights(inner)
    return str(folder)


def _check_weights(folder: Path) -> None:
    index, files = folder / SAFE_WEIGHTS_INDEX_NAME, [folder / SAFE_WEIGHTS_NAME]
    if not files[0].is_file() and index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} must list the weight files, but reading it gave {error!r}.") from error
    for file in files:
        if not file.is_file():
            pickled = " Pickled weights (.bin) are not read." if list(folder.glob("*.bin")) else ""
            raise ValueError(
                f"{folder} must hold the weights as {file.name}, and has no such file.{pickled} "
                "To resolve, save the model there with save_pretrained, which writes safetensors."
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} must be a complete safetensors file, but it is damaged: {error}. "
                "To resolve, copy, download or save it anew."
            ) from error
