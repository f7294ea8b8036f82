"""The stage prunes within its budget, close to the best that its sizes allow, without labels, and leaves its input alone."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_helpers import millisecond_per_mac
from tiny_models import batch, tiny

from smbert.allocate import Budget, plan_for
from smbert.importance import score
from smbert.measure import count_parameters, macs
from smbert.modeling import FAMILIES, encoder_layers
from smbert.retraining_free import obs
from smbert.retraining_free.calibration import SOFT, CalibrationLoss, divergence
from smbert.retraining_free.database import FILE
from smbert.retraining_free.latency_table import Conditions, latency_table, machine
from smbert.stages import Outline, retraining_free
from smbert.stages.base import batches_of_rank
from smbert.stages.retraining_free import RetrainingFreePruning
from smbert.surgery import PruningPlan, keep_units, load_model, save_model, structure_of

QUICK = {"samples": 64, "calibration": 32, "batch_size": 16, "search_steps": 4, "ffn_levels": 4}


def pruned_by(model, context, tmp_path, **options):
    return RetrainingFreePruning(**{**QUICK, **options}).run(model, context, tmp_path)


def batches_of(context, rows):
    return [context.collator([rows[i] for i in range(at, at + 16)]) for at in range(0, len(rows), 16)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_within_its_budget(family, context, tmp_path):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned, info = pruned_by(model, context, tmp_path, macs="50%")
    assert 0.4 * macs(model) < macs(pruned) <= macs(model) / 2
    assert info["budget"] == {"name": "macs", "asked": macs(model) // 2, "reached": macs(pruned)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert info["sampled_rows"] == 64
    save_model(pruned, tmp_path / "saved", context.tokenizer)
    inputs = {k: v for k, v in batches_of(context, context.data.validation)[0].items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "saved")(**inputs).logits, pruned(**inputs).logits)


def test_closer_to_the_original_than_importance_alone(context, tmp_path):
    model = tiny("bert")
    held_out = CalibrationLoss(model, batches_of(context, context.data.validation))
    taylor = score(model, batches_of(context, context.data.train), "taylor_kl")
    plan = plan_for(model, taylor, Budget(macs="50%", scope="global", min_heads=0, min_ffn=0))
    losses = {
        "taylor": held_out(keep_units(model, plan)),
        "obs": held_out(pruned_by(model, context, tmp_path, macs="50%", search_steps=12, fit_damping=None)[0]),
        "fitted": held_out(pruned_by(model, context, tmp_path, macs="50%", search_steps=12)[0]),
    }
    assert losses["obs"] < 0.7 * losses["taylor"]
    assert losses["fitted"] < 0.7 * losses["taylor"]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_still_the_originals_are_not_run_again(family):
    model = tiny(family)
    batches = [batch(model, 8, 16, seed=seed) for seed in range(3)]
    full = PruningPlan.full(model)
    pruned = keep_units(model, PruningPlan((*full.heads[:2], (0,), ()), (*full.ffn[:2], (1, 2), (3,))))
    loss, run = CalibrationLoss(model, batches, keep=True), []
    inside = next(m for m in encoder_layers(pruned)[1].modules() if isinstance(m, torch.nn.Linear))
    inside.register_forward_hook(lambda *_: run.append(1))
    plain = loss(pruned)
    assert len(run) == len(batches) and plain > 0
    assert loss(pruned, same=2) == pytest.approx(plain, rel=1e-5) and len(run) == len(batches)
    assert loss(pruned) == plain and len(run) == 2 * len(batches)  # the layers are as they were


def test_what_is_lost_beyond_enough_is_not_asked_for():
    model = tiny("bert")
    batches = [batch(model, 8, 16, seed=seed) for seed in range(3)]
    full = PruningPlan.full(model)
    pruned, runs = keep_units(model, PruningPlan(tuple(() for _ in full.heads), full.ffn)), []
    pruned.register_forward_hook(lambda *_: runs.append(1))
    loss = CalibrationLoss(model, batches)
    exact = loss(pruned)
    assert loss(pruned, enough=exact) == exact and len(runs) == 6
    assert exact / 10 < loss(pruned, enough=exact / 10) < exact and len(runs) == 7


def test_the_better_of_both_fits_stays(context, tmp_path):
    model = tiny("bert")
    pruned, info = pruned_by(model, context, tmp_path, macs="60%")
    errors = info["hidden_error"]
    assert set(errors) == set(info["calibration_loss"]) == {"pruned", "fitted"} and info["evaluations"] > 2
    plain, other = pruned_by(model, context, tmp_path, macs="60%", fit_damping=None)
    same = all(torch.equal(a, b) for a, b in zip(pruned.state_dict().values(), plain.state_dict().values()))
    assert same == (errors["fitted"] > errors["pruned"])
    assert set(other["calibration_loss"]) == {"pruned"} and "hidden_error" not in other


def test_a_fit_that_answers_worse_stays_where_its_hidden_states_are_nearer(context, tmp_path, monkeypatch):
    """Rows that the original has learned by heart lose by whatever blurs its answers."""
    model = tiny("bert")
    plain, _ = pruned_by(model, context, tmp_path, macs="60%", fit_damping=None)

    def fit(nearer):
        def fitted(original, student, *_):
            scale = 1.0 if nearer else 9.0
            torch.nn.init.zeros_(student.classifier.weight)  # one answer to everything
            student.base_model.load_state_dict(plain.base_model.state_dict())
            last = student.base_model.encoder.layer[-1].output.LayerNorm
            last.weight.data.mul_(scale)

        return fitted

    for nearer in (True, False):
        monkeypatch.setattr(obs, "fit_to_original", fit(nearer))
        pruned, info = pruned_by(model, context, tmp_path, macs="60%")
        assert info["calibration_loss"]["fitted"] > info["calibration_loss"]["pruned"]
        assert (pruned.classifier.weight.abs().max() == 0) == nearer


def looked_at(monkeypatch, context, tmp_path, **options):
    """Rows that judge and rows that are fitted, each as a tuple of ids."""
    seen = {}

    def spy(name, original):
        def spied(model, batches, *args, **kwargs):
            assert not any({"labels", "label"} & set(batch) for batch in batches)
            own = [tuple(row[row > 0].tolist()) for batch in batches for row in batch["input_ids"]]
            seen.setdefault(name, []).append(own)
            assert name == "record" or kwargs["temperature"] == SOFT
            return original(model, batches, *args, **kwargs)

        return spied

    for name in ("record", "CalibrationLoss"):
        monkeypatch.setattr(retraining_free, name, spy(name, getattr(retraining_free, name)))
    _, info = pruned_by(tiny("bert", layers=2), context, tmp_path, macs="50%", **options)
    (fitted,), (judging, leading) = seen["record"], seen["CalibrationLoss"]
    shared = set(judging) & set(leading)  # of an odd number, the one in the middle
    assert len(shared) == (len(judging) + len(leading) + len(fitted)) - info["sampled_rows"] <= 1
    return [row for row in judging if row not in shared] + leading, fitted


@pytest.mark.parametrize(("rows", "judged"), [(64, 32), (40, 20)])
def test_rows_that_judge_are_not_those_that_are_fitted(context, tmp_path, monkeypatch, rows, judged):
    data = replace(context.data, train=context.data.train.select(range(rows)))
    judging, fitted = looked_at(monkeypatch, replace(context, data=data), tmp_path)
    assert len(judging) == judged and len(fitted) + len(judging) == rows
    assert not set(fitted) & set(judging)


def test_short_rows_come_more_at_once(context):
    rows = context.data.train
    longest = max(map(len, rows["input_ids"][:]))
    for tokens in (0, 20 * longest):
        sizes = [part["attention_mask"].sum(1) for part in batches_of_rank(rows, context, 8, tokens)]
        assert sum(map(len, sizes)) == len(rows) and all(len(part) >= 8 for part in sizes[:-1])
        assert all(len(part) <= 8 or len(part) * part.max() <= tokens for part in sizes)
        assert (len(sizes[0]) > 20) == bool(tokens)


def test_texts_of_the_pool_fill_up_what_the_task_lacks(context, tmp_path, monkeypatch):
    train = context.data.train
    own, pool = train.select(range(40)), train.select(range(40, len(train))).remove_columns("labels")
    short = replace(context, data=replace(context.data, train=own), pool=pool)
    judging, fitted = looked_at(monkeypatch, short, tmp_path, samples=64, calibration=32)
    texts, more = ({tuple(ids) for ids in rows["input_ids"][:]} for rows in (own, pool))
    assert set(judging) <= texts and texts <= {*judging, *fitted} <= texts | more and len(fitted) == 32
    assert RetrainingFreePruning(**QUICK, macs="50%").looks_at_pool(short)
    assert not RetrainingFreePruning(**{**QUICK, "samples": 40}, macs="50%").looks_at_pool(short)


def test_no_more_rows_than_hold_the_tokens(context, tmp_path, monkeypatch, caplog):
    judging, fitted = looked_at(monkeypatch, context, tmp_path, tokens=200)
    lengths = [len(ids) for ids in judging + fitted]
    assert len(lengths) < 64 and sum(lengths) >= 200 > sum(lengths) - max(lengths)
    assert "fewer than" not in caplog.text


def test_parameters_and_whole_sublayers(context, tmp_path):
    model = tiny("bert")
    fixed = count_parameters(model).total - sum(4 * 8 * (4 * 32 + 3) + 64 * (2 * 32 + 1) for _ in range(4))
    pruned, info = pruned_by(model, context, tmp_path, params=fixed + 8 * (4 * 32 + 3) + 8 * 65)
    assert count_parameters(pruned).total <= fixed + 8 * (4 * 32 + 3) + 8 * 65
    sizes = [size for pair in structure_of(pruned).layer_widths for size in pair]
    assert sizes.count(0) >= 4 and info["budget"]["name"] == "params"


def test_a_model_with_nothing_left_still_answers(context, tmp_path):
    model = tiny("bert", layers=2)
    pruned, _ = pruned_by(model, context, tmp_path, macs=0)
    assert structure_of(pruned).layer_widths == ((0, 0), (0, 0))
    assert pruned(**batches_of(context, context.data.validation)[0]).logits.isfinite().all()


def test_labels_are_never_seen(context, tmp_path):
    rows = context.data.train
    wrong = rows.remove_columns("labels").add_column("labels", [1 - int(label) for label in rows["labels"][:]])
    other = replace(context, data=replace(context.data, train=wrong), cache_dir=tmp_path / "other")
    one, two = (pruned_by(tiny("bert"), c, tmp_path, macs="50%")[0].state_dict() for c in (context, other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_batch_size_changes_nothing_that_matters(context, tmp_path):
    results = [
        pruned_by(
            tiny("bert"),
            replace(context, cache_dir=tmp_path / str(n)),
            tmp_path,
            macs="50%",
            batch_size=n,
            fit_damping=None,
        )
        for n in (3, 64)
    ]
    widths = [structure_of(model).layer_widths for model, _ in results]
    assert widths[0] == widths[1]
    one, two = (model.state_dict() for model, _ in results)
    assert all(torch.allclose(one[name], two[name], atol=1e-2) for name in one)


def test_the_database_serves_all_later_targets(context, tmp_path, caplog):
    model, folder = tiny("bert"), tmp_path / "sizes"
    with caplog.at_level(logging.INFO, "smbert"):
        first, _ = pruned_by(model, context, tmp_path, macs="75%", database=str(folder))
        assert "in the database" in caplog.text
        caplog.clear()
        second, _ = pruned_by(model, context, tmp_path, macs="40%", database=str(folder))
        assert "in the database" not in caplog.text
    assert macs(second) < macs(first)
    again, _ = pruned_by(model, replace(context, cache_dir=tmp_path / "anew"), tmp_path, macs="40%")
    assert structure_of(again).layer_widths == structure_of(second).layer_widths
    for change, told in (
        ({"multiple_of": 4}, "multiple_of 8 and not 4"),
        ({"ffn_levels": 2, "damping": 1e-3}, "levels 4 and not 2, damping 0.0001 and not 0.001"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({told}\).*To resolve"):
            pruned_by(model, context, tmp_path, macs="40%", database=str(folder), **change)
    with pytest.raises(ValueError, match="another checkpoint"):
        pruned_by(tiny("bert", seed=1), context, tmp_path, macs="40%", database=str(folder))
    with pytest.raises(ValueError, match="other calibration data"):
        pruned_by(model, replace(context, seed=8), tmp_path, macs="40%", database=str(folder))


def test_the_default_database_is_kept_in_the_cache(context, tmp_path):
    model = tiny("bert", layers=2)
    pruned_by(model, context, tmp_path, macs="75%")
    files = {file: file.stat().st_mtime_ns for file in context.cache_dir.glob(f"database-*/{FILE}")}
    pruned_by(model, context, tmp_path, macs="50%")
    assert (
        files == {file: file.stat().st_mtime_ns for file in context.cache_dir.glob(f"database-*/{FILE}")}
        and len(files) == 1
    )
    pruned_by(model, context, tmp_path, macs="50%", ffn_levels=2)
    assert len(list(context.cache_dir.glob("database-*"))) == 2
    pruned_by(model, replace(context, args={**context.args, "bf16": True}), tmp_path, macs="50%")
    assert len(list(context.cache_dir.glob("database-*"))) == 3


def test_a_pruned_model_is_pruned_on(context, tmp_path):
    model = tiny("mpnet")
    first, _ = pruned_by(model, context, tmp_path, macs="70%")
    second, _ = pruned_by(copy.deepcopy(first), context, tmp_path, macs="50%")
    assert macs(second) <= macs(first) / 2
    assert all(
        a[0] <= b[0] and a[1] <= b[1]
        for a, b in zip(structure_of(second).layer_widths, structure_of(first).layer_widths)
    )


def test_budgets_out_of_reach_say_the_smallest(context, tmp_path):
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"`params` must be at least [\d,]+, the smallest.*got 1,000.*To resolve"):
        pruned_by(model, context, tmp_path, params=1000)
    electra = tiny("electra")  # its embedding projection stays
    with pytest.raises(ValueError, match=r"`macs` must be at least 65,536.*got 1,000"):
        pruned_by(electra, context, tmp_path, macs=1000)
    assert not list(Path(context.cache_dir).glob("*"))  # told before the database is built


def test_calibration_rows_that_are_too_few(context, tmp_path, caplog):
    few = replace(context, data=replace(context.data, train=context.data.train.select(range(4))))
    with pytest.raises(ValueError, match=r"more than 64 tokens.*`samples`"):
        pruned_by(tiny("bert"), few, tmp_path, macs="50%", calibration=4)
    assert "4 rows, fewer than `samples` = 64" in caplog.text
    assert not list(Path(context.cache_dir).glob("*"))


def test_activations_that_are_not_finite(context, tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        model.base_model.encoder.layer[2].output.dense.bias[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        pruned_by(model, context, tmp_path, macs="50%")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "exactly one of speedup, latency_ms, macs, params"),
        ({"macs": "50%", "speedup": 2}, "got speedup, macs"),
        ({"macs": "150%"}, "`macs`"),
        ({"params": -1}, "`params`"),
        ({"speedup": 1}, "`speedup` must be a number above 1"),
        ({"speedup": "2x"}, "`speedup` must be a number above 1"),
        ({"latency_ms": 0}, "`latency_ms` must be a number above 0"),
        ({"macs": "50%", "method": "zip"}, "`method` must be one of obs"),
        ({"macs": "50%", "samples": 0}, "`samples`"),
        ({"macs": "50%", "tokens": 0}, "`tokens` must be an integer of at least 1"),
        ({"macs": "50%", "samples": 10}, "`calibration` must be below `samples` = 10"),
        ({"macs": "50%", "samples": 256}, "`calibration` must be below `samples` = 256"),
        ({"macs": "50%", "search_steps": -1}, "`search_steps`"),
        ({"macs": "50%", "shape": "32"}, "`shape`"),
        ({"macs": "50%", "shape": "0x8"}, "`batch`"),
        ({"macs": "50%", "damping": 0}, "`damping`"),
        ({"macs": "50%", "fit_damping": 0.0}, "`fit_damping`"),
        ({"macs": "50%", "fit_damping": "1e-2"}, r"`fit_damping` must be a number above 0, got '1e-2' \(YAML takes"),
        ({"macs": "50%", "damping": "1e-4"}, r"`damping` must be a number above 0, got '1e-4' \(YAML takes"),
        ({"macs": "50%", "damping": None}, "`damping`"),
        ({"macs": "50%", "ffn_levels": 0}, "`ffn_levels`"),
        ({"macs": "50%", "ffn_levels": 16.0}, "`ffn_levels`"),
        ({"macs": "50%", "ffn_levels": None}, "`ffn_levels`"),
        ({"macs": "50%", "multiple_of": 8.0}, "`multiple_of`"),
    ],
)
def test_options_that_cannot_be(options, told):
    with pytest.raises(ValueError, match=told) as error:
        RetrainingFreePruning(**options)
    assert "To resolve" in str(error.value)


def test_outline(context):
    before = Outline(structure_of(tiny("bert")))
    after = RetrainingFreePruning(speedup=2).outline(before, context)
    assert after.structure == before.structure and not after.heads_known
    with pytest.raises(ValueError, match="`task`"):
        RetrainingFreePruning(speedup=2, task="unknown").outline(before, context)


def test_outline_tells_what_would_fail_after_long_work(context, tmp_path):
    before, taught = Outline(structure_of(tiny("bert"))), replace(context, teacher=tiny("bert"))
    with pytest.raises(ValueError, match=r"`shape` must have at most 64 tokens.*got '32x128'.*To resolve"):
        RetrainingFreePruning(speedup=2).outline(before, taught)
    RetrainingFreePruning(speedup=2, shape="32x64").outline(before, taught)
    RetrainingFreePruning(macs="50%").outline(before, taught)  # nothing is timed
    table = tmp_path / "table.json"
    RetrainingFreePruning(speedup=2, latency_table=str(table)).outline(before, context)  # to be measured
    table.write_text("{")
    with pytest.raises(ValueError, match=r"table.json must be a latency table.*To resolve"):
        RetrainingFreePruning(speedup=2, latency_table=str(table)).outline(before, context)
    folder = tmp_path / "letters"
    stage = RetrainingFreePruning(speedup=2, database=str(folder))
    stage.outline(before, context)
    folder.mkdir()
    stage.outline(before, context)
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"letters must not exist or be empty.*To resolve"):
        stage.outline(before, context)
    (folder / FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"letters must be a database of sub-layer sizes.*To resolve"):
        stage.outline(before, context)


def test_outline_refuses_tables_and_databases_of_others(context, tmp_path):
    model = tiny("bert", layers=2)
    before, options = Outline(structure_of(model)), {**QUICK, "shape": "2x8", "threads": 1}
    folder, table = tmp_path / "sizes", tmp_path / "table.json"
    pruned_by(model, context, tmp_path, macs="50%", database=str(folder))
    RetrainingFreePruning(macs="40%", database=str(folder), **options).outline(before, context)
    with pytest.raises(ValueError, match=r"other settings \(levels 4 and not 8\).*To resolve"):
        RetrainingFreePruning(macs="40%", database=str(folder), **{**options, "ffn_levels": 8}).outline(before, context)
    latency_table(model, (2, 4), (32, 64), Conditions(2, 8, 1), table, min_runs=2, min_seconds=0.0)
    RetrainingFreePruning(speedup=2, latency_table=str(table), **options).outline(before, context)
    for change, told in (({"shape": "2x16"}, "another length"), ({"threads": 2}, "another threads")):
        with pytest.raises(ValueError, match=rf"{told} .*To resolve"):
            RetrainingFreePruning(speedup=2, latency_table=str(table), **{**options, **change}).outline(before, context)
    table.write_text(json.dumps({**json.loads(table.read_text()), "machine": {**machine(), "cpu": "Z80"}}))
    stage = RetrainingFreePruning(speedup=2, latency_table=str(table), **options)
    with pytest.raises(ValueError, match=r"another machine \(cpu Z80 and not .*force_table"):
        stage.outline(before, context)
    replace(stage, force_table=True).outline(before, context)


def test_divergences():
    old, new = torch.tensor([[1.0, -1.0], [0.0, 3.0]]), torch.tensor([[0.5, 0.0], [1.0, 2.0]])
    p, q = old.softmax(-1), new.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(new, old, "single_label_classification"), kl)
    torch.testing.assert_close(divergence(new, old, "regression"), (new - old).square().mean(-1) / 2)
    p, q = old.sigmoid(), new.sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(divergence(new, old, "multi_label_classification"), each.mean(-1))
    for kind in ("single_label_classification", "regression", "multi_label_classification"):
        assert divergence(old, old, kind).abs().max() == 0
    tokens, mask = torch.stack([old, new], 1), torch.tensor([[1, 0], [1, 0]])
    torch.testing.assert_close(
        divergence(tokens, old[:, None] + tokens * 0 + torch.tensor([[[0.0]], [[1.0]]]) * 0, "regression", mask),
        torch.zeros(2),
    )


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_nearly_equal_answers_diverge_by_more_than_rounding(kind: str):
    """Half the variance of the logits' difference under the old probabilities, though it is below 1e-7."""
    old = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    new = old + torch.tensor([2.0**-12, 0.0, -(2.0**-12)])
    found, exact = divergence(new, old, kind), divergence(new.double(), old.double(), kind)
    assert exact.max() < 1e-7
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)
    step = (new - old).double()
    if kind == "single_label_classification":
        p = old.double().softmax(-1)
        expected = ((p * step.square()).sum(-1) - (p * step).sum(-1).square()) / 2
    else:
        p = old.double().sigmoid()
        expected = (p * (1 - p) * step.square()).mean(-1) / 2
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=0)


