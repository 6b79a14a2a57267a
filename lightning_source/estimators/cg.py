"""Influence functions at the final model by conjugate gradients on the exact Gauss-Newton matrix (Koh & Liang 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_source.curvature.ekfac import IDENTITY, Factors
from lightning_source.curvature.solvers import Product, conjugate_gradient, shifted, top_eigenvalue
from lightning_source.curvature.unroll import damped_inverse
from lightning_source.estimators.influence import dampings
from lightning_source.estimators.registry import Contraction, Query, register_estimator
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.gauss_newton import GaussNewton, Layout
from lightning_source.runs.run import Run


@register_estimator("influence-cg", floats_per_parameter=lambda options: 12)
def influence_cg(
    query: Query,
    *,
    damping: float | None = None,
    tolerance: float = 1e-2,
    iterations: int = 100,
    preconditioner: Literal["ekfac"] | None = "ekfac",
    factor_examples: int | None = None,
) -> Iterator[Contraction]:
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
    found = conjugate_gradient(
        lambda x: matrix(x) + shift * x,
        gradients,
        precondition=None if preconditioner is None else ekfac_inverse(run.final_factors(), amounts, matrix.layout),
        tolerance=tolerance,
        iterations=iterations,
    )
    worst = float(found.residuals.max())
    if worst > tolerance:
        rank_zero_warn(
            f'`method="influence-cg"` stopped after {found.iterations} iterations with a residual of {worst:.1e} times'
            f" the query gradient's norm where `tolerance={tolerance:g}`. HINT: raise `iterations` or `damping`."
        )
    query.extra_metadata.update(curvature=matrix.kind, residual=max(worst, query.extra_metadata.get("residual", 0.0)))
    yield Contraction(run.final_of_stage, matrix.layout.by_block(found.values), 1 / run.examples)


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
    back = inverse or (lambda x: x)
    found = 0.0
    with matrix.minibatches(size, 8 if size < len(matrix) else 1, seed) as products:
        for product in shifted(products, shift):
            repeated = (lambda x, product=product: back(product(x)) for _ in range(8))
            found = max(found, top_eigenvalue(repeated, shift.unsqueeze(0), seed))
    return max(found, 1e-30)


def ekfac_inverse(factors: Factors, amounts: dict[str, float], layout: Layout) -> Callable[[Tensor], Tensor]:
    """``(H_EK-FAC + damping)⁻¹`` times vectors ``[Q, D]``."""

    def inverse(flat: Tensor) -> Tensor:
        found = torch.empty_like(flat)
        whole = layout.by_block(found)
        for name, matrices in layout.by_block(flat).items():
            one = factors[name]
            rotated = one.basis.rotate_from(IDENTITY, matrices)
            rotated = damped_inverse(one.eigenvalues, max(amounts[name], 1e-30)) * rotated
            whole[name].copy_(IDENTITY.rotate_from(one.basis, rotated))
        return found

    return inverse
