"""Scores are what they claim to be: exact per-sample gradients, blind to batches and padding, harmless to the model."""

from __future__ import annotations

import copy
import itertools
import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny_models import batch, tiny
from torch.nn import functional as F

from smbert._sample_losses import _softmax_root
from smbert.importance import SCORERS, TORCH_PRUNING_FAMILIES, score
from smbert.modeling import FAMILIES, encoder_layers, family_of
from smbert.surgery import PruningPlan, keep_units, structure_of

GRADIENT = ("taylor", "taylor_kl", "fisher")
CASES = [
    (family, scorer)
    for family in FAMILIES
    for scorer in SCORERS
    if not scorer.startswith("torch_pruning") or family in TORCH_PRUNING_FAMILIES
]


def labelled(model, n=6, length=10, num_labels=2):
    inputs = batch(model, n, length)
    return inputs | {"labels": torch.arange(n) % num_labels}


def one_by_one(inputs):
    """The same samples in batches of one, without any padding."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    width = inputs["input_ids"].shape[1]
    return [
        {k: v[i : i + 1, :n] if v.dim() > 1 and v.shape[1] == width else v[i : i + 1] for k, v in inputs.items()}
        for i, n in enumerate(lengths)
    ]


def flat(scores):
    return torch.cat([*scores.heads, *scores.ffn])


def close(a, b, tolerance=1e-4):
    return (flat(a) - flat(b)).abs().max().item() <= tolerance * flat(b).abs().max().item()


def test_taylor_and_fisher_equal_explicit_masks_sample_by_sample():
    model = tiny("bert", num_labels=3)
    inputs, family = labelled(model, num_labels=3), family_of(model)
    gradients = []
    for sample in one_by_one(inputs):
        masks, handles = [], []
        for layer in encoder_layers(model):
            for part, repeat in (("attention_output", 8), ("ffn_out", 1)):
                mask = torch.ones(family.get(layer, part).in_features // repeat, requires_grad=True)
                hook = lambda module, args, m=mask, r=repeat: (args[0] * m.repeat_interleave(r),)  # noqa: E731
                handles.append(family.get(layer, part).register_forward_pre_hook(hook))
                masks.append(mask)
        gradients.append(torch.autograd.grad(model(**sample).loss, masks))
        for handle in handles:
            handle.remove()
    by_unit = [torch.stack(samples).double() for samples in zip(*gradients)]  # per mask: (samples, units)
    for scorer, measure in (("taylor", torch.abs), ("fisher", torch.square)):
        scores = score(model, [inputs], scorer)
        found = [part for pair in zip(scores.heads, scores.ffn) for part in pair]
        for ours, expected in zip(found, by_unit, strict=True):
            torch.testing.assert_close(ours, measure(expected).mean(0), rtol=1e-4, atol=1e-9)
        assert scores.samples == 6
    assert not torch.allclose(score(model, [inputs]).heads[0], by_unit[0].mean(0).abs()), (
        "abs must come before the mean"
    )


@pytest.mark.parametrize(("family", "scorer"), CASES)
def test_batches_and_padding_change_nothing(family, scorer):
    model = tiny(family)
    inputs = labelled(model)
    whole, single = score(model, [inputs], scorer), score(model, one_by_one(inputs), scorer)
    assert close(single, whole)
    assert flat(whole).max() > 0
    assert [(len(h), len(f)) for h, f in zip(whole.heads, whole.ffn)] == [(4, 64)] * 4
    assert flat(whole).dtype == torch.float64


@pytest.mark.parametrize(("family", "scorer"), CASES)
def test_planted_useless_units_have_the_lowest_score(family, scorer):
    model = tiny(family)
    for layer in encoder_layers(model):
        with torch.no_grad():
            family_of(model).get(layer, "attention_output").weight[:, 2 * 8 : 3 * 8] = 0  # type: ignore[operator]
            family_of(model).get(layer, "ffn_out").weight[:, 37] = 0
    scores = score(model, [labelled(model)], scorer)
    assert all(layer.argmin() == 2 and layer[2] < layer.median() for layer in scores.heads)
    assert all(layer.argmin() == 37 and layer[37] < layer.median() for layer in scores.ffn)


def test_hessian_is_weights_squared_times_the_mean_of_squared_gradients():
    """Against autograd sample by sample: torch-pruning averages over what a unit reads and writes with, per head dimension."""
    model = tiny("bert")
    inputs, layer = labelled(model), encoder_layers(model)[1]
    parts = [layer.intermediate.dense.weight, layer.output.dense.weight]
    parts += [m.weight for m in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)]
    parts += [layer.attention.output.dense.weight]
    squares = [torch.zeros_like(p) for p in parts]
    for sample in one_by_one(inputs):
        for total, gradient in zip(squares, torch.autograd.grad(model(**sample).loss, parts)):
            total += gradient.square() / 6
    read, write, *qkv, out = [(p.square() * square).detach().double() for p, square in zip(parts, squares)]
    found = score(model, [inputs], "torch_pruning_hessian")
    torch.testing.assert_close(found.ffn[1], (read.sum(1) + write.sum(0)) / 2, rtol=1e-4, atol=1e-12)
    rows = (sum(part.sum(1) for part in qkv) + out.sum(0)) / 4
    torch.testing.assert_close(found.heads[1], rows.reshape(4, 8).sum(1), rtol=1e-4, atol=1e-12)
    assert found.exponent == 1


def test_magnitude_of_fused_and_gated_projections_belongs_to_the_right_unit():
    model = tiny("modernbert")
    layer = encoder_layers(model)[1]
    with torch.no_grad():
        layer.attn.Wqkv.weight[2 * 32 + 8 : 2 * 32 + 16] = 0  # values of head 1
        layer.mlp.Wi.weight[[5, 64 + 5]] = 0
    scores = score(model, scorer="magnitude")
    assert scores.heads[1][1] == 0 and scores.heads[1].count_nonzero() == 3
    assert scores.ffn[1][5] == 0 and scores.ffn[1].count_nonzero() == 63


@pytest.mark.parametrize("num_labels", [1, 2])
def test_taylor_kl_predicts_the_divergence_that_a_mask_causes(num_labels):
    model, eps = tiny("bert", num_labels=num_labels).double(), 1e-3
    inputs = batch(model, 4)
    scores = score(model, [inputs], "taylor_kl")
    before = model(**inputs).logits
    for part, unit, found in (("attention_output", slice(8, 16), scores.heads[1][1]), ("ffn_out", 7, scores.ffn[1][7])):
        weight = family_of(model).get(encoder_layers(model)[1], part).weight
        with torch.no_grad():
            weight[:, unit] *= 1 - eps
            after = model(**inputs).logits
            weight[:, unit] /= 1 - eps
        if num_labels == 1:
            loss = F.mse_loss(after, before) / 2
        else:
            loss = F.kl_div(after.log_softmax(-1), before.softmax(-1), reduction="batchmean")
        assert loss.item() / eps**2 == pytest.approx(found.item(), rel=0.02)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_probes_have_the_curvature_of_the_softmax(classes):
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(classes)).double()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=classes))).double()
    v = _softmax_root(logits.expand(len(signs), -1), signs)
    p = logits.softmax(-1)
    torch.testing.assert_close(v.T @ v / len(v), p.diag() - p.outer(p))


def test_temperature_softens_confident_predictions():
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.weight *= 100
    cold, warm = (score(model, [batch(model)], "taylor_kl", temperature=t) for t in (1.0, 20.0))
    assert flat(warm).sum() > 10 * flat(cold).sum()


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_model_is_the_same_afterwards(scorer):
    model = tiny("bert").train()
    model.classifier.eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    config, rng = model.config.to_dict(), torch.get_rng_state()
    with torch.no_grad():  # as callers may well do
        first = score(model, [labelled(model)], scorer)
        second = score(model, [labelled(model)], scorer)
    assert torch.equal(flat(first), flat(second)), "dropout must be off"
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"classifier.weight"}
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def other_labels(model, head, n=4, length=10):
    inputs = batch(model, n, length)
    if head == "token-classification":
        labels = torch.arange(n * length).reshape(n, length) % 3
        return inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}
    if head == "question-answering":
        return inputs | {"start_positions": torch.tensor([1, 0, 1, 0]), "end_positions": torch.tensor([2, 1, 1, 2])}
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "scorer"),
    [(h, s) for h in ("token-classification", "question-answering") for s in GRADIENT] + [("encoder", "taylor_kl")],
)
def test_other_heads_are_blind_to_batches_and_padding_too(family, head, scorer):
    model = tiny(family, head, layers=2, num_labels=2 if head == "question-answering" else 3)
    inputs = other_labels(model, head)
    whole = score(model, [inputs], scorer)
    assert close(score(model, one_by_one(inputs), scorer), whole)
    assert flat(whole).max() > 0


def test_multiple_choice_scores_whole_questions():
    model = tiny("bert", "multiple-choice", layers=2)
    inputs = {k: torch.stack([v, v.flip(0)], 1) for k, v in batch(model, 4).items()}  # (4, 2, seq)
    scores = score(model, [inputs | {"labels": torch.tensor([0, 1, 0, 1])}], "fisher")
    assert scores.samples == 4 and flat(scores).max() > 0
    assert flat(score(model, [inputs], "taylor_kl")).max() > 0


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("scorer", GRADIENT)
def test_other_kinds_of_labels(kind, scorer):
    model = tiny("bert", layers=2, num_labels=1 if kind == "regression" else 3)
    n = model.config.num_labels
    labels = torch.linspace(0, 1, 6 * n).round(decimals=1).reshape(6, n)
    inputs = batch(model, 6) | {"labels": labels.squeeze(1) if n == 1 else labels.round()}
    if scorer == "taylor_kl" and n > 1:
        model.config.problem_type = kind  # without labels, nothing else tells
    whole = score(model, [inputs], scorer)
    assert close(score(model, one_by_one(inputs), scorer), whole) and flat(whole).max() > 0
    assert model.config.problem_type == (kind if scorer == "taylor_kl" and n > 1 else None)


@pytest.mark.parametrize(("family", "scorer"), CASES)
def test_pruned_models_with_empty_layers_can_be_scored_again(family, scorer):
    full = tiny(family)
    plan = PruningPlan(((0, 1, 3), (), (2,), (0, 1)), (tuple(range(40)), (3, 4), (), tuple(range(64))))
    model = keep_units(full, plan)
    scores = score(model, [labelled(full)], scorer)
    assert [(len(h), len(f)) for h, f in zip(scores.heads, scores.ffn)] == list(structure_of(model).layer_widths)
    assert all((part > 0).all() for part in (*scores.heads, *scores.ffn))


def test_chunked_feed_forward_gives_the_same_scores():
    model, chunked = tiny("bert"), tiny("bert", chunk_size_feed_forward=5)
    inputs = labelled(model)
    assert close(score(chunked, [inputs]), score(model, [inputs]))


def test_autocast_keeps_the_scores():
    model = tiny("bert")
    inputs = labelled(model)
    exact, rough = score(model, [inputs]), score(model, [inputs], autocast=torch.bfloat16)
    assert not torch.equal(flat(exact), flat(rough))
    assert close(rough, exact, 0.05)


@pytest.mark.parametrize("scorer", [*GRADIENT, "torch_pruning", "torch_pruning_hessian"])
def test_reduce_sums_before_the_scores_are_made(scorer):
    model = tiny("bert")
    inputs = labelled(model)
    singles, sent = one_by_one(inputs), []
    score(model, singles[:2], scorer, reduce=lambda t: sent.append(t.clone()) or t)
    other = iter(sent)
    both = score(model, singles[2:], scorer, reduce=lambda t: t + next(other))
    assert both.samples == 6 and close(both, score(model, [inputs], scorer))
    other = iter(sent)
    idle = score(model, [], scorer, reduce=lambda t: t + next(other))  # a rank without data of its own
    assert idle.samples == 2 and close(idle, score(model, singles[:2], scorer))


TWO_RANKS = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from accelerate import PartialState
from test_importance import flat, labelled, one_by_one
from tiny_models import tiny
from smbert.importance import score, sum_over_ranks
state = PartialState(cpu=True)
assert state.num_processes == 2
model = tiny("bert")
singles = one_by_one(labelled(model))
mine = singles[:1] if state.process_index else singles[1:]
torch.save(flat(score(model, mine, reduce=sum_over_ranks)), f"{sys.argv[3]}/{state.process_index}.pt")
"""