def test_a_high_temperature_compares_logits():
    old, new = torch.tensor([[9.0, -9.0], [0.0, 1.0]]).double(), torch.tensor([[9.0, -7.0], [1.0, 0.0]]).double()
    hot, squares = 1e3, (new - old).square()
    centred = squares.mean(-1) - (new - old).mean(-1).square()
    for kind, limit in (
        ("single_label_classification", centred / 2),
        ("multi_label_classification", squares.mean(-1) / 8),
    ):
        torch.testing.assert_close(divergence(new, old, kind, temperature=hot), limit, rtol=5e-3, atol=0)
        sure, unsure = divergence(new, old, kind)
        assert sure < unsure / 100
    torch.testing.assert_close(divergence(new, old, "regression", temperature=hot), divergence(new, old, "regression"))


def test_the_softened_loss_is_that_of_softened_logits():
    model = tiny("bert")
    full, batches = PruningPlan.full(model), [batch(model, 8, 16, seed=seed) for seed in range(2)]
    pruned = keep_units(model, PruningPlan(tuple(() for _ in full.heads), full.ffn))
    with torch.no_grad():
        old, new = (torch.cat([m.eval()(**b).logits for b in batches]) for m in (model, pruned))
    soft = divergence(new, old, "single_label_classification", temperature=4.0).mean()
    assert CalibrationLoss(model, batches, temperature=4.0)(pruned) == pytest.approx(float(soft), rel=1e-4)
    assert CalibrationLoss(model, batches)(pruned) != pytest.approx(float(soft), rel=1e-2)


