"""SOURCE and Fast-SOURCE: approximate unrolled differentiation over segments (Bae et al., NeurIPS 2024, Eq. 20-24)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.curvature.block_gradients import Rows, contract_diagonal, contract_pairs
from lightning_source.curvature.ekfac import Basis, Factors
from lightning_source.curvature.unroll import reverse_walk, segment_response
from lightning_source.estimators.query import Query
from lightning_source.estimators.registry import register_estimator
from lightning_source.estimators.terms import Contraction
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.passes.workspace import State
from lightning_source.recording.snapshots import final_parameters
from lightning_source.runs.run import Run
from lightning_source.runs.stage import Segment

Snapshots = Literal["mean", "point"]


@register_estimator("source", segments=True)
def source(
    query: Query,
    *,
    segments: int | Sequence[int] | None = None,
    snapshots: Snapshots | None = None,
    cross_layer: bool = False,
    adaptive: Literal["hybrid", "symmetric"] = "hybrid",
) -> Iterator[Contraction]:
    """One train pass per snapshot, two factor passes per snapshot the first time.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
        snapshots: ``"mean"`` takes gradients and curvature at each snapshot's running mean of the parameters,
            ``"point"`` at the parameters of one step in its middle; the run's own setting by default.
        cross_layer: scale each segment's curvature by what its layers have together beyond their own, which brings the
            size of scores near that of real changes (:meth:`Run.coupled`); one more short pass a snapshot.
        adaptive: how Adam and its like are unrolled: the paper's App. D ``"hybrid"``, or one ``"symmetric"`` operator,
            which has the right limit where the curvature is small (:mod:`lightning_source.curvature.unroll`).
    """
    run = query.run
    which = snapshots or run.settings.snapshots
    parts = run.segments(segments)
    load = run.cross_layer_factors if cross_layer else run.snapshot_factors
    factors = [load(segment, which) for segment in [*parts, *run.later_segments()]]
    if adaptive not in ("hybrid", "symmetric"):
        raise MisconfigurationException(f'`adaptive="{adaptive}"` is not known. HINT: "hybrid" or "symmetric".')
    states = [[partial(run.state, snapshot, which) for snapshot in part.snapshots] for part in parts]
    yield from _walk(query, parts, factors, states, adaptive == "symmetric")


@register_estimator("fast-source", segments=True)
def fast_source(query: Query, *, segments: int | Sequence[int] | None = None) -> Iterator[Contraction]:
    """One Hessian and one gradient per segment, at the segment's averaged parameters: ``L`` train passes.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
    """
    run = query.run
    parts = run.segments(segments)
    factors = [run.mean_factors(segment) for segment in [*parts, *run.later_segments()]]
    yield from _walk(query, parts, factors, [[partial(run.mean_state, part)] for part in parts])


def _walk(
    query: Query,
    segments: Sequence[Segment],
    factors: Sequence[Factors],
    states: Sequence[Sequence[Callable[[], State]]],
    symmetric: bool = False,
) -> Iterator[Contraction]:
    run = query.run
    later = [*segments, *run.later_segments()]
    bases: dict[str, Basis] = {}
    for segment_factors in factors:  # a block's last segment comes last
        bases |= _bases(segment_factors)
    gradients = query.gradients(run.final(), bases)
    blocks = [block for block in run.surviving_blocks() if block.name in gradients.values]
    chains = run.curvatures(later, factors, blocks, gradients.restrict, symmetric)
    walks = {name: reverse_walk(gradients.values[name], chain[-1].basis, chain) for name, chain in chains.items()}
    columns = gradients.columns
    del gradients  # each walk lets go of its block's when it sets out
    for name, walk in walks.items():
        for _ in chains[name][len(segments) :]:  # later stages only carry the query back to the asked one
            next(walk)
    for index in range(len(segments) - 1, -1, -1):
        vectors = QueryGradients({name: next(walk) for name, walk in walks.items()}, columns)
        weights = segments[index].weights if len(states[index]) > 1 else [1.0]
        for load, weight in zip(states[index], weights, strict=True):
            yield Contraction(load, vectors, weight / run.examples, _bases(factors[index]), index)


def _bases(factors: Factors) -> dict[str, Basis]:
    return {name: block_factors.basis for name, block_factors in factors.items()}


def self_influence(run: Run, ids: Tensor, chunk: int) -> Tensor:
    """The diagonal of SOURCE scores at the stage's end, training examples as queries measured by their loss, ``[N]``.

    In the last segment (the only one, if there is one) the query's and the example's activations and gradients are
    rotated and multiplied element by element, so with one position no per-example matrix exists.

    Args:
        run: the run.
        ids: the training examples.
        chunk: examples whose query vectors may be held at once.
    """
    segments = run.segments()
    factors = [run.snapshot_factors(segment, run.settings.snapshots) for segment in segments]
    return torch.cat([_self_influence_of(run, piece, segments, factors) for piece in torch.split(ids, chunk)])


def _self_influence_of(run: Run, ids: Tensor, segments: Sequence[Segment], factors: Sequence[Factors]) -> Tensor:
    last, which = len(segments) - 1, run.settings.snapshots
    query = run.workspace.capture_examples(
        final_parameters(run.store, run.stage.index), run.data, ids, _bases(factors[last]), query=True
    )
    blocks = [block for block in run.coverage.blocks if block.name in query]
    # An embedding's gradients are rows at tokens; along the walk each row is a matrix of one column.
    rows = {name: gradients.rows() for name, gradients in query.items() if gradients.vocabulary is not None}
    chains = run.curvatures(segments, factors, blocks)
    # Vectors are needed as matrices from the last segment but one, and wherever steps are preconditioned.
    plain = all(chain[last].preconditioner is None for chain in chains.values())
    walks: dict[str, Iterator[Tensor]] = {}
    if last or not plain:
        for name, chain in run.curvatures(segments, factors, blocks, partial(_at_rows, rows)).items():
            held = rows[name].values[:, None, :, None] if name in rows else query[name].per_example().transpose(0, 1)
            walks[name] = reverse_walk(held, chain[last].basis, chain)
    total = torch.zeros(len(ids))
    for index in range(last, -1, -1):
        vectors = {name: next(walk) for name, walk in walks.items()}
        for snapshot, weight in zip(segments[index].snapshots, segments[index].weights, strict=True):
            state = run.state(snapshot, which)
            trained = run.workspace.capture_examples(state, run.data, ids, _bases(factors[index]), query=False)
            for name, captured in trained.items():
                if name not in query:
                    continue
                if index == last and plain:
                    here = chains[name][index]
                    response = segment_response(here.eigenvalues, here.rate, here.weight_decay)
                    products = contract_diagonal(captured, query[name], response)
                elif name in rows:
                    products = captured.rows().products(rows[name]._replace(values=vectors[name][:, 0, :, 0]), len(ids))
                else:
                    products = contract_pairs(captured, vectors[name])
                total += weight / run.examples * products.cpu()
    return total


def _at_rows(rows: Mapping[str, Rows], name: str, values: Tensor) -> Tensor:
    """An embedding's ``[1, O, V]`` at the token of each row, ``[R, 1, O, 1]``."""
    return values[0][:, rows[name].tokens].mT[:, None, :, None] if name in rows else values
