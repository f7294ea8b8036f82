"""Calibration batches on their way through the layers of a model, one layer at a time.

One forward of the whole model records what each layer is called with beside the hidden states (masks, position biases, rotary
tables). From then on single layers can be run on all batches, so that what a layer sees is known without running those before it
again, and a pruned copy of the model can be taken along the same way as the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling import ADD_NORMS, encoder_layers, family_of

PARTS = tuple(ADD_NORMS.values())  # the output projections, in the order in which data passes them
FIRST = dict(zip(PARTS, (("query", "key", "value"), ("ffn_in",))))  # the projections that a part begins with
_LABELS = ("labels", "label", "teacher_logits", "start_positions", "end_positions")


@dataclass(frozen=True)
class Calls:
    """One forward over all batches, as recorded by `record`.

    Attributes:
        states: for each batch, the hidden states that enter the first layer, (batch, seq, hidden).
        arguments: for each batch and layer, the positional and the named arguments after the hidden states.
        masks: for each batch, its real tokens, (batch, seq) bool.
        outputs: for each batch, the model's logits (or last hidden states, without a head), float32; none where no answers were asked for.
        autocast: dtype of the forward's matrix products; None for the weights' own.
    """

    states: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
    masks: list[Tensor]
    outputs: list[Tensor]
    autocast: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(int(mask.sum()) for mask in self.masks)


@dataclass(frozen=True)
class Seen:
    """What one output projection saw of one batch: float32, real tokens only, picked out when asked for.

    Attributes:
        place: part and layer, for messages.
        mask: real tokens, (batch, seq) bool.
        everywhere: by the names of the properties, (batch, seq, ...).
    """

    place: str
    mask: Tensor
    everywhere: dict[str, Tensor]

    @property
    def read(self) -> Tensor:
        """What the projections saw that its part begins with, (tokens, hidden)."""
        return self._real("read")

    @property
    def inputs(self) -> Tensor:
        """(tokens, units * dim).

        Raises:
            ValueError: activations that are not finite.
        """
        return self._finite("inputs")

    @property
    def outputs(self) -> Tensor:
        """(tokens, hidden), the bias included.

        Raises:
            ValueError: activations that are not finite.
        """
        return self._finite("outputs")

    @property
    def residual(self) -> Tensor:
        """What the output is added to, (tokens, hidden)."""
        return self._real("residual")

    def _real(self, name: str) -> Tensor:
        return self.everywhere[name][self.mask].float()

    def _finite(self, name: str) -> Tensor:
        found = self._real(name)
        if not found.sum().isfinite():  # NaN and infinity stay in a sum, which is quicker than to look at each number
            raise ValueError(
                f"activations must be finite, got NaN or infinity at {self.place}. To resolve, check the weights and the data, and "
                "run in float32 or bfloat16 rather than float16."
            )
        return found

    @property
    def total(self) -> Tensor:
        """The residual stream behind the part, before any norm, (tokens, hidden)."""
        return self.outputs + self.residual


class _Reached(Exception):
    """Ends a layer's forward once what is asked for is known."""


@torch.no_grad()
def record(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    autocast: torch.dtype | None = None,
    answers: bool = True,
) -> Calls:
    """Runs the model once on each batch, in eval mode; labels are left out.

    Args:
        model: of any known family, pruned or not.
        batches: model inputs, with `attention_mask` wherever there is padding.
        autocast: for example torch.bfloat16.
        answers: whether `Calls.outputs` are wanted; if not, the layers of all batches but the first are left to the `Stream`.

    Raises:
        ValueError: no batches, an answer (where wanted, or of the first batch) that is not finite, or layers that do not keep the samples apart.
    """
    calls = Calls([], [], [], [], autocast)
    layers, training = encoder_layers(model), model.training
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    put_out: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], args[1:], kwargs))

    def first(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not put_out:
            put_out.append(output)

    def nothing(state: Tensor, *_: Any, **__: Any) -> Any:
        return (state,) if isinstance(put_out[0], tuple) else state

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layers[0].register_forward_hook(first).remove)
        stack.callback(model.train, training)
        model.eval()
        for batch in batches:
            seen.clear()
            inputs = inputs_of(batch, model.device)
            with autocast_to(model.device, autocast):
                out = model(**inputs)
            output = (out.logits if "logits" in out else out.last_hidden_state).float()
            if not output.isfinite().all():
                raise ValueError(
                    f"the model's answers must be finite, got NaN or infinity in calibration batch {len(calls.states)}. To "
                    "resolve, check the weights, and run in float32 or bfloat16 rather than float16."
                )
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            if seen[0][0].shape[:2] != mask.shape:
                raise ValueError(
                    f"the layers of {type(model).__name__} must keep the samples apart, but they run {tuple(mask.shape)} tokens as "
                    f"{tuple(seen[0][0].shape)}. To resolve, load the model with attn_implementation='sdpa'."
                )
            calls.states.append(seen[0][0])
            calls.arguments.append([(args, kwargs) for _, args, kwargs in seen])
            calls.masks.append(mask)
            if answers:
                calls.outputs.append(output)
            elif len(calls.states) == 1:
                stack.enter_context(run_as(layers, [nothing] * len(layers)))
    if not calls.states:
        raise ValueError("`batches` must hold at least one batch, got none. To resolve, pass calibration rows.")
    return calls


