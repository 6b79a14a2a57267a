"""SOURCE and Fast-SOURCE: approximate unrolled differentiation over segments (Bae et al., NeurIPS 2024, Eq. 20-24)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_source.engine import Factors, State
from lightning_source.estimators.registry import Contraction, Query, estimates
from lightning_source.factors import Captured, chunks, contract_diagonal
from lightning_source.run import Run, Segment
from lightning_source.unroll import reverse_walk, segment_decay, segment_response

Snapshots = Literal["mean", "point"]


@estimates("source")
def source(
    query: Query, *, segments: int | Sequence[int] | None = None, snapshots: Snapshots | None = None
) -> Iterator[Contraction]:
    """One train pass per snapshot, two factor passes per snapshot the first time.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
        snapshots: ``"mean"`` takes gradients and curvature at each snapshot's running mean of the parameters,
            ``"point"`` at the parameters of one step in its middle; the run's own setting by default.
    """
    run = query.run
    which = snapshots or run.settings["snapshots"]
    parts = run.segments(segments)
    factors = [run.snapshot_factors(segment, which) for segment in parts]
    yield from _walk(
        query, parts, factors, [[partial(run.state, s, which) for s in p.snapshots] for p in parts]
    )


@estimates("fast-source")
def fast_source(query: Query, *, segments: int | Sequence[int] | None = None) -> Iterator[Contraction]:
    """One Hessian and one gradient per segment, at the segment's averaged parameters: ``L`` train passes.

    Args:
        query: what is asked.
        segments: cut the run's snapshots into other segments than those of the run.
    """
    run = query.run
    parts = run.segments(segments)
    factors = [run.mean_factors(segment) for segment in parts]
    yield from _walk(query, parts, factors, [[partial(run.mean_state, p)] for p in parts])


def _walk(
    query: Query,
    segments: Sequence[Segment],
    factors: Sequence[Factors],
    states: Sequence[Sequence[Callable[[], State]]],
) -> Iterator[Contraction]:
    run = query.run
    gradients = query.gradients(run.final())
    blocks = [block for block in run.coverage.blocks if block.name in gradients]
    walks = {
        block.name: reverse_walk(
            gradients.pop(block.name),
            [run.curvature(segment, one, block) for segment, one in zip(segments, factors, strict=True)],
        )
        for block in blocks
    }
    for index in range(len(segments) - 1, -1, -1):
        vectors = {name: next(walk)[1] for name, walk in walks.items()}
        bases = {name: factors[index][name].basis for name in vectors}
        weights = segments[index].weights if len(states[index]) > 1 else [1.0]
        for load, weight in zip(states[index], weights, strict=True):
            yield Contraction(load, vectors, weight / run.examples, bases, index)


def self_influence(run: Run, ids: Tensor, chunk: int) -> Tensor:
    """The diagonal of SOURCE scores with the training examples as queries and their own loss as measurement, ``[N]``.

    In the last segment (the only one, if there is one) the query's and the example's activations and gradients are
    rotated and multiplied element by element, so with one position no per-example matrix exists.

    Args:
        run: the run.
        ids: the training examples.
        chunk: examples whose query vectors may be held at once.
    """
    which = run.settings["snapshots"]
    segments = run.segments()
    factors = [run.snapshot_factors(segment, which) for segment in segments]
    final = run.final()
    return torch.cat(
        [_self_influence_of(run, piece, segments, factors, final, which) for piece in ids.split(chunk)]
    )


def _self_influence_of(
    run: Run, ids: Tensor, segments: Sequence[Segment], factors: Sequence[Factors], final: State, which: str
) -> Tensor:
    total = torch.zeros(len(ids))
    last = len(segments) - 1
    bases = {name: one.basis for name, one in factors[last].items()}
    query = run.workspace.collected(final, run.data, ids, bases, query=True)
    blocks = [block for block in run.coverage.blocks if block.name in query]
    vectors: dict[str, Tensor] = {}  # [B, P, O, I], in the basis of the segment that the walk has reached
    for index in range(last, -1, -1):
        curvature = {block.name: run.curvature(segments[index], factors[index], block) for block in blocks}
        if index < last:
            for name, here in curvature.items():
                after = run.curvature(segments[index + 1], factors[index + 1], _block(blocks, name))
                if not vectors.get(name, torch.empty(0)).numel():
                    vectors[name] = query[name].per_example().transpose(0, 1)
                decayed = segment_decay(after.eigenvalues, after.rate, after.weight_decay) * vectors[name]
                vectors[name] = here.basis.rotate_from(after.basis, decayed)
        bases = {name: here.basis for name, here in curvature.items()}
        for snapshot, weight in zip(segments[index].snapshots, segments[index].weights, strict=True):
            trained = run.workspace.collected(run.state(snapshot, which), run.data, ids, bases, query=False)
            for name, captured in trained.items():
                here = curvature[name]
                response = segment_response(here.eigenvalues, here.rate, here.weight_decay)
                if index == last:
                    products = contract_diagonal(captured, query[name], response)
                else:
                    products = _paired(captured, response * vectors[name])
                total += weight / run.examples * products.cpu()
    return total


def _block(blocks: Sequence, name: str):  # type: ignore[type-arg,no-untyped-def]
    return next(block for block in blocks if block.name == name)


def _paired(captured: Captured, vectors: Tensor) -> Tensor:
    """``⟨vectors[b], gradient of example b⟩``, ``[B]``."""
    if captured.shape[2] == 1:
        a, g = (x.squeeze(2) for x in captured)
        return torch.einsum("pbi,bpi->b", a, torch.einsum("bpoi,pbo->bpi", vectors, g))
    pieces = vectors.split(len(chunks(captured)[0].activations[0]))
    return torch.cat(
        [(c.per_example().transpose(0, 1) * v).sum((1, 2, 3)) for c, v in zip(chunks(captured), pieces, strict=True)]
    )
