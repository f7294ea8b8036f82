"""Encoders whose layers differ in width: a table of model families, and config and model classes that save and reload.

This file is self-contained on purpose (torch, transformers and huggingface_hub only): `save_pretrained` copies it
beside the weights, so that `AutoModel*.from_pretrained(folder, trust_remote_code=True)` works where smbert is not
installed.

A slim model is a stock transformers model whose Linears are resized at the end of `__init__`, before any weights are
loaded. Its config adds `layer_widths = [[heads, ffn], ...]` and keeps `num_attention_heads` at the unpruned number,
since hidden_size / num_attention_heads is what every family uses as the size of a head. A part of a layer that has lost all units still
adds its bias and norms the sum, unless `passed_by = [[attention, ffn], ...]` takes that out too.
"""

# No `from __future__ import annotations` here: `strict` does not validate config fields whose types are strings.
import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention


@dataclass(frozen=True)
class Family:
    """Where one model family keeps its parts: all that smbert has to know in order to prune and distil it.

    Attributes:
        model_type: `config.model_type` of the stock config.
        classes: prefix of the stock class names, such as "Bert" in `BertForSequenceClassification`.
        layers: dotted path from the base model to the ModuleList of its layers.
        query, key, value: dotted paths inside a layer. A fused projection is named three times.
        attention_output: output projection of the attention, (heads * head_dim) -> hidden.
        ffn_in: first projection of the feed-forward part, hidden -> ffn, or hidden -> 2 * ffn when `gated`.
        ffn_out: second projection of the feed-forward part, ffn -> hidden.
        attention: the self-attention module, whose head-count attributes are kept true.
        attention_add_norm, ffn_add_norm: modules, called with output and residual, that add them and norm the sum, with a `LayerNorm` of
            their own, so that an empty part can be passed by. None: the layer does it itself.
        intermediate_size: the config's name for the number of FFN neurons. The other sizes go by their common names in
            all families, thanks to `attribute_map`.
        fused_qkv: one projection makes query, key and value, as three blocks of rows in this order.
        gated: `ffn_in` makes the activation input and the gate, as two blocks of rows.
        shared_head_bias: one position bias with a column per unpruned head serves all layers, so the numbers of the
            heads that a layer keeps must be known.
        fixed_first_layer: layer 0 is built differently from the others, so no other layer can take its place.
        pre_norm: norms stand in front of the sub-layers, so that nothing normalises the sum of output and residual.
    """

    model_type: str
    classes: str
    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    attention: str
    attention_add_norm: str | None = None
    ffn_add_norm: str | None = None
    intermediate_size: str = "intermediate_size"
    fused_qkv: bool = False
    gated: bool = False
    shared_head_bias: bool = False
    fixed_first_layer: bool = False
    pre_norm: bool = False

    def get(self, layer: nn.Module, part: str) -> nn.Module:
        """The module of a layer that plays `part`, as in `family.get(layer, "ffn_out")`."""
        return layer.get_submodule(getattr(self, part))


def _bert_like(model_type: str, classes: str) -> Family:
    return Family(
        model_type=model_type,
        classes=classes,
        layers="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention="attention.self",
        attention_add_norm="attention.output",
        ffn_add_norm="output",
    )


FAMILIES: dict[str, Family] = {
    "bert": _bert_like("bert", "Bert"),
    "roberta": _bert_like("roberta", "Roberta"),
    "xlm-roberta": _bert_like("xlm-roberta", "XLMRoberta"),
    "electra": _bert_like("electra", "Electra"),
    "distilbert": Family(
        model_type="distilbert",
        classes="DistilBert",
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        attention="attention",
        intermediate_size="hidden_dim",
    ),
    "mpnet": Family(
        model_type="mpnet",
        classes="MPNet",
        layers="encoder.layer",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention="attention.attn",
        attention_add_norm="attention",
        ffn_add_norm="output",
        shared_head_bias=True,
    ),
    # transformers 5.15 and 5.16 refuse a ModernBERT whose layers are all of one kind (full or sliding attention); 5.17 does not.
    "modernbert": Family(
        model_type="modernbert",
        classes="ModernBert",
        layers="layers",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        ffn_in="mlp.Wi",
        ffn_out="mlp.Wo",
        attention="attn",
        fused_qkv=True,
        gated=True,
        fixed_first_layer=True,
        pre_norm=True,
    ),
}

PREFIX = "smbert_"

