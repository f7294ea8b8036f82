"""Plans keep what was asked for: exact counts, totals that the sliced model really meets, the best units, no surprises."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
import torch
from tiny_models import batch, tiny
from transformers import BertConfig, BertModel

from smbert import measure
from smbert.allocate import Budget, count_from, plan_for, uniform_widths_for
from smbert.importance import SCORERS, TORCH_PRUNING_FAMILIES, Scores, score
from smbert.modeling import FAMILIES, encoder_layers, family_of
from smbert.surgery import PruningPlan, keep_units, structure_of


def random_scores(model, seed=0, exponent=2):
    generator = torch.Generator().manual_seed(seed)
    widths = structure_of(model).layer_widths
    heads, ffn = ([torch.rand(n, generator=generator).double() for n in sizes] for sizes in zip(*widths))
    return Scores(heads, ffn, exponent=exponent)


def totals(model):
    return {"params": measure.count_parameters(model).total, "macs": measure.macs(model, 128)}


def labelled(model, n=6):
    return batch(model, n) | {"labels": torch.arange(n) % 2}


# ------------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("share", [2 / 3, "2/3", Fraction(2, 3), 0.667, 0.6667, "66.7%", " 2 / 3 "])
@pytest.mark.parametrize(("size", "count"), [(12, 8), (3072, 2048), (1536, 1024), (6, 4)])
def test_two_thirds_are_two_thirds(share, size, count):
    assert count_from(share, size) == count


@pytest.mark.parametrize(
    ("value", "size", "step", "count"),
    [
        (8, 12, 1, 8),
        ("8", 12, 1, 8),
        (1, 12, 1, 1),
        (1.0, 12, 1, 12),
        ("100%", 12, 1, 12),
        (0.5, 5, 1, 3),
        (0.01, 12, 1, 1),
        (0.35, 100, 1, 35),
        (0.123, 1000, 1, 123),
        (2 / 3, 64, 8, 48),
        (2 / 3, 64, 1, 43),
        (0.99, 60, 8, 60),
        (0.5, 0, 8, 0),
        (13, 64, 8, 13),
    ],
)
def test_counts(value, size, step, count):
    assert count_from(value, size, multiple_of=step) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_counts_keep_the_best_units_of_each_layer(family):
    model = tiny(family)
    scores = random_scores(model)
    plan = plan_for(model, scores, Budget(heads=3, ffn="1/3"))
    assert plan.layer_widths == [(3, 24)] * 4  # a third of 64, up to the next multiple of 8
    for kept, values in zip((*plan.heads, *plan.ffn), (*scores.heads, *scores.ffn)):
        gone = sorted(set(range(len(values))) - set(kept))
        assert values[list(kept)].min() > values[gone].max()
    assert list(structure_of(keep_units(model, plan)).layer_widths) == plan.layer_widths
    assert plan_for(model, scores, Budget(ffn=(64, 9, 8, 0))).layer_widths == [(4, 64), (4, 9), (4, 8), (4, 0)]


def test_global_counts_are_means_per_layer():
    model = tiny("bert")
    scores = random_scores(model)
    for layer in range(4):
        scores.heads[layer] *= layer + 1
        scores.ffn[layer] *= layer + 1
    plan = plan_for(model, scores, Budget(heads="1/2", ffn=20, scope="global"))
    heads, ffn = zip(*plan.layer_widths)
    assert sum(heads) == 8 and sum(ffn) == 80
    assert heads[0] < heads[-1] and min(heads) >= 1 and list(ffn) == sorted(ffn) and len(set(ffn)) > 1
    assert all(n % 8 == 0 for n in ffn)
    best = torch.cat(scores.heads).sort(descending=True).values[:6]  # but for the minimum of one per layer
    kept = torch.cat([values[list(units)] for values, units in zip(scores.heads, plan.heads)])
    assert set(best.tolist()) <= set(kept.tolist())
    free = plan_for(model, scores, Budget(heads="1/2", ffn=20, scope="global", multiple_of=1, min_heads=0, min_ffn=0))
    assert sum(len(units) for units in free.ffn) == 80
    for part, units, n in ((scores.heads, free.heads, 8), (scores.ffn, free.ffn, 80)):
        everything = torch.cat([values[list(kept)] for values, kept in zip(part, units)])
        assert everything.min() == torch.cat(part).sort(descending=True).values[n - 1]


def test_equal_scores_keep_the_first_units():
    model = tiny("bert")
    scores = Scores([torch.ones(4).double()] * 4, [torch.ones(64).double()] * 4)
    for scope in ("uniform", "global"):
        plan = plan_for(model, scores, Budget(heads=2, ffn=16, scope=scope))
        assert all(units == tuple(range(len(units))) for units in (*plan.heads, *plan.ffn))
        assert plan == plan_for(model, scores, Budget(heads=2, ffn=16, scope=scope))
    assert plan_for(model, scores, Budget(heads=2)).layer_widths == [(2, 64)] * 4


# ------------------------------------------------------------------------------------------------------------------ totals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(("name", "share"), [("params", "80%"), ("macs", "40%"), ("macs", 0.9)])
def test_totals_are_met_by_the_sliced_model(family, scope, name, share):
    model = tiny(family)
    before = totals(model)[name]
    limit = int(float(share.rstrip("%")) / 100 * before if isinstance(share, str) else share * before)
    plan = plan_for(model, random_scores(model), Budget(**{name: share}, scope=scope))
    after = totals(keep_units(model, plan))[name]
    one_head = PruningPlan(heads=((0, 1, 2), *[tuple(range(4))] * 3), ffn=(tuple(range(64)),) * 4)
    head = before - totals(keep_units(model, one_head))[name]
    slack = head if scope == "global" else 4 * head  # the next unit, or one more in each layer, would not fit
    assert limit - slack < after <= limit
    assert (len(set(plan.layer_widths)) == 1) == (scope == "uniform")
    assert all(h >= 1 and f >= 8 and f % 8 == 0 for h, f in plan.layer_widths)
    assert plan == plan_for(model, random_scores(model), Budget(**{name: limit}, scope=scope)), "numbers as shares"


def test_totals_with_one_kind_fixed():
    model = tiny("bert")
    limit = totals(model)["macs"] * 8 // 10
    for scope in ("uniform", "global"):
        plan = plan_for(model, random_scores(model), Budget(heads=3, macs=limit, scope=scope))
        assert sum(h for h, _ in plan.layer_widths) == 12
        assert limit * 0.97 < totals(keep_units(model, plan))["macs"] <= limit
    assert plan_for(model, random_scores(model), Budget(macs=10 * limit)) == PruningPlan.full(model)


@pytest.mark.parametrize("name", ["params", "macs"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("least", [0, 1])
def test_an_unreachable_total_names_the_smallest_that_is_not(name, scope, least):
    model = tiny("bert")
    options = {"scope": scope, "min_heads": 1, "min_ffn": least}
    with pytest.raises(ValueError, match=f"`{name}` must be at least .* got 10\\.") as caught:
        plan_for(model, random_scores(model), Budget(**{name: 10}, **options))
    smallest = int(re.search("at least ([0-9,]+),", str(caught.value))[1].replace(",", ""))
    plan = plan_for(model, random_scores(model), Budget(**{name: smallest}, **options))
    assert plan.layer_widths == [(1, 8 * least)] * 4
    assert totals(keep_units(model, plan))[name] == smallest


def test_global_totals_weigh_loss_against_cost():
    model, head, neuron = tiny("bert"), 1048, 65  # parameters of one unit
    heads = [torch.full((4,), value).double() for value in (5.0, 5.0, 5.0, 0.9)]
    ffn = [torch.full((64,), value).double() for value in (1.0, 1.0, 0.01, 1.0)]
    now = totals(model)["params"]
    worst = now - 56 * neuron - 3 * head
    for exponent in (1, 2):
        plan = plan_for(model, Scores(heads, ffn, exponent=exponent), Budget(params=worst, scope="global"))
        assert plan.layer_widths == [(4, 64), (4, 64), (4, 8), (1, 64)]
    less = Budget(params=worst - 3 * head, scope="global")
    absolute, squared = (plan_for(model, Scores(heads, ffn, exponent=e), less).layer_widths for e in (1, 2))
    assert sum(h for h, _ in absolute) == 10 and sum(f for _, f in absolute) == 200, "5 / 1048 is less than 1 / 65"
    assert sum(h for h, _ in squared) == 13 and sum(f for _, f in squared) < 200, "25 / 1048 is more than 1 / 65"


def test_uniform_and_global_meet_the_same_budget_with_different_widths():
    model = tiny("bert")
    scores = score(model, [labelled(model)], "taylor_kl")
    plans = [plan_for(model, scores, Budget(macs="50%", scope=scope)) for scope in ("uniform", "global")]
    kept = [
        sum(float(v[list(units)].sum()) for v, units in zip((*scores.heads, *scores.ffn), (*plan.heads, *plan.ffn)))
        for plan in plans
    ]
    assert kept[1] > kept[0], "freedom must not lose importance"


# ----------------------------------------------------------------------------------------------------- the SmBERT numbers


@pytest.fixture(scope="module")
def three_layers():
    with torch.device("meta"):
        return BertModel(BertConfig(num_hidden_layers=3))


def test_the_smbert_plan_on_the_bert_base_shape(three_layers):
    scores = Scores([torch.ones(12)] * 3, [torch.ones(3072)] * 3)
    assert plan_for(three_layers, scores, Budget(heads=2 / 3, ffn="2/3")).layer_widths == [(8, 2048)] * 3
    encoder, total = 14_180_352, 38_608_128
    plan = plan_for(three_layers, scores, Budget(params=total))
    assert plan.layer_widths == [(8, 2048)] * 3
    assert plan_for(three_layers, scores, Budget(params=total - 1)).layer_widths == [(7, 2040)] * 3
    structure = structure_of(three_layers)
    assert uniform_widths_for(structure, params=encoder) == (8, 2048)
    assert uniform_widths_for(structure, params=encoder - 1) == (7, 2040)
    assert uniform_widths_for(structure, macs="2/3") == (8, 2048)
    assert uniform_widths_for(structure, macs=1.0) == uniform_widths_for(structure, params=10**9) == (12, 3072)


def test_derived_widths_fit_their_budget():
    structure = structure_of(tiny("modernbert"))
    full = measure.encoder_macs(structure.layer_widths, 32, 8, 64, gated=True)
    heads, ffn = uniform_widths_for(structure, macs=0.5, seq_len=64)
    found = measure.encoder_macs([(heads, ffn)] * 4, 32, 8, 64, gated=True)
    assert 0.4 * full < found <= 0.5 * full
    with pytest.raises(ValueError, match="same widths"):
        uniform_widths_for(structure_of(keep_units(tiny("bert"), PLAN)), macs=0.5)
    with pytest.raises(ValueError, match="exactly one"):
        uniform_widths_for(structure)


def test_a_cheaper_last_block_does_not_pass_a_better_one():
    """20 neurons in blocks of 8, 8 and 4: where the second block is too much, the third would fit."""
    model = tiny("bert", layers=1, intermediate_size=20)
    scores = Scores([torch.ones(4).double()], [torch.arange(20, 0, -1).double()])
    room = totals(keep_units(model, PruningPlan((tuple(range(4)),), (tuple(range(12)),))))["macs"]
    plan = plan_for(model, scores, Budget(macs=room, scope="global", multiple_of=8, min_heads=4))
    assert plan.ffn == (tuple(range(8)),)


PLAN = PruningPlan(((0, 1, 3), (), (2,), (0, 1)), (tuple(range(40)), (3, 4), (), tuple(range(64))))


# ------------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "budget",
    [
        Budget(heads="1/2", ffn="1/3"),
        Budget(heads=2, ffn=13, scope="global", multiple_of=1),
        Budget(macs="40%"),
        Budget(params="80%", scope="global"),
        Budget(ffn=(8, 16, 24, 32)),
    ],
)
def test_steps_end_where_one_shot_does(budget):
    original = model = tiny("bert")
    scores, sizes = random_scores(model), []
    for step in range(1, 5):
        absolute = budget.between(original, step / 4)
        model = keep_units(model, plan_for(model, random_scores(model, step), absolute))
        sizes.append(totals(model)["params"])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3
    once = keep_units(original, plan_for(original, scores, budget))
    if budget.macs is None and budget.params is None:
        assert sizes[-1] == totals(once)["params"]
    else:
        name = "macs" if budget.macs else "params"
        limit = getattr(budget.between(original, 1), name)
        assert totals(model)[name] <= limit and totals(once)[name] <= limit


def test_already_uneven_models_can_be_cut_further():
    model = keep_units(tiny("bert"), PLAN)
    plan = plan_for(model, random_scores(model), Budget(heads="1/2", ffn="1/2"))
    assert plan.layer_widths == [(2, 24), (0, 2), (1, 0), (1, 32)]
    before = totals(model)["macs"]
    for scope in ("uniform", "global"):
        plan = plan_for(model, random_scores(model), Budget(macs="60%", scope=scope))
        assert 0.4 * before < totals(keep_units(model, plan))["macs"] <= 0.6 * before
    with pytest.raises(ValueError, match=r"`heads` must be at most 0, .* got 2"):
        plan_for(model, random_scores(model), Budget(heads=2))


# --------------------------------------------------------------------------------------------- scorers and torch-pruning


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_planted_useless_units_are_cut_first(scorer, scope):
    model = tiny("bert")
    with torch.no_grad():
        for layer in encoder_layers(model):
            layer.attention.output.dense.weight[:, 8:16] = 0
            layer.output.dense.weight[:, 50:58] = 0
    scores = score(model, [labelled(model)], scorer)
    plan = plan_for(model, scores, Budget(heads=3, ffn=56, scope=scope))
    assert plan.heads == ((0, 2, 3),) * 4
    assert plan.ffn == (tuple(n for n in range(64) if not 50 <= n < 58),) * 4
    inputs = batch(model)
    torch.testing.assert_close(keep_units(model, plan)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", TORCH_PRUNING_FAMILIES)
def test_groups_and_choices_agree_with_torch_pruning(family):
    tp = pytest.importorskip("torch_pruning")
    model, twin = tiny(family), tiny(family)
    inputs, entry = labelled(model), family_of(model)
    plan = plan_for(model, score(model, [inputs], "torch_pruning"), Budget(heads=2, ffn=32))
    (twin(**inputs).loss).backward()
    layers = encoder_layers(twin)
    heads = {entry.get(layer, part): 4 for layer in layers for part in ("query", "key", "value")}
    roots = set(heads) | {entry.get(layer, "ffn_in") for layer in layers}
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)
    pruner = tp.pruner.BasePruner(
        twin,
        {name: inputs[name] for name in ("input_ids", "attention_mask")},
        tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        prune_num_heads=True,
        prune_head_dims=False,
        num_heads=heads,
        ignored_layers=[m for m in twin.modules() if isinstance(m, kinds) and m not in roots],
        root_module_types=[torch.nn.Linear],
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    assert entry.get(layers[0], "query").out_features == 16 and entry.get(layers[0], "ffn_in").out_features == 32
    test = batch(model, 3, seed=7)
    with torch.no_grad():
        torch.testing.assert_close(keep_units(model, plan)(**test).logits, twin(**test).logits, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "at least one of"),
        ({"heads": 0}, ValueError, "`heads` must be at least `min_heads` = 1, got 0"),
        ({"heads": -2}, ValueError, "`heads` must not be negative"),
        ({"heads": 1.5}, ValueError, "`heads` as a share must be above 0 and at most 1, got 1.5"),
        ({"ffn": 0.0}, ValueError, "`ffn` as a share must be above 0"),
        ({"ffn": "many"}, ValueError, "`ffn` must be a number or a share, got 'many'"),
        ({"ffn": float("nan")}, ValueError, "`ffn` must be a number or a share"),
        ({"ffn": "1/0"}, ValueError, "`ffn` must be a number or a share"),
        ({"ffn": True}, TypeError, "`ffn` must be a number or a share, got True"),
        ({"heads": (2, 0.5)}, ValueError, "`heads` must hold an integer per layer"),
        ({"params": "120%"}, ValueError, "`params` as a share must be above 0 and at most 1, got '120%'"),
        ({"macs": -1}, ValueError, "`macs` must not be negative"),
        ({"params": 0.5, "macs": 0.5}, ValueError, "`params` and `macs` exclude each other"),
        ({"params": 0.5, "heads": 2, "ffn": 8}, ValueError, "`params` must be left a choice"),
        ({"heads": 2, "scope": "local"}, ValueError, "`scope` must be uniform or global, got 'local'"),
        ({"heads": 2, "multiple_of": 0}, ValueError, "`multiple_of` must be an integer of at least 1, got 0"),
        ({"heads": 2, "min_ffn": -1}, ValueError, "`min_ffn` must be an integer of at least 0"),
    ],
)
def test_impossible_budgets_are_refused_at_once(fields, error, message):
    with pytest.raises(error, match=message):
        Budget(**fields)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(heads=5), "`heads` must be at most 4, .* got 5"),
        (Budget(ffn=65, scope="global"), "`ffn` must not exceed the 256 .* got 260"),
        (Budget(ffn=(1, 2)), "one number for each of the 4 layers, got 2"),
        (Budget(heads=(1, 1, 0, 0), scope="global"), "`heads` must leave every layer its `min_heads`, 4 in all, got 2"),
        (Budget(heads=0, ffn=0, min_heads=0, min_ffn=0), "at least one unit"),
    ],
)
def test_budgets_that_do_not_fit_the_model(budget, message):
    model = tiny("bert")
    with pytest.raises(ValueError, match=message):
        plan_for(model, random_scores(model), budget)


def test_scores_must_fit_the_model_and_be_finite():
    model = tiny("bert")
    with pytest.raises(ValueError, match="`scores` must be of this model"):
        plan_for(model, random_scores(tiny("bert", layers=2)), Budget(heads=2))
    scores = random_scores(model)
    scores.ffn[3][7] = float("inf")
    with pytest.raises(ValueError, match="finite, got NaN or infinity in layer 3"):
        plan_for(model, scores, Budget(heads=2))
    with pytest.raises(ValueError, match="`progress`"):
        Budget(heads=2).between(model, 0.0)
