"""Torch's losses as likelihoods: per-element losses, their normaliser, and labels sampled from the model.

Each entry of the registry turns one call, as the user wrote it, into a :class:`LossCall`. Sampled elements have the
Gauss-Newton matrix of the loss as second moment of their gradients (method §4): ``curvature`` carries what a class
weight or ``pos_weight`` multiplies it by.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)


@dataclass
class LossCall:
    """One recognised loss call.

    ``value`` is ``elements.sum() / weights.sum()`` for ``reduction="mean"``, ``elements.sum()`` for ``"sum"``. All
    tensors below have the shape of ``elements``.
    """

    name: str
    reduction: str  # the user's: "mean" | "sum" | "none"
    elements: Tensor  # the loss with reduction="none", all of the user's arguments applied
    weights: Tensor  # what "mean" divides by, element by element; 0 where the target is ignored
    curvature: Tensor  # Gauss-Newton matrix of an element over that of its sampled form
    sample: Callable[[torch.Generator], Tensor]  # elements with labels drawn from the model
    margin: Callable[[], Tensor] | None = None  # log(p / (1 - p)) of the target, if the target is a class
    log_prob: Callable[[], Tensor] | None = None  # log-likelihood of the target

    @property
    def normalizer(self) -> Tensor:
        """What the user's reduction divided the sum of elements by."""
        total = self.weights.sum() if self.reduction == "mean" else self.weights.new_ones(())
        return torch.where(total == 0, 1.0, total)  # a batch of ignored targets only

    @property
    def value(self) -> Tensor:
        """What the user's call returns."""
        return self.elements if self.reduction == "none" else self.elements.sum() / self.normalizer


Reader = Callable[[dict[str, Any]], LossCall]
_READERS: dict[Callable[..., Any], tuple[inspect.Signature, Reader]] = {}


def reads(function: Callable[..., Any]) -> Callable[[Reader], Reader]:
    """Decorator: the decorated function reads calls of ``function``, given its bound arguments."""

    def enter(reader: Reader) -> Reader:
        _READERS[function] = (inspect.signature(function), reader)
        return reader

    return enter


def read_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall | None:
    """The call as a :class:`LossCall`; ``None`` if ``function`` is not a loss that is known here."""
    if function not in _READERS:
        return None
    signature, reader = _READERS[function]
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        mean, reduce = arguments["size_average"], arguments["reduce"]
        arguments["reduction"] = "none" if reduce is False else "sum" if mean is False else "mean"
    return reader(arguments)


@reads(F.cross_entropy)
def _cross_entropy(call: dict[str, Any]) -> LossCall:
    logits, target, weight, smoothing = call["input"], call["target"], call["weight"], call["label_smoothing"]
    elements = F.cross_entropy(
        logits, target, weight=weight, ignore_index=call["ignore_index"], reduction="none", label_smoothing=smoothing
    )
    rows = logits.movedim(1, -1) if logits.dim() > 1 else logits
    # The Gauss-Newton matrix Σ_c w_c q_c (diag p - p pᵀ) knows the target distribution q only by this sum.
    if target.is_floating_point():
        soft = target.movedim(1, -1) if target.dim() > 1 else target
        weights = torch.ones_like(elements)
        total, mean = (soft.sum(-1), 1.0) if weight is None else (soft @ weight, weight.mean())
        curvature = total * (1 - smoothing) + smoothing * mean
        return _categorical("cross_entropy", call, elements, lambda: rows.log_softmax(-1), None, weights, curvature)
    hard, weights = _targets(target, call["ignore_index"], weight, elements)
    curvature = weights
    if weight is not None and smoothing:
        curvature = (weights * (1 - smoothing) + smoothing * weight.mean()) * (target != call["ignore_index"])
    return _categorical("cross_entropy", call, elements, lambda: rows.log_softmax(-1), hard, weights, curvature)


@reads(F.nll_loss)
def _nll_loss(call: dict[str, Any]) -> LossCall:
    target, weight, ignored = call["target"], call["weight"], call["ignore_index"]
    elements = F.nll_loss(call["input"], target, weight=weight, ignore_index=ignored, reduction="none")
    rows = call["input"].movedim(1, -1) if call["input"].dim() > 1 else call["input"]
    hard, weights = _targets(target, ignored, weight, elements)
    return _categorical("nll_loss", call, elements, lambda: rows, hard, weights, weights)


