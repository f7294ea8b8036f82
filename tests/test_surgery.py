"""Surgery is exact: what is cut computes what was masked, in every family; bad plans are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import batch, tiny

from smbert.modeling import FAMILIES, encoder_layers, layer_widths
from smbert.surgery import PruningPlan, keep_layers, keep_units, masked, structure_of

ALL_HEADS, ALL_FFN = tuple(range(4)), tuple(range(64))
PLANS = {  # of a model with 4 layers of 4 heads and 64 neurons
    "uneven": PruningPlan(
        ((0, 2), (1, 2, 3), (3,), ALL_HEADS), (tuple(range(0, 64, 3)), (5, 6, 7, 60, 61), tuple(range(10, 50)), ALL_FFN)
    ),
    "one unit": PruningPlan(((3,), (0,), (2,), (1,)), ((63,), (0,), (31,), (32,))),
    "zero heads": PruningPlan(((),) * 4, (ALL_FFN,) * 4),
    "zero heads in one layer": PruningPlan((ALL_HEADS, (), (1, 2), ALL_HEADS), (ALL_FFN,) * 4),
    "zero ffn": PruningPlan((ALL_HEADS,) * 4, ((),) * 4),
    "zero layer": PruningPlan((ALL_HEADS, (), ALL_HEADS, (0, 1)), (ALL_FFN, (), ALL_FFN, ALL_FFN[:8])),
    "nothing": PruningPlan(((),) * 4, ((),) * 4),
    "same heads in all layers": PruningPlan(((1, 3),) * 4, (ALL_FFN[:32],) * 4),
    "uniform ffn": PruningPlan((ALL_HEADS,) * 4, (tuple(range(7, 39)),) * 4),
    "full": PruningPlan((ALL_HEADS,) * 4, (ALL_FFN,) * 4),
}
HEADS = ("encoder", "token-classification", "question-answering", "masked-lm", "multiple-choice")


@torch.no_grad()
def outputs(model, inputs):
    if "ForMultipleChoice" in type(model).__name__:
        inputs = {name: torch.stack([tensor, tensor.flip(0)], dim=1) for name, tensor in inputs.items()}
    return torch.cat([tensor.flatten() for tensor in model(**inputs).to_tuple()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
def test_sliced_equals_masked(family, name):
    model, plan = tiny(family), PLANS[name]
    inputs = batch(model)
    before = outputs(model, inputs)
    with masked(model, plan):
        expected = outputs(model, inputs)
    sliced = keep_units(model, plan)
    assert distance(outputs(sliced, inputs), expected) < 2e-6
    if name != "full":
        assert distance(expected, before) > 1e-3, "the mask must bite"
    assert torch.equal(outputs(model, inputs), before), "hooks must be gone and the input untouched"
    assert list(structure_of(sliced).layer_widths) == plan.layer_widths == layer_widths(sliced.config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_sliced_equals_masked_under_other_heads(family, head):
    model, plan = tiny(family, head), PLANS["zero layer"]
    inputs = batch(model)
    with masked(model, plan):
        expected = outputs(model, inputs)
    sliced = keep_units(model, plan)
    assert distance(outputs(sliced, inputs), expected) < 2e-6
    assert type(sliced).__name__ == "Slim" + type(model).__name__
    if head == "masked-lm":
        assert sliced.get_output_embeddings().weight is sliced.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_and_neuron_matters(family):
    model = tiny(family, layers=2)
    inputs, full = batch(model), PruningPlan.full(model)
    before = outputs(model, inputs)
    for layer in range(2):
        for unit in range(4):
            kept = tuple(tuple(h for h in ALL_HEADS if (i, h) != (layer, unit)) for i in range(2))
            with masked(model, PruningPlan(kept, full.ffn)):
                assert distance(outputs(model, inputs), before) > 1e-6
        for unit in (0, 33, 63):
            kept = tuple(tuple(n for n in ALL_FFN if (i, n) != (layer, unit)) for i in range(2))
            with masked(model, PruningPlan(full.heads, kept)):
                assert distance(outputs(model, inputs), before) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_compose(family):
    """A second cut counts the units that the first has left; the heads of MPNet keep their own position biases."""
    model = tiny(family)
    once = keep_units(model, PruningPlan(((1, 2, 3),) * 4, (tuple(range(20, 60)),) * 4))
    twice = keep_layers(keep_units(once, PruningPlan(((0, 2),) * 4, (tuple(range(10)),) * 4)), [0, 2, 3])
    direct = keep_units(keep_layers(model, [0, 2, 3]), PruningPlan(((1, 3),) * 3, (tuple(range(20, 30)),) * 3))
    inputs = batch(model)
    assert torch.equal(outputs(twice, inputs), outputs(direct, inputs))
    assert twice.config.to_dict() == direct.config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 3), (0,), (0, 1, 2, 3)])
def test_depth_slice_equals_original_with_skipped_layers(family, layers):
    model = tiny(family)
    inputs = batch(model)
    before = outputs(model, inputs)
    shallow = keep_layers(model, layers)
    hooks = [
        layer.register_forward_hook(lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])
        for index, layer in enumerate(encoder_layers(model))
        if index not in layers
    ]
    assert distance(outputs(shallow, inputs), outputs(model, inputs)) < 1e-6
    for hook in hooks:
        hook.remove()
    assert torch.equal(outputs(model, inputs), before)
    assert type(shallow) is type(model)
    assert shallow.config.num_hidden_layers == len(encoder_layers(shallow)) == len(layers)


def test_modernbert_keeps_the_kind_of_each_layer():
    model = tiny("modernbert")
    inputs = batch(model)
    everywhere = tiny("modernbert", layer_types=["full_attention"] * 3 + ["sliding_attention"])
    assert distance(outputs(model, inputs), outputs(everywhere, inputs)) > 1e-3, "the window must bite"
    shallow = keep_layers(model, [0, 2, 3])
    assert shallow.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [layer.attention_type for layer in encoder_layers(shallow)] == shallow.config.layer_types
    with pytest.raises(ValueError, match="must begin with 0"):
        keep_layers(model, [1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_class_when_its_config_can_say_it(family):
    model = tiny(family, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    uniform = keep_units(keep_layers(model, [0, 3]), PruningPlan((ALL_HEADS,) * 2, (ALL_FFN[::2],) * 2))
    assert type(uniform) is type(model) and type(uniform.config) is type(model.config)
    slim = keep_units(model, PLANS["uneven"])
    assert slim.config.model_type == f"smbert_{family}"
    back = keep_layers(slim, [0, 3])
    assert type(back) is type(slim)
    mixed = keep_units(model, PruningPlan((ALL_HEADS,) * 4, (ALL_FFN, ALL_FFN[:8], ALL_FFN, ALL_FFN)))
    again = keep_layers(mixed, [0, 2])
    assert type(again) is type(model) and type(again.config) is type(model.config)
    assert "layer_widths" not in again.config.to_dict() and "auto_map" not in again.config.to_dict()
    for result in (uniform, slim, back, again):
        assert result.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("family", FAMILIES)
def test_input_untouched_and_mode_dtype_backend_kept(family):
    backend = "eager"
    model = tiny(family, attn_implementation=backend).to(torch.bfloat16).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    config, state = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for result in (keep_layers(model, [0, 2]), keep_units(model, PLANS["uneven"])):
        assert result.training and result.dtype == torch.bfloat16
        assert result.config._attn_implementation == backend
        frozen = [name for name, p in result.named_parameters() if not p.requires_grad]
        assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad] != []
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.zero_()
    assert model.config.to_dict() == config and model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_units_train(family):
    model = keep_units(tiny(family), PLANS["zero layer"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, labels = batch(model), torch.tensor([0, 1, 0])
    torch.manual_seed(0)
    losses = []
    for _ in range(20):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in encoder_layers(model).parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_and_hidden_states_of_layers_without_heads(family):
    model = keep_units(tiny(family, attn_implementation="eager"), PLANS["zero layer"])
    with torch.no_grad():
        out = model(**batch(model), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(3, heads, 10, 10) for heads in (4, 0, 4, 2)]
    assert len(out.hidden_states) == 5


def test_parameters_of_the_smbert_shape():
    """BERT-base (12 x 768, 12 heads, 3072) to 3 layers, 8 heads, 2048 neurons: the paper's 38.6 M, of one sixth."""
    with torch.device("meta"):
        base = transformers.BertModel(transformers.BertConfig())
    plan = PruningPlan((tuple(range(8)),) * 3, (tuple(range(2048)),) * 3)
    small = keep_units(keep_layers(base, [0, 4, 8]), plan)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    layer = 4 * 768 * 512 + 3 * 512 + 768 + 2 * 768 * 2048 + 2048 + 768 + 4 * 768
    assert count(encoder_layers(small)) == 3 * layer
    assert round(count(small) / 1e6, 2) == 38.61
    assert round(count(encoder_layers(small)) / 1e6, 2) == 14.18
    assert round(count(encoder_layers(base)) / count(encoder_layers(small)), 2) == 6.00
    assert structure_of(small).layer_widths == ((8, 2048),) * 3
    assert structure_of(small).head_dim == 64


