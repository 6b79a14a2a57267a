"""SOURCE's spectral functions and the reverse walk over segments: pure tensors, the paper's equations.

Within a segment the Hessian ``H`` and the gradients are taken as stationary (Bae et al., NeurIPS 2024, Eq. 15-24):

    ``S = exp(-Λ H)`` carries a change of the parameters through the segment,
    ``r = (1/N) F_r(H) g`` is the change that one example's gradient ``g`` leaves at the segment's end.

``Λ`` (``rate``) is the sum of the segment's effective learning rates. L2 weight decay ``w`` shifts every eigenvalue,
``σ → σ + w``; the gradient stays the data's. Nothing here is damped: ``F_r`` is bounded by ``Λ``.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_source.curvature.ekfac import IDENTITY, Basis

_Step = tuple[Tensor, Tensor, Basis]  # the response, and the vector with its basis before the segment


def segment_decay(eigenvalues: Tensor, rate: float, weight_decay: float = 0.0) -> Tensor:
    """``F_S(σ) = exp(-Λ (σ + w))``, the factor by which a segment shrinks a change of the parameters.

    Args:
        eigenvalues: curvature eigenvalues ``σ`` of the loss that the learning rate multiplied; any shape.
            Round-off negatives count as 0.
        rate: ``Λ``, the sum of effective learning rates over the segment's steps.
        weight_decay: ``w``, the coupled L2 decay.

    Example:
        >>> segment_decay(torch.tensor([0.0, 1.0, 1000.0]), rate=0.5)  # a flat direction keeps all, a steep one nothing
        tensor([1.0000, 0.6065, 0.0000])
    """
    return torch.exp(-rate * (eigenvalues.clamp_min(0) + weight_decay))


def segment_response(eigenvalues: Tensor, rate: float, weight_decay: float = 0.0) -> Tensor:
    """``F_r(σ) = (1 - exp(-Λ (σ + w))) / (σ + w)``, which is exactly ``Λ`` at ``σ + w = 0``.

    Args:
        eigenvalues: curvature eigenvalues ``σ``; any shape. Round-off negatives count as 0.
        rate: ``Λ``, the sum of effective learning rates over the segment's steps.
        weight_decay: ``w``, the coupled L2 decay.

    Example:
        >>> segment_response(torch.tensor([0.0, 1.0, 1000.0]), rate=0.5)  # Λ at σ = 0, 1/σ where Λσ is large
        tensor([0.5000, 0.3935, 0.0010])
    """
    exponent = rate * (eigenvalues.clamp_min(0) + weight_decay)
    # (1 - exp(-x)) / x by expm1: without it x below 1e-7 loses every digit in float32.
    ratio = -torch.expm1(-exponent) / torch.where(exponent > 0, exponent, 1.0)
    return rate * torch.where(exponent > 0, ratio, 1.0)


def finite_step_response(eigenvalues: Tensor, learning_rate: float, steps: int) -> Tensor:
    """``(1 - (1 - ησ)^K) / σ``: the exact geometric sum of ``K`` steps that :func:`segment_response` smooths.

    Args:
        eigenvalues: ``σ``; any shape, with ``0 <= ησ <= 1``.
        learning_rate: ``η`` of every step.
        steps: ``K``.

    Example:
        >>> finite_step_response(torch.tensor([2.0]), learning_rate=0.25, steps=2)  # η + η (1 - ησ)
        tensor([0.3750])
    """
    sigma = eigenvalues.clamp_min(0)
    total = -torch.expm1(steps * torch.log1p(-learning_rate * sigma))
    return torch.where(sigma > 0, total / torch.where(sigma > 0, sigma, 1.0), learning_rate * steps)


def damped_inverse(eigenvalues: Tensor, damping: float) -> Tensor:
    """``1 / (σ + damping)``, the influence function's spectral map (Koh & Liang 2017; Grosse et al. 2023).

    Example:
        >>> damped_inverse(torch.tensor([0.0, 3.0]), damping=1.0)
        tensor([1.0000, 0.2500])
    """
    return 1.0 / (eigenvalues.clamp_min(0) + damping)


class SegmentCurvature(NamedTuple):
    """What one segment contributes to one block: its curvature and how far training moved along it."""

    basis: Basis  # eigenvectors, activations [P, I, I] and gradients [P, O, O]
    eigenvalues: Tensor  # [P, O, I], of the loss as trained
    rate: float  # Λ, sum of effective learning rates
    weight_decay: float  # w
    preconditioner: Tensor | None = None  # P̄ [P, O, I], in parameter space; None: plain gradient steps
    decoupled: bool = False  # the decay is not preconditioned
    mean: float | None = None  # mean eigenvalue of the whole block, where those here are of some columns
    symmetric: bool = False  # under a preconditioner: one symmetric operator in place of the hybrid


def diagonal_of(basis: Basis, eigenvalues: Tensor) -> Tensor:
    """Diagonal of ``H`` in parameter space, ``(Q_G∘Q_G) λ (Q_A∘Q_A)ᵀ``, ``[P, O, I]``."""
    diagonal = eigenvalues if basis.gradients is None else basis.gradients.square() @ eigenvalues
    return diagonal if basis.activations is None else diagonal @ basis.activations.square().mT


def reverse_walk(query: Tensor, basis: Basis, segments: Sequence[SegmentCurvature]) -> Iterator[Tensor]:
    """Walk a query gradient back through the segments, last to first (method §2, Eq. 24 read from the right).

    Args:
        query: ``[..., P, O, I]``, the measurement's gradients with respect to one block at the end of training.
        basis: the basis that ``query`` is written in.
        segments: the block's segments in the order of training.

    Yields:
        ``F_r(H) v`` for the last segment, then for the one before it, and so on, each **in that segment's eigenbasis**;
        its inner product with an example's gradient there, over ``N``, is the segment's share of the score.
    """
    vector, here = query, basis
    for index in range(len(segments) - 1, -1, -1):
        segment = segments[index]
        step = _gradient_segment
        if segment.preconditioner is not None:
            step = _symmetric_segment if segment.symmetric else _preconditioned_segment
        response, vector, here = step(vector, here, segment, index == 0)
        yield response


def _gradient_segment(vector: Tensor, here: Basis, segment: SegmentCurvature, first: bool) -> _Step:
    vector = segment.basis.rotate_from(here, vector)
    response = segment_response(segment.eigenvalues, segment.rate, segment.weight_decay) * vector
    if not first:
        vector = segment_decay(segment.eigenvalues, segment.rate, segment.weight_decay) * vector
    return response, vector, segment.basis


def _preconditioned_segment(vector: Tensor, here: Basis, segment: SegmentCurvature, first: bool) -> _Step:
    """Adam and its like (Eq. 39, 43) by the hybrid of the paper's App. D.

    ``r = (I - exp(-Λ P H)) H⁻¹ g`` with a diagonal ``H`` inside the exponential and EK-FAC for ``H⁻¹``, which needs a
    damping, here 0.1 times the mean eigenvalue. Diagonal matrices are their own transposes, so ``Sᵀ = S``.
    """
    assert segment.preconditioner is not None
    vector = IDENTITY.rotate_from(here, vector)
    shifted = diagonal_of(segment.basis, segment.eigenvalues) + (0.0 if segment.decoupled else segment.weight_decay)
    exponent = segment.rate * (segment.preconditioner * shifted + (segment.weight_decay if segment.decoupled else 0.0))
    reached = torch.where(segment.preconditioner > 0, -torch.expm1(-exponent), 0.0)  # though the decay moved the others
    moved = segment.basis.rotate_from(IDENTITY, reached * vector)
    values = segment.eigenvalues.clamp_min(0)
    decay = 0.0 if segment.decoupled else segment.weight_decay
    mean = float(values.mean()) if segment.mean is None else segment.mean
    response = damped_inverse(values, max(0.1 * mean + decay, 1e-30)) * moved
    return response, vector if first else torch.exp(-exponent) * vector, IDENTITY


def _symmetric_segment(vector: Tensor, here: Basis, segment: SegmentCurvature, first: bool) -> _Step:
    """Adam and its like by one operator, ``M = P^½ H P^½`` (Eq. 39, 43), in the eigenbasis ``Q`` of ``H``.

    What ``P`` does to an eigenvalue ``σ`` is taken as ``p̂σ`` with ``p̂ = diag(Qᵀ P Q)``. So ``r = P^½ F_r(M) P^½ g``
    and ``S = P^½ exp(-ΛM) P^-½`` are exact where ``P`` is a multiple of the identity, tend to ``ΛP g`` where the
    curvature is small, and need no damping.
    """
    assert segment.preconditioner is not None
    root, basis = segment.preconditioner.sqrt(), segment.basis
    scale = _diagonal_in(basis, segment.preconditioner)
    decay = segment.weight_decay / scale.clamp_min(1e-30) if segment.decoupled else segment.weight_decay
    values = scale * (segment.eigenvalues.clamp_min(0) + decay)
    entries = IDENTITY.rotate_from(here, vector)
    rotated = basis.rotate_from(IDENTITY, root * entries)
    back = IDENTITY.rotate_from(basis, segment_response(values, segment.rate) * rotated)
    response = basis.rotate_from(IDENTITY, root * back)
    if first:
        return response, vector, IDENTITY
    carried = IDENTITY.rotate_from(basis, segment_decay(values, segment.rate) * rotated)
    carried = torch.where(root > 0, carried / torch.where(root > 0, root, 1.0), entries)  # what stood still stays
    return response, carried, IDENTITY


def _diagonal_in(basis: Basis, values: Tensor) -> Tensor:
    """Diagonal of ``Qᵀ diag(values) Q``, ``(Q_G∘Q_G)ᵀ values (Q_A∘Q_A)``, ``[P, O, I]``."""
    diagonal = values if basis.gradients is None else basis.gradients.square().mT @ values
    return diagonal if basis.activations is None else diagonal @ basis.activations.square()
