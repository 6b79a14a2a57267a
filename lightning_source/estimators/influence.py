"""Influence functions at the final model with EK-FAC curvature (Grosse et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_source.estimators.registry import Contraction, Query, estimates
from lightning_source.unroll import damped_inverse


@estimates("influence")
def influence(query: Query, *, damping: float | None = None) -> Iterator[Contraction]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g``: one train pass, two factor passes the first time.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue.
    """
    run = query.run
    factors = run.final_factors()
    bases = {name: one.basis for name, one in factors.items()}
    vectors = query.gradients(run.final(), bases)
    for name, rows in vectors.items():
        values = factors[name].eigenvalues
        amount = 0.1 * float(values.mean()) if damping is None else damping
        # A block that never saw a gradient has no curvature and no default damping; its gradients are 0 as well.
        rows.mul_(damped_inverse(query.columns(name, values), max(amount, 1e-30)))
    yield Contraction(run.final_of_stage, vectors, 1 / run.examples, bases)
