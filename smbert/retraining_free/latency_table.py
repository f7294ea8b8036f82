"""How many milliseconds a sub-layer of each size takes on this machine, and so a whole model that was never built.

All sizes are timed in turns, in torch as layers of their own fed with a real layer's inputs, behind an engine as models of one layer,
together with the whole model and with one that has no units left. A model's predicted latency is that of the empty model plus that of its sub-layers, scaled so that the whole
model's is met exactly.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._model_card import write_whole
from ..measure import environment, latency_on, max_positions
from ..modeling import encoder_layers
from ..processes import process_state
from ..surgery import PruningPlan, keep_layers, keep_units, pass_by, structure_of
from .cost_table import CostTable
from .served import check_engine, served, versions, with_small_vocabulary
from .stream import record

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# Whatever else the machine does only adds time, and it comes and goes: the median of some sizes would be of one state and that of
# others of another.
UNDISTURBED = 10  # percentile
_MACHINE = ("cpu", "isa", "cores", "gpu", "torch", "platform")  # entries of `environment` on which times depend


@dataclass(frozen=True)
class Conditions:
    """What times belong to beside the machine.

    Attributes:
        batch, length: sequences and tokens of each, without padding.
        threads: of the CPU; None: as many as torch uses now.
        engine: that runs the models: torch, onnx (ONNX Runtime) or openvino, in fp32.
    """

    batch: int = 32
    length: int = 128
    threads: int | None = None
    engine: str = "torch"

    def __post_init__(self) -> None:
        check_engine(self.engine)
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}. To resolve, correct it.")
        if self.threads is None:
            object.__setattr__(self, "threads", torch.get_num_threads())


def latency_table(
    model: PreTrainedModel,
    heads: Iterable[int],
    ffn: Iterable[int],
    conditions: Conditions,
    path: str | Path,
    *,
    force: bool = False,
    min_runs: int = 15,
    min_seconds: float = 60.0,
) -> CostTable:
    """The table for a model's sizes: read from `path` if there is one, else measured and written there.

    Args:
        model: the model whose sub-layers are timed; any known family.
        heads, ffn: the sizes that the table must hold.
        conditions: what is timed.
        path: a JSON file, or a folder in which the file is named by machine, model and conditions.
        force: use a table of another machine or another engine all the same.
        min_runs, min_seconds: as in `measure.latency`.

    Raises:
        ValueError: a table of another machine, engine, shape, number of threads, attention or model, or without these sizes.
    """
    sizes = {"heads": sorted({0, *heads}), "ffn": sorted({0, *ffn})}
    about = {
        **_about(conditions),
        "attention": model.config._attn_implementation,
        "model": _shape_of(model),
        "sizes": sizes,
    }
    path = Path(path)
    if path.suffix != ".json":
        path = path / f"latency-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"
    try:
        if process_state().is_main_process and not path.exists():
            costs = _measured(model, sizes["heads"], sizes["ffn"], conditions, min_runs, min_seconds)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"schema_version": SCHEMA_VERSION, **about, "costs": asdict(costs)}
            write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    finally:
        process_state().wait_for_everyone()
    return _read(path, about, force)


def machine() -> dict[str, Any]:
    """The entries of `measure.environment` that decide how long a computation takes."""
    values = environment()
    return {key: values[key] for key in _MACHINE}


def _shape_of(model: PreTrainedModel) -> dict[str, Any]:
    structure, config = structure_of(model), model.config
    names = ("hidden_act", "hidden_activation", "activation")  # as the families call it
    return {
        "class": type(model).__name__,
        "activation": next((getattr(config, name) for name in names if hasattr(config, name)), None),
        "family": structure.family.model_type,
        "hidden_size": structure.hidden_size,
        "head_dim": structure.head_dim,
        "embedding_size": structure.embedding_size,
        "layer_widths": [list(pair) for pair in structure.layer_widths],
        "passed_by": [list(pair) for pair in structure.passed_by],
    }


def read_table(path: Path, keys: Iterable[str] = ()) -> tuple[CostTable, dict[str, Any]]:
    """The costs in a file, and its entries of these keys; ValueError where it is no latency table."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        costs = values["costs"]
        table = CostTable(
            costs["name"],
            float(costs["fixed"]),
            *({int(size): float(ms) for size, ms in costs[part].items()} for part in ("heads", "ffn")),
        )
        return table, {key: values[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a latency table, but reading it gave {error!r}. To resolve, delete it, so that it is measured anew."
        ) from error


def check_table(path: Path, conditions: Conditions, force: bool = False) -> None:
    """What can be said of a table before there is a model.

    Raises:
        ValueError: no latency table, or one of another machine, engine, shape or number of threads.
    """
    _checked(path, _about(conditions), force)


def _about(conditions: Conditions) -> dict[str, Any]:
    return {**asdict(conditions), "machine": {**machine(), **versions(conditions.engine)}}


def _checked(path: Path, about: Mapping[str, Any], force: bool) -> CostTable:
    table, found = read_table(path, about)
    for key, what in (("machine", "on another machine"), ("engine", "with another engine")):
        if found[key] != about[key] and not force:
            told = ", ".join(_changes(found[key], about[key]))
            raise ValueError(
                f"{path} was measured {what} ({told}), so its times say nothing here. To resolve, name another file, delete it, "
                "so that it is measured anew, or use it all the same with `force_table`."
            )
    for key in ("batch", "length", "threads", "attention", "model"):
        if key in about and found[key] != about[key]:
            raise ValueError(
                f"{path} was measured for another {key} ({', '.join(_changes(found[key], about[key]))}). To resolve, name another "
                "file, or delete it, so that it is measured anew."
            )
    return table


def _read(path: Path, about: Mapping[str, Any], force: bool) -> CostTable:
    table = _checked(path, about, force)
    for part, name in ((table.heads, "heads"), (table.ffn, "ffn")):
        if missing := sorted(set(about["sizes"][name]) - set(part)):
            raise ValueError(
                f"{path} must hold the {name} sizes {missing} too. To resolve, name another file, or delete it, so that it is "
                "measured anew."
            )
    return table


def _changes(old: Any, new: Any) -> list[str]:
    if not isinstance(old, Mapping):
        return [f"{old} and not {new}"]
    return [f"{key} {old.get(key)} and not {new.get(key)}" for key in new if old.get(key) != new.get(key)]


# ---------------------------------------------------------------------------------------------------------------- measuring


def whole_models_ms(
    models: Mapping[str, PreTrainedModel], conditions: Conditions, *, warmup: int = 3, min_runs: int, min_seconds: float
) -> dict[str, float]:
    """Undisturbed milliseconds of models, timed in turns."""
    inputs = _inputs(min(models.values(), key=lambda m: m.config.vocab_size), conditions)  # all know its tokens
    with served(models, conditions.engine, conditions.threads) as modules:
        timed = latency_on(
            modules, [inputs], label="ms", warmup=warmup, min_runs=min_runs, min_seconds=min_seconds, threads=conditions.threads,
            disable_tqdm=True, percentiles=(UNDISTURBED,),
        )  # fmt: skip
    return {name: figures["ms"][f"p{UNDISTURBED}"] for name, figures in timed.items()}


def _inputs(model: PreTrainedModel, conditions: Conditions) -> dict[str, Tensor]:
    """Random tokens (batch, length) without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (conditions.batch, conditions.length), generator=generator)
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def _measured(
    model: PreTrainedModel, heads: list[int], ffn: list[int], conditions: Conditions, min_runs: int, min_seconds: float
) -> CostTable:
    """All sizes in turns."""
    if conditions.length > (most := max_positions(model)):
        raise ValueError(
            f"`length` must be at most {most}, the positions of this model, got {conditions.length}. To resolve, lower it."
        )
    widths = structure_of(model).layer_widths
    time = _layers_in_torch if conditions.engine == "torch" else _models_behind_engine
    ms = time(model, (heads, ffn), conditions, min_runs, min_seconds)
    tables = [
        {size: max(0.0, ms[f"{kind} {size}"] - ms[f"{kind} 0"]) for size in sizes}
        for kind, sizes in enumerate((heads, ffn))
    ]
    units = sum(tables[kind][size] for pair in widths for kind, size in enumerate(pair))
    fixed = min(ms["empty"], ms["whole"])
    scale = (ms["whole"] - fixed) / units if units > 0 else 0.0
    logger.info(
        "latency: whole %.1f ms, without units %.1f ms, layers alone take %.2f of their part",
        ms["whole"],
        fixed,
        1 / scale if scale else 0.0,
    )
    return CostTable("latency_ms", fixed, *({size: scale * t for size, t in table.items()} for table in tables))


Sizes = tuple[list[int], list[int]]  # of heads, of neurons


def _layers_in_torch(
    model: PreTrainedModel, sizes: Sizes, conditions: Conditions, min_runs: int, min_seconds: float
) -> dict[str, float]:
    """Undisturbed milliseconds of "whole", "empty", and of a layer alone of each size: "0 8" for eight heads, "1 512" for neurons."""
    inputs = _inputs(model, conditions)
    calls, widest = record(model, [inputs]), _widest(model)
    models: dict[str, nn.Module] = {"whole": model, "empty": _emptied(model)}
    batches: dict[str, list[dict[str, Tensor]]] = {"whole": [inputs], "empty": [inputs]}
    for name, cut, kind in _cut(model, sizes):
        models[name] = _Alone(encoder_layers(cut)[-1], *calls.arguments[0][widest[kind]])
        batches[name] = [{"hidden_states": calls.states[0]}]
    timed = latency_on(
        models, batches, label="ms", warmup=2, min_runs=min_runs, min_seconds=min_seconds / len(models),
        threads=conditions.threads, disable_tqdm=True, percentiles=(UNDISTURBED,),
    )  # fmt: skip
    return {name: figures["ms"][f"p{UNDISTURBED}"] for name, figures in timed.items()}


def _models_behind_engine(
    model: PreTrainedModel, sizes: Sizes, conditions: Conditions, min_runs: int, min_seconds: float
) -> dict[str, float]:
    """Likewise, where a layer comes as a model of its own, since an engine runs nothing less."""
    few = with_small_vocabulary(model)
    models = {"whole": few, "empty": _emptied(few), **{name: cut for name, cut, _ in _cut(few, sizes)}}
    return whole_models_ms(models, conditions, warmup=2, min_runs=min_runs, min_seconds=min_seconds / len(models))


def _cut(model: PreTrainedModel, sizes: Sizes) -> Iterator[tuple[str, PreTrainedModel, int]]:
    """For each size its name, a model whose last layer has it and nothing else, and its kind: 0 for heads, 1 for neurons."""
    widest = _widest(model)
    for kind, own in enumerate(sizes):
        # A family may need its first layer to be there.
        few = keep_layers(model, sorted({0, widest[kind]}))
        kept = structure_of(few).layer_widths
        for size in own:
            last = (0, size) if kind else (size, 0)
            yield f"{kind} {size}", _cut_to(few, _first(kept, [*[(0, 0)] * (len(kept) - 1), last])), kind


def _widest(model: PreTrainedModel) -> list[int]:
    """The layers with most heads and with most neurons."""
    widths = structure_of(model).layer_widths
    return [max(range(len(widths)), key=lambda layer, kind=kind: widths[layer][kind]) for kind in range(2)]  # type: ignore[misc]


def _emptied(model: PreTrainedModel) -> PreTrainedModel:
    widths = structure_of(model).layer_widths
    return _cut_to(model, _first(widths, [(0, 0)] * len(widths)))


def _cut_to(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """As it will be served: parts without units are passed by."""
    return pass_by(keep_units(model, plan))


def _first(widths: Any, sizes: Any) -> PruningPlan:
    """A plan that keeps the first units of each layer: for timing, not for answering."""
    pairs = [(min(h, size[0]), min(f, size[1])) for (h, f), size in zip(widths, sizes, strict=True)]
    return PruningPlan(tuple(tuple(range(h)) for h, _ in pairs), tuple(tuple(range(f)) for _, f in pairs))


class _Alone(nn.Module):
    """One layer with all its arguments but the hidden states."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.layer, self.arguments = layer, (args, kwargs)

    def forward(self, hidden_states: Tensor) -> Any:
        args, kwargs = self.arguments
        return self.layer(hidden_states, *args, **kwargs)