HEADS: dict[str, tuple[str, str]] = {  # name of the head: (Auto class, ending of the stock class name)
    "encoder": ("AutoModel", "Model"),
    "sequence-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "token-classification": ("AutoModelForTokenClassification", "ForTokenClassification"),
    "question-answering": ("AutoModelForQuestionAnswering", "ForQuestionAnswering"),
    "multiple-choice": ("AutoModelForMultipleChoice", "ForMultipleChoice"),
    "masked-lm": ("AutoModelForMaskedLM", "ForMaskedLM"),
}


def family_of(model_or_config: Any) -> Family:
    """The family of a model, a config, or a `model_type`; slim models belong to the family that they were cut from.

    Raises:
        ValueError: the family is not in `FAMILIES`.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type).removeprefix(PREFIX))
    if family is None:
        raise ValueError(
            f"`model_type` must be one of the known families {', '.join(FAMILIES)}, got {model_type!r}. To resolve, "
            "use a checkpoint of one of them, or add an entry to `smbert.modeling.FAMILIES`, with the paths of your "
            f"model's own modules: "
            f'FAMILIES[{model_type!r}] = Family(model_type={model_type!r}, classes="Bert", '
            'layers="encoder.layer", query="attention.self.query", key="attention.self.key", '
            'value="attention.self.value", attention_output="attention.output.dense", ffn_in="intermediate.dense", '
            'ffn_out="output.dense", attention="attention.self").'
        )
    return family


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a model with or without a head."""
    layers = getattr(model, "base_model", model).get_submodule(family_of(model).layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"the layers of {type(model).__name__} must be a ModuleList, got {type(layers).__name__}.")
    return layers


def head_dim(config: Any) -> int:
    """Size of one attention head. Pruning never changes it: slim configs keep the unpruned number of heads."""
    return config.hidden_size // config.num_attention_heads


def layer_widths(config: Any) -> list[tuple[int, int]]:
    """The numbers of heads and of FFN neurons of each layer, for stock and slim configs."""
    family = family_of(config)
    if getattr(config, "layer_widths", None) is not None:
        return [(heads, ffn) for heads, ffn in config.layer_widths]
    return [(config.num_attention_heads, getattr(config, family.intermediate_size))] * config.num_hidden_layers


# Of the two parts of a layer: what adds its output to the residual and norms it, and its output projection.
ADD_NORMS = {"attention_add_norm": "attention_output", "ffn_add_norm": "ffn_out"}


def passed_by(config: Any) -> list[tuple[bool, bool]]:
    """For each layer, whether the residual stream passes by its attention and its feed-forward part, unchanged and not normed."""
    found = getattr(config, "passed_by", None) or [[False, False]] * config.num_hidden_layers
    return [(attention, ffn) for attention, ffn in found]


def _shrink(linear: nn.Module, rows: int, columns: int) -> None:
    """Keeps the first rows and columns: freshly initialised weights stay so, on the meta device too."""
    assert isinstance(linear, nn.Linear)  # by construction of the stock classes
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())
    linear.out_features, linear.in_features = rows, columns


def _resize_layers(model: Any) -> None:
    """Gives a freshly built stock model the widths that its slim config asks for."""
    config, family = model.config, family_of(model)
    hidden, size = config.hidden_size, head_dim(config)
    for index, (layer, (heads, ffn)) in enumerate(zip(encoder_layers(model), layer_widths(config), strict=True)):
        if family.shared_head_bias:
            kept = config.kept_heads[index] if config.kept_heads else range(heads)
            layer.set_submodule(family.attention, SlimMPNetSelfAttention(config, tuple(kept)))
        attention = family.get(layer, "attention")
        for name, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", heads * size)):
            if hasattr(attention, name):
                setattr(attention, name, value)
        for part in ("query",) if family.fused_qkv else ("query", "key", "value"):
            _shrink(family.get(layer, part), (3 if family.fused_qkv else 1) * heads * size, hidden)
        _shrink(family.get(layer, "attention_output"), hidden, heads * size)
        if heads == 0:
            _remove_attention(family, attention)
        _shrink(family.get(layer, "ffn_in"), (2 if family.gated else 1) * ffn, hidden)
        _shrink(family.get(layer, "ffn_out"), hidden, ffn)
        for part, passed in zip(ADD_NORMS, passed_by(config)[index], strict=True):
            if passed:
                _pass_by(family.get(layer, part), family.get(layer, ADD_NORMS[part]))


@functools.cache
def _mixed(mixin: type, stock: Any) -> Any:
    name = mixin.__name__.removesuffix("Mixin") + stock.__name__
    return type(name, (mixin, stock), {"__module__": __name__, "__qualname__": name})


