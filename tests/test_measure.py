"""Counts equal hand formulas and torch's counter; timing runs its models in turns and leaves them as they were."""

from __future__ import annotations

import ctypes
import json
import platform
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import batch, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from smbert import measure
from smbert._memory import freed_memory_kept
from smbert.measure import (
    count_parameters,
    encoder_macs,
    environment,
    latency,
    latency_on,
    machine_line,
    macs,
    size_mb,
    speedups,
    supports_bf16,
)
from smbert.modeling import FAMILIES, SLIM_CLASSES, encoder_layers

QUICK: dict[str, Any] = {"warmup": 1, "min_runs": 3, "min_seconds": 0.0, "disable_tqdm": True}


class Recorder(nn.Module):
    """Stands in for a model: notes who was called with what, and under which conditions."""

    def __init__(self, name: str, calls: list, size: int = 10) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.config = SimpleNamespace(vocab_size=size)
        self.linear = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        assert not self.training and torch.is_inference_mode_enabled()
        assert int(input_ids.max()) < self.config.vocab_size and bool((attention_mask == 1).all())
        dtype = self.linear(torch.ones(1, 2)).dtype
        self.calls.append((self.name, tuple(input_ids.shape), dtype, torch.get_num_threads()))


# Parameters


def test_smbert_plan_on_the_bert_base_shape() -> None:
    with torch.device("meta"):
        base = BertModel(BertConfig())
        slim = SLIM_CLASSES[BertModel](SLIM_CLASSES[BertConfig](num_hidden_layers=3, layer_widths=[[8, 2048]] * 3))
    parameters = count_parameters(slim)
    assert (round(parameters.total / 1e6, 2), round(parameters.encoder / 1e6, 2)) == (38.61, 14.18)
    assert parameters.embedding == (30522 + 512 + 2 + 2) * 768  # three tables and the norm's scale and shift
    assert parameters.total - parameters.encoder - parameters.embedding == 768 * 768 + 768  # the pooler
    assert round(count_parameters(base).encoder / parameters.encoder, 2) == 6.00
    products = 2 * 128 * 128 * 64
    assert macs(base) == 12 * (128 * (4 * 768 * 768 + 2 * 768 * 3072) + 12 * products)
    assert macs(slim) == 3 * (128 * (4 * 768 * 512 + 2 * 768 * 2048) + 8 * products)
    assert macs(base) == 6 * macs(slim)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family(family: str) -> None:
    model = tiny(family)
    parameters = count_parameters(model)
    bias = family != "modernbert"
    attention = 4 * 32 * 32 + bias * 4 * 32
    ffn = 3 * 32 * 64 if family == "modernbert" else 2 * 32 * 64 + 64 + 32
    norms = 2 * (32 + 32 * bias)
    missing = 32 if family == "modernbert" else 0  # its first layer has no norm before the attention
    assert parameters.encoder == 4 * (attention + ffn + norms) - missing
    assert parameters.total == sum(p.numel() for p in model.parameters())
    tables = {
        "bert": (100 + 64 + 2) * 32 + 64,
        "distilbert": (100 + 64) * 32 + 64,
        "mpnet": (100 + 64) * 32 + 64 + 32 * 4,
        "electra": (100 + 64 + 2) * 16 + 32 + 16 * 32 + 32,
        "modernbert": 100 * 32 + 32,
    }
    if family in tables:
        assert parameters.embedding == tables[family]
    assert parameters.total > parameters.encoder + parameters.embedding  # the head remains


def test_bare_encoder_counts_the_same_and_tied_weights_count_once() -> None:
    bare, head, masked_lm = tiny("bert", "encoder"), tiny("bert"), tiny("bert", "masked-lm")
    assert count_parameters(bare).encoder == count_parameters(head).encoder == count_parameters(masked_lm).encoder
    assert count_parameters(bare).embedding == count_parameters(head).embedding == count_parameters(masked_lm).embedding
    transform, decoder_bias = 32 * 32 + 32 + 64, 100
    rest = (
        count_parameters(masked_lm).total - count_parameters(masked_lm).encoder - count_parameters(masked_lm).embedding
    )
    assert rest == transform + decoder_bias


# MACs


