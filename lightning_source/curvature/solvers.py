"""Iterations that need a matrix only by its products: linear systems and eigenvalues. Pure tensors.

All work on a block of vectors ``[Q, D]`` at once, one system a row, and know nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # [Q, D] -> [Q, D]


class Solution(NamedTuple):
    """What an iteration arrived at."""

    values: Tensor  # [Q, D]
    residuals: Tensor  # [Q], what is left of each equation over the norm of its right side
    iterations: int


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, dtype=torch.float64)


def _norms(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def conjugate_gradient(
    product: Product,
    targets: Tensor,
    *,
    precondition: Product | None = None,
    tolerance: float = 1e-2,
    iterations: int = 100,
) -> Solution:
    """Solve ``A x = b`` for positive definite ``A``, each row on its own (Hestenes and Stiefel 1952).

    Starts at ``precondition(b)`` where there is a preconditioner, else at 0. A row that has converged stands still.

    Args:
        product: ``A`` times a block of vectors.
        targets: ``b``, ``[Q, D]``.
        precondition: an approximate inverse of ``A``, positive definite.
        tolerance: stops where every residual's norm is below this share of its target's.
        iterations: products at most, besides the first.

    Example:
        >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> solution = conjugate_gradient(lambda x: x @ matrix, torch.tensor([[2.0, 2.0]]), tolerance=1e-6)
        >>> solution.values, solution.iterations
        (tensor([[1.0000, 0.5000]]), 2)
    """
    inverse = precondition or (lambda x: x)
    scale = _norms(targets)
    if precondition is None:
        x, r = torch.zeros_like(targets), targets.clone()
    else:
        x = inverse(targets)
        r = targets - product(x)
    residuals = _norms(r) / scale
    z = inverse(r)
    p, rz = z.clone(), _dot(r, z)
    done = 0
    while done < iterations and bool((residuals > tolerance).any()):
        image = product(p)
        curvature = _dot(p, image)
        moving = (residuals > tolerance) & (curvature > 0)
        if not moving.any():
            break
        step = torch.where(moving, rz / torch.where(moving, curvature, 1.0), 0.0).to(x.dtype).unsqueeze(1)
        x += step * p
        r -= step * image
        done += 1
        residuals = torch.where(moving, _norms(r) / scale, residuals)
        z = inverse(r)
        after = _dot(r, z)
        growth = torch.where(moving & (rz > 0), after / torch.where(rz > 0, rz, 1.0), 0.0).to(x.dtype)
        p = z + growth.unsqueeze(1) * p
        rz = after
    return Solution(x, residuals, done)


def top_eigenvalue(products: Iterable[Product], like: Tensor, seed: int) -> float:
    """The largest eigenvalue of a positive semi-definite matrix by power iteration; approached from below.

    Args:
        products: the matrix times a block of vectors, once for each iteration; it may be similar to a symmetric one, as
            ``P A`` is, or differ a little from one iteration to the next.
        like: a block ``[Q, D]`` whose dtype and device the start takes.
        seed: of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, like.shape[1], generator=generator, dtype=torch.float64).to(like)
    value = 0.0
    for product in products:
        vector = product(vector / _norms(vector).to(vector.dtype).unsqueeze(1))
        value = float(_norms(vector))
    return value


def shifted(products: Iterable[Product], shift: Tensor) -> Iterator[Product]:
    """``A_k + diag(shift)`` for each ``A_k``."""
    for product in products:
        yield lambda x, product=product: product(x) + shift * x  # type: ignore[misc]


class Diverged(ArithmeticError):
    """An iteration that must stay bounded did not."""


def neumann(
    products: Iterable[Product],
    targets: Tensor,
    *,
    step: float,
    precondition: Product | None = None,
    skip: int | None = None,
) -> Tensor:
    """``x ← x + step · P (b - A_k x)``: the Neumann series of ``A⁻¹ b`` term by term.

    With ``P`` the identity, from ``step · b``, and ``A_k`` of small random batches it is LiSSA (Agarwal et al. 2017)
    with scale ``1 / step``; with an EK-FAC inverse as ``P``, from ``P b``, it is that of ASTRA (Wang et al. 2025).

    Args:
        products: ``A_k`` times a block of vectors, one for each iteration.
        targets: ``b``, ``[Q, D]``.
        step: below ``2 / λ_max(P A_k)``.
        precondition: ``P``.
        skip: gives back the mean of the iterates after this many, since random batches make them noisy; by default
            the last iterate.

    Raises:
        Diverged: iterates grew as no convergent series can.
    """
    inverse = precondition or (lambda x: x)
    x = step * targets if precondition is None else inverse(targets)
    start = _norms(x)
    # While I - step · P A contracts, an iterate moves by less than the first did; P bends norms by its own condition.
    growth = 1.0 if precondition is None else max(1.0, step)
    total, averaged = torch.zeros_like(x), 0
    for done, product in enumerate(products, start=1):
        x = x + step * inverse(targets - product(x))
        if not bool((_norms(x) <= 100 * (1 + growth * done) * start).all()):
            raise Diverged(f"after {done} steps iterates are {float((_norms(x) / start).max()):.1e} times the first")
        if skip is not None and done > skip:
            total += x
            averaged += 1
    return total / averaged if averaged else x
