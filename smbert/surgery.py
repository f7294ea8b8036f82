"""The only code that changes the shape of a model: whole layers, attention heads and FFN neurons.

Surgery is exact: a model cut by `keep_units` computes what the uncut model computes under `masked`, because a unit only
reaches the rest of the model through its own columns of an output projection. At zero units its bias and norm stay, until `pass_by`,
which is not exact, takes them out.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoints import load_model, save_model
from .modeling import (
    ADD_NORMS,
    SLIM_CLASSES,
    STOCK_CLASSES,
    Family,
    auto_map,
    encoder_layers,
    family_of,
    head_dim,
    passed_by,
)

__all__ = [
    "PruningPlan",
    "Structure",
    "empty_parts",
    "keep_layers",
    "keep_units",
    "load_model",
    "masked",
    "pass_by",
    "save_model",
    "structure_of",
]


@dataclass(frozen=True)
class Structure:
    """The sizes of a model that scoring, budgets and losses need.

    Attributes:
        family: entry of the `FAMILIES` table.
        hidden_size: width of the residual stream.
        head_dim: size of one attention head; pruning never changes it.
        vocab_size: rows of the word embedding.
        embedding_size: columns of the word embedding (ELECTRA: may differ from `hidden_size`).
        layer_widths: (heads, FFN neurons) of each layer, as they are in the model's tensors.
        factorised: whether the word embedding is a product of two tables.
        passed_by: for each layer, whether its attention and its feed-forward part are passed by; empty: none is.
    """

    family: Family
    hidden_size: int
    head_dim: int
    vocab_size: int
    embedding_size: int
    layer_widths: tuple[tuple[int, int], ...]
    factorised: bool = False
    passed_by: tuple[tuple[bool, bool], ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layer_widths)


@dataclass(frozen=True)
class PruningPlan:
    """The indices of the units that stay, per layer, sorted; they count the units that the model has now.

    Attributes:
        heads: for each layer, the attention heads that stay; none at all is allowed.
        ffn: for each layer, the FFN neurons that stay; none at all is allowed.
    """

    heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for name in ("heads", "ffn"):
            layers = tuple(tuple(operator.index(unit) for unit in layer) for layer in getattr(self, name))
            for number, layer in enumerate(layers):
                if list(layer) != sorted(set(layer)) or (layer and layer[0] < 0):
                    raise ValueError(
                        f"`{name}` must be sorted, distinct and not negative in every layer, got {layer} in layer "
                        f"{number}. To resolve, pass tuple(sorted(set(indices)))."
                    )
            object.__setattr__(self, name, layers)
        if len(self.heads) != len(self.ffn):
            raise ValueError(
                f"`heads` and `ffn` must describe the same layers, got {len(self.heads)} and {len(self.ffn)}. "
                "To resolve, give one tuple per layer in both."
            )

    @property
    def layer_widths(self) -> list[tuple[int, int]]:
        """The numbers of heads and of FFN neurons that each layer keeps."""
        return [(len(heads), len(ffn)) for heads, ffn in zip(self.heads, self.ffn, strict=True)]

    def to_dict(self) -> dict[str, list[list[int]]]:
        return {"heads": [list(layer) for layer in self.heads], "ffn": [list(layer) for layer in self.ffn]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningPlan:
        if set(values) != {"heads", "ffn"}:
            raise ValueError(f"a pruning plan must have the keys `heads` and `ffn`, got {sorted(values)}.")
        return cls(heads=tuple(values["heads"]), ffn=tuple(values["ffn"]))

    @classmethod
    def full(cls, model: PreTrainedModel) -> PruningPlan:
        """The plan that keeps everything."""
        widths = structure_of(model).layer_widths
        return cls(heads=tuple(tuple(range(h)) for h, _ in widths), ffn=tuple(tuple(range(f)) for _, f in widths))


def structure_of(model: PreTrainedModel) -> Structure:
    """Reads a model's sizes from its tensors, so that an unsaved model is described as truly as a loaded one.

    Raises:
        ValueError: the model's family is unknown.
    """
    family, config = family_of(model), model.config
    size = head_dim(config)
    embedding: Any = model.get_input_embeddings()
    return Structure(
        family=family,
        hidden_size=config.hidden_size,
        head_dim=size,
        vocab_size=embedding.weight.shape[0],
        embedding_size=embedding.weight.shape[1],
        layer_widths=tuple(
            (_in_features(family.get(layer, "attention_output")) // size, _in_features(family.get(layer, "ffn_out")))
            for layer in encoder_layers(model)
        ),
        factorised=bool(getattr(config, "embedding_rank", None)),
        passed_by=tuple(passed_by(config)),
    )


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model of the given layers only (0-based, ascending); the rest of it and the input stay as they are.

    Raises:
        ValueError: no layers, not ascending, not there, or without layer 0 in a family that cannot do without it.
    """
    count, chosen = len(encoder_layers(model)), [operator.index(layer) for layer in layers]
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(
            f"`layers` must be ascending, distinct numbers from 0 to {count - 1} for this {count}-layer model, "
            f"got {chosen}. To resolve, choose 1 to {count} of these."
        )
    if family_of(model).fixed_first_layer and chosen[0] != 0:
        raise ValueError(
            f"`layers` must begin with 0 for {family_of(model).model_type}, whose first layer has no norm before its "
            f"attention, got {chosen}. To resolve, keep layer 0 as well."
        )
    full = PruningPlan.full(model)
    return _rebuild(
        model, chosen, PruningPlan(tuple(full.heads[i] for i in chosen), tuple(full.ffn[i] for i in chosen))
    )


