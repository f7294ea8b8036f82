"""Slim models save and reload exactly, with smbert and without it; broken checkpoints are refused by name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import batch, tiny

from smbert.modeling import FAMILIES, HEADS, SLIM_CLASSES, encoder_layers, family_of, head_dim, layer_widths
from smbert.surgery import PruningPlan, empty_parts, keep_layers, keep_units, load_model, pass_by, save_model

ROOT = Path(__file__).resolve().parents[1]
UNEVEN = PruningPlan(((0, 2), (), (3,), (0, 1, 2, 3)), (tuple(range(0, 64, 3)), (5, 6), (), tuple(range(64))))
LABELS = {0: "bad", 1: "so so", 2: "good"}


def slim(family: str, head: str = "sequence-classification", **config):
    return keep_units(tiny(family, head, **config), UNEVEN)


@torch.no_grad()
def outputs(model, inputs):
    return torch.cat([tensor.flatten() for tensor in model(**inputs).to_tuple()])


@pytest.fixture
def saved(tmp_path):
    """A stock checkpoint with two labels."""
    save_model(tiny("bert"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["slim", "stock"])
def test_round_trip(family, kind, tmp_path):
    named = {"num_labels": 3, "id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    model = slim(family, **named) if kind == "slim" else keep_layers(tiny(family, **named), [0, 3])
    save_model(model, tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"config.json", "model.safetensors"} | ({"modeling.py"} if kind == "slim" else set())
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config.id2label == LABELS and loaded.config.label2id == named["label2id"]
    assert layer_widths(loaded.config) == layer_widths(model.config)
    assert torch.equal(outputs(loaded, batch(model)), outputs(model, batch(model)))
    if family == "modernbert":
        assert loaded.config.layer_types == model.config.layer_types
    model_type = json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
    assert model_type == (f"smbert_{family}" if kind == "slim" else family)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "multiple-choice"])
@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_round_trip_of_other_heads(family, head, tmp_path):
    model = slim(family, head)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", head=head)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, batch(model)), outputs(model, batch(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_out_of_a_classifier(family, tmp_path):
    model = slim(family)
    save_model(model, tmp_path / "model")
    encoder = load_model(tmp_path / "model", head="encoder")
    with torch.no_grad():
        expected = model.base_model(**batch(model)).last_hidden_state
        assert torch.equal(encoder(**batch(model)).last_hidden_state, expected)


def test_dtype_survives(tmp_path):
    save_model(slim("roberta").to(torch.bfloat16), tmp_path / "model")
    assert load_model(tmp_path / "model", dtype=None).dtype == torch.bfloat16
    assert load_model(tmp_path / "model").dtype == torch.float32


SCRIPT = """
import sys
import torch, transformers
from safetensors.torch import load_file

torch.set_grad_enabled(False)  # MPNet's attention takes another kernel without
trust = sys.argv[1] == "trust"
if trust:
    sys.modules["smbert"] = None  # importing it fails from here on, wherever it may be installed
else:
    import smbert
for folder in sys.argv[2:]:
    tensors = load_file(folder + "/tensors.st")
    inputs = {"input_ids": tensors["input_ids"], "attention_mask": tensors["attention_mask"]}
    kwargs = {"trust_remote_code": True} if trust else {}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)
    assert torch.equal(model(**inputs).logits, tensors["logits"]), folder
    assert model.config.id2label[2] == "good"
    assert type(model).__module__.startswith("transformers_modules." if trust else "smbert.")
    for auto in sorted(model.config.auto_map):
        if auto.startswith("AutoModel") and folder == sys.argv[2]:
            other = getattr(transformers, auto).from_pretrained(folder, ignore_mismatched_sizes=True, **kwargs)
            assert type(other).__name__ == model.config.auto_map[auto].split(".")[-1]
            assert torch.equal(other.base_model(**inputs)[0], model.base_model(**inputs)[0]), auto
    copy = folder + "-saved-again-" + sys.argv[1]
    model.save_pretrained(copy)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(copy, **kwargs)
    assert torch.equal(again(**inputs).logits, tensors["logits"])
