"""Torch's losses as likelihoods: per-element losses, their normaliser, and labels sampled from the model.

Each reader turns one call, as the user wrote it, into a :class:`LossCall`. Sampled elements have the Gauss-Newton
matrix of the loss as second moment of their gradients (method §4): ``curvature`` carries what a class weight or
``pos_weight`` multiplies it by. ``information`` is that second moment in closed form, as seen by what the network put
into the call.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_source.capture.loss_calls import Information as Information
from lightning_source.capture.loss_calls import LossArguments, diagonal
from lightning_source.capture.loss_calls import LossCall as LossCall
from lightning_source.capture.loss_calls import read_call as read_call
from lightning_source.capture.loss_calls import register_loss as register_loss
from lightning_source.capture.loss_calls import unreduced as unreduced


@register_loss(F.cross_entropy)
def _cross_entropy(call: LossArguments) -> LossCall:
    logits, target, weight, smoothing = call["input"], call["target"], call["weight"], call["label_smoothing"]
    elements = F.cross_entropy(
        logits, target, weight=weight, ignore_index=call["ignore_index"], reduction="none", label_smoothing=smoothing
    )
    rows = logits.movedim(1, -1) if logits.dim() > 1 else logits
    # The Gauss-Newton matrix Σ_c w_c q_c (diag p - p pᵀ) knows the target distribution q only by this sum.
    if target.is_floating_point():
        soft = target.movedim(1, -1) if target.dim() > 1 else target
        weights = torch.ones_like(elements)
        by_class = soft.new_ones(soft.shape[-1]) if weight is None else weight
        curvature = soft @ by_class * (1 - smoothing) + smoothing * by_class.mean()
        return _categorical(
            "cross_entropy", call, elements, lambda: rows.log_softmax(-1), None, weights, curvature, _of_logits
        )
    hard, weights = _targets(target, call["ignore_index"], weight, elements)
    curvature = weights
    if weight is not None and smoothing:
        curvature = (weights * (1 - smoothing) + smoothing * weight.mean()) * (target != call["ignore_index"])
    return _categorical(
        "cross_entropy", call, elements, lambda: rows.log_softmax(-1), hard, weights, curvature, _of_logits
    )


@register_loss(F.nll_loss)
def _nll_loss(call: LossArguments) -> LossCall:
    target, weight, ignored = call["target"], call["weight"], call["ignore_index"]
    elements = F.nll_loss(call["input"], target, weight=weight, ignore_index=ignored, reduction="none")
    rows = call["input"].movedim(1, -1) if call["input"].dim() > 1 else call["input"]
    hard, weights = _targets(target, ignored, weight, elements)
    return _categorical("nll_loss", call, elements, lambda: rows, hard, weights, weights, _of_log_probs)


def _targets(target: Tensor, ignored: int, weight: Tensor | None, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices that are safe to gather with, and each element's weight in the mean."""
    valid = target != ignored
    hard = torch.where(valid, target, 0)
    weights = valid.to(elements.dtype) if weight is None else weight.detach()[hard] * valid
    return hard, weights