class FactorisedEmbedding(nn.Embedding):
    """A word embedding as a product: a table (vocabulary, rank), and a projection to the width that the model expects."""

    def __init__(self, size: int, rank: int, width: int, padding_idx: int | None) -> None:
        super().__init__(size, rank, padding_idx=padding_idx)
        self.projection = nn.Linear(rank, width, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.projection(super().forward(input))


class NoHeadsMixin:
    """Self-attention of a layer that has no heads left: its output is the bias of the output projection.

    No attention kernel is called, since some (flash attention on CUDA) divide by the number of heads. The empty
    projections still run, so that hooks on them fire and that no parameter is without a gradient in training.
    """

    projections: tuple[str, ...]
    outputs: tuple[str, ...]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        module: Any = self
        states: Any = sum(module.get_submodule(name)(hidden_states) for name in self.projections)  # (batch, seq, 0)
        for name in self.outputs:
            states = module.get_submodule(name)(states)
        batch, length = hidden_states.shape[:2]
        return states, hidden_states.new_zeros(batch, 0, length, length)  # no attention weights


def _remove_attention(family: Family, attention: Any) -> None:
    inside = family.attention + "."
    projections = (family.query,) if family.fused_qkv else (family.query, family.key, family.value)
    attention.projections = tuple(path.removeprefix(inside) for path in projections)
    # BERT-like layers call the output projection elsewhere; ModernBERT's is followed by a dropout.
    outputs = [family.attention_output, f"{inside}out_drop"] if family.attention_output.startswith(inside) else []
    attention.outputs = tuple(p.removeprefix(inside) for p in outputs if hasattr(attention, p.removeprefix(inside)))
    attention.__class__ = _mixed(NoHeadsMixin, attention.__class__)


class EmptyLinear(nn.Linear):
    """An output projection without inputs and bias. Nothing is computed but in training, where every parameter needs a gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(input)
        return input.new_zeros(()).expand(*input.shape[:-1], self.out_features)


class PassedByMixin:
    """Adds nothing to the residual stream and does not norm it."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        module: Any = self
        output = module.dense(hidden_states)  # hooks on it fire
        return input_tensor + output if module.training else input_tensor


class PassedByWholeMixin:
    """The same for a module that computes the attention too."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        module: Any = self
        output, *weights = module.attn(hidden_states, *args, **kwargs)
        return (hidden_states + output if module.training else hidden_states, *weights)


def _pass_by(add_norm: Any, projection: nn.Module) -> None:
    whole = getattr(add_norm, "dense", None) is not projection
    projection.__class__ = EmptyLinear
    projection.register_parameter("bias", None)
    add_norm.LayerNorm = None
    add_norm.__class__ = _mixed(PassedByWholeMixin if whole else PassedByMixin, add_norm.__class__)


class SlimMPNetSelfAttention(MPNetSelfAttention):
    """MPNet attention that picks its own heads' columns of the position bias, which all layers share; without training, in one kernel."""

    def __init__(self, config: Any, kept_heads: tuple[int, ...]) -> None:
        super().__init__(config)
        self.kept_heads = list(kept_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if position_bias is not None:
            # (batch, unpruned heads, seq, seq) -> (batch, heads, seq, seq)
            position_bias = position_bias[:, self.kept_heads]
        # The kernel gives neither attention weights nor, at speed, a gradient of the bias.
        if position_bias is None or output_attentions or torch.is_grad_enabled():
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        bias = position_bias if attention_mask is None else position_bias + attention_mask
        states = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return (self.o(states.transpose(1, 2).flatten(2)),)


class SlimConfigMixin:
    """What all slim configs add to the stock config of their family: checks, and the map to this file's classes."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if not getattr(self, "auto_map", None):  # save_pretrained alone would list the saved class only
            self.auto_map = auto_map(family_of(self))

    def validate_layer_widths(self) -> None:
        """Raises ValueError unless `layer_widths`, and `passed_by` and `kept_heads` with them, fit the other sizes."""
        config: Any = self
        if config.layer_widths is None:
            return
        heads, ffn = config.num_attention_heads, getattr(config, family_of(config).intermediate_size)
        for name in ("layer_widths", "passed_by"):
            pairs = getattr(config, name)
            if pairs is not None and len(pairs) != config.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must have one pair for each of the {config.num_hidden_layers} layers, got {len(pairs)}."
                )
        for pair in config.layer_widths:
            if len(pair) != 2 or not 0 <= pair[0] <= heads or not 0 <= pair[1] <= ffn:
                raise ValueError(f"`layer_widths` must hold pairs [0..{heads} heads, 0..{ffn} neurons], got {pair}.")
        self._check_passed_by()
        self._check_kept_heads()

    def _check_passed_by(self) -> None:
        config: Any = self
        able = [bool(getattr(family_of(config), part)) for part in ADD_NORMS]
        for number, (widths, passed) in enumerate(zip(config.layer_widths, passed_by(config), strict=True)):
            if any(gone and (size or not can) for gone, size, can in zip(passed, widths, able, strict=True)):
                raise ValueError(
                    f"`passed_by` must be false for parts with units, and in families whose layers norm by themselves, got "
                    f"{list(passed)} in layer {number} of widths {widths}."
                )

    def _check_kept_heads(self) -> None:
        config: Any = self
        heads, kept = config.num_attention_heads, config.kept_heads
        if kept is None:
            if family_of(config).shared_head_bias and any(pair[0] < heads for pair in config.layer_widths):
                raise ValueError(f"`kept_heads` must list the heads that {config.model_type} keeps, got None.")
            return
        if [len(layer) for layer in kept] != [pair[0] for pair in config.layer_widths]:
            raise ValueError("`kept_heads` must have as many heads in each layer as `layer_widths`.")
        for layer in kept:
            if layer != sorted(set(layer)) or any(not 0 <= head < heads for head in layer):
                raise ValueError(f"`kept_heads` must hold sorted, distinct numbers below {heads}, got {layer}.")


class SlimModelMixin:
    """Resizes the stock model that the next class in line has built, before any weights are loaded into it."""

    def post_init(self) -> None:
        _resize_layers(self)
        model: Any = self
        if rank := model.config.embedding_rank:
            table = model.get_input_embeddings()
            size = table.num_embeddings, rank, table.embedding_dim
            model.set_input_embeddings(FactorisedEmbedding(*size, table.padding_idx))
        super().post_init()  # type: ignore[misc]


def _slim_name(family: Family, ending: str) -> str:
    return f"Slim{family.classes}{ending}"


def auto_map(family: Family) -> dict[str, str]:
    """Where `trust_remote_code=True` finds the classes: this file lies beside the weights under its own name."""
    file = __name__.rpartition(".")[2]
    endings = [("AutoConfig", "Config"), *HEADS.values()]
    return {auto: f"{file}.{_slim_name(family, e)}" for auto, e in endings if hasattr(transformers, family.classes + e)}


def _slim_classes(family: Family) -> dict[type, type]:
    """Makes the slim config and model classes of a family: {stock class: slim class}, the config first."""
    stock_config = getattr(transformers, family.classes + "Config")
    name = _slim_name(family, "Config")
    config = type(
        name,
        (SlimConfigMixin, stock_config),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{stock_config.__name__} with `layer_widths` [[heads, ffn], ...], `kept_heads` and `passed_by` per layer.",
            "__annotations__": {
                "layer_widths": list[list[int]] | None,
                "kept_heads": list[list[int]] | None,
                "passed_by": list[list[bool]] | None,
                "embedding_rank": int | None,
            },
            "layer_widths": None,
            "kept_heads": None,
            "passed_by": None,
            "embedding_rank": None,
            "model_type": PREFIX + family.model_type,
            "_auto_class": "AutoConfig",
        },
    )
    classes: dict[type, type] = {stock_config: strict(config)}
    for auto, ending in HEADS.values():
        stock = getattr(transformers, family.classes + ending, None)
        if stock is not None:
            name = _slim_name(family, ending)
            classes[stock] = type(
                name,
                (SlimModelMixin, stock),
                {
                    "__module__": __name__,
                    "__qualname__": name,
                    "__doc__": f"{stock.__name__} with its own numbers of heads and FFN neurons in each layer.",
                    "config_class": classes[stock_config],
                    "_auto_class": auto,
                },
            )
    return classes


SLIM_CLASSES: dict[type, type] = {s: slim for family in FAMILIES.values() for s, slim in _slim_classes(family).items()}
STOCK_CLASSES: dict[type, type] = {slim: stock for stock, slim in SLIM_CLASSES.items()}
globals().update({slim.__name__: slim for slim in STOCK_CLASSES})


def _register() -> None:
    for slim in STOCK_CLASSES:
        auto = getattr(transformers, slim._auto_class)  # type: ignore[attr-defined]
        if issubclass(slim, transformers.PreTrainedConfig):
            auto.register(slim.model_type, slim, exist_ok=True)
        else:
            auto.register(slim.config_class, slim, exist_ok=True)  # type: ignore[attr-defined]


# A copy of this file that came with a checkpoint must not take over from an installed smbert.
if not __name__.startswith("transformers_modules"):
    _register()
