"""Scores that say how much a model would lose with each attention head and each FFN neuron: high means keep.

All gradient scorers rest on one device: every unit gets a mask of ones PER SAMPLE, in front of the output projection that
it feeds, and one backward of the SUM of the samples' losses gives d loss_i / d mask_iu of every sample i and unit u, exactly.
So scores are means over samples, and neither the batch size nor padding changes them. Parameters take no part in the
backward: it costs a forward and half an ordinary backward.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._sample_losses import kl_probes, label_losses
from .modeling import encoder_layers
from .surgery import structure_of

LABELS = ("labels", "label", "start_positions", "end_positions")
TORCH_PRUNING_FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """Importance of every unit that the model has now, in float64 on the CPU.

    Attributes:
        heads: for each layer, the scores of its attention heads, (heads,).
        ffn: for each layer, the scores of its FFN neurons, (ffn,).
        samples: number of samples behind the scores, over all ranks; 0 for data-free scorers.
        exponent: score ** exponent is what may be summed over units: 1 for squares of gradients, 2 for absolute values.
    """

    heads: list[Tensor]
    ffn: list[Tensor]
    samples: int = 0
    exponent: int = 2


def score(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] = (),
    scorer: str = "taylor",
    *,
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> Scores:
    """Scores all heads and neurons; the model's mode, flags and gradients are the same afterwards.

    Args:
        model: any known family, pruned or not, with the head that its task needs.
        batches: what a data loader gives: tensors by name, with `attention_mask` wherever there is padding.
        scorer: a key of `SCORERS`.
        temperature: softens the model's own predictions in `taylor_kl`; the other scorers have no use for it.
        autocast: for example `torch.bfloat16`, to run forward and backward under autocast. Sums stay in float64.
        reduce: sums a tensor over all ranks, such as `sum_over_ranks`. Every rank gets the same scores, even one that
            had no batches. None: this process is alone.

    Raises:
        ValueError: unknown scorer, no samples, missing or impossible labels, or scores that are not finite.
    """
    if scorer not in SCORERS:
        raise ValueError(
            f"`scorer` must be one of {', '.join(SCORERS)}, got {scorer!r}. To resolve, name one of these."
        )
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"`temperature` must be a positive number, got {temperature}. To resolve, use 1.0 or 2.0.")
    scores = SCORERS[scorer](model, batches, temperature=temperature, autocast=autocast, reduce=reduce)
    for part, name in ((scores.heads, "head"), (scores.ffn, "neuron")):
        for number, layer in enumerate(part):
            bad = (~layer.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"`{scorer}` scores must be finite, got {layer[bad[0]]} for {name} {bad[0]} of layer {number} "
                    f"({len(bad)} of {len(layer)} there). To resolve, check the weights and the data for NaN and infinite "
                    "values, and score in float32 or bfloat16 rather than float16."
                )
    return scores


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all processes of an accelerate launch, in the same bits on each; with one process, the tensor itself."""
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState()  # the processes' own device: NCCL cannot send what lies on the CPU
    return reduce(tensor.to(state.device), "sum").to(tensor.device) if state.num_processes > 1 else tensor


# ---------------------------------------------------------------------------------------------------------------- scorers


def magnitude(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]] = (), **_: Any) -> Scores:
    """Data-free: the norm of what a unit reads with times the norm of what it writes with.

    FFN: |row of ffn_in| * |column of ffn_out|; heads: |value rows| * |output columns|, Frobenius norms, biases included.
    The product, unlike the norm of all the unit's weights together, is zero as soon as the unit cannot write, and
    does not change when scale moves from one projection to the other. Query and key only steer where a head looks.
    """
    structure = structure_of(model)
    family, size = structure.family, structure.head_dim
    heads: list[Tensor] = []
    ffn: list[Tensor] = []
    for layer, (n_heads, n_ffn) in zip(encoder_layers(model), structure.layer_widths):
        value = _rows(
            family.get(layer, "value")
        )  # (heads * head_dim, hidden + 1), the last such block of rows if fused
        value = value[len(value) - n_heads * size :]
        write = _weight(family.get(layer, "attention_output")).T  # (heads * head_dim, hidden)
        heads.append(_norms(value, n_heads) * _norms(write, n_heads))
        read, write = _rows(family.get(layer, "ffn_in")), _weight(family.get(layer, "ffn_out")).T
        ffn.append(_norms(read, n_ffn, blocks=2 if family.gated else 1) * _norms(write, n_ffn))
    return Scores(heads, ffn)


def taylor(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], **options: Any) -> Scores:
    """First-order Taylor with labels: mean over samples of |d loss_i / d mask| (Molchanov et al. 2019; TextPruner).

    The absolute value is taken per sample, so that units which help some samples and hurt others still count.
    """
    return _from_gradients("taylor", model, batches, label_losses, torch.abs, **options)


def fisher(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], **options: Any) -> Scores:
    """Diagonal empirical Fisher information of the masks: mean over samples of (d loss_i / d mask)^2 (Kwon et al. 2022)."""
    scores = _from_gradients("fisher", model, batches, label_losses, torch.square, **options)
    return replace(scores, exponent=1)