def draw_classes(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each row of ``probabilities [..., C]``, which need not sum to 1: where their sum passes a number.

    One number a row is drawn, by ``generator``; ``torch.multinomial`` draws one for every class, which over a
    vocabulary takes longer than the network does.
    """
    sums = probabilities.cumsum(-1)
    shape = (*sums.shape[:-1], 1)
    drawn = torch.rand(shape, generator=generator, device=sums.device, dtype=sums.dtype) * sums[..., -1:]
    # The first class beyond the number: never one of probability 0, whose sum is that of the class before.
    return torch.searchsorted(sums, drawn, right=True).squeeze(-1).clamp_max(sums.shape[-1] - 1)


def _categorical(
    name: str,
    call: LossArguments,
    elements: Tensor,
    log_probs: Callable[[], Tensor],
    hard: Tensor | None,
    weights: Tensor,
    curvature: Tensor,
    product: Callable[[Tensor, Tensor, int], Tensor],
) -> LossCall:
    """A loss of classes.

    Args:
        name: the function's.
        call: its arguments.
        elements: the loss of each row.
        log_probs: the model's log-probabilities, ``[*elements.shape, C]``.
        hard: the target classes, shaped like ``elements``; ``None`` where targets are distributions.
        weights: what a mean divides by, shaped like ``elements``.
        curvature: as in :class:`LossCall`.
        product: ``(probabilities, tangents, dimension of classes in tangents)`` to the Fisher matrix times tangents.
    """

    def pick(rows: Tensor, index: Tensor) -> Tensor:
        return rows.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def sample(generator: torch.Generator) -> Tensor:
        rows = log_probs()
        return -pick(rows, draw_classes(rows.detach().float().exp(), generator))

    def margin() -> Tensor:
        assert hard is not None
        rows = log_probs()
        return pick(rows, hard) - rows.scatter(-1, hard.unsqueeze(-1), -torch.inf).logsumexp(-1)

    def log_prob() -> Tensor:
        assert hard is not None
        return pick(log_probs(), hard)

    def information(weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        classes = 1 if call["input"].dim() > 1 else 0
        probabilities = log_probs().detach().exp().movedim(-1, classes)
        return [weights.unsqueeze(classes) * product(probabilities, tangents[0], classes + 1)]

    known = hard is not None
    return LossCall(
        name=name,
        reduction=call["reduction"],
        elements=elements,
        weights=weights.detach(),
        curvature=curvature.detach(),
        sample=sample,
        margin=margin if known else None,
        log_prob=log_prob if known else None,
        outputs=(call["input"],),
        information=information,
    )


def _of_logits(probabilities: Tensor, tangents: Tensor, classes: int) -> Tensor:
    """``(diag p - p pᵀ) u``."""
    scaled = probabilities * tangents
    return scaled - probabilities * scaled.sum(classes, keepdim=True)


def _of_log_probs(probabilities: Tensor, tangents: Tensor, classes: int) -> Tensor:
    """``diag(p) u``: the softmax before the logarithm is the network's."""
    return probabilities * tangents


@register_loss(F.binary_cross_entropy_with_logits)
def _binary_with_logits(call: LossArguments) -> LossCall:
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
        lambda p: p * (1 - p),
    )


@register_loss(F.binary_cross_entropy)
def _binary_cross_entropy(call: LossArguments) -> LossCall:
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
        lambda p: 1 / (p * (1 - p)).clamp_min(1e-12),
    )


def _binary(
    name: str,
    call: LossArguments,
    elements: Tensor,
    probability: Tensor,
    curvature: Tensor,
    loss: Callable[[Tensor], Tensor],
    margin: Callable[[], Tensor],
    target: Tensor,
    information: Callable[[Tensor], Tensor],
) -> LossCall:
    """A loss of labels 0 and 1.

    Args:
        name: the function's.
        call: its arguments.
        elements: the loss of each label; all tensors below have its shape.
        probability: the model's, of label 1.
        curvature: as in :class:`LossCall`.
        loss: the unweighted loss of given labels.
        margin: logit of the target's probability.
        target: the labels, which may lie between 0 and 1.
        information: the Fisher information of the call's ``input``, from the probability.
    """

    def sample(generator: torch.Generator) -> Tensor:
        return loss(torch.bernoulli(probability, generator=generator))

    hard = bool(((target == 0) | (target == 1)).all())
    return LossCall(
        name=name,
        reduction=call["reduction"],
        elements=elements,
        weights=torch.ones_like(elements).detach(),
        curvature=curvature.detach(),
        sample=sample,
        margin=margin if hard else None,
        log_prob=(lambda: -loss(target)) if hard else None,
        outputs=(call["input"],),
        information=diagonal(information(probability)),
    )


# Losses of a residual r are read as densities exp(-loss(r)), of which the Fisher takes only one number: the expected
# squared score. A residual of random sign has a score of that square with no variance of its own.


