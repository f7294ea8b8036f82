"""Losses against plain numpy, capture against the models' own outputs, and what must not matter: padding, wrappers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import batch, tiny
from torch import nn

from smbert.modeling import FAMILIES, encoder_layers
from smbert.objectives import (
    OBJECTIVES,
    AttentionObjective,
    CosineObjective,
    EmbeddingObjective,
    Features,
    GoldObjective,
    HiddenObjective,
    LogitsObjective,
    Needs,
    Objective,
    RelationObjective,
    build_objectives,
    capture_features,
    layer_pairs,
)
from smbert.surgery import PruningPlan, keep_units, structure_of

COMPARING = [kind for kind in OBJECTIVES if kind != "gold"]


def seen(model: Any, inputs: dict[str, torch.Tensor], needs: Needs, side: str = "student", **options: Any) -> Features:
    hidden, qkv = getattr(needs, f"{side}_hidden"), getattr(needs, f"{side}_qkv")
    return capture_features(model, inputs, hidden=hidden, qkv=qkv, **options)


def loss_between(objective: Objective, student: Any, teacher: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = build_objectives([objective], structure_of(student), structure_of(teacher))
    with torch.no_grad():
        target = seen(teacher, inputs, loss.needs, "teacher")
    return loss(seen(student, inputs, loss.needs), target)[0]


def pad(inputs: dict[str, torch.Tensor], columns: int, token: int) -> dict[str, torch.Tensor]:
    fill = {"input_ids": token, "attention_mask": 0}
    return {k: nn.functional.pad(v, (0, columns), value=fill[k]) for k, v in inputs.items()}


def without_heads(model: Any, layer: int) -> Any:
    full = PruningPlan.full(model)
    return keep_units(
        model, dataclasses.replace(full, heads=[() if i == layer else h for i, h in enumerate(full.heads)])
    )


def narrower(model: Any, heads: int) -> Any:
    full = PruningPlan.full(model)
    return keep_units(model, dataclasses.replace(full, heads=[h[:heads] for h in full.heads]))


def random_features(seed: int, heads: int = 4, head_dim: int = 8, layers: tuple[int, ...] = (1,)) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    q, k, v = ({i: draw(3, heads, 5, head_dim) for i in layers} for _ in range(3))
    hidden = {i: draw(3, 5, 16) for i in layers}
    return Features(mask=mask, logits=draw(3, 4), hidden=hidden, queries=q, keys=k, values=v)


def built(objective: Objective, kind: str = "single_label", student_heads: int = 4, teacher_heads: int = 4) -> Any:
    """A loss for `random_features`, whose sizes need no model."""
    base = structure_of(tiny("bert", layers=1))
    student, teacher = (
        dataclasses.replace(base, layer_widths=((heads, 64),), hidden_size=16)
        for heads in (student_heads, teacher_heads)
    )
    return objective.build(student, teacher, kind)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- the values, against plain loops ---------------------------------------------------------------------------------


def test_logits_loss_equals_numpy() -> None:
    student, teacher = random_features(0), random_features(1)
    p, q = (softmax(f.logits.double().numpy() / 3.0) for f in (teacher, student))
    expected = 9.0 * np.mean([np.sum(a * (np.log(a) - np.log(b))) for a, b in zip(p, q)])
    assert built(LogitsObjective(temperature=3.0))(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_logits_loss_of_multi_label_tasks_is_a_bernoulli_kl_per_label() -> None:
    student, teacher = random_features(0), random_features(1)
    p, q = (1 / (1 + np.exp(-f.logits.double().numpy() / 2.0)) for f in (teacher, student))
    expected = 4.0 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert built(LogitsObjective(), "multi_label")(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_logits_loss_of_regression_is_the_squared_error_without_temperature() -> None:
    student, teacher = random_features(0), random_features(1)
    expected = ((student.logits - teacher.logits) ** 2).mean().item()
    loss = built(LogitsObjective(temperature=7.0), "regression")
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_logits_of_token_classification_count_real_tokens_only() -> None:
    student, teacher = random_features(0), random_features(1)
    student.logits, teacher.logits = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    flat = [Features(mask=f.mask, logits=f.logits[f.mask]) for f in (student, teacher)]
    loss = built(LogitsObjective())
    assert loss(student, teacher).item() == pytest.approx(loss(*flat).item(), rel=1e-6)


def test_hidden_and_cosine_losses_equal_numpy() -> None:
    student, teacher = random_features(0), random_features(1)
    squares, angles = [], []
    for b, s in np.argwhere(student.mask.numpy()):
        x, y = (f.hidden[1][b, s].double().numpy() for f in (student, teacher))
        squares.append(np.sum((x - y) ** 2) / len(x))
        angles.append(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert len(squares) == 10
    assert built(HiddenObjective())(student, teacher).item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert built(CosineObjective())(student, teacher).item() == pytest.approx(np.mean(angles), rel=1e-5)


@pytest.mark.parametrize("heads", ["match", "mean"])
def test_attention_loss_equals_numpy(heads: str) -> None:
    student, teacher = random_features(0), random_features(1, heads=4 if heads == "match" else 6)
    errors = []
    for b in range(3):
        n = int(student.mask[b].sum())
        maps = []
        for f in (student, teacher):
            q, k = (x[1][b, :, :n].double().numpy() for x in (f.queries, f.keys))
            scores = np.stack([q[h] @ k[h].T / np.sqrt(8) for h in range(len(q))])
            maps.append(scores if heads == "match" else scores.mean(0, keepdims=True))
        errors += list(((maps[0] - maps[1]) ** 2).ravel())
    loss = built(AttentionObjective(heads=heads), teacher_heads=teacher.queries[1].shape[1])
    assert loss(student, teacher).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_attention_loss_of_bfloat16_features_rounds_the_difference_and_not_the_scores() -> None:
    teacher, noise = random_features(1), random_features(2)
    for what in ("queries", "keys"):
        # Scores of some hundreds, which bfloat16 tells apart in steps of 1 or 2.
        getattr(teacher, what)[1] = (16 * getattr(teacher, what)[1]).bfloat16()
    student = Features(mask=teacher.mask)
    for what in ("queries", "keys"):
        near = getattr(teacher, what)[1] + getattr(noise, what)[1].bfloat16() / 16
        getattr(student, what)[1] = near.requires_grad_()
    loss = built(AttentionObjective())
    wide = [
        Features(mask=f.mask, queries={1: f.queries[1].float()}, keys={1: f.keys[1].float()})
        for f in (student, teacher)
    ]
    assert loss(student, teacher).item() == pytest.approx(loss(*wide).item(), rel=0.01)
    assert loss(teacher, teacher).item() < 1e-6 * loss(student, teacher).item()
    loss(student, teacher).backward()
    assert student.queries[1].grad.abs().sum() > 0


@pytest.mark.parametrize(("student_heads", "relation_heads"), [(4, None), (2, None), (3, 8), (4, 1)])
def test_relation_loss_equals_numpy(student_heads: int, relation_heads: int | None) -> None:
    student, teacher = random_features(0, heads=student_heads), random_features(1)
    n_heads = relation_heads or 4
    expected = 0.0
    for what in ("queries", "keys", "values"):
        divergences = []
        for b in range(3):
            n = int(student.mask[b].sum())
            relations = []
            for f in (student, teacher):
                x = getattr(f, what)[1][b].double().numpy()  # (heads, seq, head_dim)
                wide = np.concatenate(list(x), axis=-1)[:n]  # (real tokens, heads * head_dim)
                relations.append([softmax(a @ a.T / np.sqrt(a.shape[-1])) for a in np.split(wide, n_heads, axis=-1)])
            for s, t in zip(*relations):
                divergences += [np.sum(t[i] * (np.log(t[i]) - np.log(s[i]))) for i in range(n)]
        expected += float(np.mean(divergences))
    loss = built(RelationObjective(relation_heads=relation_heads), student_heads=student_heads)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["single_label", "regression", "multi_label"])
def test_gold_loss_is_the_models_own_loss(kind: str) -> None:
    problem = kind if kind == "regression" else f"{kind}_classification"
    model = tiny("bert", num_labels=1 if kind == "regression" else 4, problem_type=problem)
    labels = {
        "single_label": torch.tensor([0, 3, 1]),
        "regression": torch.tensor([0.5, -1.0, 2.0]),
        "multi_label": torch.eye(4)[[0, 2, 2]],
    }[kind]
    inputs = batch(model)
    expected = model(**inputs, labels=labels).loss
    features = capture_features(model, inputs)
    loss = built(GoldObjective(), kind)
    assert loss(features, features, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["single_label", "regression", "multi_label"])
def test_rows_without_a_gold_label_change_nothing(kind: str) -> None:
    logits = torch.randn(
        4, 1 if kind == "regression" else 3, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    labels, none = {
        "single_label": (torch.tensor([0, 2]), torch.tensor([-100, -100])),
        "regression": (torch.tensor([0.5, -1.0]), torch.full((2,), torch.nan)),
        "multi_label": (torch.eye(3)[:2], torch.full((2, 3), torch.nan)),
    }[kind]
    loss = built(GoldObjective(), kind)
    mask = torch.ones(4, 1).bool()
    known = loss(Features(mask=mask[:2], logits=logits[:2]), None, labels)
    mixed = loss(Features(mask=mask, logits=logits), None, torch.cat([labels, none]))
    assert mixed.item() == pytest.approx(known.item(), rel=1e-6)
    mixed.backward()
    assert logits.grad is not None and logits.grad[:2].abs().sum() > 0 and (logits.grad[2:] == 0).all()
    assert loss(Features(mask=mask[:2], logits=logits[:2]), None, none).item() == 0.0


# --- what must hold for every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_models_have_no_loss_and_padding_changes_nothing(family: str) -> None:
    teacher, student = tiny(family, layers=2), tiny(family, layers=2, seed=1)
    inputs = batch(teacher)
    longer = pad(inputs, 6, teacher.config.pad_token_id)
    for kind in COMPARING:
        objective = OBJECTIVES[kind]()
        assert abs(loss_between(objective, teacher, teacher, inputs).item()) <= 1e-6, kind
        value = loss_between(objective, student, teacher, inputs).item()
        assert value > 1e-4, kind
        assert loss_between(objective, student, teacher, longer).item() == pytest.approx(value, rel=2e-4), kind


@pytest.mark.parametrize("kind", [k for k in COMPARING if k != "logits"])
def test_no_number_in_a_padded_place_is_read(kind: str) -> None:
    student, teacher = random_features(0, layers=(0, 1)), random_features(1, layers=(0, 1))
    loss = built(OBJECTIVES[kind]())
    clean = loss(student, teacher)
    for f in (student, teacher):
        for x in (f.hidden, f.queries, f.keys, f.values):
            for i, t in x.items():
                padded = ~f.mask[:, :, None] if t.ndim == 3 else ~f.mask[:, None, :, None]
                x[i] = t.masked_fill(padded, torch.nan)
    assert loss(student, teacher).item() == clean.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_hidden_states_are_the_models_own(family: str) -> None:
    model = tiny(family)
    inputs = batch(model)
    hidden = capture_features(model, inputs, hidden=range(5)).hidden
    expected = model(**inputs, output_hidden_states=True).hidden_states
    assert list(hidden) == [0, 1, 2, 3, 4]
    for i in range(4):  # some families put the final norm into their last one
        assert torch.equal(hidden[i], expected[i]), i
    last = model.base_model.final_norm(hidden[4]) if family == "modernbert" else hidden[4]
    torch.testing.assert_close(last, model.base_model(**inputs)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_queries_and_keys_give_the_models_own_attention(family: str) -> None:
    model = tiny(family)
    inputs = batch(model)
    default = capture_features(model, inputs, qkv={1, 2})
    model.set_attn_implementation("eager")
    eager = capture_features(model, inputs, qkv={1, 2})
    weights = model(**inputs, output_attentions=True).attentions
    for i in (1, 2):
        q, k = eager.queries[i], eager.keys[i]
        assert q.shape == (3, 4, 10, 8)
        for what in ("queries", "keys", "values"):
            torch.testing.assert_close(getattr(default, what)[i], getattr(eager, what)[i])
        bias = torch.zeros(())
        if family == "mpnet":
            bias = model.base_model.encoder.compute_position_bias(torch.empty(3, 10, 32))
        if family == "modernbert":
            from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

            kind = model.config.layer_types[i - 1]
            q, k = apply_rotary_pos_emb(q, k, *model.base_model.rotary_emb(q, torch.arange(10)[None], kind))
            if kind == "sliding_attention":
                distance = (torch.arange(10)[:, None] - torch.arange(10)).abs()
                bias = torch.zeros(10, 10).masked_fill(distance > model.config.sliding_window, -torch.inf)
        scores = (q @ k.transpose(-1, -2) / 8**0.5 + bias).masked_fill(~eager.mask[:, None, None], -torch.inf)
        real = eager.mask.nonzero(as_tuple=True)  # a padded token's window may hold no real token at all
        ours, theirs = (x.transpose(1, 2)[real] for x in (scores.softmax(-1), weights[i - 1]))  # (tokens, heads, seq)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_values_are_the_projections(family: str) -> None:
    model, entry = tiny(family), FAMILIES[family]
    found: list[torch.Tensor] = []
    hook = entry.get(encoder_layers(model)[1], "value").register_forward_hook(lambda m, a, out: found.append(out))
    values = capture_features(model, batch(model), qkv={2}).values[2]
    hook.remove()
    expected = found[0][..., -32:].view(3, 10, 4, 8)  # of a fused projection, values are the last third
    assert torch.equal(values, expected.transpose(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_widths_are_captured_with_the_heads_they_have(family: str) -> None:
    model = narrower(tiny(family), 3)
    features = capture_features(model, batch(model), qkv={1})
    assert features.queries[1].shape == features.keys[1].shape == features.values[1].shape == (3, 3, 10, 8)


# --- capture ---------------------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_only_what_is_asked_for_is_kept_and_no_hook_stays() -> None:
    model = tiny("bert")
    features = capture_features(model, batch(model), hidden={0, 3}, qkv={2})
    assert set(features.hidden) == {0, 3}
    assert set(features.queries) == set(features.keys) == set(features.values) == {2}
    assert features.logits is not None and hooks_of(model) == 0
    with pytest.raises(IndexError):
        capture_features(model, {"input_ids": torch.tensor([[10**6]])}, hidden={0, 1}, qkv={1})
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"hidden": {5}}, "between 0 and 4"), ({"qkv": {0}}, "between 1 and 4")]
)
def test_layers_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny("bert")
    with pytest.raises(ValueError, match=message):
        capture_features(model, batch(model), **options)


def test_without_a_mask_all_tokens_are_real() -> None:
    model = tiny("bert")
    assert capture_features(model, {"input_ids": torch.ones(2, 3, dtype=torch.long)}).mask.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_student_and_not_the_teacher(family: str) -> None:
    student, teacher = tiny(family, layers=2), tiny(family, layers=2, seed=1)
    inputs = batch(student)
    loss = build_objectives([OBJECTIVES[kind]() for kind in COMPARING], structure_of(student), structure_of(teacher))
    loss(seen(student, inputs, loss.needs), seen(teacher, inputs, loss.needs, "teacher"))[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    for layer in encoder_layers(student):
        for name, p in layer.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


# The newer name of the switch is not in the oldest supported release.
old_name = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@old_name
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mpnet"])  # MPNet has no gradient checkpointing
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    teacher = tiny(family, layers=2, seed=1)
    gradients = []
    for checkpointing in (False, True):
        student = tiny(family, layers=2).train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        objectives = [HiddenObjective(), AttentionObjective(), RelationObjective(layer_map="uniform")]
        loss = build_objectives(objectives, structure_of(student), structure_of(teacher))
        inputs = batch(student)
        total, _ = loss(seen(student, inputs, loss.needs), seen(teacher, inputs, loss.needs, "teacher"))
        total.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert sum(g is not None for g in gradients[0].values()) > 10
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, msg=name)


@old_name
def test_reentrant_checkpointing_is_refused_where_it_would_hide_gradients() -> None:
    student = tiny("bert", layers=2).train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        capture_features(student, batch(student), qkv={1})


def test_frozen_parts_are_no_fault() -> None:
    student = tiny("bert", layers=2).train()
    student.base_model.embeddings.requires_grad_(False)
    encoder_layers(student)[0].requires_grad_(False)
    features = capture_features(student, batch(student), hidden={0, 1, 2}, qkv={1, 2})
    assert not features.hidden[1].requires_grad and features.hidden[2].requires_grad


def test_under_autocast_losses_are_float32_and_close() -> None:
    student, teacher = tiny("bert", layers=2), tiny("bert", layers=2, seed=1)
    inputs = batch(student)
    loss = build_objectives([OBJECTIVES[kind]() for kind in COMPARING], structure_of(student), structure_of(teacher))
    _, exact = loss(seen(student, inputs, loss.needs), seen(teacher, inputs, loss.needs, "teacher"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = seen(student, inputs, loss.needs)
        target = seen(teacher, inputs, loss.needs, "teacher")
        total, terms = loss(features, target)
    assert features.queries[1].dtype == torch.bfloat16
    assert total.dtype == torch.float32 and torch.equal(total, loss(features, target)[0])
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(exact[name].item(), rel=0.1), name
    total.backward()


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_capture_runs_the_wrapper_that_it_is_given(process_group: None) -> None:
    model = tiny("bert", layers=2)
    wrapper = nn.parallel.DistributedDataParallel(model)
    calls: list[int] = []
    wrapper.register_forward_hook(lambda *a: calls.append(1))
    inputs = batch(model)
    through = capture_features(model, inputs, hidden={1}, qkv={2}, call=wrapper)
    alone = capture_features(model, inputs, hidden={1}, qkv={2})
    assert calls == [1]
    assert torch.equal(through.hidden[1], alone.hidden[1]) and torch.equal(through.keys[2], alone.keys[2])


def test_wrappers_that_cannot_work_are_refused() -> None:
    model = tiny("bert", layers=2)
    with pytest.raises(ValueError, match="one process per GPU"):
        capture_features(model, batch(model), call=nn.DataParallel(model))
    with pytest.raises(ValueError, match="bypassed"):
        capture_features(model, batch(model), hidden={1}, call=tiny("bert", layers=2))


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer_map", "n_student", "n_teacher", "expected"),
    [
        ("uniform", 3, 12, [(4, 1), (8, 2), (12, 3)]),
        ("uniform", 4, 6, [(2, 1), (3, 2), (5, 3), (6, 4)]),
        ("uniform", 4, 2, [(1, 1), (1, 2), (2, 3), (2, 4)]),
        ("last", 3, 12, [(12, 3)]),
        ([[2, 1], [12, 1]], 3, 12, [(2, 1), (12, 1)]),
    ],
)
def test_layer_maps(layer_map: Any, n_student: int, n_teacher: int, expected: list[tuple[int, int]]) -> None:
    assert layer_pairs(layer_map, n_student, n_teacher) == expected


@pytest.mark.parametrize(
    "layer_map",
    ["top", [], [[0, 1]], [[13, 1]], [[1, 4]], [[1, 2, 3]], [1], ["12"], [[1.0, 1]], [[1, 1], [1, 1]], 3, None],
)
def test_bad_layer_maps_are_refused(layer_map: Any) -> None:
    with pytest.raises(ValueError, match="`layer_map` must be"):
        layer_pairs(layer_map, 3, 12)


@pytest.mark.parametrize("make", [HiddenObjective, CosineObjective, EmbeddingObjective])
def test_a_projection_is_learned_exactly_where_widths_differ(make: type[Objective]) -> None:
    teacher, narrow = tiny("bert", layers=2), tiny("bert", layers=2, hidden_size=16, num_attention_heads=2)
    inputs = batch(teacher)
    loss = build_objectives([make()], structure_of(narrow), structure_of(teacher))
    assert {n: tuple(p.shape) for n, p in loss.named_parameters()} == {"losses.0.projection.weight": (32, 16)}
    total, _ = loss(seen(narrow, inputs, loss.needs), seen(teacher, inputs, loss.needs, "teacher"))
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert not list(build_objectives([make()], structure_of(teacher), structure_of(teacher)).parameters())


def test_other_head_counts_need_relations_or_means() -> None:
    teacher = tiny("bert", layers=2)
    student = narrower(teacher, 3)
    with pytest.raises(ValueError, match=r"equal head counts, got .*\(4, 3\).*To resolve, use the relation objective"):
        build_objectives([AttentionObjective()], structure_of(student), structure_of(teacher))
    for objective in (AttentionObjective(heads="mean"), RelationObjective()):
        value = loss_between(objective, student, teacher, batch(teacher))
        assert value.item() > 0 and torch.isfinite(value)


def test_relation_heads_divide_both_widths() -> None:
    base = structure_of(tiny("bert", layers=1))
    for heads, chosen in (
        (4, 4),
        (3, 4),
        (2, 4),
        (1, 4),
    ):  # widths 32, 24, 16, 8 against 32; up to the teacher's 4 heads
        assert built(RelationObjective(), student_heads=heads).heads == [chosen]
    odd = dataclasses.replace(base, layer_widths=((3, 64),), head_dim=5)
    assert RelationObjective().build(odd, base).heads == [1]
    with pytest.raises(
        ValueError, match=r"widths 32 of the teacher and 24 of the student, got 3\..*one of \[1, 2, 4, 8\]"
    ):
        built(RelationObjective(relation_heads=3), student_heads=3)


@pytest.mark.parametrize("kind", ["attention", "relation"])
def test_layers_without_heads_are_refused(kind: str) -> None:
    teacher = tiny("bert", layers=2)
    student = without_heads(teacher, 1)
    with pytest.raises(ValueError, match=r"without attention heads: \[\[2, 2\]\]"):
        build_objectives([OBJECTIVES[kind]()], structure_of(student), structure_of(teacher))
    first = OBJECTIVES[kind](layer_map=[[1, 1]])  # type: ignore[call-arg]
    assert loss_between(first, student, teacher, batch(teacher)).item() <= 1e-6


def test_needs_are_the_union_of_all_terms() -> None:
    student, teacher = structure_of(tiny("bert", layers=2)), structure_of(tiny("bert", layers=4))
    loss = build_objectives([LogitsObjective(), GoldObjective()], student, teacher)
    assert loss.needs == Needs(teacher_logits=True, labels=True) and not loss.needs.live_teacher
    objectives = [HiddenObjective(), EmbeddingObjective(), RelationObjective(), AttentionObjective(layer_map=[[1, 2]])]
    assert build_objectives(objectives, student, teacher).needs == Needs(
        student_hidden=frozenset({0, 1, 2}),
        teacher_hidden=frozenset({0, 2, 4}),
        student_qkv=frozenset({2}),
        teacher_qkv=frozenset({1, 4}),
    )


def test_the_total_is_the_weighted_sum_and_terms_are_logged_without_weights() -> None:
    student, teacher = tiny("bert", layers=2), tiny("bert", layers=2, seed=1)
    inputs = batch(student)
    objectives = [
        LogitsObjective(weight=5.0),
        HiddenObjective(weight=2.0),
        LogitsObjective(0.5, "cold", temperature=1.0),
    ]
    loss = build_objectives(objectives, structure_of(student), structure_of(teacher))
    total, terms = loss(seen(student, inputs, loss.needs), seen(teacher, inputs, loss.needs, "teacher"))
    assert list(terms) == ["logits", "hidden", "cold"] and not any(t.requires_grad for t in terms.values())
    assert total.requires_grad
    expected = 5.0 * terms["logits"] + 2.0 * terms["hidden"] + 0.5 * terms["cold"]
    torch.testing.assert_close(total.detach(), expected)
    assert terms["hidden"].item() == pytest.approx(loss_between(HiddenObjective(), student, teacher, inputs).item())


def test_all_faults_come_in_one_message() -> None:
    teacher = tiny("bert", layers=2)
    objectives = [AttentionObjective(), HiddenObjective(layer_map="top"), GoldObjective(), GoldObjective()]
    with pytest.raises(ValueError) as error:
        build_objectives(objectives, structure_of(narrower(teacher, 2)), structure_of(teacher), "ranking")
    for part in ("equal head counts", "`layer_map` must be", "'gold' 2 times", "'ranking'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="must not be empty"):
        build_objectives([], structure_of(teacher), structure_of(teacher))


def test_objectives_from_yaml_equal_those_from_python() -> None:
    assert HiddenObjective(layer_map=[[4, 1]]) == HiddenObjective(layer_map=((4, 1),))  # type: ignore[arg-type]
    for kind, cls in OBJECTIVES.items():
        assert cls().name == cls.kind == kind
        assert cls(**dataclasses.asdict(cls(weight=2.0))) == cls(weight=2.0) and hash(cls()) == hash(cls())


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (HiddenObjective, {"weight": -1.0}, "`weight`"),
        (HiddenObjective, {"weight": "5"}, "`weight`"),
        (HiddenObjective, {"weight": float("nan")}, "`weight`"),
        (LogitsObjective, {"temperature": 0}, "`temperature`"),
        (AttentionObjective, {"heads": "sum"}, "`heads`"),
        (RelationObjective, {"relation_heads": 0}, "`relation_heads`"),
        (RelationObjective, {"relation_heads": 2.0}, "`relation_heads`"),
    ],
)
def test_bad_values_are_refused(cls: type[Objective], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("logits", {"logits": torch.zeros(3, 2)}, "one shape"),
        ("logits", {"logits": None}, "without a head"),
        ("hidden", {"hidden": {}}, "teacher's hidden of layer 1 were not captured"),
        ("relation", {"mask": torch.ones(3, 7).bool()}, "same tokens"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(OBJECTIVES[kind]())(random_features(0), dataclasses.replace(random_features(1), **change))


def test_single_label_logits_of_one_class_are_refused() -> None:
    one = Features(mask=torch.ones(2, 1).bool(), logits=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least two classes"):
        built(LogitsObjective())(one, one)


def test_gold_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        built(GoldObjective())(random_features(0), random_features(0), None)
    with pytest.raises(ValueError, match="labels must match the logits"):
        built(GoldObjective(), "multi_label")(random_features(0), random_features(0), torch.zeros(3))