def _torch_macs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Half of torch's FLOPs: (of the whole model, of the encoder layers)."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with FlopCounterMode(display=False, depth=99) as counter, torch.inference_mode():
        model(**inputs)
    layers = [name for name, module in model.named_modules() if module in set(encoder_layers(model))]
    counts = counter.get_flop_counts()
    inner = sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in layers)
    return counter.get_total_flops() // 2, inner // 2


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "mpnet", "electra", "roberta"])
def test_macs_equal_torchs_counter(family: str) -> None:
    model, n, length = tiny(family), 3, 11
    inputs = batch(model, n, length)
    total, layers = _torch_macs(model, inputs)
    projection = n * length * 16 * 32 if family == "electra" else 0
    assert layers > 0
    assert macs(model, length, n) == macs(model.config, length, n) == layers + projection
    head = n * (32 * 32 + 32 * 2)  # one token of each sequence: pooler and classifier

    assert total == macs(model, length, n) + head


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_macs_of_uneven_widths_equal_torchs_counter(family: str) -> None:
    stock = tiny(family)
    widths = [[4, 64], [1, 8], [0, 24], [3, 0]]
    slim_config = SLIM_CLASSES[type(stock.config)](**{**_plain(stock.config), "layer_widths": widths})
    model = SLIM_CLASSES[type(stock)](slim_config).eval()
    _, layers = _torch_macs(model, batch(model, 2, 9))
    assert macs(model, 9, 2) == layers == encoder_macs([(h, f) for h, f in widths], 32, 8, 9, family == "modernbert", 2)


def _plain(config: Any) -> dict[str, Any]:
    return {
        k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")
    }


def test_encoder_macs_by_hand() -> None:
    assert encoder_macs([], 32, 8, 128, False) == 0
    assert encoder_macs([(1, 0)], 2, 3, 5, False) == 4 * 5 * 2 * 3 + 2 * 5 * 5 * 3
    assert encoder_macs([(0, 7)], 2, 3, 5, False) == 2 * 5 * 2 * 7
    assert encoder_macs([(0, 7)], 2, 3, 5, True, batch=4) == 4 * 3 * 5 * 2 * 7
    with pytest.raises(ValueError, match="`seq_len` must be at least 1, got 0"):
        macs(BertConfig(), seq_len=0)


# Size on disk


def test_size_counts_the_weights_that_a_load_reads(tmp_path) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"0" * 1000)
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"0" * 1000)
    (tmp_path / "model" / "checkpoint-7").mkdir()
    (tmp_path / "model" / "checkpoint-7" / "model.safetensors").write_bytes(b"0" * 1000)
    assert size_mb(tmp_path / "model") == weights / 1e6
    assert size_mb(str(tmp_path / "model" / "pytorch_model.bin")) == 0.001


def test_size_of_other_folders(tmp_path) -> None:
    for name, size in (("model.onnx", 500), ("model.onnx.data", 250), ("config.json", 100)):
        (tmp_path / name).write_bytes(b"0" * size)
    assert size_mb(tmp_path) == 750 / 1e6
    other = tmp_path / "classical"
    (other / "deep").mkdir(parents=True)
    assert size_mb(other) == 0.0
    (other / "deep" / "weights.npz").write_bytes(b"0" * 70)
    assert size_mb(other) == 70 / 1e6
    with pytest.raises(FileNotFoundError, match="must be a file or a model folder"):
        size_mb(tmp_path / "absent")


def test_size_of_shards_is_their_sum(tmp_path) -> None:
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"0" * 300)
    assert size_mb(tmp_path) == 600 / 1e6


# The machine


def test_environment_is_json_and_names_no_host() -> None:
    found = environment(threads=3, dtype=torch.bfloat16)
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == 3 and found["dtype"] == "bfloat16"
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert found["cpu"] and found["cores"] >= 1
    assert {"isa", "gpu", "transformers", "smbert", "platform"} <= set(found)
    assert platform.node() not in json.dumps(found).split('"') and "/" not in json.dumps(found)
    assert "dtype" not in environment() and environment()["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512f"}, False),
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_bf16"}, True),
        ({"asimd", "bf16"}, True),
        (set(), False),
    ],
)
def test_bf16_needs_the_hardware(monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: bool) -> None:
    monkeypatch.setattr(measure, "_cpu", lambda: ("a CPU", frozenset(flags)))
    assert supports_bf16("cpu") is expected
    assert supports_bf16(torch.device("meta")) is False
    assert environment()["isa"] == [flag for flag in measure._ISA if flag in flags]
    if not torch.cuda.is_available():
        assert supports_bf16("cuda") is False
        assert supports_bf16() is expected


# Latency


