"""DataInf: a closed form that swaps the mean over examples and the inverse (Kwon et al., ICLR 2024, Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_source.capture.data import to_module
from lightning_source.curvature.block_gradients import contract, squared_norms
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction, Metadata
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.gauss_newton import expand, layout_of
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.runs.run import Run


@register_estimator("datainf", floats_per_parameter=5)
def datainf(
    query: Query, *, damping: float | None = None, factor_examples: int | None = None
) -> Iterator[Contraction | Metadata]:
    """``(1/N) ∇fᵀ r`` with ``r = E_i[(λ + ∇L_i ∇L_iᵀ)⁻¹] g`` block by block, at the final model.

    The empirical Fisher of single examples stands for ``H``, and the mean of inverses for the inverse of the mean, so
    each inverse is of rank one and known. Costs one train pass and two more passes over ``factor_examples`` examples.
    Holds 5 copies of the attributed parameters for each query.

    Args:
        query: what is asked.
        damping: ``λ`` of every block; by default the paper's, 0.1 times the mean squared entry of its gradients.
        factor_examples: training examples that the curvature is averaged over, drawn once; all by default.
    """
    run = query.run
    ids = factor_ids(len(run.data), factor_examples, run.settings.seed)
    layout = layout_of(run.workspace)
    flat = query.flat_gradients(run.final(), layout)
    vectors = layout.by_block(flat)
    result = torch.zeros_like(flat)
    inverse = layout.by_block(result)
    scale = 1 / _multiplier(run)  # λ and ∇L ∇Lᵀ at the scale of the loss as trained
    sizes: dict[str, Tensor] = {}
    with run.workspace.at(run.final_of_stage()):
        for _, captured in run.workspace.captures(run.data, run.workspace.trained(), ids):
            for name, gradients in captured.items():
                sizes[name] = sizes.get(name, 0) + scale * squared_norms(gradients).sum() / len(ids)
        amounts = {
            block.name: float(0.1 * sizes[block.name] / block.numel if damping is None else damping)
            for block in layout.blocks
            if block.name in sizes and float(sizes[block.name]) > 0  # else no example has a gradient there
        }
        for _, captured in run.workspace.captures(run.data, run.workspace.trained(), ids):
            for name, gradients in captured.items():
                if name in amounts:
                    share = contract(gradients, vectors[name]) / (amounts[name] + scale * squared_norms(gradients))
                    inverse[name] -= scale / len(ids) * expand(gradients, share)
    for name, amount in amounts.items():
        inverse[name].add_(vectors[name]).div_(amount)
    yield Metadata({"curvature": "empirical"})
    yield Contraction(run.final_of_stage, QueryGradients(inverse), 1 / run.examples)


def _multiplier(run: Run) -> float:
    """How many times an example's own loss its ``g(z)`` is the gradient of, on a first batch."""
    workspace = run.workspace
    assert workspace.spec is not None
    with workspace.at(run.final_of_stage()):
        index, batch = next(run.data.batches(torch.arange(min(len(run.data), run.data.batch_size))))
        batch = to_module(batch, workspace.module, workspace.hooks)
        return workspace.losses(batch, len(index)).multiplier(workspace.spec)
