"""Influence functions at the final model by a stochastic Neumann series: LiSSA (Agarwal et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_source._lightning import MisconfigurationException
from lightning_source.curvature.solvers import Diverged, neumann, shifted
from lightning_source.estimators.cg import final_gauss_newton, largest_of_batches
from lightning_source.estimators.influence import dampings
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction, Metadata
from lightning_source.passes.query_gradients import QueryGradients


@register_estimator("influence-lissa", floats_per_parameter=10)
def influence_lissa(
    query: Query,
    *,
    damping: float | None = None,
    depth: int = 1000,
    scale: float | None = None,
    repeats: int = 1,
    examples_per_step: int = 32,
) -> Iterator[Contraction | Metadata]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g`` by ``x ← b + x - (H_batch + damping) x / scale``.

    Costs one train pass and ``repeats · depth`` Gauss-Newton products of ``examples_per_step`` examples with every
    query (see ``"influence-cg"``). Holds 10 copies of the attributed parameters for each query. Directions with
    eigenvalues ``σ + damping`` below ``scale / depth`` are not reached, which is damping by other means; the second
    half of the iterates is averaged, since batches make them noisy.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue, as in ``"influence"``.
        depth: steps of the series.
        scale: above half the top eigenvalue of every batch's ``H + damping``; by default the largest that power
            iteration finds in 8 batches.
        repeats: independent series that are averaged.
        examples_per_step: examples of a batch.

    Raises:
        MisconfigurationException: the series diverged; the message says by how much to raise ``scale``.
    """
    run = query.run
    matrix = final_gauss_newton(query, None)
    gradients = query.flat_gradients(run.final(), matrix.layout)
    shift = matrix.layout.each(dampings(run, damping), gradients)
    seed = run.settings.seed
    if scale is None:
        scale = largest_of_batches(matrix, examples_per_step, shift, seed)
    total = torch.zeros_like(gradients)
    for repeat in range(repeats):
        with matrix.minibatches(examples_per_step, depth, seed + 1 + repeat) as products:
            try:
                total += neumann(shifted(products, shift), gradients, step=1 / scale, skip=depth // 2)
            except Diverged as error:
                raise MisconfigurationException(
                    f'`method="influence-lissa"` diverged: {error}. HINT: raise `scale={scale:.3g}` (the series needs'
                    " more than half the top eigenvalue of each batch) or `examples_per_step`."
                ) from error
    yield Metadata({"curvature": matrix.kind, "scale": scale})
    vectors = QueryGradients(matrix.layout.by_block(total / repeats))
    yield Contraction(run.final_of_stage, vectors, 1 / run.examples)
