"""Influence functions at the final model by conjugate gradients on the exact Gauss-Newton matrix (Koh & Liang 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_source.engine import Factors, factor_ids
from lightning_source.estimators.influence import dampings
from lightning_source.estimators.registry import Contraction, Query, estimates
from lightning_source.factors import IDENTITY
from lightning_source.products import GaussNewton, Layout
from lightning_source.run import Run
from lightning_source.solvers import conjugate_gradient
from lightning_source.unroll import damped_inverse


@estimates("influence-cg", held=lambda options: 9)
def influence_cg(
    query: Query,
    *,
    damping: float | None = None,
    tolerance: float = 1e-4,
    iterations: int = 100,
    preconditioner: Literal["ekfac"] | None = None,
    factor_examples: int | None = None,
) -> Iterator[Contraction]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g`` with ``H`` over all blocks jointly, solved for each query.

    Costs one train pass, and each iteration a Gauss-Newton product with every query: over ``factor_examples`` examples
    a forward and two backwards, and about two backwards more a query. Holds 9 copies of the attributed parameters for
    each query. The default damping (and ``"ekfac"``) needs the EK-FAC factors at the final model, two factor passes the
    first time.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue, as in ``"influence"``.
        tolerance: each query is solved until its residual is below this share of its gradient's norm.
        iterations: at most; a warning names the residual that is left.
        preconditioner: ``"ekfac"`` starts from the EK-FAC solution and iterates in its metric: fewer iterations.
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
            f" the query gradient's norm where `tolerance={tolerance:g}`. HINT: raise `iterations` or `damping`, or"
            ' pass `preconditioner="ekfac"`.'
        )
    query.remarks.update(curvature=matrix.kind, residual=max(worst, query.remarks.get("residual", 0.0)))
    yield Contraction(run.final, matrix.layout.by_block(found.values), 1 / run.examples)


def final_gauss_newton(query: Query, examples: int | None) -> GaussNewton:
    """``H`` of the asked stage's objective and examples at the final parameters."""
    run = query.run
    ids = factor_ids(len(run.data), examples, run.settings["seed"])
    return GaussNewton(run.workspace, run.data, _once(run), ids, run.settings["label_samples"])


def _once(run: Run) -> Callable[[], dict[str, Tensor]]:
    state = dict(run.final())
    return lambda: state


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