@contextlib.contextmanager
def run_as(layers: Iterable[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, layers run these in place of their own forwards; hooks see what they are called with all the same."""
    changed = list(zip(layers, forwards))
    for layer, forward in changed:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in changed:
            del layer.forward


class Stream:
    """Hidden states of all batches in front of one layer of a model, beginning with the first.

    Args:
        model: that which was recorded, or a pruned copy of it.
        calls: from `record`.
    """

    def __init__(self, model: PreTrainedModel, calls: Calls):
        self.family, self.layers, self.calls = family_of(model), encoder_layers(model), calls
        self.states = list(calls.states)
        self.layer = 0
        # What the attention of the present layer puts out for each batch, once that is settled.
        self._attended: list[Any] = []

    @torch.no_grad()
    def see(self, *parts: str, advance: bool = False) -> Iterator[dict[str, Seen]]:
        """Runs the present layer on each batch and yields what its output projections saw.

        Args:
            parts: of `PARTS`.
            advance: go on to the next layer afterwards; the iterator must be used up then.
        """
        layer = self.layers[self.layer]
        module = {part: self.family.get(layer, part) for part in PARTS}
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {part: [] for part in PARTS}
        read: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        attended: list[Any] = []

        def watch(part: str, stop: bool) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                seen[part].append((args[0], output))
                if stop:
                    raise _Reached

            return hook

        with contextlib.ExitStack() as stack:
            stack.callback(self._watch_attention(layer, attended))
            for part in PARTS:
                stop = part == "attention_output" and part in parts and len(parts) == 1 and not advance
                stack.callback(module[part].register_forward_hook(watch(part, stop)).remove)
                begin = self.family.get(layer, FIRST[part][0])
                stack.callback(
                    begin.register_forward_pre_hook(lambda _, args, own=read[part]: own.append(args[0])).remove
                )
            for number in range(len(self.states)):
                for part in PARTS:
                    seen[part].clear()
                    read[part].clear()
                attended.clear()
                state, after = self.states[number], self._forward(layer, number)
                found = {}
                for part in parts:
                    # A chunked feed-forward part calls its projections once for each chunk of tokens.
                    inputs, outputs = (torch.cat(tensors, 1) for tensors in zip(*seen[part]))
                    first = torch.cat(read[part] or [state], 1)  # without heads nothing is read
                    if part == "attention_output":
                        residual = state
                    elif self.family.pre_norm:  # what the feed-forward part reads is normed already
                        residual = state + _tensor(attended[0])
                    else:
                        residual = first
                    found[part] = Seen(
                        f"{part} of layer {self.layer}",
                        self.calls.masks[number],
                        {"read": first, "inputs": inputs, "outputs": outputs, "residual": residual},
                    )
                yield found
                if advance:
                    assert after is not None  # nothing stopped it
                    self.states[number] = after
        if advance:
            self.layer += 1
            self._attended = []

    @torch.no_grad()
    def reads(self, part: str) -> Iterator[Tensor]:
        """Runs the present layer on each batch as far as `Seen.read` of one part, which must have units, and yields that.

        Of the feed-forward part, once the iterator is used up, the attention is settled and not run again in this layer, which takes
        (batch, seq, hidden) of memory for each batch.
        """
        read: list[Tensor] = []
        attended: list[Any] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            read.append(args[0])
            if sum(chunk.shape[1] for chunk in read) == length:
                raise _Reached

        layer = self.layers[self.layer]
        with contextlib.ExitStack() as stack:
            stack.callback(self._watch_attention(layer, attended))
            stack.callback(self.family.get(layer, FIRST[part][0]).register_forward_pre_hook(hook).remove)
            for number, mask in enumerate(self.calls.masks):
                read.clear()
                length = mask.shape[1]
                self._forward(layer, number)
                yield torch.cat(read, 1)[mask].float()
        if part == PARTS[-1]:
            self._attended = attended

    def advance(self) -> None:
        """Goes on to the next layer."""
        for _ in self.see(advance=True):
            pass

    def _watch_attention(self, layer: nn.Module, found: list[Any]) -> Callable[[], None]:
        """Adds to `found` what the attention of a layer puts out; returns what ends that."""
        return self._attention(layer).register_forward_hook(lambda _, args, output: found.append(output)).remove

    def _attention(self, layer: nn.Module) -> nn.Module:
        """The child of a layer that ends with the attention's output projection, or with its norm."""
        last = self.family.get(layer, PARTS[0])
        return next(child for child in layer.children() if any(module is last for module in child.modules()))

    def _forward(self, layer: nn.Module, number: int) -> Tensor | None:
        args, kwargs = self.calls.arguments[number][self.layer]
        state = self.states[number]
        known = [lambda *_, output=output, **__: output for output in self._attended[number : number + 1]]
        with (
            autocast_to(state.device, self.calls.autocast),
            run_as([self._attention(layer)], known),
            contextlib.suppress(_Reached),
        ):
            return _tensor(layer(state, *args, **kwargs))
        return None


def masks_of_chunks(mask: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """For the hook of one module, which may see a batch in chunks of tokens: the mask of the chunk that it is called with.

    Args:
        mask: holds that of the batch which runs, (batch, seq).
    """
    begin = 0

    def own(chunk: Tensor) -> Tensor:
        nonlocal begin
        here = mask[0][:, begin : begin + chunk.shape[1]]
        begin = (begin + chunk.shape[1]) % mask[0].shape[1]
        return here

    return own


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A batch without labels, on the device."""
    return {k: v.to(device) for k, v in dict(batch).items() if isinstance(v, Tensor) and k not in _LABELS}


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> Any:
    """torch.autocast, or nothing where there is no dtype."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
