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
Removal = Literal["many", "few"]
QueryAt = Literal["trajectory", "final"]


@register_estimator("source", segments=True, floats_per_parameter=4)
def source(
    query: Query,
    *,
    segments: int | Sequence[int] | None = None,
    snapshots: Snapshots | None = None,
    removal: Removal | None = None,
    query_at: QueryAt | None = None,
    cross_layer: bool | None = None,
    adaptive: Literal["hybrid", "symmetric"] = "symmetric",
) -> Iterator[Contraction]:
    """One train pass and one query pass per snapshot, two factor passes per snapshot the first time.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
        snapshots: ``"mean"`` takes gradients and curvature at each snapshot's running mean of the parameters,
            ``"point"`` at the parameters of one step in its middle; the run's own setting by default.
        removal: what the scores are to predict: that ``"many"`` examples are removed, a share of the data, after which
            training ends at another place; or ``"few"``, one or a handful, which is the paper's SOURCE. It sets
            ``query_at`` and ``cross_layer`` where these are not given. ``"many"`` by default, ``"few"`` for a final
            model without a recorded run.
        query_at: where the query's gradient is taken: its mean over the snapshots of the last stage
            (``"trajectory"``), or at the ``"final"`` parameters, exact for an infinitesimal change (method §2.5).
        cross_layer: scale each segment's curvature by what its layers have together beyond their own, which brings the
            size of scores near that of real changes (:meth:`Run.cross_layer_factors`); one more short pass a snapshot.
        adaptive: how Adam and its like are unrolled: one ``"symmetric"`` operator, which has the right limit where the
            curvature is small (:mod:`lightning_source.curvature.unroll`), or the paper's App. D ``"hybrid"``.

    Raises:
        MisconfigurationException: an option has a value that is not known.
    """
    run = query.run
    which = snapshots or run.settings.snapshots
    if adaptive not in ("hybrid", "symmetric"):
        raise MisconfigurationException(f'`adaptive="{adaptive}"` is not known. HINT: "hybrid" or "symmetric".')
    many = _removes_many(run, removal)
    trajectory = _along_trajectory(run, query_at, many)
    parts = run.segments(segments)
    chain = [*parts, *run.later_segments()]
    coupled = many if cross_layer is None else cross_layer
    load = run.cross_layer_factors if coupled else run.snapshot_factors
    factors = [load(segment, which) for segment in chain]
    states = [[partial(run.state, snapshot, which) for snapshot in part.snapshots] for part in chain]
    yield from _walk(query, parts, factors, states, trajectory, adaptive == "symmetric")


@register_estimator("fast-source", segments=True, floats_per_parameter=4)
def fast_source(
    query: Query,
    *,
    segments: int | Sequence[int] | None = None,
    removal: Removal | None = None,
    query_at: QueryAt | None = None,
    adaptive: Literal["hybrid", "symmetric"] = "symmetric",
) -> Iterator[Contraction]:
    """One Hessian and one gradient per segment, at the segment's averaged parameters: ``L`` train and query passes.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
        removal: see :func:`source`; there is no ``cross_layer`` for it to set.
        query_at: see :func:`source`; the trajectory is that of the segments' averaged parameters.
        adaptive: see :func:`source`.
    """
    run = query.run
    trajectory = _along_trajectory(run, query_at, _removes_many(run, removal))
    parts = run.segments(segments)
    chain = [*parts, *run.later_segments()]
    factors = [run.mean_factors(segment) for segment in chain]
    states = [[partial(run.mean_state, part)] for part in chain]
    yield from _walk(query, parts, factors, states, trajectory, adaptive == "symmetric")


def _removes_many(run: Run, removal: Removal | None) -> bool:
    if removal not in (None, "many", "few"):
        raise MisconfigurationException(f'`removal="{removal}"` is not known. HINT: "many" or "few".')
    # Of a final model nothing is known but the end, and what is asked of it is the effect of single examples.
    return not run.store.manifest.flags.final_model_only if removal is None else removal == "many"


def _along_trajectory(run: Run, query_at: QueryAt | None, many: bool) -> bool:
    if query_at not in (None, "trajectory", "final"):
        raise MisconfigurationException(f'`query_at="{query_at}"` is not known. HINT: "trajectory" or "final".')
    if query_at == "trajectory" and run.asked_at is not None:
        raise MisconfigurationException(
            '`query_at="trajectory"` asks at the snapshots of the run, and `weights="module"` at the model as it is.'
        )
    return many and run.asked_at is None if query_at is None else query_at == "trajectory"


def _mean_gradients(
    query: Query, states: Sequence[Callable[[], State]], steps: Sequence[int], bases: Mapping[str, Basis]
) -> QueryGradients:
    """The queries' gradients averaged over parameters of the last stage, a mean over the way between two networks.

    A model that training on less data ends with lies away from the final one, and its measurement differs by the mean
    of the gradient on the way there times the difference. The measurement is that of the end of training throughout.
    Each of the parameters counts by the steps that it stands for, so that the mean does not depend on how they are cut.
    """
    # As a plain mapping it has no moment of its own, so that steps that read the Trainer are shown the end.
    points = ({**load()} for load in states)
    return QueryGradients.mean((query.gradients(point, bases) for point in points), steps)


def _walk(
    query: Query,
    segments: Sequence[Segment],
    factors: Sequence[Factors],
    states: Sequence[Sequence[Callable[[], State]]],
    trajectory: bool,
    symmetric: bool,
) -> Iterator[Contraction]:
    """The terms of SOURCE.

    Args:
        query: what is asked.
        segments: of the asked stage.
        factors: of these and of the later stages' segments.
        states: the snapshots of all of them.
        trajectory: whether the query's gradient is averaged over the snapshots.
        symmetric: how adaptive steps are unrolled.
    """
    run = query.run
    later = [*segments, *run.later_segments()]
    bases: dict[str, Basis] = {}
    for segment_factors in factors:  # a block's last segment comes last
        bases |= _bases(segment_factors)
    if trajectory:
        loads: list[Callable[[], State]] = []
        steps: list[int] = []
        for part, of_part in zip(later, states, strict=True):
            if part.stage == run.stages[-1].index:  # the way that training goes from wherever earlier stages led
                own = [s.steps for s in part.snapshots]
                loads += of_part
                steps += own if len(of_part) > 1 else [sum(own)]  # or one state that stands for all
        gradients = _mean_gradients(query, loads, steps, bases)
    else:
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

    What one example is owed to itself is the effect of removing one: these are the scores of ``removal="few"``.

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
    chains = run.curvatures(segments, factors, blocks, symmetric=True)
    # Vectors are needed as matrices from the last segment but one, and wherever steps are preconditioned.
    plain = all(chain[last].preconditioner is None for chain in chains.values())
    walks: dict[str, Iterator[Tensor]] = {}
    if last or not plain:
        for name, chain in run.curvatures(segments, factors, blocks, partial(_at_rows, rows), symmetric=True).items():
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