def test_latency_of_real_models_has_the_documented_shape() -> None:
    models = {"teacher": tiny("bert"), "small": tiny("bert", layers=1)}
    found = latency(models, shapes=((1, 8), (2, 16)), **QUICK)
    assert set(found) == {"teacher", "small"}
    for figures in found.values():
        assert set(figures) == {"1x8", "2x16"}
        assert all(0 < value["p50"] <= value["p95"] < 1e4 for value in figures.values())
    ratios = speedups(found)
    assert ratios["teacher"] == {"1x8": 1.0, "2x16": 1.0}
    assert ratios["small"]["1x8"] == found["teacher"]["1x8"]["p50"] / found["small"]["1x8"]["p50"]


def test_models_are_timed_in_turns() -> None:
    calls: list = []
    names = ["teacher", "a", "b"]
    latency({n: Recorder(n, calls) for n in names}, shapes=((2, 4),), warmup=2, min_runs=6, disable_tqdm=True)
    rounds = [[call[0] for call in calls[i : i + 3]] for i in range(0, len(calls), 3)]
    assert len(rounds) == 2 + 6
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert {r[0] for r in rounds[2:]} == set(names)  # the order rotates
    assert all(call[1] == (2, 4) for call in calls)


def test_conditions_are_set_and_restored() -> None:
    calls: list = []
    model = Recorder("m", calls, size=7).train()
    model.linear.eval()
    before = torch.get_num_threads()
    latency({"m": model}, shapes=((3, 5),), threads=before + 1, dtype=torch.bfloat16, **QUICK)
    assert {call[2:] for call in calls} == {(torch.bfloat16, before + 1)}
    assert torch.get_num_threads() == before and model.training and not model.linear.training
    calls.clear()
    latency({"m": model}, shapes=((3, 5),), **QUICK)
    assert {call[2:] for call in calls} == {(torch.float32, before)}


def test_conditions_are_restored_after_a_failure() -> None:
    class Broken(Recorder):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
            raise RuntimeError("out of memory")

    model, before = Broken("m", []).train(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="out of memory"):
        latency({"m": model}, threads=before + 1, **QUICK)
    assert torch.get_num_threads() == before and model.training


def test_slow_models_stop_at_the_time_and_fast_ones_at_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)

    class Slow(Recorder):
        def __init__(self, seconds: list[float], calls: list) -> None:
            super().__init__("m", calls)
            self.seconds = seconds

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
            clock.now += self.seconds[len(self.calls) % len(self.seconds)]
            super().forward(input_ids, attention_mask)

    def runs(seconds: list[float], **asked: Any) -> tuple[int, dict[str, float]]:
        calls: list = []
        found = latency({"m": Slow(seconds, calls)}, shapes=((1, 2),), **{**QUICK, "warmup": 0, **asked})
        return len(calls), found["m"]["1x2"]

    assert runs([0.001], min_runs=50, min_seconds=5)[0] == 50
    assert runs([0.5], min_runs=50, min_seconds=5)[0] == 10
    assert runs([60.0], min_runs=50, min_seconds=5)[0] == 5  # never fewer: a median of one run says nothing
    assert runs([60.0], min_runs=2, min_seconds=5)[0] == 2
    _, figures = runs([0.001, 0.002, 0.003, 0.004, 0.1], min_runs=5)
    assert figures["p50"] == pytest.approx(3.0) and figures["p95"] == pytest.approx(80.8)  # milliseconds
    text = [dict.fromkeys(("input_ids", "attention_mask"), torch.ones(1, 2, dtype=torch.long))]
    slow = {"m": Slow([0.001, 0.002, 0.003, 0.004, 0.1], [])}
    asked = latency_on(slow, text, **{**QUICK, "warmup": 0, "min_runs": 5}, percentiles=(0, 25))
    assert asked["m"]["mix"] == {"p0": pytest.approx(1.0), "p25": pytest.approx(2.0)}