@pytest.mark.parametrize("labels", [1, 3])
def test_regression_and_several_classes(context, tmp_path, labels, tokenizer):
    pruned, info = pruned_by(tiny("bert", num_labels=labels), context, tmp_path, macs="50%")
    assert 0 < info["calibration_loss"]["pruned"] < float("inf")
    assert pruned.config.num_labels == labels


def test_only_the_main_process_measures(context, tmp_path, monkeypatch):
    millisecond_per_mac(monkeypatch)
    measured, waited = [], []
    fake = lambda *_, **__: measured.append(1) or {"predicted": 2.0, "measured": 3.0}  # noqa: E731
    monkeypatch.setattr(RetrainingFreePruning, "_measured", fake)
    for main in (True, False):
        state = SimpleNamespace(is_main_process=main, wait_for_everyone=lambda main=main: waited.append(main))
        monkeypatch.setattr(retraining_free, "process_state", lambda state=state: state)
        _, info = pruned_by(tiny("bert", layers=2), context, tmp_path, method="fisher", speedup=2, shape="2x16")
        assert ("latency_ms" in info) == main
        # What the others learn of it is the sum over all.
        assert RetrainingFreePruning(speedup=2)._pace(None, None, None) == (1.5 if main else 0)
    assert measured == [1, 1] and waited == [True, True, False, False]