def taylor_kl(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], **options: Any) -> Scores:
    """Label-free: the KL divergence from the model's own soft labels that removing the unit would cause, to second order.

    The first-order term of KL(p || p_masked) vanishes at mask 1, where the two agree. The first term that does not
    is 1/2 dmask' F dmask, with F the true Fisher information J' (diag(p) - p p') J and J = d logits / d mask. For each
    sample this takes one backward of v . logits, where v v' has the expectation diag(p) - p p': exact for two classes and
    for regression, unbiased for more. v is drawn from the sample's own tokens: neither batches nor order change it.
    Regression and bare encoders (MSE of the hidden states) take the identity for diag(p) - p p'.

    On a 3-layer model fine-tuned on SST-2 it orders the heads by the KL that removing each really causes as well as
    `taylor` and `fisher` do with gold labels (rank correlation .93, .94, .94; magnitude .35).
    """
    scores = _from_gradients("taylor_kl", model, batches, kl_probes, torch.square, **options)
    return Scores(
        [layer / 2 for layer in scores.heads], [layer / 2 for layer in scores.ffn], scores.samples, exponent=1
    )


def torch_pruning(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], **options: Any) -> Scores:
    """torch-pruning's GroupTaylorImportance over the groups of its own dependency graph, with labels.

    It needs the gradients of the weights, and so works on a copy of the model. Importance is summed over a head's
    dimensions and not normalised per layer, so that layers can be compared.

    Raises:
        ValueError: torch-pruning gets the groups of this family wrong.
    """
    return _from_groups("torch_pruning", "GroupTaylorImportance", model, batches, **options)


def torch_pruning_hessian(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], **options: Any) -> Scores:
    """torch-pruning's GroupHessianImportance (optimal brain damage: w^2 times the mean of squared gradients), likewise.

    Squares do not add up over a batch, so every sample has a backward pass of its own: several times slower than the others.
    The squares are summed here because `accumulate_grad` of torch-pruning 1.6.1 keeps those of the last call only.
    """
    scores = _from_groups("torch_pruning_hessian", "GroupHessianImportance", model, batches, squared=True, **options)
    return replace(scores, exponent=1)


@torch.enable_grad()
def _from_groups(
    name: str,
    importance: str,
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    squared: bool = False,
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
    **_: Any,
) -> Scores:
    """An importance of torch-pruning, which reads mean gradients (or, if `squared`, mean squares of them) off the weights."""
    structure = structure_of(model)
    family, size = structure.family, structure.head_dim
    if family.model_type not in TORCH_PRUNING_FAMILIES:
        raise ValueError(
            f"`scorer` must not be {name} for the family {family.model_type}, whose groups torch-pruning gets wrong; "
            f"it is right for {', '.join(TORCH_PRUNING_FAMILIES)}. To resolve, use taylor, taylor_kl, fisher or magnitude."
        )
    import torch_pruning as tp

    twin = copy.deepcopy(model).eval().requires_grad_(False)
    layers = encoder_layers(twin)
    # Of weights alone, since the importances leave biases out.
    weights = [m.weight for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    for weight in weights:
        weight.requires_grad_(True).grad = torch.zeros_like(weight)
    sums = [torch.zeros_like(weight) for weight in weights]
    samples = torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        for some in _one_by_one(batch) if squared else [batch]:
            inputs, labels = _split(some, model.device)
            with _autocast(model, autocast):
                losses = label_losses(name, twin, inputs, labels)
            for total, gradient in zip(sums, torch.autograd.grad(losses.sum(), weights, allow_unused=True)):
                if gradient is not None:  # query and key of a sub-layer without heads
                    total += gradient.square() if squared else gradient
            samples += len(losses)
    samples = _total(samples, reduce)
    for weight, total in zip(weights, sums):
        weight.grad = (reduce(total) if reduce else total) / samples.item()
    tokens = torch.full((1, 8), min(5, structure.vocab_size - 1), device=model.device)
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    graph = tp.DependencyGraph().build_dependency(
        twin.requires_grad_(True), example, output_transform=lambda out: out[0].sum()
    )
    measure = getattr(tp.importance, importance)(normalizer=None)
    heads: list[Tensor] = []
    ffn: list[Tensor] = []
    for layer, (n_heads, n_ffn) in zip(layers, structure.layer_widths):
        for part, units, scores in (("attention_output", n_heads * size, heads), ("ffn_out", n_ffn, ffn)):
            if units == 0:
                scores.append(torch.zeros(0, dtype=torch.float64))
                continue
            group = graph.get_pruning_group(family.get(layer, part), tp.prune_linear_in_channels, list(range(units)))
            scores.append(measure(group).double().cpu())  # (units,)
        heads[-1] = heads[-1].reshape(n_heads, size).sum(1)
    return Scores(heads, ffn, int(samples))


SCORERS: dict[str, Callable[..., Scores]] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "taylor_kl": taylor_kl,
    "fisher": fisher,
    "torch_pruning": torch_pruning,
    "torch_pruning_hessian": torch_pruning_hessian,
}


