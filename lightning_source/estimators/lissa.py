"""Influence functions at the final model by a stochastic Neumann series: LiSSA (Agarwal et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source.estimators.cg import final_gauss_newton
from lightning_source.estimators.influence import dampings
from lightning_source.estimators.registry import Contraction, Query, estimates
from lightning_source.solvers import Diverged, neumann, shifted, top_eigenvalue

# Batches of few examples have larger top eigenvalues than the mean that power iteration over batches converges to.
_MARGIN = 2.0


@estimates("influence-lissa", held=lambda options: 9)
def influence_lissa(
    query: Query,
    *,
    damping: float | None = None,
    depth: int = 1000,
    scale: float | None = None,
    repeats: int = 1,
    examples_per_step: int = 32,
) -> Iterator[Contraction]:
    """``(1/N) ∇fᵀ (H + damping)⁻¹ g`` by ``x ← b + x - (H_batch + damping) x / scale``.

    Costs one train pass and ``repeats · depth`` Gauss-Newton products of ``examples_per_step`` examples with every
    query (see ``"influence-cg"``). Holds 9 copies of the attributed parameters for each query. Directions with
    eigenvalues ``σ + damping`` below ``scale / depth`` are not reached, which is damping by other means; the second
    half of the iterates is averaged, since batches make them noisy.

    Args:
        query: what is asked.
        damping: added to every eigenvalue; by default 0.1 times the block's mean eigenvalue, as in ``"influence"``.
        depth: steps of the series.
        scale: above half the top eigenvalue of every batch's ``H + damping``; by default twice the top eigenvalue that
            20 steps of power iteration over batches find.
        repeats: independent series that are averaged.
        examples_per_step: examples of a batch.

    Raises:
        MisconfigurationException: the series diverged; the message says by how much to raise ``scale``.
    """
    run = query.run
    matrix = final_gauss_newton(query, None)
    gradients = query.flat_gradients(run.final(), matrix.layout)
    shift = matrix.layout.each(dampings(run, damping), gradients)
    seed = run.settings["seed"]
    if scale is None:
        with matrix.minibatches(examples_per_step, 20, seed) as products:
            scale = _MARGIN * top_eigenvalue(shifted(products, shift), gradients, seed)
    total = torch.zeros_like(gradients)
    for repeat in range(repeats):
        with matrix.minibatches(examples_per_step, depth, seed + 1 + repeat) as products:
            try:
                total += neumann(shifted(products, shift), gradients, step=1 / max(scale, 1e-30), skip=depth // 2)
            except Diverged as error:
                raise MisconfigurationException(
                    f'`method="influence-lissa"` diverged: {error}. HINT: raise `scale={scale:.3g}` (the series needs'
                    " more than half the top eigenvalue of each batch) or `examples_per_step`."
                ) from error
    query.remarks.update(curvature=matrix.kind, scale=scale)
    yield Contraction(run.final, matrix.layout.by_block(total / repeats), 1 / run.examples)
