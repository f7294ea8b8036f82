"""Mask search and K-prune: Fisher blocks, exchanges and knowledge against brute force; budgets; every family."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import batch, tiny

from smbert.importance import score
from smbert.measure import count_parameters, macs
from smbert.modeling import FAMILIES, encoder_layers
from smbert.retraining_free import kprune
from smbert.retraining_free.calibration import CalibrationLoss
from smbert.retraining_free.cost_table import counted_costs
from smbert.retraining_free.kprune import _above_threshold, knowledge, prune_by_knowledge
from smbert.retraining_free.masksearch import fisher_blocks, rearranged, rescale_to_original
from smbert.retraining_free.stream import PARTS, record
from smbert.retraining_free.working_copy import output_projection, working_copy
from smbert.stages.retraining_free import RetrainingFreePruning
from smbert.surgery import PruningPlan, keep_units, structure_of


def batches(model, count=4):
    return [batch(model, 4, 16, seed=seed) for seed in range(count)]


def one_by_one(rows):
    for inputs in rows:
        for i, n in enumerate(inputs["attention_mask"].sum(1).tolist()):
            yield {k: v[i : i + 1, :n] for k, v in inputs.items()}


@pytest.mark.parametrize("method", ["fisher", "kprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_within_its_budget(family, method, context, tmp_path):
    model = tiny(family, layers=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage = RetrainingFreePruning(method=method, macs="60%", samples=32, calibration=1, batch_size=16)
    pruned, info = stage.run(model, context, tmp_path)
    assert 0.5 * macs(model) < macs(pruned) <= 0.6 * macs(model)
    assert info["budget"]["reached"] == macs(pruned) <= info["budget"]["asked"]
    assert all(ffn % 8 == 0 for _, ffn in structure_of(pruned).layer_widths)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pruned(**batch(model)).logits.isfinite().all()
    held_out = CalibrationLoss(model, batches(model))
    full = PruningPlan.full(model)
    worst = PruningPlan(tuple(() for _ in full.heads), tuple(() for _ in full.ffn))
    assert held_out(pruned) < held_out(keep_units(model, worst))


@pytest.mark.parametrize("method", ["fisher", "kprune"])
def test_parameters_and_impossible_budgets(method, context, tmp_path):
    model = tiny("bert")
    options = {"method": method, "samples": 16, "calibration": 1}
    pruned, _ = RetrainingFreePruning(params="80%", **options).run(model, context, tmp_path)
    assert count_parameters(pruned).total <= 0.8 * count_parameters(model).total
    with pytest.raises(ValueError, match=r"`params` must be at least [\d,]+, the smallest.*To resolve"):
        RetrainingFreePruning(params=1000, **options).run(model, context, tmp_path)


def test_kprune_takes_no_time_budget():
    for budget in ({"speedup": 2}, {"latency_ms": 3.0}):
        with pytest.raises(ValueError, match=r"K-prune needs.*`macs` or `params`.*To resolve"):
            RetrainingFreePruning(method="kprune", **budget)
    with pytest.raises(ValueError, match=r"`fit_damping`.*kprune.*To resolve"):
        RetrainingFreePruning(method="kprune", macs="50%", fit_damping=None)


def test_diagonals_of_fisher_blocks_are_the_label_free_scores():
    model = tiny("bert", layers=2)
    rows = batches(model)
    blocks, scores = fisher_blocks(model, rows), score(model, rows, "taylor_kl")
    for part, found in zip(PARTS, (scores.heads, scores.ffn)):
        for layer in range(2):
            torch.testing.assert_close(blocks[part, layer].diagonal() / 2, found[layer], rtol=1e-4, atol=1e-9)
            assert torch.linalg.eigvalsh(blocks[part, layer]).min() > -1e-8
    apart = fisher_blocks(model, one_by_one(rows))
    for key, block in blocks.items():
        torch.testing.assert_close(apart[key], block, rtol=1e-3, atol=1e-3 * float(block.abs().max()))


def test_exchanges_lower_what_is_lost_together():
    generator, better = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        rows = torch.randn(5, 8, generator=generator).double()
        rows[:, 1] = -rows[:, 0] + 0.1 * rows[:, 1]  # these two cancel
        block = rows.T @ rows

        def lost(kept, block=block):
            gone = [u for u in range(8) if u not in kept]
            return float(block[gone][:, gone].sum())

        found = rearranged(block, 4)
        plain = tuple(sorted(block.diagonal().argsort(descending=True)[:4].tolist()))
        assert len(found) == 4 and lost(found) <= lost(plain) + 1e-9
        better += lost(found) < lost(plain) - 1e-9
        assert lost(found) >= min(lost(kept) for kept in itertools.combinations(range(8), 4)) - 1e-9
    assert better > 5
    assert rearranged(block, 8) == tuple(range(8)) and rearranged(block, 0) == ()


def test_units_that_cancel_are_removed_together():
    block = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.2, 0.0], [-1.0, 0.0, 1.5]]).double()
    assert rearranged(block, 1) == (1,)  # by the diagonal alone, 2 would stay


def test_rescaling_makes_up_for_a_removed_copy():
    model = tiny("bert", layers=1)
    layer = encoder_layers(model)[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[1] = layer.intermediate.dense.weight[0]
        layer.intermediate.dense.bias[1] = layer.intermediate.dense.bias[0]
        layer.output.dense.weight[:, 1] = layer.output.dense.weight[:, 0]
    calls = record(model, batches(model))
    full = PruningPlan.full(model)
    student = keep_units(model, PruningPlan(full.heads, (tuple(u for u in range(64) if u != 1),)))
    before = output_projection(student, "ffn_out", 0).weight.clone()
    assert rescale_to_original(model, student, calls) == 1
    factors = (output_projection(student, "ffn_out", 0).weight[0] / before[0]).detach()
    assert float(factors[0]) == pytest.approx(2, abs=0.05) and (factors[1:] - 1).abs().max() < 0.05
    assert CalibrationLoss(model, batches(model))(student) < 1e-7


def test_rescaling_ends_where_factors_are_refused():
    model = tiny("bert", layers=2)
    calls = record(model, batches(model))
    student = keep_units(model, PruningPlan(heads=((0,), (0, 1, 2, 3)), ffn=(tuple(range(64)),) * 2))
    with torch.no_grad():
        output_projection(student, "attention_output", 0).weight.mul_(1e-3)  # a factor of 1000 would be needed
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert rescale_to_original(model, student, calls) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_knowledge_is_its_definition():
    model = tiny("bert", layers=2).double()
    rows = batches(model, 2)
    calls = record(model, rows)
    copy = working_copy(model)
    with torch.no_grad():
        output_projection(copy, "attention_output", 0).weight[:, 8:16] = 0
    keys = [("ffn_out", 0), ("attention_output", 1)]
    found = knowledge(copy, [o.double() for o in calls.outputs], rows, keys)
    squares, gradients, tokens = [0.0, 0.0], [0.0, 0.0], 0
    for inputs in one_by_one(rows):
        inputs = {**inputs}
        seen, masks, hooks = [], [], []
        for (part, layer), dim in zip(keys, (1, 8)):
            linear = output_projection(copy, part, layer)
            mask = torch.ones(linear.in_features // dim, dtype=torch.float64, requires_grad=True)

            def hook(module, args, mask=mask, dim=dim, seen=seen):
                seen.append(args[0].detach())
                return (args[0] * mask.repeat_interleave(dim),)

            hooks.append(linear.register_forward_pre_hook(hook))
            masks.append(mask)
        with torch.no_grad():
            target = (model(**inputs).logits / 2).log_softmax(-1)
        log = (copy(**inputs).logits / 2).log_softmax(-1)
        kl = 4 * (target.exp() * (target - log)).sum()
        for i, gradient in enumerate(torch.autograd.grad(kl, masks)):
            gradients[i] = gradients[i] + gradient**2
            squares[i] = squares[i] + seen[i].square().sum((0, 1))
        tokens += inputs["input_ids"].numel()
        for handle in hooks:
            handle.remove()
    for i, (key, dim) in enumerate(zip(keys, (1, 8))):
        weight = output_projection(copy, *key).weight
        rows_of = (squares[i] / tokens * weight.square().mean(0)).reshape(-1, dim).sum(1)
        expected = gradients[i] / 8 / 2 + 2.5e-4 * rows_of
        torch.testing.assert_close(found[key], expected.detach(), rtol=1e-3, atol=1e-9)


def test_knowledge_of_a_model_that_reads_in_chunks_is_the_same():
    found = []
    for options in ({}, {"chunk_size_feed_forward": 4}, {"chunk_size_feed_forward": 1}):
        model = tiny("bert", layers=2, **options)
        rows, copy = batches(model, 2), working_copy(model)
        output_projection(copy, "attention_output", 0).weight.data[:, 8:16] = 0
        found.append(knowledge(copy, record(model, rows).outputs, rows, [("ffn_out", 0), ("ffn_out", 1)]))
    for key, scores in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[key], scores, rtol=1e-3, atol=1e-12)


def test_kprune_in_half_precision_scores_no_rounding(monkeypatch):
    """Nothing is pruned before the first scores, so the answers are the original's."""
    model, seen = tiny("bert", layers=2), []
    rows = batches(model, 2)
    monkeypatch.setattr(kprune, "REPRESENTATION", 0.0)
    scores = kprune.knowledge
    monkeypatch.setattr(kprune, "knowledge", lambda *args: seen.append(scores(*args)) or seen[-1])
    table = counted_costs(model, "macs", set(range(5)), set(range(0, 65, 8)))
    calls = record(model, rows, answers=False)
    prune_by_knowledge(model, calls, rows, table, macs(model) // 2, autocast=torch.bfloat16)
    first, last = seen[0], seen[-1]
    assert max(float(s.abs().max()) for s in first.values()) < 1e-3 * max(float(s.abs().max()) for s in last.values())


def test_threshold_over_all_that_is_left():
    scores = {("attention_output", 0): torch.tensor([8.0, 1.0]), ("ffn_out", 0): torch.tensor([3.0, 2.0, 0.1, 0.2])}
    price = {"attention_output": 2.0, "ffn_out": 1.0}  # per cost: 4, .5 and 3, 2, .1, .2
    now = ("attention_output", 0)
    assert _above_threshold(scores, price, now, 4, 1) == (0,)
    assert _above_threshold(scores, price, now, 6, 1) == (0, 1)
    assert _above_threshold(scores, price, ("ffn_out", 0), 4, 1) == (0, 1)
    assert _above_threshold(scores, price, ("ffn_out", 0), 3, 2) == ()
    assert _above_threshold(scores, price, now, 1, 1) == ()


def test_costs_of_fisher_may_be_milliseconds(context, tmp_path):
    from smbert.retraining_free.cost_table import CostTable
    from smbert.retraining_free.masksearch import prune_by_fisher

    model = tiny("bert", layers=2)
    rows = batches(model)
    table = CostTable("latency_ms", 1.0, {n: 0.5 * n for n in range(5)}, {0: 0.0, 32: 0.4, 64: 1.0})
    pruned, info = prune_by_fisher(model, record(model, rows), rows, table, 4.1)
    assert table.total(structure_of(pruned).layer_widths) == pytest.approx(info["cost"]) and info["cost"] <= 4.1
    assert counted_costs(model, "macs", range(5), (0, 32, 64)).total(structure_of(model).layer_widths) == macs(model)
