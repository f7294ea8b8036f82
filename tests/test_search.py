"""Sizes under a budget: optimal against brute force, never above the budget, refined by what is measured."""

from __future__ import annotations

import itertools
import random

import pytest
from tiny_models import tiny

from smbert.measure import count_parameters, macs
from smbert.retraining_free.cost_table import CostTable, counted_costs
from smbert.retraining_free.search import Options, check_reachable, find_sizes, fit, options_of
from smbert.surgery import PruningPlan, keep_units, structure_of


def case(seed: int, integer: bool) -> tuple[list[Options], list[float]]:
    """Four sub-layers of up to five sizes with random falling errors and random rising costs."""
    rng = random.Random(seed)
    options = []
    for _ in range(4):
        n = rng.randint(2, 5)
        errors = [*sorted((rng.random() for _ in range(n - 1)), reverse=True), 0.0]
        costs = [0, *sorted(rng.randint(1, 40) if integer else rng.uniform(0.1, 40) for _ in range(n - 1))]
        options.append(Options(range(n), errors, costs))
    return options, [rng.uniform(0.1, 3) for _ in range(4)]


def brute_force(options, coefficients, budget):
    best = float("inf")
    for choice in itertools.product(*(range(len(option.sizes)) for option in options)):
        if sum(option.costs[i] for option, i in zip(options, choice)) <= budget:
            best = min(best, sum(c * o.errors[i] for c, o, i in zip(coefficients, options, choice)))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("integer", [True, False])
def test_dynamic_programming_is_optimal(seed, integer):
    options, coefficients = case(seed, integer)
    most = sum(option.costs[-1] for option in options)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = share * most
        sizes = fit(options, coefficients, budget)
        found = [option.sizes.index(size) for option, size in zip(options, sizes)]
        assert sum(option.costs[i] for option, i in zip(options, found)) <= budget + 1e-9
        loss = sum(c * o.errors[i] for c, o, i in zip(coefficients, options, found))
        assert loss == pytest.approx(brute_force(options, coefficients, budget), abs=1e-12)


def test_large_costs_are_rounded_up_and_never_exceed_the_budget():
    rng = random.Random(0)
    options = []
    for _ in range(6):
        costs = sorted(rng.randint(10**8, 10**9) for _ in range(8))
        options.append(Options(range(8), [*sorted((rng.random() for _ in range(7)), reverse=True), 0.0], costs))
    least = sum(option.costs[0] for option in options)
    for budget in (least, int(1.001 * least), 3 * 10**9):
        sizes = fit(options, [1.0] * 6, budget)
        assert sum(option.costs[size] for option, size in zip(options, sizes)) <= budget
    with pytest.raises(ValueError, match="cheapest"):
        fit(options, [1.0] * 6, least - 1)


def test_a_measured_latency_may_make_a_larger_size_cheaper():
    options = [Options((0, 1, 2), (1.0, 0.4, 0.0), (0.0, 3.0, 2.5))]
    assert fit(options, [1.0], 2.5) == [2] and fit(options, [1.0], 2.4) == [0]


def test_of_equal_losses_the_larger_size_stays():
    options = [Options((0, 1, 2), (1.0, 0.0, 0.0), (0, 1, 2)), Options((0, 1), (0.5, 0.0), (0, 1))]
    assert fit(options, [1.0, 1.0], 3) == [2, 1] and fit(options, [1.0, 1.0], 2) == [1, 1]


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_counted_costs_are_what_is_measured(family):
    model = tiny(family)
    widths = [(1, 8), (0, 64), (4, 0), (3, 24)]
    plan = PruningPlan(tuple(tuple(range(h)) for h, _ in widths), tuple(tuple(range(f)) for _, f in widths))
    pruned = keep_units(model, plan)
    heads, ffn = zip(*widths)
    assert counted_costs(model, "macs", heads, ffn, 32).total(widths) == macs(pruned, 32)
    assert counted_costs(model, "params", heads, ffn).total(widths) == count_parameters(pruned).total
    table = counted_costs(model, "macs", heads, ffn)
    with pytest.raises(ValueError, match=r"size of 2 heads, it holds \[0, 1, 3, 4\].*To resolve"):
        table.total([(2, 8)] * 4)


def planted(weights):
    """Eight sub-layers of three sizes with the same errors, whose true importance the errors do not tell."""
    errors = [(1.0, 0.3, 0.0)] * 8
    table = CostTable("macs", 10, {0: 0, 1: 1, 2: 2}, {0: 0, 1: 1, 2: 2})
    options = options_of([((0, 1, 2), e) for e in errors], table)

    def loss(widths):
        flat = [size for pair in widths for size in pair]
        return sum(w * errors[0][size] for w, size in zip(weights, flat))

    return options, table, loss


