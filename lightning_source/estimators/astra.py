"""ASTRA: Neumann iterations on the exact Gauss-Newton matrix, preconditioned by EK-FAC (Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_source._lightning import MisconfigurationException
from lightning_source.curvature.solvers import Diverged, neumann, shifted
from lightning_source.estimators.cg import ekfac_inverse, final_gauss_newton, largest_of_batches
from lightning_source.estimators.influence import dampings
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction, Metadata
from lightning_source.passes.query_gradients import QueryGradients


@register_estimator("astra", floats_per_parameter=10)
def astra(
    query: Query,
    *,
    damping: float | None = None,
    iterations: int = 200,
    step: float | None = None,
    examples_per_step: int = 128,
) -> Iterator[Contraction | Metadata]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g`` by ``x ← x + step · P (∇f - (H_batch + damping) x)`` from ``P ∇f``.

    ``P = (H_EK-FAC + damping)⁻¹``: iteration 0 is the score of ``"influence"``, and what EK-FAC gets wrong decays with
    every step. Costs one train pass, ``iterations`` Gauss-Newton products of ``examples_per_step`` examples with every
    query (see ``"influence-cg"``), and two factor passes the first time. Holds 10 copies of the attributed parameters
    for each query. Over batches the second half of the iterates is averaged; where a step takes all examples,
    ``"influence-cg"`` reaches the same in fewer.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue, as in ``"influence"``.
        iterations: steps.
        step: below ``2 / λ_max`` of every batch's ``P (H + damping)``; by default 1 over the largest that power
            iteration finds in 8 batches.
        examples_per_step: examples of a batch.

    Raises:
        MisconfigurationException: the iteration diverged.
    """
    run = query.run
    matrix = final_gauss_newton(query, None)
    amounts = dampings(run, damping)
    gradients = query.flat_gradients(run.final(), matrix.layout)
    shift = matrix.layout.each(amounts, gradients)
    inverse = ekfac_inverse(run.final_factors(), amounts, matrix.layout)
    seed, whole = run.settings.seed, examples_per_step >= len(run.data)
    if step is None:
        step = 1 / largest_of_batches(matrix, examples_per_step, shift, seed, inverse)
    with matrix.minibatches(examples_per_step, iterations, seed + 1) as products:
        try:
            solution = neumann(
                shifted(products, shift),
                gradients,
                step=step,
                precondition=inverse,
                skip=None if whole else iterations // 2,
            )
        except Diverged as error:
            raise MisconfigurationException(
                f'`method="astra"` diverged: {error}. HINT: lower `step={step:.3g}`, or raise `examples_per_step` or'
                " `damping`."
            ) from error
    yield Metadata({"curvature": matrix.kind, "step": step})
    yield Contraction(run.final_of_stage, QueryGradients(matrix.layout.by_block(solution)), 1 / run.examples)
