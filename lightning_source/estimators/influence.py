"""Influence functions at the final model with EK-FAC curvature (Grosse et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_source.curvature.unroll import damped_inverse
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction
from lightning_source.runs.run import Run


@register_estimator("influence")
def influence(query: Query, *, damping: float | None = None) -> Iterator[Contraction]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g``: one train pass, two factor passes the first time.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue.
    """
    run = query.run
    factors = run.final_factors()
    bases = {name: block_factors.basis for name, block_factors in factors.items()}
    amounts = dampings(run, damping)
    vectors = query.gradients(run.final(), bases)
    for name, values in vectors.values.items():
        eigenvalues = vectors.restrict(name, factors[name].eigenvalues)
        # A block that never saw a gradient has no curvature and no default damping; its gradients are 0 as well.
        values.mul_(damped_inverse(eigenvalues, max(amounts[name], 1e-30)))
    yield Contraction(run.final_of_stage, vectors, 1 / run.examples, bases)


def dampings(run: Run, damping: float | None) -> dict[str, float]:
    """What is added to the curvature, by block: ``damping``, by default 0.1 times the block's mean eigenvalue."""
    if damping is not None:
        return dict.fromkeys((block.name for block in run.coverage.blocks), damping)
    return {name: 0.1 * float(factors.eigenvalues.mean()) for name, factors in run.final_factors().items()}
