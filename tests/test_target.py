"""A target becomes sizes that meet it, as measured, and the recipe that reaches these sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import tiny
from transformers import PreTrainedModel

import smbert.target
from smbert.context import Context
from smbert.measure import count_parameters, macs
from smbert.objectives import LogitsObjective
from smbert.recipe import Recipe
from smbert.report import Row
from smbert.stages import DepthReduction, Distill, Finetune, Outline, WidthPruning
from smbert.surgery import PruningPlan, keep_units, structure_of
from smbert.target import Sizes, Target, candidates, cut_to, sizes_for, with_sizes

RECOVERY = Distill(objectives=(LogitsObjective(),))
CHAIN = Recipe(
    stages=(DepthReduction(), DepthReduction(), Distill(), WidthPruning(iterations=2), RECOVERY), name="chain"
)


def row(name: str, params: int = 100, p50: float = 10.0) -> Row:
    return Row(
        name=name,
        task="tiny",
        seed=0,
        metric_name="accuracy",
        metric=0.9,
        params_total=params,
        latency_ms={"32x128": {"p50": p50, "p95": p50}},
    )


# --- what may be asked -------------------------------------------------------------------------------------------------


def test_a_target_is_one_goal_and_a_shape() -> None:
    assert Target.of({"speedup": 6}) == Target("speedup", 6, (32, 128))
    assert Target.of({"params": "35%"}) == Target("params", "35%", (32, 128))
    assert Target.of({"latency_ms": 12.5, "shape": "1x64"}) == Target("latency_ms", 12.5, (1, 64))
    assert Target.of({"latency_ms": 12.5, "shape": "1x64"}).shape_name == "1x64"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "must have one of the keys speedup, params, latency_ms, got"),
        ({"speedup": 2, "params": 0.5}, "must have one of the keys"),
        ({"faster": 2}, "must have one of the keys"),
        ({"shape": "1x128"}, "must have one of the keys"),
        ({"speedup": 1}, "`speedup` must be a number above 1, got 1"),
        ({"speedup": "6x"}, "`speedup` must be a number above 1, got '6x'"),
        ({"speedup": float("nan")}, "`speedup` must be a number above 1, got nan"),
        ({"speedup": float("inf")}, "`speedup` must be a number above 1, got inf"),
        ({"speedup": True}, "`speedup` must be a number above 1, got True"),
        ({"latency_ms": 0}, "`latency_ms` must be a number above 0, got 0"),
        ({"params": "135%"}, "`params` as a share must be above 0 and at most 1"),
        ({"params": "few"}, "`params` must be a number or a share, got 'few'"),
        ({"speedup": 2, "shape": "32"}, "`shape` must look like"),
        ({"speedup": 2, "shape": "0x128"}, "`shape` must look like"),
        ({"speedup": 2, "shape": "1x-8"}, "`shape` must look like"),
    ],
)
def test_other_targets_are_refused(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Target.of(values)
    assert "To resolve" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "teacher", "student", "measured", "met"),
    [
        ({"speedup": 4}, row("t", p50=40), row("s", p50=10), 4.0, True),
        ({"speedup": 4}, row("t", p50=40), row("s", p50=10.4), 3.846, True),  # within the measuring noise
        ({"speedup": 4}, row("t", p50=40), row("s", p50=11), 3.636, False),
        ({"latency_ms": 10}, row("t"), row("s", p50=10.4), 10.4, True),
        ({"latency_ms": 10}, row("t"), row("s", p50=10.6), 10.6, False),
        ({"params": "35%"}, row("t", params=1000), row("s", params=350), 350.0, True),
        ({"params": "35%"}, row("t", params=1000), row("s", params=351), 351.0, False),
        ({"params": 350}, row("t", params=10), row("s", params=351), 351.0, False),
    ],
)
def test_the_outcome_says_what_was_asked_measured_and_met(
    target: Mapping[str, Any], teacher: Row, student: Row, measured: float, met: bool
) -> None:
    outcome = Target.of(target).outcome(teacher, student)
    (goal,) = target
    assert outcome["goal"] == goal
    assert outcome["asked"] == target[goal]
    assert (outcome["measured"], outcome["met"]) == (measured, met)
    assert outcome.get("shape") == (None if goal == "params" else "32x128")


# --- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_candidates_get_smaller_and_can_be_built(family: str) -> None:
    model = tiny(family)
    options = candidates(model)
    assert options[0] == Sizes(4, 4, 64)
    assert {o.layers for o in options} == {1, 2, 3, 4}
    costs = [macs(cut_to(model, o)) for o in options]
    assert costs == sorted(set(costs), reverse=True)
    for option in options:
        assert structure_of(cut_to(model, option)).layer_widths == ((option.heads, option.ffn),) * option.layers


def test_candidates_of_an_uneven_model_exist_in_all_its_layers() -> None:
    model = tiny("bert")
    plan = PruningPlan(
        heads=((0, 1, 2, 3), (0, 1), (0, 1, 2), (1, 3)), ffn=(tuple(range(64)),) * 3 + (tuple(range(32)),)
    )
    uneven = keep_units(model, plan)
    assert max(o.heads for o in candidates(uneven)) == 2
    assert max(o.ffn for o in candidates(uneven)) == 32
    even = with_sizes(CHAIN, uneven, Sizes(4, 2, 32))
    assert next(s for s in even.stages if isinstance(s, WidthPruning)).heads == 2


@pytest.mark.parametrize("asked", ["90%", "75%", "60%", 20_000, 15_000])
def test_parameters_give_the_largest_shape_that_fits(asked: Any) -> None:
    model = tiny("bert")
    total = count_parameters(model).total
    limit = asked if isinstance(asked, int) else int(asked[:-1]) * total // 100
    sizes = sizes_for(Target.of({"params": asked}), model)
    counts = {o: count_parameters(cut_to(model, o)).total for o in candidates(model)}
    assert counts[sizes] <= limit < total
    # `candidates` are ordered by MACs: none before the chosen one fits.
    assert all(counts[o] > limit for o in candidates(model)[: candidates(model).index(sizes)])


def clock(monkeypatch: pytest.MonkeyPatch, fixed_ms: float = 0.0) -> list[str]:
    """Time is proportional to MACs, plus `fixed_ms`; the list gets the shapes that were timed."""
    asked: list[str] = []

    def latency(
        models: Mapping[str, PreTrainedModel], shapes: Sequence[tuple[int, int]], **_: Any
    ) -> dict[str, dict[str, dict[str, float]]]:
        names = [f"{b}x{s}" for b, s in shapes]
        asked.extend(names)
        return {
            name: {shape: {"p50": fixed_ms + macs(model, s) / 1e6} for shape, (_, s) in zip(names, shapes)}
            for name, model in models.items()
        }

    monkeypatch.setattr(smbert.target, "latency", latency)
    return asked


@pytest.mark.parametrize("speedup", [1.3, 2, 3.7, 6])
def test_a_speedup_gives_the_slowest_shape_that_is_fast_enough(speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clock(monkeypatch)
    model = tiny("bert")
    sizes = sizes_for(Target.of({"speedup": speedup, "shape": "2x128"}), model)
    reached = {o: macs(model) / macs(cut_to(model, o)) for o in candidates(model)}
    assert sizes == next(o for o in candidates(model) if reached[o] >= speedup)
    assert set(asked) == {"2x128"}
    assert len(asked) <= 7  # bisection, not a walk through all


def test_a_latency_counts_what_every_shape_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, fixed_ms=5.0)
    model = tiny("bert")
    sizes = sizes_for(Target.of({"latency_ms": 7.0}), model)
    assert sizes == next(o for o in candidates(model) if 5.0 + macs(cut_to(model, o)) / 1e6 <= 7.0)


def test_a_larger_teacher_is_what_speed_and_share_refer_to(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    model, teacher = tiny("bert"), tiny("bert", layers=8, hidden_size=64, num_attention_heads=8, intermediate_size=256)
    sizes = sizes_for(Target.of({"speedup": macs(teacher) / macs(model)}), model, teacher)
    assert sizes == candidates(model)[0]  # the student as it is, whose sizes the teacher's would not fit
    share = count_parameters(model).total / count_parameters(teacher).total
    assert sizes_for(Target.of({"params": f"{100 * share + 1:.0f}%"}), model, teacher) == candidates(model)[0]


def test_a_target_out_of_reach_says_what_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, fixed_ms=5.0)
    model = tiny("bert")
    for target, reached in (
        ({"speedup": 50}, r"reaches \d\.\d\dx"),
        ({"latency_ms": 1}, r"reaches \d\.\d ms"),
        ({"params": 10}, r"reaches 0\.0\d M"),
    ):
        with pytest.raises(ValueError, match=f"out of reach: the smallest shape .*{reached}. To resolve"):
            sizes_for(Target.of(target), model)


# --- the recipe --------------------------------------------------------------------------------------------------------


def kinds(recipe: Recipe) -> list[tuple[str, Any]]:
    """What the depth and width stages are set to."""
    return [
        (
            s.kind,
            s.layers if isinstance(s, DepthReduction) else (s.heads, s.ffn) if isinstance(s, WidthPruning) else None,
        )
        for s in recipe.stages
    ]


@pytest.mark.parametrize(
    ("layers", "sizes", "stages"),
    [
        (12, Sizes(3, 3, 48), [("depth_reduction", 6), ("depth_reduction", 3), ("distill", None), ("width_pruning", (3, 48)), ("distill", None)]),
        (12, Sizes(11, 4, 64), [("depth_reduction", 11), ("distill", None), ("distill", None)]),
        (4, Sizes(4, 2, 64), [("distill", None), ("width_pruning", (2, 64)), ("distill", None)]),
        (4, Sizes(1, 4, 32), [("depth_reduction", 2), ("depth_reduction", 1), ("distill", None), ("width_pruning", (4, 32)), ("distill", None)]),
    ],
)  # fmt: skip
def test_a_recipe_gets_the_sizes_and_loses_stages_without_work(
    layers: int, sizes: Sizes, stages: list[tuple[str, Any]], context: Context
) -> None:
    model = tiny("bert", layers=layers)
    recipe = with_sizes(CHAIN, model, sizes)
    assert kinds(recipe) == stages
    after = recipe.check(Outline(structure_of(model)), replace(context, teacher=model))
    assert after.structure.layer_widths == ((sizes.heads, sizes.ffn),) * sizes.layers
    # All else is as it was.
    width = [s for s in recipe.stages if isinstance(s, WidthPruning)]
    assert all(s.iterations == 2 for s in width)
    assert recipe.name == "chain"


def test_a_budget_gives_way_to_the_sizes() -> None:
    model = tiny("bert")
    chain = Recipe(stages=(WidthPruning(params="50%"), Distill(), WidthPruning(macs="50%", scorer="fisher")))
    first, second = with_sizes(chain, model, Sizes(4, 2, 32)).stages
    assert isinstance(first, Distill)
    assert second == WidthPruning(heads=2, ffn=32, scorer="fisher")


def test_a_recipe_that_cannot_reach_the_sizes_is_refused() -> None:
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"`target` needs a depth_reduction stage .*To resolve"):
        with_sizes(Recipe(stages=(WidthPruning(),)), model, Sizes(2, 2, 32))
    with pytest.raises(ValueError, match=r"`target` needs a width_pruning stage .*To resolve"):
        with_sizes(Recipe(stages=(DepthReduction(), Finetune())), model, Sizes(2, 2, 32))
    with pytest.raises(ValueError, match=r"`keep` of a depth_reduction stage lists them: \[0, 3\]. To resolve"):
        with_sizes(Recipe(stages=(DepthReduction(keep=(0, 3)),)), model, Sizes(2, 4, 64))
