"""Gradient products: TracIn over the snapshots (Pruthi et al. 2020), and dot product or cosine at the final model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.recording.intervals import StepInterval, merge_all
from lightning_source.runs.run import Run


@register_estimator("tracin", segments=True)
def tracin(query: Query, *, snapshots: Literal["mean", "point"] | None = None) -> Iterator[Contraction]:
    """``(1/N) Σ_c Λ_c ∇f(θ_c)ᵀ P_c g(θ_c)``: one query pass and one train pass per snapshot, no curvature.

    Args:
        query: what is asked.
        snapshots: ``"mean"`` or ``"point"`` parameters of the snapshots; the run's own setting by default.
    """
    run = query.run
    which = snapshots or run.settings.snapshots
    for index, segment in enumerate(run.segments()):
        for snapshot in segment.snapshots:
            load = partial(run.state, snapshot, which)
            vectors = _scaled(run, query.gradients(run.for_query(load())), snapshot)
            for name, scale in run.preconditioner([snapshot]).items():
                if name in vectors.values:
                    vectors.values[name].mul_(vectors.restrict(name, scale))
            yield Contraction(load, vectors, 1 / run.examples, segment=index)


@register_estimator("grad-dot")
def grad_dot(query: Query) -> Iterator[Contraction]:
    """``(1/N) Λ ∇fᵀ g`` at the final model, ``Λ`` over all of training: SOURCE's limit for ``Λσ ≪ 1``."""
    run = query.run
    vectors = _scaled(
        run, query.gradients(run.final()), merge_all([s for s in run.snapshots if s.stage == run.stage.index])
    )
    yield Contraction(run.final_of_stage, vectors, 1 / run.examples)


@register_estimator("grad-cos", unit="cosine")
def grad_cos(query: Query) -> Iterator[Contraction]:
    """Cosine of the two gradients at the final model, in [-1, 1]: a similarity, not a change of ``f``."""
    run = query.run
    gradients = query.gradients(run.final())
    squares = [values.flatten(1).square().sum(1) for values in gradients.values.values()]
    norms = torch.stack(squares).sum(0).sqrt().clamp_min(1e-30).view(-1, 1, 1, 1)
    vectors = replace(gradients, values={name: values / norms for name, values in gradients.values.items()})
    yield Contraction(run.final_of_stage, vectors, 1.0, normalize=True)


def _scaled(run: Run, gradients: QueryGradients, interval: StepInterval) -> QueryGradients:
    """Gradients times each block's own Λ."""
    rates = {block.name: interval.rates[block.group] for block in run.coverage.blocks}
    return replace(gradients, values={name: rates[name] * values for name, values in gradients.values.items()})