@register_loss(F.mse_loss)
def _mse_loss(call: LossArguments) -> LossCall:
    """Normal with variance 1/2: the Fisher is the Gauss-Newton matrix, 2."""
    return _residual("mse_loss", call, F.mse_loss(call["input"], call["target"], reduction="none"), 2.0)


@register_loss(F.l1_loss)
def _l1_loss(call: LossArguments) -> LossCall:
    """Laplace with scale 1. The second derivative is 0 but at the target; the squared score, a sign's, is 1."""
    return _residual("l1_loss", call, F.l1_loss(call["input"], call["target"], reduction="none"), 1.0)


@register_loss(F.huber_loss)
def _huber_loss(call: LossArguments) -> LossCall:
    """Normal in the middle, Laplace in the tails; see :func:`_huber_information`."""
    elements = F.huber_loss(call["input"], call["target"], reduction="none", delta=call["delta"])
    # Other than its siblings', torch's weighted mean divides by the number of elements.
    return _residual("huber_loss", call, elements, _huber_information(1.0, call["delta"]), normalized=False)


@register_loss(F.smooth_l1_loss)
def _smooth_l1_loss(call: LossArguments) -> LossCall:
    """Huber's loss over ``beta``; the L1 loss where that is 0."""
    beta = call["beta"]
    elements = F.smooth_l1_loss(call["input"], call["target"], reduction="none", beta=beta)
    return _residual("smooth_l1_loss", call, elements, _huber_information(1 / beta, beta) if beta else 1.0)


def _huber_information(slope: float, threshold: float) -> float:
    """Expected squared score of the density ``exp(-loss)`` whose score is ``slope · r``, constant past the threshold.

    By parts, it is the expected second derivative: the slope times the probability of a residual in the middle.
    """
    middle = math.sqrt(2 * math.pi / slope) * math.erf(threshold * math.sqrt(slope / 2))
    tails = 2 * math.exp(-slope * threshold**2 / 2) / (slope * threshold)
    return slope * middle / (middle + tails)


def _residual(
    name: str, call: LossArguments, elements: Tensor, information: float, normalized: bool = True
) -> LossCall:
    """A loss of residuals; ``normalized`` where its weighted mean is divided by the sum of the weights."""
    ones = torch.ones_like(elements).detach()
    given = call.get("weight")
    weight = ones if given is None else given
    scale = (ones * weight).detach()
    # A weighted mean is divided by the sum of the weights as they are, before a broadcast target repeats them.
    weights = scale * (weight.numel() / max(1, ones.numel())) if normalized else ones

    def sample(generator: torch.Generator) -> Tensor:
        # Written in the residual, which is the same whichever of the two the network has put out.
        signs = 2 * torch.bernoulli(torch.full_like(ones, 0.5), generator=generator) - 1
        return math.sqrt(information) * signs * (call["input"] - call["target"])

    plain = call["input"].shape == elements.shape and not call["target"].requires_grad
    return LossCall(
        name=name,
        reduction=call["reduction"],
        elements=elements * weight,
        weights=weights,
        curvature=scale,
        sample=sample,
        log_prob=lambda: -elements,
        outputs=(call["input"] if plain else call["input"] - call["target"],),
        information=diagonal(information),
    )