def keep_units(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """A new model of the planned heads and neurons only; the input stays as it is.

    The result is of the stock class when its config can say the widths (all heads, the same number of neurons in every
    layer), else of the slim class of the family.

    Raises:
        ValueError: the plan is not of this model, or the model's class has no slim counterpart.
    """
    _check_plan(model, plan)
    return _rebuild(model, list(range(len(plan.ffn))), plan)


def empty_parts(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(layer, part) of each part without units that the residual stream could pass by and does not yet; part 0 is attention, 1 FFN.

    The first part of the model is never one: what its norm does cannot be left to the norm of the part before.
    """
    family, found, before = family_of(model), [], False
    for layer, (widths, passed) in enumerate(
        zip(structure_of(model).layer_widths, passed_by(model.config), strict=True)
    ):
        for part, name in enumerate(ADD_NORMS):
            if before and not widths[part] and not passed[part] and getattr(family, name):
                found.append((layer, part))
            before = before or not passed[part]
    return found


def pass_by(model: PreTrainedModel, parts: Sequence[tuple[int, int]] | None = None) -> PreTrainedModel:
    """A new model whose residual stream passes by `empty_parts`: neither their biases nor their norms are there any more.

    Args:
        model: stays as it is.
        parts: (layer, 0 for attention or 1 for FFN) of some of them; None: all.

    Raises:
        ValueError: a part that is not one of them.
    """
    able, passed = empty_parts(model), [list(pair) for pair in passed_by(model.config)]
    chosen = able if parts is None else parts
    if other := [part for part in chosen if part not in able]:
        raise ValueError(
            f"`parts` must be among the empty ones that can be passed by, {able}, got {other[0]}. To resolve, leave it out."
        )
    for layer, part in chosen:
        passed[layer][part] = True
    return _rebuild(model, range(len(passed)), PruningPlan.full(model), passed)


@contextlib.contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Within the context, units outside the plan are multiplied by zero on their way into the output projections.

    Raises:
        ValueError: the plan is not of this model.
    """
    _check_plan(model, plan)
    family, structure = family_of(model), structure_of(model)
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(encoder_layers(model)):
            heads, ffn = structure.layer_widths[index]
            head_mask = _mask(heads, plan.heads[index]).repeat_interleave(structure.head_dim)  # (heads * head_dim,)
            for part, mask in (("attention_output", head_mask), ("ffn_out", _mask(ffn, plan.ffn[index]))):
                hook = family.get(layer, part).register_forward_pre_hook(_multiply_input_by(mask))
                stack.callback(hook.remove)
        yield model


def _mask(count: int, kept: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(count)
    mask[list(kept)] = 1
    return mask


def _multiply_input_by(mask: torch.Tensor) -> Any:
    return lambda module, args: (args[0] * mask.to(args[0]), *args[1:])


def _in_features(module: nn.Module) -> int:
    return int(module.in_features)  # type: ignore[arg-type]


def _check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    widths = structure_of(model).layer_widths
    if len(plan.heads) != len(widths):
        raise ValueError(
            f"`plan` must have one entry for each of the model's {len(widths)} layers, got {len(plan.heads)}. "
            "To resolve, make the plan from this very model."
        )
    for number, (sizes, *kept) in enumerate(zip(widths, plan.heads, plan.ffn, strict=True)):
        for name, size, units in zip(("heads", "neurons"), sizes, kept, strict=True):
            if units and units[-1] >= size:
                raise ValueError(
                    f"`plan` must keep {name} below {size} in layer {number}, got {units[-1]}. "
                    "To resolve, make the plan from this very model: indices count the units that are still there."
                )


def _rebuild(
    model: PreTrainedModel, layers: Sequence[int], plan: PruningPlan, passed: Sequence[Sequence[bool]] | None = None
) -> PreTrainedModel:
    """Builds the class and config that can hold the result, and fills it with cut copies of the model's tensors.

    Args:
        model: left untouched.
        layers: the layers to take, by their numbers in `model`.
        plan: the units to take in each of these layers, by their numbers in `model`.
        passed: for each layer of `model`, whether its two parts shall be passed by; None: as now.
    """
    target = _target_class(model, plan)
    config = _target_config(model, target, layers, plan, passed or passed_by(model.config))
    with torch.device("meta"):
        result = target(config)
    if getattr(model, "pooler", result) is None:  # AutoModel(..., add_pooling_layer=False) is not in the config
        result.pooler = None
    prefix = next(name for name, module in model.named_modules() if module is encoder_layers(model))
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    slices = _slices(model, layers, plan)

    def source(name: str) -> str:
        return pattern.sub(lambda match: f"{prefix}.{layers[int(match[1])]}.", name)

    tensors, state = model.state_dict(), {}
    for name in result.state_dict():
        tensor = tensors[source(name)].detach()
        match = pattern.match(name)
        cut = slices.get((int(match[1]), name[match.end() :])) if match else None
        state[name] = tensor.index_select(cut[0], cut[1].to(tensor.device)) if cut else tensor.clone()
    result.load_state_dict(state, assign=True)
    result.tie_weights()
    for name, buffer in list(result.named_buffers()):
        if buffer.is_meta:  # not in the state dict, and the same for all layers and widths
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, model.get_buffer(source(name)).detach().clone())
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(model.get_parameter(source(name)).requires_grad)
    return result.train(model.training)


def _slices(
    model: PreTrainedModel, layers: Sequence[int], plan: PruningPlan
) -> dict[tuple[int, str], tuple[int, torch.Tensor]]:
    """For each tensor to cut, (new layer number, its name inside the layer): dimension and indices to keep."""
    family, structure = family_of(model), structure_of(model)
    size = structure.head_dim
    slices: dict[tuple[int, str], tuple[int, torch.Tensor]] = {}
    for number, layer in enumerate(layers):
        heads, ffn = structure.layer_widths[layer]
        neurons = torch.tensor(plan.ffn[number], dtype=torch.long)
        kept = torch.tensor(plan.heads[number], dtype=torch.long)
        columns = (kept[:, None] * size + torch.arange(size)).flatten()  # (kept heads * head_dim,)
        if len(kept) < heads:
            blocks = range(3) if family.fused_qkv else range(1)
            rows = torch.cat([columns + block * heads * size for block in blocks])
            for part in {family.query, family.key, family.value}:
                slices[number, f"{part}.weight"] = slices[number, f"{part}.bias"] = (0, rows)
            slices[number, f"{family.attention_output}.weight"] = (1, columns)
        if len(neurons) < ffn:
            rows = torch.cat([neurons + block * ffn for block in (range(2) if family.gated else range(1))])
            slices[number, f"{family.ffn_in}.weight"] = slices[number, f"{family.ffn_in}.bias"] = (0, rows)
            slices[number, f"{family.ffn_out}.weight"] = (1, neurons)
    return slices


def _target_class(model: PreTrainedModel, plan: PruningPlan) -> Any:
    """The stock class if its config can say the plan. No family can say fewer heads: all derive head_dim from them."""
    stock = STOCK_CLASSES.get(type(model), type(model))
    widths = set(plan.layer_widths)
    heads, ffn = max(widths)
    factorised = getattr(model.config, "embedding_rank", None)
    if len(widths) == 1 and heads == model.config.num_attention_heads and ffn > 0 and not factorised:
        return stock
    if stock not in SLIM_CLASSES:
        prefix = family_of(model).classes
        known = [c.__name__ for c in SLIM_CLASSES if c.__name__.startswith(prefix) and issubclass(c, PreTrainedModel)]
        raise ValueError(
            f"the model's class must be one of {', '.join(known)} to have other widths than its config can say, "
            f"got {type(model).__name__}. To resolve, load the checkpoint with `load_model`."
        )
    return SLIM_CLASSES[stock]


def _target_config(
    model: PreTrainedModel, target: Any, layers: Sequence[int], plan: PruningPlan, passed: Sequence[Sequence[bool]]
) -> Any:
    family, old = family_of(model), model.config
    # Copied field by field, since rebuilding from a dict forgets the attention back end and other private state.
    config = target.config_class.__new__(target.config_class)
    config.__dict__.update(copy.deepcopy(old.__dict__))
    if type(old) in STOCK_CLASSES:
        for key in ("layer_widths", "kept_heads", "passed_by", "auto_map"):
            config.__dict__.pop(key, None)
        if not config.__dict__.get("embedding_rank"):
            config.__dict__.pop("embedding_rank", None)
    config.num_hidden_layers = len(layers)
    if most := max(ffn for _, ffn in plan.layer_widths):
        setattr(config, family.intermediate_size, most)
    if getattr(old, "layer_types", None) is not None:
        config.layer_types = [old.layer_types[layer] for layer in layers]
    if type(config) in STOCK_CLASSES:
        config.auto_map = auto_map(family)
        config.layer_widths = [[heads, ffn] for heads, ffn in plan.layer_widths]
        chosen = [list(passed[layer]) for layer in layers]
        config.passed_by = chosen if any(map(any, chosen)) else None
        config.kept_heads = None
        if family.shared_head_bias:
            before = getattr(old, "kept_heads", None) or [range(old.num_attention_heads)] * old.num_hidden_layers
            config.kept_heads = [
                [before[layer][head] for head in kept] for layer, kept in zip(layers, plan.heads, strict=True)
            ]
    config.validate()
    return config
