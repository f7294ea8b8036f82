"""The latency table: what it holds, whose it is, and that it adds up to the whole model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny

import smbert.retraining_free.latency_table as module
import smbert.stages.retraining_free as stage_module
from smbert.modeling import FAMILIES
from smbert.retraining_free.latency_table import Conditions, latency_table, machine
from smbert.retraining_free.served import with_small_vocabulary
from smbert.stages.retraining_free import RetrainingFreePruning
from smbert.surgery import PruningPlan, keep_units, structure_of

SMALL = Conditions(batch=2, length=8, threads=1)
QUICK = {"min_runs": 2, "min_seconds": 0.0}


@pytest.fixture
def no_engine(monkeypatch):
    """Whoever measures now fails."""

    def refuse(*args):
        raise AssertionError("measured again")

    return lambda: monkeypatch.setattr(module, "_measured", refuse)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_every_family(family, tmp_path):
    model = tiny(family, layers=2)
    table = latency_table(model, range(5), (0, 32, 64), SMALL, tmp_path, **QUICK)
    assert table.name == "latency_ms" and table.fixed > 0
    assert sorted(table.heads) == [0, 1, 2, 3, 4] and sorted(table.ffn) == [0, 32, 64]
    assert table.heads[0] == table.ffn[0] == 0 and min([*table.heads.values(), *table.ffn.values()]) >= 0
    assert table.total([(0, 0)] * 2) == table.fixed <= table.total([(4, 64)] * 2)


def test_the_sum_is_the_whole_model(tmp_path, monkeypatch):
    """With known times in place of measured ones: an empty model 2 ms, layers alone twice as fast as within the model."""
    times = {"whole": 20.0, "empty": 2.0, "0 0": 0.5, "0 2": 1.0, "0 4": 2.0, "1 0": 0.5, "1 64": 5.5, "1 32": 3.5}

    def timed(models, batches, **options):
        assert set(models) == set(times) == set(batches)
        with torch.no_grad():
            for name, one in models.items():
                one(**batches[name][0])
        return {name: {"ms": {"p10": times[name]}} for name in models}

    monkeypatch.setattr(module, "latency_on", timed)
    model = tiny("bert", layers=2)
    table = latency_table(model, (2, 4), (32, 64), SMALL, tmp_path)
    # Both layers: 2 * (1.5 + 5) = 13 alone, 18 within the model.
    assert table.total([(4, 64)] * 2) == pytest.approx(20)
    assert table.total([(2, 0), (0, 32)]) == pytest.approx(2 + 18 / 13 * (0.5 + 3))


def test_measured_once_per_machine_model_and_conditions(tmp_path, no_engine):
    model = tiny("bert", layers=2)
    first = latency_table(model, (2, 4), (32, 64), SMALL, tmp_path / "cache", **QUICK)
    assert len(list((tmp_path / "cache").glob("latency-*.json"))) == 1
    no_engine()
    assert latency_table(model, (2, 4), (32, 64), SMALL, tmp_path / "cache") == first
    assert latency_table(tiny("bert", layers=2, seed=5), (4, 2), (64, 32), SMALL, tmp_path / "cache") == first
    with pytest.raises(AssertionError, match="measured again"):
        latency_table(model, (2, 4), (32, 64), Conditions(3, 8, 1), tmp_path / "cache")
    for other in (tiny("bert", layers=3), tiny("bert", layers=2, hidden_act="relu")):
        with pytest.raises(AssertionError, match="measured again"):
            latency_table(other, (2, 4), (32, 64), SMALL, tmp_path / "cache")


def test_models_of_several_vocabularies_are_timed_on_tokens_that_all_have():
    models = {"large": tiny("bert", layers=1), "small": tiny("bert", layers=1, vocab_size=20)}
    assert models["large"].config.vocab_size > 20
    ms = module.whole_models_ms(models, SMALL, **QUICK)
    assert ms.keys() == models.keys() and min(ms.values()) > 0


@pytest.fixture
def table_file(tmp_path):
    file = tmp_path / "table.json"
    latency_table(tiny("bert", layers=2), (2, 4), (32, 64), SMALL, file, **QUICK)
    return file


def altered(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"machine": {**machine(), "cpu": "Z80"}}, r"another machine \(cpu Z80 and not .*force_table"),
        ({"engine": "onnx"}, r"another engine \(onnx and not torch\).*force_table"),
    ],
)
def test_tables_of_other_machines_and_engines_are_refused_unless_forced(table_file, no_engine, changes, told):
    altered(table_file, **changes)
    no_engine()
    model = tiny("bert", layers=2)
    with pytest.raises(ValueError, match=told) as error:
        latency_table(model, (2, 4), (32, 64), SMALL, table_file)
    assert "To resolve" in str(error.value)
    assert latency_table(model, (2, 4), (32, 64), SMALL, table_file, force=True).fixed > 0


@pytest.mark.parametrize("force", [False, True])
def test_tables_of_other_shapes_models_and_sizes_are_always_refused(table_file, force):
    model = tiny("bert", layers=2)
    for conditions, told in (
        (Conditions(4, 8, 1), "another batch"),
        (Conditions(2, 9, 1), "another length"),
        (Conditions(2, 8, 2), "another threads"),
    ):
        with pytest.raises(ValueError, match=rf"{told} .*To resolve"):
            latency_table(model, (2, 4), (32, 64), conditions, table_file, force=force)
    eager = tiny("bert", layers=2)
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"another attention \(sdpa and not eager\).*To resolve"):
        latency_table(eager, (2, 4), (32, 64), SMALL, table_file, force=force)
    with pytest.raises(ValueError, match=r"another model .*layer_widths.*To resolve"):
        latency_table(tiny("bert", layers=3), (2, 4), (32, 64), SMALL, table_file, force=force)
    with pytest.raises(ValueError, match=r"heads sizes \[1, 3\] too.*To resolve"):
        latency_table(model, (1, 2, 3, 4), (32, 64), SMALL, table_file, force=force)
    table_file.write_text("{}")
    with pytest.raises(ValueError, match=r"must be a latency table.*To resolve"):
        latency_table(model, (2, 4), (32, 64), SMALL, table_file, force=force)


def test_bad_conditions(tmp_path):
    for values, told in (
        ({"engine": "tvm"}, "`engine` must be one of torch"),
        ({"batch": 0}, "`batch`"),
        ({"length": 0}, "`length`"),
    ):
        with pytest.raises(ValueError, match=rf"{told}.*To resolve"):
            Conditions(**values)
    with pytest.raises(ValueError, match=r"`length` must be at most 64.*To resolve"):
        latency_table(tiny("bert"), (4,), (64,), Conditions(1, 65), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_behind_onnx_runtime(family, tmp_path, monkeypatch):
    """Every size is a model of one layer, and each graph answers as its model does."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    seen = {}

    def timed(models, batches, **options):
        seen.update({name: one(**batches[0]) for name, one in models.items()})
        return {name: {"ms": {"p10": 1.0 + number}} for number, name in enumerate(models)}

    model = tiny(family, layers=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "latency_on", timed)
        latency_table(model, (2, 4), (32, 64), replace(SMALL, engine="onnx"), tmp_path / "known")
    assert sorted(seen) == ["0 0", "0 2", "0 4", "1 0", "1 32", "1 64", "empty", "whole"]
    few = with_small_vocabulary(model)
    inputs = module._inputs(few, SMALL)
    with torch.no_grad():
        torch.testing.assert_close(seen["whole"], few(**inputs).logits, rtol=1e-4, atol=1e-5)
        for name, cut, _ in module._cut(few, ([0, 2, 4], [0, 32, 64])):
            torch.testing.assert_close(seen[name], cut(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen["0 2"], seen["0 4"]) and not torch.allclose(seen["1 32"], seen["1 64"])
    table = latency_table(model, (2, 4), (32, 64), replace(SMALL, engine="onnx"), tmp_path, **QUICK)
    assert table.fixed > 0 and min([*table.heads.values(), *table.ffn.values()]) >= 0


def test_the_stage_asks_the_engine(context, tmp_path):
    pytest.importorskip("onnxruntime")
    options = {"samples": 64, "calibration": 16, "search_steps": 0, "ffn_levels": 4, "shape": "2x16", "threads": 1}
    stage = RetrainingFreePruning(latency_ms=1e6, engine="onnx", **options)
    pruned, info = stage.run(tiny("bert", layers=2), context, tmp_path)
    assert info["latency_ms"]["measured"] > 0 and structure_of(pruned).num_layers == 2
    (file,) = context.cache_dir.glob("latency-*.json")
    assert json.loads(file.read_text())["engine"] == "onnx"


def test_folders_from_before_there_were_engines_go_on():
    assert "engine" not in RetrainingFreePruning(speedup=2).to_dict()


def test_engines_that_cannot_time(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`engine` must be one of torch, onnx, openvino, got 'tensorrt'.*To resolve"):
        Conditions(engine="tensorrt")
    with pytest.raises(ValueError, match=r"`engine` must be torch for a model without a task head.*To resolve"):
        latency_table(tiny("bert", head="encoder", layers=2), (2,), (32,), replace(SMALL, engine="onnx"), tmp_path)
    monkeypatch.setattr(module.check_engine.__globals__["importlib"].util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`engine` onnx needs onnx. To resolve, pip install smbert\[onnx\]"):
        RetrainingFreePruning(speedup=2, engine="onnx")


def test_uneven_models_have_tables_too(tmp_path):
    model = tiny("mpnet", layers=2)
    plan = PruningPlan(heads=((1, 2, 3), ()), ffn=((), tuple(range(40))))
    pruned = keep_units(model, plan)
    table = latency_table(pruned, (3,), (40,), SMALL, tmp_path, **QUICK)
    assert sorted(table.heads) == [0, 3] and sorted(table.ffn) == [0, 40]
    assert table.total(structure_of(pruned).layer_widths) >= table.fixed


@pytest.mark.parametrize("pace", [0.9, 1.0, 1.3])
def test_the_stage_prunes_to_a_time(context, tmp_path, monkeypatch, pace):
    """Known costs: heads 1 ms, 8 neurons 1 ms, 4 ms for the rest, 52 ms for the model of 4 layers.

    Models that are pruned take `pace` times as long, and the machine takes twice as long as when the table was made.
    """

    def engine(model, heads, ffn, conditions, runs, seconds):
        assert (conditions.batch, conditions.length, conditions.threads) == (2, 16, 1)
        return module.CostTable("latency_ms", 4.0, {n: float(n) for n in heads}, {n: n / 8 for n in ffn})

    def cost_of(model):
        return 4 + sum(heads + ffn / 8 for heads, ffn in structure_of(model).layer_widths)

    def timed(models, *_, **__):
        return {"before": 2 * cost_of(models["before"]), "after": 2 * pace * cost_of(models["after"])}

    monkeypatch.setattr(module, "_measured", engine)
    monkeypatch.setattr(stage_module, "whole_models_ms", timed)
    options = {"samples": 64, "calibration": 16, "search_steps": 2, "ffn_levels": 4, "shape": "2x16", "threads": 1}
    model = tiny("bert")
    # Of a factor the share counts, whatever the table's milliseconds.
    for budget, limit, own in (({"speedup": 2}, 26.0, pace), ({"latency_ms": 24.0}, 24.0, 2 * pace)):
        pruned, info = RetrainingFreePruning(**budget, **options).run(model, context, tmp_path)
        cost = cost_of(pruned)
        assert 0.8 * limit < own * cost <= limit
        assert info["latency_ms"]["measured"] == pytest.approx(2 * pace * cost)
        assert info["latency_ms"]["predicted"] == pytest.approx(2 * pace * cost)
        assert info["latency_ms"]["pace"] == pytest.approx(own)
        assert info["budget"] == {"name": "latency_ms", "asked": limit, "reached": pytest.approx(own * cost)}
    pruned, info = RetrainingFreePruning(method="fisher", speedup=2, **options).run(model, context, tmp_path)
    assert info["latency_ms"]["predicted"] <= info["latency_ms"]["before"] / 2 and info["latency_ms"]["pace"] == 1
    # What its real pace puts out of reach is still made, and the record tells.
    _, info = RetrainingFreePruning(latency_ms=7.0, **options).run(model, context, tmp_path)
    assert info["budget"]["reached"] == pytest.approx(info["latency_ms"]["measured"]) and info["budget"]["reached"] > 7
    with pytest.raises(ValueError, match=r"`latency_ms` must be at least 4, the smallest.*got 3.*To resolve"):
        RetrainingFreePruning(latency_ms=3, **options).run(model, context, tmp_path)


@pytest.mark.parametrize(
    ("method", "budget"), [("obs", {"speedup": 1.5}), ("fisher", {"speedup": 1.5}), ("kprune", {"macs": "60%"})]
)
def test_timed_and_left_with_the_models_own_attention(context, tmp_path, monkeypatch, method, budget):
    seen = []

    def timed(models, batches, **options):
        seen.extend(one.config._attn_implementation for one in models.values() if hasattr(one, "config"))
        ms = {"whole": 20.0, "empty": 2.0}
        return {name: {"ms": {"p10": ms.get(name) or 1 + float(name.split()[1])}} for name in models}

    monkeypatch.setattr(module, "latency_on", timed)
    monkeypatch.setattr(RetrainingFreePruning, "_measured", lambda *_, **__: {"predicted": 1.0, "measured": 1.0})
    model = tiny("bert", layers=2)
    assert model.config._attn_implementation == "sdpa"
    options = {"samples": 64, "calibration": 16, "search_steps": 0, "ffn_levels": 4, "shape": "2x16", "threads": 1}
    pruned, _ = RetrainingFreePruning(method=method, **budget, **options).run(model, context, tmp_path)
    assert seen == (["sdpa", "sdpa"] if "speedup" in budget else [])
    assert pruned.config._attn_implementation == model.config._attn_implementation == "sdpa"
