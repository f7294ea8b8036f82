"""The database of sub-layer sizes: true errors, weights that give them, nothing of padding, and no mix-ups."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from tiny_models import batch, tiny

import smbert.retraining_free.database as module
from smbert.modeling import FAMILIES
from smbert.retraining_free.database import Database, Settings, build_database
from smbert.retraining_free.stream import PARTS, Stream, record
from smbert.retraining_free.working_copy import output_projection, working_copy
from smbert.surgery import keep_units, structure_of

SETTINGS = Settings(levels=4)


def batches(model, count=6, length=16):
    return [batch(model, 4, length, seed=seed) for seed in range(count)]


def one_by_one(inputs):
    """The same samples in batches of one, without any padding."""
    for i, n in enumerate(inputs["attention_mask"].sum(1).tolist()):
        yield {k: v[i : i + 1, :n] for k, v in inputs.items()}


def seen_by(model, calls):
    """(part, layer) -> inputs and outputs of the output projection over all real tokens."""
    stream, found = Stream(model, calls), {}
    for layer in range(len(stream.layers)):
        parts = list(stream.see(*PARTS, advance=True))
        for part in PARTS:
            found[part, layer] = tuple(
                torch.cat([getattr(p[part], what) for p in parts]) for what in ("inputs", "outputs")
            )
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_weights(family, tmp_path):
    model = tiny(family, layers=3)
    calls = record(model, batches(model))
    database = build_database(model, calls, tmp_path / "db", "data", SETTINGS)
    seen, dim = seen_by(model, calls), structure_of(model).head_dim
    assert [(s.part, s.layer) for s in database.sublayers] == [(part, layer) for layer in range(3) for part in PARTS]
    for sublayer in database.sublayers:
        heads = sublayer.part == "attention_output"
        assert sublayer.sizes == ((0, 1, 2, 3, 4) if heads else (0, 8, 16, 32, 48, 64))
        assert sorted(sublayer.order) == list(range(4 if heads else 64))
        assert sublayer.errors[-1] == 0 and list(sublayer.errors) == sorted(sublayer.errors, reverse=True)
        x, y = seen[sublayer.part, sublayer.layer]
        has_bias = output_projection(model, sublayer.part, sublayer.layer).bias is not None
        centred = y - y.mean(0) if has_bias else y
        for size, error in zip(sublayer.sizes[:-1], sublayer.errors):
            width = dim if heads else 1
            weight, bias = database.weights(sublayer, size)
            columns = [unit * width + i for unit in sublayer.kept(size) for i in range(width)]
            found = x[:, columns] @ weight.T + (bias if has_bias else 0)
            assert ((found - y).square().sum() / centred.square().sum()).item() == pytest.approx(
                error, rel=0.02, abs=1e-5
            )
        assert sublayer.errors[0] == pytest.approx(1, abs=1e-4)  # nothing but the mean is left


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_is_the_working_copy(family, tmp_path):
    model = tiny(family)
    calls = record(model, batches(model))
    database = build_database(model, calls, tmp_path / "db", "data", SETTINGS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widths = [(2, 16), (0, 64), (4, 0), (3, 48)]
    copy = working_copy(model)
    database.apply(copy, model, widths)
    pruned = keep_units(copy, database.plan(widths))
    assert structure_of(pruned).layer_widths == tuple(widths)
    inputs = batch(model, 3, 12, seed=99)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs).logits, copy(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(pruned(**inputs).logits, model(**inputs).logits, atol=1e-3)
        database.apply(copy, model, structure_of(model).layer_widths)
        torch.testing.assert_close(copy(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batches_change_nothing(family, tmp_path):
    model = tiny(family, layers=2)
    together = batches(model)
    apart = [sample for inputs in together for sample in one_by_one(inputs)]
    found = [
        build_database(model, record(model, rows), tmp_path / name, "data", SETTINGS)
        for name, rows in (("together", together), ("apart", apart))
    ]
    assert found[0].about["tokens"] == found[1].about["tokens"] == sum(int(b["attention_mask"].sum()) for b in together)
    for one, other in zip(*(database.sublayers for database in found)):
        assert one.order[:8] == other.order[:8]
        assert one.errors == pytest.approx(other.errors, rel=1e-3, abs=1e-5)


def test_a_pruned_model_has_a_database_of_its_own_sizes(tmp_path):
    model = tiny("bert", layers=2)
    calls = record(model, batches(model))
    first = build_database(model, calls, tmp_path / "a", "data", SETTINGS)
    copy = working_copy(model)
    first.apply(copy, model, [(0, 48), (3, 0)])
    pruned = keep_units(copy, first.plan([(0, 48), (3, 0)]))
    second = build_database(pruned, record(pruned, batches(model)), tmp_path / "b", "data", SETTINGS)
    # The widest layer has 48 neurons now, so the step is 12, rounded up to multiples of 8.
    assert [s.sizes for s in second.sublayers] == [(0,), (0, 8, 16, 24, 40, 48), (0, 1, 2, 3), (0,)]
    assert second.sublayers[0].errors == second.sublayers[3].errors == (0.0,)


def test_dead_and_duplicated_neurons_go_first(tmp_path):
    model = tiny("bert", layers=1)
    layer = model.base_model.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[5] = 0
        layer.intermediate.dense.bias[5] = -1e4  # gelu gives 0 on all data
        layer.intermediate.dense.weight[9] = layer.intermediate.dense.weight[20]
        layer.intermediate.dense.bias[9] = layer.intermediate.dense.bias[20]
        layer.attention.self.value.weight[8:16] = 0
        layer.attention.self.value.bias[8:16] = 0  # head 1 writes nothing
    database = build_database(
        model, record(model, batches(model, 12)), tmp_path / "db", "data", Settings(multiple_of=1, levels=64)
    )
    heads, ffn = database.sublayers
    assert heads.order[0] == 1 and heads.errors[3] < 1e-6
    assert 5 in ffn.order[:2] and len({9, 20} & set(ffn.order[:2])) == 1
    assert ffn.errors[ffn.sizes.index(62)] < 1e-6
    assert all(torch.isfinite(tensor).all() for size in ffn.sizes[:-1] for tensor in database.weights(ffn, size))


def test_stored_in_half_precision_where_it_does_no_harm(tmp_path):
    from safetensors.torch import load_file

    model = tiny("bert", layers=1)
    with torch.no_grad():
        model.base_model.encoder.layer[0].output.dense.weight *= 1e7  # beyond half precision
    build_database(model, record(model, batches(model)), tmp_path / "db", "data", SETTINGS)
    tensors = load_file(tmp_path / "db" / "layer-00.safetensors")
    assert tensors["attention_output.2.weight"].dtype == torch.float16
    assert tensors["ffn_out.32.weight"].dtype == torch.float32


def test_databases_of_others_are_refused(tmp_path):
    model, other = tiny("bert", layers=1), tiny("bert", layers=1, seed=1)
    folder = tmp_path / "db"
    build_database(model, record(model, batches(model)), folder, "data", SETTINGS)
    assert Database.load(folder, model).about["data"] == "data"
    with pytest.raises(ValueError, match=r"another checkpoint.*To resolve"):
        Database.load(folder, other)
    with pytest.raises(ValueError, match=r"other calibration data.*To resolve"):
        Database.load(folder, model, "other data")
    with pytest.raises(ValueError, match=r"must be a database.*To resolve"):
        Database.load(tmp_path / "nothing", model)
    (folder / "layer-00.safetensors").write_bytes(b"cut")
    database = Database.load(folder, model)
    with pytest.raises(ValueError, match=r"layer-00.*To resolve"):
        database.weights(database.sublayers[0], 1)
    values = json.loads((folder / "database.json").read_text())
    (folder / "database.json").write_text(json.dumps({**values, "schema_version": 0}))
    with pytest.raises(ValueError, match="another version"):
        Database.load(folder, model)


def test_folders_of_other_things_are_left_alone(tmp_path):
    model, folder = tiny("bert", layers=1), tmp_path / "mine"
    calls = record(model, batches(model))
    folder.mkdir()
    build_database(model, calls, folder, "data", SETTINGS)  # an empty folder may be filled
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"letters must not exist or be empty.*To resolve"):
        build_database(model, calls, other, "data", SETTINGS)
    assert (other / "letter.txt").read_text() == "dear"


def test_too_few_tokens_are_refused_and_nothing_is_left(tmp_path):
    model = tiny("bert", layers=1)
    calls = record(model, [batch(model, 3, 10)])
    with pytest.raises(ValueError, match=r"more than 64 tokens.*got \d+.*`samples`"):
        build_database(model, calls, tmp_path / "db", "data", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_have_left_goes(tmp_path):
    model = tiny("bert", layers=1)
    old, new, other = (tmp_path / name for name in (".db.1.part", ".db.2.part", ".other.1.part"))
    for folder in (old, new, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    build_database(model, record(model, batches(model)), tmp_path / "db", "data", SETTINGS)
    assert not old.exists() and new.exists() and other.exists()


@pytest.mark.parametrize("culprit", ["save_file", "_sizes_of", "model_fingerprint"])
def test_what_fails_on_the_main_process_ends_all_of_them_at_once(tmp_path, monkeypatch, culprit):
    """Every process takes part in the same sums, the last of which says that it is over."""
    model = tiny("bert", layers=2)
    calls = record(model, batches(model))

    def fails(*args):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(module, culprit, fails)
    sums = {}
    for main, error in ((True, RuntimeError), (False, OSError)):
        # Nobody is to wait where others do not come.
        state = SimpleNamespace(is_main_process=main, wait_for_everyone=None)
        monkeypatch.setattr(module, "process_state", lambda state=state: state)
        sums[main] = []

        def reduce(tensor, main=main):
            flag = tensor.shape == (1,) and tensor.item() in (0, 1)
            sums[main].append((tuple(tensor.shape), flag))
            # What the main process says, as the others get it.
            ended = flag and not main and len(sums[False]) == len(sums[True])
            return tensor + 1 if ended else tensor

        with pytest.raises(error):
            build_database(model, calls, tmp_path / "db", "data", SETTINGS, reduce)
    assert sums[True] == sums[False] and sums[True][-1][1]
    assert sum(flag for _, flag in sums[True]) == (3 if culprit == "model_fingerprint" else 1)
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_are_refused_by_place(tmp_path):
    model = tiny("bert", layers=2)
    calls = record(model, batches(model))
    with torch.no_grad():
        model.base_model.encoder.layer[1].intermediate.dense.bias[3] = float("inf")
    with pytest.raises(ValueError, match=r"finite.*ffn_out of layer 1.*To resolve"):
        build_database(model, calls, tmp_path / "db", "data", SETTINGS)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"answers must be finite.*batch 0"):
        record(model, batches(model))
    with pytest.raises(ValueError, match="at least one batch"):
        record(model, [])


@pytest.mark.parametrize("values", [{"levels": 0}, {"multiple_of": 0}, {"damping": 0.0}, {"damping": 1.0}])
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=rf"`{next(iter(values))}`.*To resolve"):
        Settings(**values)
