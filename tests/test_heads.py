"""A head is kept where it answers the task's question, and never where it answers another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import batch, tiny
from transformers import AutoModel

from smbert.heads import check_labels, in_order_of, is_finetuned, label_names, with_head
from smbert.modeling import FAMILIES, encoder_layers
from smbert.tasks import Task, prepare

BINARY = Task("t", ("text",), label_names=("down", "up"))
THREE = Task("t", ("text",), label_names=("down", "flat", "up"))
SCORE = Task("t", ("text",), kind="regression")


def named(*names: str):
    model = tiny("bert", layers=1, num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    return model


def test_is_finetuned_of_folders_and_models(tmp_path: Path) -> None:
    head, bare = tiny("bert", layers=1), tiny("bert", "encoder", layers=1)
    head.save_pretrained(tmp_path / "head")
    bare.save_pretrained(tmp_path / "bare")
    assert is_finetuned(head) and is_finetuned(tmp_path / "head") and is_finetuned(str(tmp_path / "head"))
    assert not is_finetuned(bare) and not is_finetuned(tmp_path / "bare")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    assert not is_finetuned(tmp_path / "head")


def test_label_names() -> None:
    assert label_names(named("LABEL_0", "LABEL_1")) is None
    assert label_names(named("no", "yes")) == ["no", "yes"]


@pytest.mark.parametrize("names", [("down", "up"), ("DOWN", "Up"), ("LABEL_0", "LABEL_1")])
def test_labels_that_agree(names: tuple[str, ...]) -> None:
    check_labels(named(*names), BINARY)


def test_the_model_says_how_classes_are_numbered() -> None:
    data = prepare(BINARY, {"train": Dataset.from_dict({"text": ["a", "b", "c"], "label": ["up", "down", "down"]})}, ())
    task, ordered = in_order_of(named("UP", "DOWN"), BINARY, data)
    assert task.label_names == ("up", "down") and ordered["train"]["label"][:] == [0, 1, 1]
    for other in (named("down", "up"), named("LABEL_0", "LABEL_1"), named("good", "bad"), named("up", "down", "flat")):
        assert in_order_of(other, BINARY, data) == (BINARY, data)
    # F1 is that of class 1, whatever its name.
    f1 = replace(BINARY, metrics=("f1",), headline="")
    assert in_order_of(named("up", "down"), f1, data) == (f1, data)


def test_a_head_that_fits_keeps_its_names() -> None:
    assert with_head(named("DOWN", "UP"), BINARY).config.id2label == {0: "DOWN", 1: "UP"}
    assert with_head(named("LABEL_0", "LABEL_1"), BINARY).config.id2label == {0: "down", 1: "up"}


def test_classes_that_are_only_numbers_agree_with_any_names() -> None:
    check_labels(named("no", "yes"), Task("t", ("text",), label_names=("0", "1")))


@pytest.mark.parametrize("names", [("up", "down"), ("negative", "positive")])
def test_labels_in_another_order_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="in this order") as error:
        check_labels(named(*names), BINARY)
    assert names[0] in str(error.value) and "To resolve" in str(error.value) and "--new-head" in str(error.value)


@pytest.mark.parametrize("task", [THREE, SCORE])
def test_another_number_of_labels_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=rf"trained on 2 labels.* have {task.num_labels}.*To resolve"):
        check_labels(named("down", "up"), task)


def test_a_head_that_fits_is_kept_and_named() -> None:
    model = tiny("bert", layers=1)
    before = model.classifier.weight.clone()
    after = with_head(model, BINARY)
    assert after is model and torch.equal(after.classifier.weight, before)
    assert after.config.id2label == {0: "down", 1: "up"} and after.config.label2id == {"down": 0, "up": 1}
    assert after.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("head", ["sequence-classification", "encoder"])
def test_a_fresh_head_sits_on_the_same_encoder(family: str, head: str) -> None:
    model = tiny(family, head, layers=2)
    inputs = batch(model)
    after = with_head(model, THREE)
    assert after is not model and after.config.num_labels == 3 and after.config.id2label[2] == "up"
    assert not after.training and after.dtype == model.dtype
    with torch.inference_mode():
        assert after(**inputs).logits.shape == (3, 3)
        one = getattr(model, model.base_model_prefix, model)(**inputs)[0]
        two = getattr(after, after.base_model_prefix)(**inputs)[0]
    assert torch.equal(one, two)


def test_a_fresh_head_follows_the_seed() -> None:
    model = tiny("bert", "encoder", layers=1)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(with_head(model, BINARY).classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_fresh_head_on_request_leaves_the_model_alone() -> None:
    model = named("down", "up")
    before = model.classifier.weight.clone()
    after = with_head(model, BINARY, fresh=True)
    assert after is not model and torch.equal(model.classifier.weight, before)
    assert not torch.equal(after.classifier.weight, before)
    assert model.config.problem_type is None
    for one, two in zip(encoder_layers(model).parameters(), encoder_layers(after).parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_slim_model_gets_a_fresh_head() -> None:
    from smbert.surgery import PruningPlan, keep_units, structure_of

    model = tiny("bert", layers=2)
    slim = keep_units(model, PruningPlan(heads=((0, 1), (2,)), ffn=((0, 1, 2), (5,))))
    after = with_head(slim, SCORE)
    assert structure_of(after).layer_widths == structure_of(slim).layer_widths
    assert after.config.problem_type == "regression" and after.num_labels == 1
    assert isinstance(after, type(slim)) and AutoModel.from_config(after.config) is not None
