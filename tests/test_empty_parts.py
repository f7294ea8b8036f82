"""Parts without units are passed by: nothing of them is left, and the norm before does what theirs did."""

from __future__ import annotations

import pytest
import torch
from tiny_models import batch, tiny

from smbert.measure import count_parameters
from smbert.modeling import FAMILIES, SLIM_CLASSES, encoder_layers
from smbert.objectives import HiddenObjective, RelationObjective
from smbert.retraining_free.calibration import CalibrationLoss
from smbert.retraining_free.empty_parts import without_empty_parts
from smbert.retraining_free.latency_table import Conditions, latency_table
from smbert.retraining_free.stream import Stream, record
from smbert.stages.retraining_free import RetrainingFreePruning
from smbert.surgery import PruningPlan, empty_parts, keep_layers, keep_units, pass_by, structure_of
from smbert.teacher import model_fingerprint

ABLE = [name for name, family in FAMILIES.items() if family.attention_add_norm and family.ffn_add_norm]
# Layer 0 has no heads, layer 1 neither, layer 2 has nothing at all, layer 3 no neurons.
EMPTY = PruningPlan(((), (), (), (0, 2)), ((1, 2, 3), (0, 5), (), ()))
PASSED = [(1, 0), (2, 0), (2, 1), (3, 1)]


def emptied(family: str = "bert", **config):
    return keep_units(tiny(family, **config), EMPTY)


def batches(model, count=6):
    return [batch(model, n=8, seed=seed) for seed in range(count)]


def test_families_that_are_known_to_be_able():
    assert ABLE == ["bert", "roberta", "xlm-roberta", "electra", "mpnet"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_part_stays_and_so_does_what_a_family_norms_itself(family):
    assert empty_parts(tiny(family)) == []
    assert empty_parts(emptied(family)) == (PASSED if family in ABLE else [])


@pytest.mark.parametrize("family", ABLE)
def test_nothing_of_a_part_is_left(family):
    model = emptied(family)
    slim = pass_by(model, PASSED)
    assert count_parameters(model).total - count_parameters(slim).total == len(PASSED) * 3 * 32  # a bias and a norm
    assert structure_of(slim).layer_widths == structure_of(model).layer_widths
    seen = []
    layer = encoder_layers(slim)[2]
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        slim(**batch(slim))
    assert torch.equal(*(t[0] if isinstance(t, tuple) else t for t in seen[0]))
    assert empty_parts(slim) == []


@pytest.mark.parametrize("family", ABLE)
def test_the_norm_before_takes_over_what_theirs_did(family):
    model = emptied(family)
    loss = CalibrationLoss(model, batches(model))
    folded, plain = without_empty_parts(model, batches(model, 4)), pass_by(model, PASSED)
    assert loss(model) == pytest.approx(0, abs=1e-9)
    assert loss(folded) < loss(plain) / 5
    assert {id(p) for p in folded.parameters()}.isdisjoint(map(id, model.parameters())) and not folded.training


def test_chunks_of_the_feed_forward_part_are_read_whole():
    models = [emptied(), emptied(chunk_size_feed_forward=5)]
    one, other = (without_empty_parts(model, batches(model)).state_dict() for model in models)
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-5), name


def test_padding_does_not_count():
    model = emptied()
    padded = [
        {
            "input_ids": torch.cat([b["input_ids"], torch.full((8, 5), 7)], 1),
            "attention_mask": torch.cat([b["attention_mask"], torch.zeros(8, 5, dtype=torch.long)], 1),
        }
        for b in batches(model)
    ]
    one, other = without_empty_parts(model, batches(model)), without_empty_parts(model, padded)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("family", ABLE)
def test_trained_pruned_and_cut_on(family, tmp_path):
    slim = pass_by(emptied(family), PASSED)
    slim.train()(**batch(slim), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in encoder_layers(slim).parameters())
    slim.eval()
    assert structure_of(keep_layers(slim, [0, 2, 3])).passed_by == ((False, False), (True, True), (False, True))
    full = PruningPlan.full(slim)
    fewer = keep_units(slim, PruningPlan((*full.heads[:3], (0,)), full.ffn))
    assert structure_of(fewer).passed_by == structure_of(slim).passed_by
    inputs = batch(slim)
    with torch.no_grad():
        assert torch.equal(keep_units(slim, full)(**inputs).logits, slim(**inputs).logits)


def test_a_model_from_before_there_was_such_an_entry_is_known_again():
    model = emptied()
    before = model_fingerprint(model)
    del model.config.passed_by
    assert model_fingerprint(model) == before != model_fingerprint(pass_by(emptied(), PASSED))


def test_parts_with_units_cannot_be_passed_by():
    with pytest.raises(ValueError, match=r"`parts` must be among the empty ones .*\(3, 1\).*, got \(3, 0\)"):
        pass_by(emptied(), [(3, 1), (3, 0)])


def test_streams_go_by_too():
    slim = pass_by(emptied(), PASSED)
    calls = record(slim, batches(slim, 2))
    stream = Stream(slim, calls)
    for layer in range(4):
        for seen in stream.see("attention_output", "ffn_out", advance=True):
            for part, name in enumerate(("attention_output", "ffn_out")):
                if (layer, part) in PASSED:
                    assert not seen[name].outputs.any() and seen[name].outputs.shape == seen[name].residual.shape


def test_the_stage_passes_them_by_and_goes_on_from_there(context, tmp_path):
    quick = {"samples": 64, "calibration": 32, "batch_size": 16, "search_steps": 4, "ffn_levels": 4}
    first, _ = RetrainingFreePruning(macs=0.3, **quick).run(tiny("bert"), context, tmp_path)
    assert empty_parts(first) == []
    second, info = RetrainingFreePruning(macs=0.3, **quick).run(first, context, tmp_path)
    assert empty_parts(second) == [] and sum(map(sum, structure_of(second).passed_by)) >= 1
    assert info["passed_by"] == [list(pair) for pair in structure_of(second).passed_by]
    assert type(second) is SLIM_CLASSES[type(tiny("bert"))] and info["calibration_loss"]["pruned"] >= 0


def test_a_part_without_units_costs_no_time(tmp_path):
    table = latency_table(tiny("bert", layers=2), [4], [64], Conditions(2, 8), tmp_path, min_runs=2, min_seconds=0.0)
    assert table.of(0, 0) == table.of(1, 0) == 0
    passed = pass_by(emptied(), PASSED)
    latency_table(passed, [2], [2, 3], Conditions(2, 8), tmp_path, min_runs=2, min_seconds=0.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_states_that_stand_for_more_than_their_layer_are_not_compared():
    """Layers 0 and 1 are followed by an attention that is passed by."""
    student, teacher = structure_of(pass_by(emptied(), PASSED)), structure_of(tiny("bert"))
    assert HiddenObjective().pairs(student, teacher) == [(3, 3), (4, 4)]
    assert HiddenObjective(layer_map=((1, 1),)).pairs(student, teacher) == [(1, 1)]
    assert RelationObjective().pairs(student, teacher) == [(4, 4)]