def _targets(target: Tensor, ignored: int, weight: Tensor | None, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices that are safe to gather with, and each element's weight in the mean."""
    valid = target != ignored
    hard = torch.where(valid, target, 0)
    weights = valid.to(elements.dtype) if weight is None else weight.detach()[hard] * valid
    return hard, weights


def _categorical(
    name: str,
    call: dict[str, Any],
    elements: Tensor,
    log_probs: Callable[[], Tensor],
    hard: Tensor | None,
    weights: Tensor,
    curvature: Tensor,
) -> LossCall:
    def pick(rows: Tensor, index: Tensor) -> Tensor:
        return rows.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def sample(generator: torch.Generator) -> Tensor:
        rows = log_probs()
        probabilities = rows.detach().float().exp().reshape(-1, rows.shape[-1])
        return -pick(rows, torch.multinomial(probabilities, 1, generator=generator).view(rows.shape[:-1]))

    def margin() -> Tensor:
        assert hard is not None
        rows = log_probs()
        return pick(rows, hard) - rows.scatter(-1, hard.unsqueeze(-1), -torch.inf).logsumexp(-1)

    def log_prob() -> Tensor:
        assert hard is not None
        return pick(log_probs(), hard)

    known = hard is not None
    return LossCall(
        name,
        call["reduction"],
        elements,
        weights.detach(),
        curvature.detach(),
        sample,
        margin if known else None,
        log_prob if known else None,
    )


@reads(F.binary_cross_entropy_with_logits)
def _binary_with_logits(call: dict[str, Any]) -> LossCall:
    logits, target, weight, positive = call["input"], call["target"], call["weight"], call["pos_weight"]
    elements = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none", pos_weight=positive)
    curvature = torch.ones_like(elements) if positive is None else 1 + (positive - 1) * target
    sign = 2 * target - 1
    return _binary(
        "binary_cross_entropy_with_logits",
        call,
        elements,
        logits.detach().sigmoid(),
        curvature if weight is None else curvature * weight,
        lambda labels: F.binary_cross_entropy_with_logits(logits, labels, reduction="none"),
        lambda: sign * logits,
        target,
    )


@reads(F.binary_cross_entropy)
def _binary_cross_entropy(call: dict[str, Any]) -> LossCall:
    probability, target, weight = call["input"], call["target"], call["weight"]
    elements = F.binary_cross_entropy(probability, target, weight=weight, reduction="none")
    ones = torch.ones_like(elements)
    return _binary(
        "binary_cross_entropy",
        call,
        elements,
        probability.detach(),
        ones if weight is None else ones * weight,
        lambda labels: F.binary_cross_entropy(probability, labels, reduction="none"),
        lambda: (2 * target - 1) * (probability.log() - torch.log1p(-probability)),
        target,
    )


def _binary(
    name: str,
    call: dict[str, Any],
    elements: Tensor,
    probability: Tensor,
    curvature: Tensor,
    loss: Callable[[Tensor], Tensor],
    margin: Callable[[], Tensor],
    target: Tensor,
) -> LossCall:
    def sample(generator: torch.Generator) -> Tensor:
        return loss(torch.bernoulli(probability, generator=generator))

    hard = bool(((target == 0) | (target == 1)).all())
    return LossCall(
        name,
        call["reduction"],
        elements,
        torch.ones_like(elements).detach(),
        curvature.detach(),
        sample,
        margin if hard else None,
        (lambda: -loss(target)) if hard else None,
    )


@reads(F.mse_loss)
def _mse_loss(call: dict[str, Any]) -> LossCall:
    prediction, target, weight = call["input"], call["target"], call.get("weight")
    elements = F.mse_loss(prediction, target, reduction="none")
    ones = torch.ones_like(elements).detach()
    scale = ones if weight is None else ones * weight
    # torch divides a weighted mean by the sum of the weights as they were given, not as they were broadcast.
    weights = scale if weight is None else scale * (weight.numel() / scale.numel())
    prediction = prediction.expand_as(elements)

    def sample(generator: torch.Generator) -> Tensor:
        # Only the noise's variance, 1/2, enters the Fisher. A sign has that variance with no variance of its own.
        signs = torch.bernoulli(torch.full_like(prediction, 0.5), generator=generator)
        return (prediction - prediction.detach() - SQRT_HALF * (2 * signs - 1)).square()

    return LossCall("mse_loss", call["reduction"], elements * scale, weights, scale, sample, None, lambda: -elements)