@register_loss(F.gaussian_nll_loss)
def _gaussian_nll_loss(call: LossArguments) -> LossCall:
    """Normal, whose Fisher over mean and variance ``v`` is ``diag(1 / v, 1 / (2 v²))``; ``v`` at least ``eps``."""
    elements = F.gaussian_nll_loss(
        call["input"], call["target"], call["var"], full=call["full"], eps=call["eps"], reduction="none"
    )
    residual = call["input"] - call["target"]
    var = call["var"] if isinstance(call["var"], Tensor) else torch.full_like(residual, call["var"]).detach()
    if var.shape == residual.shape[:-1]:
        var = var.unsqueeze(-1)
    variance = var.detach().clamp_min(call["eps"])

    def information(weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        mean, spread = tangents
        return [weights / variance * mean, weights / (2 * variance.square()) * spread]

    def sample(generator: torch.Generator) -> Tensor:
        deviation = variance.sqrt()
        # Moments up to the fourth enter the Fisher. 0 and ±√3 at odds of 4 : 1 : 1 have those of the Normal, and a
        # square that varies far less.
        tails, signs = (
            torch.bernoulli(torch.full_like(elements, p), generator=generator).detach() for p in (1 / 3, 1 / 2)
        )
        noise = math.sqrt(3) * tails * (2 * signs - 1) * deviation
        return F.gaussian_nll_loss(residual - residual.detach(), noise, var, reduction="none", eps=call["eps"])

    return _density("gaussian_nll_loss", call, elements, sample, (residual, var.expand_as(elements)), information)


@register_loss(F.poisson_nll_loss)
def _poisson_nll_loss(call: LossArguments) -> LossCall:
    """Poisson, with Fisher ``rate`` over the logarithm of the rate and ``1 / rate`` over the rate."""
    nll = partial(F.poisson_nll_loss, log_input=call["log_input"], eps=call["eps"], reduction="none")
    elements = nll(call["input"], call["target"], full=call["full"])
    output = call["input"].expand_as(elements)
    rate = output.detach().exp() if call["log_input"] else output.detach().clamp_min(0)
    information = rate if call["log_input"] else rate / (rate + call["eps"]).square()

    def sample(generator: torch.Generator) -> Tensor:
        rate = output.detach().float().exp() if call["log_input"] else output.detach().float().clamp_min(0)
        return nll(output, torch.poisson(rate, generator=generator).to(output.dtype))

    return _density("poisson_nll_loss", call, elements, sample, (output,), diagonal(information))


def _density(
    name: str,
    call: LossArguments,
    elements: Tensor,
    sample: Callable[[torch.Generator], Tensor],
    outputs: tuple[Tensor, ...],
    information: Information,
) -> LossCall:
    """A negative log-density of ``outputs``, unweighted."""
    ones = torch.ones_like(elements).detach()
    return LossCall(
        name=name,
        reduction=call["reduction"],
        elements=elements,
        weights=ones,
        curvature=ones,
        sample=sample,
        log_prob=lambda: -elements,
        outputs=outputs,
        information=information,
    )


@register_loss(F.kl_div)
def _kl_div(call: LossArguments) -> LossCall | None:
    """Cross entropy with soft targets, less their entropy, where the last dimension holds the model's classes.

    That is so if ``input`` are logarithms of probabilities that sum to 1 along it and the targets are data: then a
    label is drawn for each row, and the Gauss-Newton matrix is that of a cross entropy times the targets' sum. Any
    other call, such as one over raw scores or classes in dimension 1 of several, is no likelihood of known labels.
    """
    rows, target = call["input"], call["target"]
    probabilities = rows.detach().float().exp()
    total = probabilities.sum(-1)
    if rows.dim() < 2 or rows.shape != target.shape or target.requires_grad or ((total - 1).abs() > 1e-2).any():
        return None
    elements = F.kl_div(rows, target, reduction="none", log_target=call["log_target"])
    mass = (target.exp() if call["log_target"] else target).sum(-1, keepdim=True)

    def sample(generator: torch.Generator) -> Tensor:
        labels = draw_classes(probabilities, generator).unsqueeze(-1)
        drawn = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, labels, True)
        return -rows.masked_fill(~drawn, 0)

    # "batchmean" divides by the number of rows along the first dimension: a mean of lighter elements.
    batchmean = call["reduction"] == "batchmean"
    weights = torch.full_like(elements, rows.shape[0] / rows.numel() if batchmean else 1.0).detach()
    reduction = "mean" if batchmean else call["reduction"]
    curvature = mass.expand_as(elements).detach()
    return LossCall(
        name="kl_div",
        reduction=reduction,
        elements=elements,
        weights=weights,
        curvature=curvature,
        sample=sample,
        outputs=(rows,),
        information=diagonal(rows.detach().exp()),
    )