print("reloaded", len(sys.argv) - 2)
"""


def test_reload_in_another_process_with_and_without_smbert(tmp_path):
    folders = []
    models = {family: slim(family, num_labels=3, id2label=LABELS) for family in ("bert", "mpnet", "modernbert")}
    empty = keep_units(models["bert"], PruningPlan(((0,), (), (), (0,)), ((0, 1), (), (), (0,))))
    models["passed-by"] = pass_by(empty, empty_parts(empty))
    for name, model in models.items():
        save_model(model, tmp_path / name)
        with torch.no_grad():
            inputs = batch(model)
            save_file({**inputs, "logits": model(**inputs).logits}, tmp_path / name / "tensors.st")
        folders.append(str(tmp_path / name))
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, mode, *folders],
            env={**env, "PYTHONPATH": str(ROOT) if mode == "import" else ""},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mode in ("trust", "import")
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert out.strip().endswith("reloaded 4")


def test_installed_class_wins_over_shipped_code(tmp_path):
    save_model(slim("bert"), tmp_path / "model")
    (tmp_path / "model" / "modeling.py").write_text("raise RuntimeError('shipped code ran')\n")
    model = load_model(tmp_path / "model", trust_remote_code=True)
    assert type(model) is SLIM_CLASSES[transformers.BertForSequenceClassification]


@pytest.mark.parametrize("model_type", ["bert", "stranger"])
def test_shipped_code_does_not_run_unasked(model_type, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (saved / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto}))
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if model_type == "bert":
        assert type(load_model(saved)) is transformers.BertForSequenceClassification
    else:
        with pytest.raises(ValueError, match="stranger"):
            load_model(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_name_their_parts(family):
    entry, model = FAMILIES[family], tiny(family)
    assert family_of(model) is family_of(model.config) is family_of(slim(family)) is family_of(family) is entry
    assert head_dim(model.config) == head_dim(slim(family).config) == 8
    assert layer_widths(model.config) == [(4, 64)] * 4
    assert layer_widths(slim(family).config) == UNEVEN.layer_widths
    for bare in (model, model.base_model):
        assert len(encoder_layers(bare)) == 4
    for layer in encoder_layers(model):
        assert entry.get(layer, "query").out_features == (96 if entry.fused_qkv else 32)
        assert entry.get(layer, "attention_output").in_features == 32
        assert entry.get(layer, "ffn_in").out_features == (128 if entry.gated else 64)
        assert entry.get(layer, "ffn_out").in_features == 64


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "modernbert"])
def test_head_counts_of_the_modules_are_true(family):
    entry = FAMILIES[family]
    for (heads, _), layer in zip(UNEVEN.layer_widths, encoder_layers(slim(family)), strict=True):
        attention = entry.get(layer, "attention")
        assert getattr(attention, "n_heads" if family == "distilbert" else "num_attention_heads") == heads
        if hasattr(attention, "all_head_size"):
            assert attention.all_head_size == 8 * heads


@pytest.mark.parametrize("family", FAMILIES)
def test_slim_models_from_scratch_are_initialised(family):
    config = slim(family).config
    config.initializer_range = 0.02
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert type(model) is SLIM_CLASSES[type(tiny(family))]
    for name, tensor in encoder_layers(model).named_parameters():
        if "norm" not in name.lower() and tensor.numel() and tensor.ndim == 1:
            assert tensor.abs().max() == 0, name
        elif tensor.ndim == 2 and tensor.numel() > 500:
            assert tensor.std() < 0.03, name
    assert torch.isfinite(outputs(model.eval(), batch(model))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_map_all_classes_to_the_shipped_file(family):
    config = SLIM_CLASSES[type(tiny(family).config)]()
    assert set(config.auto_map) == {"AutoConfig", *(auto for auto, _ in HEADS.values())}
    assert set(config.auto_map.values()) <= {f"modeling.{slim.__name__}" for slim in SLIM_CLASSES.values()}


def test_unknown_family():
    with pytest.raises(ValueError, match=r"bert, roberta, xlm-roberta.*'gpt2'.*FAMILIES\['gpt2'\] = Family\("):
        family_of(transformers.GPT2Config())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_widths": [[2, 8]]}, "one pair for each of the 2 layers, got 1"),
        ({"layer_widths": [[2, 8], [5, 8]]}, "pairs"),
        ({"layer_widths": [[2, 8], [1, 65]]}, "pairs"),
        ({"layer_widths": [[2, 8], [1]]}, "pairs"),
        ({"layer_widths": [[2, 8], [-1, 8]]}, "pairs"),
        ({"layer_widths": "all"}, "layer_widths"),
        ({"layer_widths": [[2, 8], ["2", 8]]}, "layer_widths"),
        ({"layer_widths": [[2, 8], [1, 8]], "kept_heads": None}, "`kept_heads` must list"),
        ({"layer_widths": [[2, 8], [1, 8]], "kept_heads": [[0, 1], [0, 1]]}, "as many heads"),
        ({"layer_widths": [[2, 8], [1, 8]], "kept_heads": [[0, 1], [4]]}, "below 4"),
        ({"layer_widths": [[2, 8], [1, 8]], "kept_heads": [[1, 0], [3]]}, "sorted"),
        ({"layer_widths": [[4, 8], [4, 8]], "passed_by": [[False, False]]}, "one pair for each of the 2 layers"),
        ({"layer_widths": [[4, 8], [4, 1]], "passed_by": [[False, False], [False, True]]}, "parts with units"),
    ],
)
def test_bad_slim_configs(values, message, tmp_path):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    with pytest.raises(Exception, match=message):
        SLIM_CLASSES[transformers.MPNetConfig](**sizes, **values)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smbert_mpnet", **sizes, **values}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_family_whose_layers_norm_by_themselves_cannot_pass_by(tmp_path):
    values = {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 64, "layer_widths": [[4, 8], [4, 0]]}
    values["passed_by"] = [[False, False], [False, True]]
    with pytest.raises(Exception, match="layers norm by themselves"):
        SLIM_CLASSES[transformers.DistilBertConfig](**values)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smbert_distilbert", **values}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layers norm by themselves"):
        load_model(tmp_path)


def test_mpnet_answers_alike_by_either_kernel():
    model = slim("mpnet").eval()
    inputs = batch(model)
    inputs["attention_mask"][0, 5:] = 0
    slow = model(**inputs).logits  # a gradient may be wanted
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, slow, atol=1e-6, rtol=0)
        told = model(**inputs, output_attentions=True)
        torch.testing.assert_close(told.logits, slow, atol=1e-6, rtol=0)
    assert [a.shape[1] for a in told.attentions] == [heads for heads, _ in model.config.layer_widths]


def test_labels(saved):
    assert load_model(saved, num_labels=2).config.num_labels == 2
    with pytest.raises(ValueError, match=r"`num_labels` must be 2, .*got 3"):
        load_model(saved, num_labels=3)
    fresh = load_model(saved, num_labels=3, ignore_mismatched_sizes=True, problem_type="single_label_classification")
    assert fresh.config.num_labels == fresh.classifier.out_features == 3
    assert fresh.config.problem_type == "single_label_classification"
    renamed = load_model(saved, id2label={0: "no", 1: "yes"})
    assert renamed.config.id2label == {0: "no", 1: "yes"} and renamed.config.label2id == {"no": 0, "yes": 1}
    assert torch.equal(renamed.classifier.weight, load_model(saved).classifier.weight)
    with pytest.raises(ValueError, match="length of `id2label`"):
        load_model(saved, num_labels=3, id2label={0: "no", 1: "yes"})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_model(saved, num_labels=0)
    assert load_model(saved, head="token-classification", num_labels=5).classifier.out_features == 5


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "must hold a config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{oops"), "config.json must be JSON"),
    "config without model_type": (lambda f: (f / "config.json").write_text("{}"), "with a `model_type`"),
    "unknown family": (lambda f: _edit_config(f, model_type="gpt2"), "known families"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold the weights as model.safetensors"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "Pickled weights"),
    "truncated weights": (_truncate, r"model\.safetensors must be a complete safetensors file"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "complete safetensors file"),
    "missing shard": (
        lambda f: (
            (f / "model.safetensors").rename(f / "a.safetensors")
            and (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "b.safetensors"}}')
        ),
        r"must hold the weights as b\.safetensors",
    ),
    "more layers than weights": (lambda f: _edit_config(f, num_hidden_layers=5), "5 layers .* are missing"),
    "fewer layers than weights": (lambda f: _edit_config(f, num_hidden_layers=3), "3 layers .* are not used"),
    "other sizes": (
        lambda f: _edit_config(f, intermediate_size=65),
        r"sizes that its config describes, .* such as bert.encoder.layer.0.intermediate.dense.bias: \[64\], not \[65\]",
    ),
    "no embedding": (
        lambda f: _edit_weights(f, lambda t: t.pop("bert.embeddings.word_embeddings.weight")),
        "are missing, such as bert.embeddings.word_embeddings.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(name, saved):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_missing_folders_and_heads(saved, tmp_path):
    for place in (tmp_path / "nowhere", "./nowhere", "a/b/c", saved / "config.json"):
        with pytest.raises(ValueError, match="must be a folder or a Hub id"):
            load_model(place)
    with pytest.raises(ValueError, match="`head` must be one of encoder, sequence-classification"):
        load_model(saved, head="classification")


def test_save_keeps_other_files_and_drops_stale_ones(tmp_path):
    folder = tmp_path / "model"
    save_model(slim("bert"), folder)
    (folder / "README.md").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("mine too")
    for stale in ("model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (folder / stale).write_text("stale")
    for mine in ("train.bin", "adapter_model.safetensors"):
        (folder / mine).write_text("mine")
    model = tiny("bert")
    save_model(model, folder)
    own = {"README.md", "logs", "train.bin", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", *own}
    (folder / "modeling.py").write_text("mine, since this config names none")
    save_model(model, folder)
    assert (folder / "modeling.py").read_text().startswith("mine")
    assert (folder / "logs" / "a.txt").read_text() == "mine too"
    assert torch.equal(outputs(load_model(folder), batch(model)), outputs(model, batch(model)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failed_save_leaves_the_previous_model(saved, tmp_path):
    class FullDisk:
        def save_pretrained(self, folder):
            (Path(folder) / "config.json").write_text("half of a")
            raise OSError(errno.ENOSPC, "No space left on device")

    before = (saved / "config.json").read_text()
    with pytest.raises(OSError, match=r"No space left.*previous contents are intact"):
        save_model(FullDisk(), saved)
    assert (saved / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        save_model(tiny("bert"), saved / "config.json")


def test_save_killed_between_its_renames_is_repaired(saved, tmp_path):
    (saved / "README.md").write_text("mine")
    saved.rename(tmp_path / ".model.previous")
    (tmp_path / ".model.partial").mkdir()
    save_model(tiny("bert"), saved)
    assert (saved / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