def test_two_processes_get_the_same_scores(tmp_path):
    here = os.path.dirname(os.path.abspath(__file__))
    (tmp_path / "script.py").write_text(TWO_RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in "01":  # what torchrun sets, without the seconds that torchrun needs
        launch = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment = os.environ | launch | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(tmp_path / "script.py"), here, os.path.dirname(here), str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    model = tiny("bert")
    torch.testing.assert_close(first, flat(score(model, [labelled(model)])), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scorer", ["taylor", "fisher", "torch_pruning", "torch_pruning_hessian"])
def test_missing_or_impossible_labels_are_named(scorer):
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"`labels`.*no labels at all.*taylor_kl"):
        score(model, [batch(model)], scorer)
    with pytest.raises(ValueError, match=r"between 0 and 1.*got -1"):
        score(model, [labelled(model) | {"labels": torch.full((6,), -1)}], scorer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: score(m, [], "nothing"), r"`scorer` must be one of magnitude, taylor.*'nothing'"),
        (lambda m: score(m, []), r"`batches` must hold at least one sample"),
        (lambda m: score(m, [batch(m)], "taylor_kl", temperature=0.0), r"`temperature` must be a positive number"),
        (lambda m: score(tiny("bert", "encoder"), [labelled(m)]), r"task head, got BertModel.*taylor_kl"),
        (lambda m: score(tiny("modernbert"), [labelled(m)], "torch_pruning"), r"modernbert.*To resolve, use taylor"),
        (lambda m: score(tiny("mpnet"), [labelled(m)], "torch_pruning_hessian"), r"be torch_pruning_hessian .* mpnet"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny("bert"))


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_that_are_not_finite_name_the_layer(scorer):
    model = tiny("bert")
    with torch.no_grad():
        encoder_layers(model)[2].output.dense.weight[0, 5] = float("nan")
    layer, unit = (2, "neuron 5") if scorer == "magnitude" else (0, "head 0")
    with pytest.raises(ValueError, match=rf"`{scorer}` scores must be finite, got nan for {unit} of layer {layer}"):
        score(model, [labelled(model)], scorer)
