"""SOURCE's spectral functions of a matrix that is known by its products only. Pure tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_source.curvature.unroll import segment_decay, segment_response

Product = Callable[[Tensor], Tensor]  # [Q, D] -> [Q, D]

# How many equations are kept, and what each counts for beside the one before it.
_EQUATIONS, _SHARE = 16, 0.3


class Responses(NamedTuple):
    """``F_r(M) v`` and ``exp(-M) v`` for each row of ``v``, over a unit of time."""

    response: Tensor  # [Q, D]
    decay: Tensor  # [Q, D]
    residuals: Tensor  # [Q], what is left of the equations over the norms of their right sides, the first counting most
    iterations: int


def spectral_responses(
    product: Product,
    vectors: Tensor,
    *,
    precondition: Product | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> Responses:
    """``(1 - exp(-σ))/σ`` and ``exp(-σ)`` of a symmetric positive semi-definite ``M``, applied to vectors.

    Both are taken by Galerkin's condition in a subspace: ``f(M) v ≈ V f(Vᵀ M V) Vᵀ v``. The subspace is made for the
    vectors ``(1 + M)⁻ᵏ v``, ``k = 0, 1, …``, in which these functions converge at a pace that does not depend on how
    large ``M`` is (shift-and-invert Krylov, van den Eshof & Hochbruck 2006). Each is the solution of
    ``(1 + M) x_k = x_{k-1}``, solved in the same subspace, which grows by the preconditioned residual of the equation
    that is furthest from solved (Davidson 1975): so every product serves all of them, and none is solved further than
    the others need. The first, ``(1 + M)⁻¹ v``, is what ASTRA iterates towards from the preconditioner's solution (Wang
    et al. 2025).

    Without a preconditioner the vectors are Lanczos'. Whatever the preconditioner, the result is exact once the
    subspace holds all of ``v``'s spectrum, and never unstable: the spectrum of ``Vᵀ M V`` lies within that of ``M``.

    Args:
        product: ``M`` times a block of vectors.
        vectors: ``v``, ``[Q, D]``.
        precondition: an approximation of ``(1 + M)⁻¹``.
        iterations: products at most. The subspace and its image take ``2 · iterations · Q · D`` numbers.
        tolerance: stops where every residual is below it.
    """
    inverse = precondition or (lambda x: x)
    iterations = min(iterations, vectors.shape[1])
    queries = len(vectors)
    basis = vectors.new_zeros(queries, iterations, vectors.shape[1])
    images = torch.zeros_like(basis)
    reduced, gram = torch.zeros(2, queries, iterations, iterations, dtype=torch.float64, device=vectors.device)
    candidate = vectors
    for size in range(1, iterations + 1):
        basis[:, size - 1] = _orthonormal(candidate, basis[:, : size - 1])
        images[:, size - 1] = product(basis[:, size - 1])
        held, moved, last = basis[:, :size], images[:, :size], images[:, size - 1]
        for matrix, rows in ((reduced, held), (gram, moved)):
            entries = (rows @ last.unsqueeze(2)).squeeze(2).double()
            matrix[:, size - 1, :size] = entries
            matrix[:, :size, size - 1] = entries
        small = reduced[:, :size, :size]
        values, turn = torch.linalg.eigh(small)
        start = (held @ vectors.unsqueeze(2)).squeeze(2).double()
        before, after, left = _equations(values, turn, small, gram[:, :size, :size], start)
        worst, which = left.max(0)
        if size == iterations or bool((worst < tolerance).all()):
            break
        before, after = (x[which, torch.arange(queries, device=which.device)] for x in (before, after))
        left_over = inverse(_combine(held, before - after) - _combine(moved, after))
        # A row that is done stands still, so that it does not depend on the others.
        candidate = torch.where((worst >= tolerance).unsqueeze(1), left_over, 0.0)
    turned = _times(turn.mT, start)
    response, decay = (_combine(held, _times(turn, f(values, 1.0) * turned)) for f in (segment_response, segment_decay))
    return Responses(response, decay, worst, size)


def _equations(
    values: Tensor, turn: Tensor, small: Tensor, gram: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Right sides, solutions and weighted relative residuals of ``(1 + M) x_k = x_{k-1}`` in the subspace.

    Returns:
        Coefficients ``[k, Q, K]`` twice, right sides of norm 1, and residuals ``[k, Q]``.
    """
    before, after, left = [], [], []
    right = start
    for k in range(_EQUATIONS):
        right = right / right.norm(dim=1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny)
        solution = _times(turn, _times(turn.mT, right) / (1 + values.clamp_min(0)))
        gap = right - solution
        square = gap.square().sum(1) - 2 * (gap * _times(small, solution)).sum(1)
        square = square + (solution * _times(gram, solution)).sum(1)
        before.append(right)
        after.append(solution)
        left.append(_SHARE**k * square.clamp_min(0).sqrt())
        right = solution
    return torch.stack(before), torch.stack(after), torch.stack(left)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(2)).squeeze(2)


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """``[Q, K, D]`` with weights ``[Q, K]``: ``[Q, D]``."""
    return (weights.to(rows.dtype).unsqueeze(1) @ rows).squeeze(1)


def _orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """What is new in each vector, normalised; 0 where that is round-off."""
    tiny = torch.finfo(vectors.dtype).tiny
    new = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(tiny)
    for _ in range(2):  # once leaves round-off of the part that is taken away
        new = new - _combine(basis, (basis @ new.unsqueeze(2)).squeeze(2))
    norms = new.norm(dim=1, keepdim=True)
    return torch.where(norms > 100 * torch.finfo(vectors.dtype).eps, new / norms.clamp_min(tiny), 0.0)