def test_coefficients_are_measured_and_refined():
    weights = [5.0, 0.01, 4.0, 0.02, 3.0, 0.01, 5.0, 0.02]
    options, table, loss = planted(weights)
    plain = find_sizes(options, table, 18)
    found = find_sizes(options, table, 18, loss, steps=0)
    assert found.widths == [(2, 0)] * 4 and found.cost == 18 and found.loss == pytest.approx(0.06)
    assert loss(plain.widths) > found.loss and plain.loss is None
    assert found.evaluations == 2  # of fits; what each of eight does alone is not counted


def test_a_sublayer_without_which_nothing_is_finite_is_kept_and_the_others_are_ranked():
    options, table, plain = planted([1.0, 0.01, 4.0, 0.02, 3.0, 0.01, 5.0, 0.02])

    def loss(widths):
        return float("inf") if widths[0][0] < 2 else plain(widths)

    found = find_sizes(options, table, 18, loss, steps=0)
    assert found.widths == [(2, 0)] * 4 and found.loss == pytest.approx(0.06)
    assert found.coefficients[0] == pytest.approx(50) and max(found.coefficients[1:]) == pytest.approx(5)


def test_the_search_never_makes_it_worse_and_repeats_itself():
    rng = random.Random(3)
    interactions = {(i, j): rng.uniform(-0.5, 2) for i in range(8) for j in range(i)}
    options, table, plain = planted([rng.uniform(0.5, 1.5) for _ in range(8)])

    def loss(widths):
        flat = [size for pair in widths for size in pair]
        return plain(widths) + sum(w for (i, j), w in interactions.items() if flat[i] < 2 and flat[j] < 2)

    before = find_sizes(options, table, 18, loss, steps=0)
    after = find_sizes(options, table, 18, loss, steps=40, seed=1)
    again = find_sizes(options, table, 18, loss, steps=40, seed=1)
    assert after.loss < before.loss and after.cost <= 18
    assert (after.widths, after.loss) == (again.widths, again.loss)
    assert before.evaluations < after.evaluations <= before.evaluations + 40


def test_a_rough_loss_leads_the_search_and_the_real_one_judges_the_finalists():
    options, table, loss = planted([5.0, 1.0, 4.0, 2.0, 3.0, 1.5, 5.0, 0.5])
    rough_of, judged, given_up = {}, [], []

    def rough(widths, enough):
        widths = tuple(widths)
        exact = rough_of.setdefault(widths, loss(widths) * random.Random(f"3{widths}").uniform(0.3, 1.7))
        if exact <= enough:
            return exact
        given_up.append(widths)
        return (enough + exact) / 2

    def real(widths):
        judged.append(tuple(widths))
        return loss(widths)

    found = find_sizes(options, table, 18, real, rough, steps=40)
    within = [widths for widths in rough_of if table.total(widths) <= 18]
    assert judged == sorted(within, key=rough_of.__getitem__)[:4] and len(within) > len(given_up) > 20
    assert found.loss == min(map(loss, judged)) == loss(found.widths) and found.evaluations == len(within)
    assert found.loss < loss(judged[0])  # what looked best was not
    # The coefficients are those of the winner, and a search that goes on from them measures nothing else first.
    again = find_sizes(options, table, 18, real, rough, steps=0, start=found.coefficients)
    assert again.widths == found.widths and again.evaluations == 1
    on = find_sizes(options, table, 15, loss, steps=20, start=found.coefficients)
    assert on.cost <= 15 and on.loss <= find_sizes(options, table, 15, loss, steps=0, start=found.coefficients).loss


def test_out_of_reach_says_the_smallest():
    model = tiny("bert")
    (heads, ffn), layers = structure_of(model).layer_widths[0], 4
    table = counted_costs(model, "params", range(heads + 1), (0, ffn))
    options = options_of([((0, heads), (1.0, 0.0)), ((0, ffn), (1.0, 0.0))] * layers, table)
    least = int(table.fixed)
    assert find_sizes(options, table, least).widths == [(0, 0)] * layers
    with pytest.raises(ValueError, match=rf"`params` must be at least {least:,}.*got {least - 1:,}.*To resolve"):
        find_sizes(options, table, least - 1)
    slow = CostTable("latency_ms", 2.5, {0: 0.0}, {0: 0.25})
    with pytest.raises(ValueError, match=r"`latency_ms` must be at least 2.75.*got 1.5"):
        check_reachable([Options((0,), (0.0,), (0.0,)), Options((0,), (0.0,), (0.25,))], slow, 1.5)
