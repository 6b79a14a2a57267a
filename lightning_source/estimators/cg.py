"""Influence functions at the final model by conjugate gradients on the exact Gauss-Newton matrix (Koh & Liang 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_source._lightning import rank_zero_warn
from lightning_source.curvature.ekfac import IDENTITY, Factors
from lightning_source.curvature.solvers import Product, conjugate_gradient, shifted, top_eigenvalue
from lightning_source.curvature.unroll import damped_inverse
from lightning_source.estimators.influence import dampings
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction, Metadata
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.gauss_newton import GaussNewton, Layout
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.runs.run import Run


@register_estimator("influence-cg", floats_per_parameter=12)
def influence_cg(
    query: Query,
    *,
    damping: float | None = None,
    tolerance: float = 1e-2,
    iterations: int = 100,
    preconditioner: Literal["ekfac"] | None = "ekfac",
    factor_examples: int | None = None,
) -> Iterator[Contraction | Metadata]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g`` with ``H`` over all blocks jointly, solved for each query.

    Costs one train pass, and each iteration a Gauss-Newton product with every query: over ``factor_examples`` examples
    a forward and two backwards, and about two backwards more a query. Holds 12 copies of the attributed parameters for
    each query. The default damping and the preconditioner need the EK-FAC factors at the final model, two factor passes
    the first time.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue, as in ``"influence"``.
        tolerance: each query is solved until its residual is below this share of its gradient's norm.
        iterations: at most; a warning names the residual that is left.
        preconditioner: ``"ekfac"`` starts from the EK-FAC solution and iterates in its metric, which takes fewer steps
            to a useful answer; ``None`` starts from 0.
        factor_examples: training examples that ``H`` is averaged over, drawn once; all by default.
    """
    run = query.run
    matrix = final_gauss_newton(query, factor_examples)
    amounts = dampings(run, damping)
    gradients = query.flat_gradients(run.final(), matrix.layout)
    shift = matrix.layout.each(amounts, gradients)
    solution = conjugate_gradient(
        lambda vectors: matrix(vectors) + shift * vectors,
        gradients,
        precondition=None if preconditioner is None else ekfac_inverse(run.final_factors(), amounts, matrix.layout),
        tolerance=tolerance,
        iterations=iterations,
    )
    worst = float(solution.residuals.max())
    if worst > tolerance:
        rank_zero_warn(
            f'`method="influence-cg"` stopped after {solution.iterations} iterations with a residual of {worst:.1e}'
            f" times the query gradient's norm where `tolerance={tolerance:g}`. HINT: raise `iterations` or `damping`."
        )
    yield Metadata({"curvature": matrix.kind}, residual=worst)
    yield Contraction(run.final_of_stage, QueryGradients(matrix.layout.by_block(solution.values)), 1 / run.examples)


def final_gauss_newton(query: Query, examples: int | None) -> GaussNewton:
    """``H`` of the asked stage's objective and examples at the final parameters."""
    run = query.run
    ids = factor_ids(len(run.data), examples, run.settings.seed)
    return GaussNewton(run.workspace, run.data, _once(run), ids, run.settings.label_samples)


def _once(run: Run) -> Callable[[], dict[str, Tensor]]:
    state = dict(run.final_of_stage())
    return lambda: state


def largest_of_batches(
    matrix: GaussNewton, size: int, shift: Tensor, seed: int, inverse: Product | None = None
) -> float:
    """The largest eigenvalue of ``H + shift`` (times ``inverse``) that power iteration finds in 8 batches.

    Rare examples with much curvature make it larger in their batches than in the mean: that is what a step must bear.
    """
    precondition = inverse or (lambda vectors: vectors)
    largest = 0.0
    with matrix.minibatches(size, 8 if size < len(matrix) else 1, seed) as products:
        for product in shifted(products, shift):
            repeated = (lambda vectors, product=product: precondition(product(vectors)) for _ in range(8))
            largest = max(largest, top_eigenvalue(repeated, shift.unsqueeze(0), seed))
    return max(largest, 1e-30)


def ekfac_inverse(factors: Factors, amounts: dict[str, float], layout: Layout) -> Callable[[Tensor], Tensor]:
    """``(H_EK-FAC + damping)⁻¹`` times vectors ``[Q, D]``."""

    def inverse(flat: Tensor) -> Tensor:
        result = torch.empty_like(flat)
        result_blocks = layout.by_block(result)
        for name, matrices in layout.by_block(flat).items():
            basis, eigenvalues = factors[name].basis, factors[name].eigenvalues
            rotated = basis.rotate_from(IDENTITY, matrices)
            rotated = damped_inverse(eigenvalues, max(amounts[name], 1e-30)) * rotated
            result_blocks[name].copy_(IDENTITY.rotate_from(basis, rotated))
        return result

    return inverse
