"""The calibration loss: how far a pruned model's answers lie from the original's, without any gold label."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..modeling import encoder_layers
from .reconstruct import Reduce
from .stream import autocast_to, inputs_of, run_as

# A temperature for what is judged by rows that the original was trained on: it is so sure of most of them that the few others would
# make nearly all of the divergence, and sizes would suit these.
SOFT = 4.0


class CalibrationLoss:
    """Mean divergence per sample from a model's own answers on a few batches.

    KL divergence of the class probabilities; of each label's, where several may hold; half the squared error for regression
    and for models without a task head.

    Args:
        model: the original.
        batches: this process's share of the calibration sample; labels are ignored.
        autocast: for example torch.bfloat16.
        reduce: sums a tensor over all ranks; None: this process is alone.
        keep: what the original's layers put out, so that pruned forms need not run those that are still the same; takes (samples,
            layers, seq, hidden) of memory.
        temperature: of the probabilities, see `divergence`.

    Raises:
        ValueError: no samples on any rank.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, Any]],
        autocast: torch.dtype | None = None,
        reduce: Reduce | None = None,
        keep: bool = False,
        temperature: float = 1.0,
    ):
        self.batches = [inputs_of(batch, model.device) for batch in batches]
        self.autocast, self.reduce, self.temperature = autocast, reduce, temperature
        self.kind = problem_kind(model)
        self.outputs: list[list[Any]] = [[] for _ in self.batches]
        with contextlib.ExitStack() as stack:
            for layer in encoder_layers(model) if keep else ():
                hook = layer.register_forward_hook(
                    lambda _, args, output: self.outputs[len(self.targets)].append(output)
                )
                stack.callback(hook.remove)
            self.targets: list[Tensor] = []
            for batch in self.batches:
                self.targets.append(self._answers(model, batch))
        count = torch.tensor([float(sum(map(len, self.targets)))], dtype=torch.float64)
        self.samples = int((reduce(count) if reduce else count)[0])
        if self.samples == 0:
            raise ValueError(
                "the calibration sample must hold at least one row, got none. To resolve, raise `calibration`."
            )

    def __call__(self, model: PreTrainedModel, enough: float = math.inf, same: int = 0) -> float:
        """The loss of a pruned form of the original; infinite where its answers are not finite.

        Args:
            model: a pruned form.
            enough: a loss beyond which nobody needs to know by how much: what the first batches lose beyond it is returned.
            same: so many of its first layers are the original's.
        """
        total = torch.zeros(1, dtype=torch.float64)
        for batch, target, outputs in zip(self.batches, self.targets, self.outputs):
            known = [lambda *_, output=output, **__: output for output in outputs[:same]]
            with run_as(encoder_layers(model), known):
                losses = divergence(
                    self._answers(model, batch), target, self.kind, batch.get("attention_mask"), self.temperature
                )
            total += losses.double().sum().cpu()  # none is below zero
            if float(total) > enough * self.samples:
                break
        value = float((self.reduce(total) if self.reduce else total)[0]) / self.samples
        return value if math.isfinite(value) else math.inf

    @torch.no_grad()
    def _answers(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        training = model.training
        with autocast_to(model.device, self.autocast):
            out = model.eval()(**batch)
        model.train(training)
        return (out.logits if "logits" in out else out.last_hidden_state).float()


def problem_kind(model: PreTrainedModel) -> str:
    """The kind of a model's answers, as its config says it."""
    config = model.config
    if config.num_labels == 1 or not hasattr(model, "base_model") or model.base_model is model:
        return "regression"
    return getattr(config, "problem_type", None) or "single_label_classification"


def divergence(
    found: Tensor, target: Tensor, kind: str, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Divergence of each sample's logits from the target logits, (batch,).

    Args:
        found, target: (batch, classes), or (batch, seq, classes) for answers of each token.
        kind: a transformers `problem_type`.
        mask: real tokens (batch, seq), for answers of each token.
        temperature: the logits are divided by it and the divergence multiplied by its square (Hinton et al. 2015); not for regression.
    """
    if kind == "regression":
        each = (found - target).square().mean(-1) / 2
    else:
        # Nearly equal answers cancel: in float32 1e-7 is rounding, and to prune one sub-layer may lose no more than that.
        p, q = (logits.double() / temperature for logits in (target, found))
        each = (temperature**2 * _of_probabilities(q, p, kind)).to(found.dtype)
    if each.dim() == 1:
        return each
    real = torch.ones_like(each) if mask is None or mask.shape != each.shape else mask.to(each)
    return (each * real).sum(1) / real.sum(1).clamp(min=1)


def _of_probabilities(found: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "multi_label_classification":
        p = target.sigmoid()
        return (
            p * (F.logsigmoid(target) - F.logsigmoid(found)) + (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-found))
        ).mean(-1)
    return F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)