# -------------------------------------------------------------------------------------------------- gradients of the masks


class _Mask(torch.autograd.Function):
    """Multiplication by a mask of ones: the forward is free, and the backward sums g * x over tokens and unit dims."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # (batch, seq, units * dim)
        ctx.units = mask.shape[1]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        product = (grads[0].to(wide) * x.to(wide)).sum(1)  # (batch, units * dim)
        return grads[0], product.reshape(len(product), ctx.units, -1).sum(2)


@contextlib.contextmanager
def unit_masks(model: PreTrainedModel) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Within the context, a forward fills the dict with the masks (batch, units) that it used: key (part, layer)."""
    structure, masks = structure_of(model), dict[tuple[str, int], Tensor]()

    def watch(key: tuple[str, int], units: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if key not in masks:  # chunked feed-forward calls its projections several times
                dtype = torch.promote_types(args[0].dtype, torch.float32)
                masks[key] = torch.ones(len(args[0]), units, dtype=dtype, device=args[0].device, requires_grad=True)
            return (_Mask.apply(args[0], masks[key]), *args[1:])

        return hook

    with contextlib.ExitStack() as stack:
        for number, (layer, (heads, ffn)) in enumerate(zip(encoder_layers(model), structure.layer_widths)):
            for part, units in (("attention_output", heads), ("ffn_out", ffn)):
                if units:
                    module = structure.family.get(layer, part)
                    stack.callback(module.register_forward_pre_hook(watch((part, number), units)).remove)
        yield masks


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context: eval mode and no parameter requires a gradient; then everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _from_gradients(
    name: str,
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    objective: Callable[..., Tensor],
    measure: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> Scores:
    """Means over samples of `measure` of the mask gradients of `objective`, which gives one number per sample (batch,)."""
    widths = structure_of(model).layer_widths
    keys = [(part, number) for part in ("attention_output", "ffn_out") for number in range(len(widths))]
    sizes = [units for part in zip(*widths) for units in part]
    sums = [torch.zeros(units, dtype=torch.float64) for units in sizes]
    samples = torch.zeros(1, dtype=torch.float64)
    with frozen(model), unit_masks(model) as masks, torch.enable_grad():
        for batch in batches:
            masks.clear()
            inputs, labels = _split(batch, model.device)
            with _autocast(model, autocast):
                values = objective(name, model, inputs, labels, temperature)
            if any(len(mask) % len(values) for mask in masks.values()):
                raise ValueError(
                    f"`{name}` needs layers that keep the samples apart, but {type(model).__name__} runs {len(values)} "
                    "samples in another layout. To resolve, load the model with attn_implementation='sdpa'."
                )
            if masks:
                for key, gradient in zip(list(masks), torch.autograd.grad(values.sum(), list(masks.values()))):
                    rows = gradient.cpu().double().reshape(len(values), -1, gradient.shape[1])  # choices in the middle
                    sums[keys.index(key)] += measure(rows.sum(1)).sum(0)
            samples += len(values)
    flat = _total(torch.cat([samples, *sums]), reduce)
    means = (flat[1:] / flat[0]).split(sizes)
    return Scores(list(means[: len(widths)]), list(means[len(widths) :]), int(flat[0]))


def _total(flat: Tensor, reduce: Reduce | None) -> Tensor:
    """Sums over ranks; only then complains about missing data, so that all ranks stop together. flat[0] counts samples."""
    flat = reduce(flat) if reduce else flat
    if flat[0] == 0:
        raise ValueError(
            "`batches` must hold at least one sample, got none. To resolve, pass a data loader that has data."
        )
    return flat


# ---------------------------------------------------------------------------------------------------------------- helpers


def _split(batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = {key: value.to(device) for key, value in dict(batch).items() if isinstance(value, Tensor)}
    labels = {"labels" if key == "label" else key: tensors.pop(key) for key in LABELS if key in tensors}
    return tensors, labels


def _one_by_one(batch: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The samples of a batch as batches of one."""
    tensors = {key: value for key, value in dict(batch).items() if isinstance(value, Tensor)}
    for row in range(len(next(iter(tensors.values())))):
        yield {key: value[row : row + 1] for key, value in tensors.items()}


def _autocast(model: PreTrainedModel, dtype: torch.dtype | None) -> Any:
    return torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext()


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)  # by construction of the families
    return module.weight.detach().double().cpu()


def _rows(module: nn.Module) -> Tensor:
    """Weight and bias side by side, (out, in + 1)."""
    weight, bias = _weight(module), module.bias
    column = torch.zeros(len(weight), 1) if bias is None else bias.detach().double().cpu()[:, None]  # type: ignore[operator,union-attr]
    return torch.cat([weight, column.double()], 1)


def _norms(rows: Tensor, units: int, blocks: int = 1) -> Tensor:
    """Frobenius norm of each unit's rows, (units,); `blocks` sets of rows lie one after the other."""
    return rows.square().sum(1).reshape(blocks, units, -1 if units else 0).sum((0, 2)).sqrt()