def test_encoder_without_pooler():
    config = tiny("bert").config
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    sliced = keep_units(model, PLANS["uneven"])
    assert sliced.pooler is None
    with masked(model, PLANS["uneven"]):
        expected = outputs(model, batch(model))
    assert distance(outputs(sliced, batch(model)), expected) < 2e-6


def test_structure():
    structure = structure_of(tiny("electra"))
    assert (structure.hidden_size, structure.embedding_size, structure.vocab_size, structure.head_dim) == (
        32,
        16,
        100,
        8,
    )
    assert structure.num_layers == 4 and structure.layer_widths == ((4, 64),) * 4
    assert structure.family is FAMILIES["electra"]


def test_plan_round_trip():
    plan = PLANS["uneven"]
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert PruningPlan.full(tiny("bert")) == PLANS["full"]
    assert PruningPlan(heads=(torch.tensor([0, 2]),), ffn=([1],)) == PruningPlan(((0, 2),), ((1,),))


@pytest.mark.parametrize(
    ("heads", "ffn", "message"),
    [
        (((1, 0),), ((0,),), "`heads` must be sorted"),
        (((0,),), ((2, 2),), "`ffn` must be sorted"),
        (((-1,),), ((0,),), "not negative"),
        (((0,), (0,)), ((0,),), "same layers, got 2 and 1"),
    ],
)
def test_bad_plans(heads, ffn, message):
    with pytest.raises(ValueError, match=message):
        PruningPlan(heads, ffn)


