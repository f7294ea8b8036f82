"""The linear algebra of pruning against brute force: which unit goes first, what the others become, what the factors are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from smbert.retraining_free.reconstruct import FACTORS, Moments, Projection, damping_of, refit, rescale

TOKENS, HIDDEN = 400, 6


def inputs(n: int, seed: int = 0) -> Tensor:
    """Correlated inputs with means of their own, (tokens, n)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator)
    return torch.randn(TOKENS, n, generator=generator) @ mix + torch.randn(n, generator=generator)


def linear(n: int, bias: bool = True, seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n, HIDDEN, bias=bias)


def projection(x: Tensor, layer: nn.Linear, damping: float = 1e-10, dim: int = 1) -> Projection:
    moments = Moments(x.shape[1])
    for part in x.split(64):
        moments.add(part)
    return Projection.of(layer, moments, damping, dim)


def best(x: Tensor, layer: nn.Linear, columns: list[int]) -> tuple[Tensor, Tensor | None, float]:
    """Least squares by QR on the tokens themselves: weight, bias, mean squared error."""
    y, design = layer(x).detach().double(), x[:, columns].double()
    if layer.bias is not None:
        design = torch.cat([design, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    found = torch.linalg.lstsq(design, y).solution
    error = float((design @ found - y).square().sum() / len(x))
    return found[: len(columns)].T, (found[-1] if layer.bias is not None else None), error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kept", "dim"), [([0, 2, 5], 1), ([1, 2], 2), ([], 1), (list(range(8)), 1)])
def test_solve_is_least_squares(bias, kept, dim):
    x, layer = inputs(8), linear(8, bias)
    own = projection(x, layer, dim=dim)
    columns = [unit * dim + i for unit in kept for i in range(dim)]
    weight, offset = own.solve(kept)
    expected, expected_bias, error = best(x, layer, columns)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    if expected_bias is None:
        assert offset is None
    else:
        torch.testing.assert_close(offset, expected_bias, rtol=1e-4, atol=1e-4)
    y = layer(x).detach().double()
    energy = (y - y.mean(0) if bias else y).square().sum().item() / TOKENS
    assert own.energy == pytest.approx(energy, rel=1e-5)
    assert own.error(weight, kept) == pytest.approx(error / energy, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize(("n", "dim"), [(9, 1), (12, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_each_removal_is_the_cheapest_with_the_best_update(n, dim, bias):
    x, layer = inputs(n), linear(n, bias)
    order = projection(x, layer, dim=dim).removal_order()
    assert sorted(order) == list(range(n // dim))
    left = set(order)
    for chosen in order[:-1]:
        costs = {
            unit: best(x, layer, [u * dim + i for u in sorted(left - {unit}) for i in range(dim)])[2] for unit in left
        }
        assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-4)
        left.remove(chosen)


def test_many_columns_are_removed_as_one_at_a_time():
    """More than one block of delayed updates, against the plain algorithm."""
    n = 300
    x, layer = torch.randn(1000, n, generator=torch.Generator().manual_seed(3)), linear(n)
    x[:, 1:] += 0.7 * x[:, :-1]
    own = projection(x, layer, 1e-6)
    gram = own.gram + damping_of(own.gram, 1e-6) * torch.eye(n)
    weight, inverse, plain, names = own.weight.clone(), torch.linalg.inv(gram), [], list(range(n))
    while names:
        j = int((weight.square().sum(0) / inverse.diagonal()).argmin())
        weight = weight - weight[:, j].outer(inverse[j] / inverse[j, j])
        inverse = inverse - inverse[:, j].outer(inverse[j] / inverse[j, j])
        stay = [i for i in range(len(names)) if i != j]
        weight, inverse = weight[:, stay], inverse[stay][:, stay]
        plain.append(names.pop(j))
    assert own.removal_order() == plain


@pytest.mark.parametrize("dim", [1, 2])
def test_duplicated_and_dead_units_cost_nothing(dim):
    x, layer = inputs(8), linear(8)
    x[:, 2 * dim : 3 * dim] = 0.0  # dead on all data
    x[:, 3 * dim : 4 * dim] = x[:, :dim]  # a copy of the first unit
    own = projection(x, layer, 1e-6, dim)
    order = own.removal_order()
    assert 2 in order[:2] and len({0, 3} & set(order[:2])) == 1
    kept = sorted(order[2:])
    weight, bias = own.solve(kept)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert own.error(weight, kept) < 1e-9
    torch.testing.assert_close(
        weight @ x[:, own.columns(kept)].double().T + bias[:, None], layer(x).detach().double().T, rtol=1e-3, atol=1e-3
    )


def test_inputs_that_are_all_dead_or_constant():
    layer = linear(4)
    for x in (
        torch.zeros(TOKENS, 4),
        torch.full((TOKENS, 4), 3.0),
        torch.tensor([[0.1, 1e3, -0.7, 1e-3]]).repeat(TOKENS, 1),
    ):
        own = projection(x, layer, 1e-4)
        assert sorted(own.removal_order()) == [0, 1, 2, 3]
        weight, bias = own.solve([1])
        torch.testing.assert_close(
            bias + weight @ x[0, [1]].double(), layer(x[0]).detach().double(), rtol=1e-4, atol=1e-4
        )
        assert weight.isfinite().all() and own.error(weight, [1]) >= 0


def test_float32_products_are_as_good_as_float64():
    x, layer = inputs(32), linear(32)
    x[:, 0] += 30  # a mean far above the spread
    exact = torch.cov(x.double().T, correction=0)
    found = projection(x, layer).gram
    assert (found - exact).abs().max() < 1e-4 * exact.diagonal().mean()


def test_second_moments_of_wide_inputs_are_made_in_blocks_and_whole():
    x = inputs(900)
    moments = Moments(900)
    for part in x.split(100):
        moments.add(part)
    exact = x.double().T @ x.double()
    assert torch.equal(moments.xx, moments.xx.T) and (moments.xx - exact).abs().max() < 1e-6 * exact.diagonal().mean()


def test_moments_over_ranks_are_those_of_all_tokens():
    x, y = inputs(5), inputs(3, seed=4)
    whole, parts = Moments(5, 3), [Moments(5, 3), Moments(5, 3)]
    whole.add(x, y)
    parts[0].add(x[:100], y[:100])
    parts[1].add(x[100:], y[100:])
    flat = [torch.cat([torch.tensor([p.tokens]).double(), *(t.flatten() for t in p._sums)]) for p in parts]
    found = parts[0].reduced(lambda tensor: flat[0] + flat[1])
    assert found.tokens == TOKENS
    for one, other in zip(found.second(True), whole.second(True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_refit_fits_other_inputs_and_targets(bias):
    x, layer, target = inputs(7), linear(7, bias), inputs(HIDDEN, seed=5)
    target = target + x @ torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(6))
    moments = Moments(7, HIDDEN)
    moments.add(x, target)
    weight, offset = refit(layer.weight.detach(), layer.bias.detach() if bias else None, moments, 1e-10)
    design = torch.cat([x, torch.ones(TOKENS, 1)], 1).double() if bias else x.double()
    expected = torch.linalg.lstsq(design, target.double()).solution
    torch.testing.assert_close(weight, expected[:7].T, rtol=1e-3, atol=2e-3)  # products in float32
    if bias:
        torch.testing.assert_close(offset, expected[7], rtol=1e-3, atol=2e-3)


def test_refit_leaves_directions_without_data_alone():
    x, layer = inputs(6), linear(6)
    x[:, 4] = 0.0
    moments = Moments(6, HIDDEN)
    moments.add(x, torch.randn(TOKENS, HIDDEN))
    weight, _ = refit(layer.weight.detach(), layer.bias.detach(), moments, 1e-6)
    torch.testing.assert_close(weight[:, 4], layer.weight.detach()[:, 4].double())
    assert not torch.allclose(weight[:, 3], layer.weight.detach()[:, 3].double(), atol=1e-2)


@pytest.mark.parametrize("dim", [1, 2])
def test_rescaling_is_least_squares_over_units(dim):
    x, layer = inputs(4 * dim), linear(4 * dim)
    wanted = torch.tensor([0.5, 1.5, -2.0, 3.0])
    y = (x * wanted.repeat_interleave(dim)) @ layer.weight.detach().T + layer.bias.detach()
    y = y + 0.1 * inputs(HIDDEN, seed=8)
    moments = Moments(4 * dim, HIDDEN)
    moments.add(x, y)
    found = rescale(layer.weight.detach(), layer.bias.detach(), moments, dim, damping=1e-12)
    parts = [x[:, u * dim : (u + 1) * dim] @ layer.weight.detach()[:, u * dim : (u + 1) * dim].T for u in range(4)]
    design = torch.stack([part.flatten() for part in parts], 1).double()
    expected = torch.linalg.lstsq(design, (y - layer.bias.detach()).flatten()[:, None].double()).solution[:, 0]
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_factors_out_of_range_are_refused():
    x, layer = inputs(3), linear(3)
    for factor, accepted in ((0.99 * FACTORS[1], True), (1.01 * FACTORS[1], False), (1.01 * FACTORS[0], False)):
        moments = Moments(3, HIDDEN)
        moments.add(x, factor * x @ layer.weight.detach().T + layer.bias.detach())
        assert (rescale(layer.weight.detach(), layer.bias.detach(), moments, 1, 1e-12) is not None) == accepted


def test_moments_that_are_not_finite_are_refused():
    moments = Moments(2)
    moments.add(torch.tensor([[1e30, 1.0]]))
    with pytest.raises(ValueError, match="must be finite"):
        moments.reduced(None)


def test_greedy_heads_equal_the_best_pair_when_heads_are_independent():
    generator = torch.Generator().manual_seed(9)
    x, layer = torch.randn(4000, 8, generator=generator), linear(8)
    own = projection(x, layer, dim=2)
    kept = sorted(own.removal_order()[2:])
    errors = {
        pair: best(x, layer, [u * 2 + i for u in pair for i in range(2)])[2]
        for pair in itertools.combinations(range(4), 2)
    }
    assert errors[tuple(kept)] == min(errors.values())
