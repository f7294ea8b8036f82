"""The fit from bottom to top: least squares against the original's residual stream, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import batch, tiny

from smbert.modeling import FAMILIES, encoder_layers, family_of
from smbert.retraining_free.sequential import fit_to_original, moments_towards
from smbert.retraining_free.stream import FIRST, PARTS, Stream, record
from smbert.retraining_free.working_copy import output_projection
from smbert.surgery import PruningPlan, keep_units

PLAN = PruningPlan(heads=((0, 1, 2, 3), (1, 3), ()), ffn=(tuple(range(64)), tuple(range(0, 64, 3)), (5,)))


def pair(family):
    model = tiny(family, layers=3)
    calls = record(model, [batch(model, 4, 16, seed=seed) for seed in range(8)])
    return model, keep_units(model, PLAN), calls


def last_states(model, calls):
    stream = Stream(model, calls)
    for _ in stream.layers:
        stream.advance()
    return torch.cat([state[mask] for state, mask in zip(stream.states, calls.masks)])


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_the_models_own_forward(family):
    model, student, calls = pair(family)
    inputs = batch(model, 4, 16, seed=0)
    with torch.no_grad():
        found = last_states(model, calls)[: int(inputs["attention_mask"].sum())]
        expected = model.base_model(**inputs).last_hidden_state
        if family == "modernbert":
            found = model.base_model.final_norm(found)
    torch.testing.assert_close(found, expected[inputs["attention_mask"].bool()], rtol=1e-4, atol=1e-5)
    assert calls.tokens == len(last_states(student, calls))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_answers_only_the_first_batch_runs_through_the_layers(family):
    model, _, calls = pair(family)
    runs = [0]
    hooks = [
        module.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
        for module in (output_projection(model, part, layer) for part in PARTS for layer in range(3))
    ]
    found = record(model, [batch(model, 4, 16, seed=seed) for seed in range(8)], answers=False)
    for hook in hooks:
        hook.remove()
    assert runs[0] == len(hooks) and len(calls.outputs) == 8 and not found.outputs
    torch.testing.assert_close(last_states(model, found), last_states(model, calls), rtol=0, atol=0)
    with torch.no_grad():  # and the model is as it was
        torch.testing.assert_close(model(**batch(model, 4, 16, seed=7)).logits, calls.outputs[7])


@pytest.mark.parametrize("family", FAMILIES)
def test_output_plus_residual_is_what_the_next_norm_reads(family):
    """The stream after a layer, made from what was seen: through the layer's own last norm, or as it is in ModernBERT."""
    model, _, calls = pair(family)
    stream = Stream(model, calls)
    seen = [parts["ffn_out"] for parts in stream.see("ffn_out", advance=True)]
    total = torch.cat([s.outputs + s.residual for s in seen])
    layer = stream.layers[0]
    norm = {"distilbert": lambda x: layer.output_layer_norm(x), "modernbert": lambda x: x}.get(
        family, lambda x: layer.output.LayerNorm(x)
    )
    after = torch.cat([state[mask] for state, mask in zip(stream.states, calls.masks)])
    with torch.no_grad():
        torch.testing.assert_close(norm(total), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_pruned_projection_is_least_squares(family):
    model, student, calls = pair(family)
    original, pruned = Stream(model, calls), Stream(student, calls)
    for stream in (original, pruned):
        stream.advance()
    one = [parts["attention_output"] for parts in original.see("attention_output")]
    other = [parts["attention_output"] for parts in pruned.see("attention_output")]
    x = torch.cat([s.inputs for s in other]).double()
    y = torch.cat([a.outputs + a.residual - b.residual for a, b in zip(one, other)]).double()
    linear = output_projection(student, "attention_output", 1)
    design = x if linear.bias is None else torch.cat([x, torch.ones(len(x), 1)], 1).double()
    expected = torch.linalg.lstsq(design, y).solution
    fit_to_original(model, student, calls, damping=1e-9)
    torch.testing.assert_close(linear.weight.double(), expected[: x.shape[1]].T, rtol=1e-3, atol=1e-3)
    if linear.bias is not None:
        torch.testing.assert_close(linear.bias.double(), expected[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_comes_closer_and_what_was_not_pruned_stays(family):
    model, student, calls = pair(family)
    before, target = last_states(student, calls), last_states(model, calls)
    kept = {part: output_projection(student, part, 0).weight.clone() for part in PARTS}
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_to_original(model, student, calls, damping=1e-4)
    after = last_states(student, calls)
    assert (after - target).square().mean() < 0.8 * (before - target).square().mean()
    assert all(torch.equal(kept[part], output_projection(student, part, 0).weight) for part in PARTS)
    assert all(torch.equal(original[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_reads_is_mapped_back_by_least_squares(family, part):
    model = tiny(family, layers=3)
    calls = record(model, [batch(model, 4, 16, seed=seed) for seed in range(8)])
    cut = PruningPlan(heads=((1, 3), (0, 2), (0, 1, 2)), ffn=(tuple(range(20)), tuple(range(9)), tuple(range(3))))
    student = keep_units(model, cut)
    layer = encoder_layers(student)[1]
    names = dict.fromkeys(getattr(family_of(student), name) for name in FIRST[part])
    before = {name: copy.deepcopy(layer.get_submodule(name)) for name in names}
    fit_to_original(model, student, calls, damping=1e-6)
    original, pruned = Stream(model, calls), Stream(student, calls)
    for stream in (original, pruned):
        stream.advance()
    x, y = (torch.cat(list(stream.reads(part))) for stream in (pruned, original))
    for name, old in before.items():
        design = x if old.bias is None else torch.cat([x, torch.ones(len(x), 1)], 1)
        with torch.no_grad():
            target = old(y)
            best = design @ torch.linalg.lstsq(design, target).solution
            loss, least, unmapped = ((z - target).square().mean() for z in (layer.get_submodule(name)(x), best, old(x)))
        assert loss < 1.01 * least < 0.9 * unmapped


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_stops_where_the_part_begins(family):
    model, _, calls = pair(family)
    layer, run = encoder_layers(model)[0], []
    for part in PARTS:
        whole = [seen[part].read for seen in Stream(model, calls).see(part)]
        begin = layer.get_submodule(getattr(family_of(model), FIRST[part][0]))
        hook = begin.register_forward_hook(lambda *_: run.append(1))
        for found, expected in zip(Stream(model, calls).reads(part), whole, strict=True):
            assert torch.equal(found, expected)
        hook.remove()
    assert not run


@pytest.mark.parametrize("family", FAMILIES)
def test_settled_attention_is_not_run_again_in_its_layer(family):
    model, _, calls = pair(family)
    runs: list[int] = []
    query = encoder_layers(model)[0].get_submodule(family_of(model).query)
    query.register_forward_hook(lambda *_: runs.append(1))
    plain, settled = Stream(model, calls), Stream(model, calls)
    list(settled.reads("ffn_out"))
    assert len(runs) == len(calls.states)
    runs.clear()
    for one, other in zip(plain.see("ffn_out"), settled.see("ffn_out"), strict=True):
        for name in ("read", "inputs", "outputs", "residual"):
            assert torch.equal(getattr(one["ffn_out"], name), getattr(other["ffn_out"], name))
    settled.advance()
    assert len(runs) == len(calls.states)  # of the plain one
    for stream in (plain, settled):
        while stream.layer < 2:
            stream.advance()
    assert all(torch.equal(one, other) for one, other in zip(plain.states, settled.states, strict=True))


def test_passes_in_bf16_end_as_near_to_the_original():
    model, student, calls = pair("bert")
    half = copy.deepcopy(student)
    fit_to_original(model, student, calls, damping=1e-2)
    rows = [batch(model, 4, 16, seed=seed) for seed in range(8)]
    fit_to_original(model, half, record(model, rows, torch.bfloat16, answers=False), damping=1e-2)
    target = last_states(model, calls)
    errors = [float((last_states(m, calls) - target).square().mean()) for m in (student, half)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


def test_chunks_of_the_feed_forward_part_are_read_whole():
    model = tiny("bert", layers=3, chunk_size_feed_forward=4)
    calls = record(model, [batch(model, 4, 16)])
    (read,) = Stream(model, calls).reads("ffn_out")
    assert len(read) == calls.tokens


def test_an_equal_model_is_a_fixed_point():
    model, _, calls = pair("bert")
    student = keep_units(model, PruningPlan.full(model))
    moments = moments_towards(Stream(model, calls), Stream(student, calls), "attention_output")
    linear = output_projection(model, "attention_output", 0)
    torch.testing.assert_close(
        moments.y / moments.tokens,
        linear.weight.double() @ (moments.x / moments.tokens) + linear.bias.double(),
        rtol=1e-4,
        atol=1e-4,
    )