@pytest.mark.parametrize("own", [False, True])
def test_real_lengths_use_all_batches_equally_and_no_labels(own: bool) -> None:
    calls: list = []
    ids = [torch.ones(2, length, dtype=torch.long) for length in (3, 5, 9)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": torch.zeros(2)} for x in ids]
    models = {"teacher": Recorder("teacher", calls), "a": Recorder("a", calls)}
    given = {"teacher": batches, "a": list(reversed(batches))} if own else batches
    found = latency_on(models, given, label="2xmix", **{**QUICK, "warmup": 0, "min_runs": 4})
    assert set(found["a"]) == {"2xmix"} and set(found["a"]["2xmix"]) == {"p50", "p95"}
    for name in models:
        lengths = [shape[1] for who, shape, *_ in calls if who == name]
        assert sorted(lengths) == [3, 3, 5, 5, 9, 9]  # four runs asked: rounded up to whole passes
    first = next(shape for who, shape, *_ in calls if who == "a")
    assert first == ((2, 9) if own else (2, 3))


def test_progress_line_can_be_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    latency({"m": Recorder("m", [])}, shapes=((1, 2),), **QUICK)
    assert capfd.readouterr() == ("", "")
    latency({"m": Recorder("m", [])}, shapes=((1, 2),), **{**QUICK, "disable_tqdm": False})
    assert "latency 1x2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": {}}, "`models` must hold at least one"),
        ({"shapes": ((0, 8),)}, "at least 1, got"),
        ({"shapes": ((1, 65),)}, "64 positions of 'm', got 1x65"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"warmup": -1}, "`warmup` must be at least 0"),
        ({"min_runs": 0}, "`min_runs` must be at least 1"),
        ({"dtype": torch.float16}, "`dtype` must be torch.float32"),
        ({"models": {"m": nn.Linear(1, 1).bfloat16()}}, "'m' must have fp32 weights, got torch.bfloat16"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latency(**{"models": {"m": tiny("bert")}, "shapes": ((1, 8),), **QUICK, **arguments})


def test_roberta_has_fewer_positions_than_rows() -> None:
    model = {"m": tiny("roberta")}
    assert latency(model, shapes=((1, 62),), **QUICK)
    with pytest.raises(ValueError, match="62 positions of 'm', got 1x63"):
        latency(model, shapes=((1, 63),), **QUICK)


def test_bad_batches() -> None:
    models = {"a": Recorder("a", []), "b": Recorder("b", [])}
    with pytest.raises(ValueError, match="at least 1, for all models"):
        latency_on(models, [], **QUICK)
    with pytest.raises(ValueError, match="names of the models"):
        latency_on(models, {"a": []}, **QUICK)
    with pytest.raises(ValueError, match="equally many batches"):
        latency_on(models, {"a": [{}], "b": [{}, {}]}, **QUICK)


def test_no_speedup_without_its_baseline() -> None:
    figures = {"1x128": {"p50": 4.0, "p95": 5.0}}
    slow = {"1x128": {"p50": 8.0, "p95": 9.0}, "32x128": {"p50": 80.0, "p95": 90.0}}
    assert speedups({"teacher": slow, "a": figures})["a"] == {"1x128": 2.0}
    assert speedups({"big": slow, "a": figures}, baseline="big")["big"] == {"1x128": 1.0, "32x128": 1.0}
    with pytest.raises(ValueError, match=r"timed together, \['a'\], got 'teacher'. To resolve"):
        speedups({"a": figures})
    with pytest.raises(ValueError, match=r"must hold the baseline 'teacher' for \['32x128'\]"):
        speedups({"teacher": figures, "a": slow})


def test_interleaving_is_pairwise_fair() -> None:
    calls: list = []
    latency({n: Recorder(n, calls) for n in "ab"}, shapes=((1, 2),), **{**QUICK, "warmup": 0, "min_runs": 8})
    order = [call[0] for call in calls]
    follows = {pair: sum(p == pair for p in pairwise(order)) for pair in (("a", "b"), ("b", "a"))}
    assert abs(follows["a", "b"] - follows["b", "a"]) <= 1


def test_the_machine_on_one_line() -> None:
    assert (
        machine_line({"cpu": "A", "isa": ["avx2", "fma"], "gpu": None, "threads": 2})
        == "cpu A, isa avx2+fma, threads 2"
    )
    assert f"torch {torch.__version__}" in machine_line(environment())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once")
def test_once_warmed_up_no_page_is_faulted_in_again_while_models_are_timed():
    resource = pytest.importorskip("resource")
    faults = []

    class Wide(nn.Module):
        config = SimpleNamespace(vocab_size=10)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
            torch.ones(10_000_000).add_(1)  # 40 MB: a block of its own mapping wherever memory is not kept
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    latency({"m": Wide()}, shapes=((1, 2),), **QUICK | {"warmup": 30})
    assert len(faults) == 33 and faults[-1] - faults[29] < 500  # of 29,000 where each run gets new pages


def test_memory_is_left_alone_where_it_is_not_glibcs(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    with freed_memory_kept():
        pass