def test_plans_of_wrong_types():
    with pytest.raises(TypeError):
        PruningPlan(((0.5,),), ((0,),))
    with pytest.raises(ValueError, match="keys `heads` and `ffn`"):
        PruningPlan.from_dict({"heads": [[0]]})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PruningPlan((ALL_HEADS,) * 3, (ALL_FFN,) * 3), "each of the model's 4 layers, got 3"),
        (PruningPlan(((4,),) + (ALL_HEADS,) * 3, (ALL_FFN,) * 4), "heads below 4 in layer 0, got 4"),
        (PruningPlan((ALL_HEADS,) * 4, (ALL_FFN,) * 3 + ((70,),)), "neurons below 64 in layer 3, got 70"),
    ],
)
def test_plan_of_another_model(plan, message):
    model = tiny("bert")
    with pytest.raises(ValueError, match=message):
        keep_units(model, plan)
    with pytest.raises(ValueError, match=message), masked(model, plan):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layers", [[], [0, 4], [0, 1, 2, 3, 4], [1, 0], [0, 0], [-1, 2]])
def test_bad_layers(layers):
    with pytest.raises(ValueError, match="from 0 to 3 for this 4-layer model"):
        keep_layers(tiny("bert"), layers)


def test_class_without_slim_counterpart():
    class OwnHead(transformers.BertForSequenceClassification):
        pass

    model = OwnHead(tiny("bert").config)
    assert type(keep_layers(model, [0, 1])) is OwnHead
    with pytest.raises(ValueError, match=r"must be one of .*BertForSequenceClassification.*got OwnHead"):
        keep_units(model, PLANS["uneven"])
