"""EK-FAC factors of a segment: the passes that gather covariances and eigenvalues."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_source.capture.data import Examples, to_module
from lightning_source.capture.objective import NoLoss
from lightning_source.curvature.block_gradients import (
    BlockGradients,
    accumulator_dtype,
    gram,
)
from lightning_source.curvature.ekfac import (
    IDENTITY,
    Basis,
    BlockFactors,
    CovarianceSums,
    Factors,
    eigenbasis,
    eigenvalue_sums,
    mean_covariances,
)
from lightning_source.passes.finite import require_finite
from lightning_source.passes.workspace import State, Workspace

# A snapshot visits at least so many drawn labels, and examples, where there are so many.
FEWEST_LABELS, FEWEST_EXAMPLES = 512, 64


def factor_ids(total: int, limit: int | None, seed: int) -> Tensor:
    """The examples that factor passes visit: all, or ``limit`` drawn without replacement, in ascending order.

    Example:
        >>> factor_ids(5, limit=None, seed=0).tolist()
        [0, 1, 2, 3, 4]
    """
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def deal(workspace: Workspace, load: Callable[[], State], data: Examples, ids: Tensor, count: int) -> list[Tensor]:
    """A segment's factor examples dealt over its ``count`` snapshots (:func:`dealt_ids`).

    An example of a sequence model has a label at every position, so that fewer examples tell as much.

    Args:
        workspace: the model.
        load: the parameters at which the labels of a batch are counted.
        data: training examples.
        ids: the segment's factor examples.
        count: how many snapshots the segment has.
    """
    fewest = len(ids)
    if count > 1 and fewest > FEWEST_EXAMPLES:
        labels = workspace.ranks.on_rank_zero(lambda: _labels_of_an_example(workspace, load(), data, ids))
        fewest = max(FEWEST_EXAMPLES, math.ceil(FEWEST_LABELS / max(1.0, labels)))
    return [dealt_ids(ids, place, count, workspace.seed, fewest) for place in range(count)]


def _labels_of_an_example(workspace: Workspace, state: State, data: Examples, ids: Tensor) -> float:
    """How many elements an example's losses have, by one batch."""
    with workspace.at(state), torch.no_grad():
        index, batch = next(iter(data.batches(ids[: data.batch_size])))
        try:
            losses = workspace.losses(to_module(batch, workspace.module, workspace.hooks), len(index))
        except NoLoss:  # of a batch that the step skips
            return 1.0
    return sum(int(call.weights.count_nonzero()) for call in losses.calls) / len(index)


def dealt_ids(ids: Tensor, place: int, count: int, seed: int, fewest: int) -> Tensor:
    """The part of a segment's factor examples that one of its snapshots visits, in ascending order.

    Curvature is averaged over the snapshots, so each sees other examples, and together they see all; the same part at
    every snapshot would lose some. No part is smaller than ``fewest``, and then they overlap.

    Args:
        ids: the segment's factor examples.
        place: of the snapshot among the segment's.
        count: how many snapshots the segment has.
        seed: of the order in which they are dealt.
        fewest: examples of a part, where there are so many.

    Example:
        >>> dealt_ids(torch.arange(4), place=1, count=6, seed=0, fewest=8).tolist()  # too few to deal
        [0, 1, 2, 3]
    """
    size = max(-(-len(ids) // count), min(len(ids), fewest))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    start = place * len(ids) // count
    return ids[order.roll(-start)[:size].sort().values]


@dataclass(frozen=True)
class WeightedState:
    """One of the snapshots that factors are averaged over."""

    load: Callable[[], State]  # its parameters
    weight: float  # the weights of all sum to 1
    covariances: dict[str, CovarianceSums] | None = None  # sums that are known already


class FittedFactors(NamedTuple):
    """What the passes of a segment give."""

    factors: Factors  # by block
    sums: list[dict[str, CovarianceSums]]  # of each snapshot; none for ``"diagonal"``
    coupling: float | None  # see :func:`coupling_of`; ``None`` where no pass told it


def fit_factors(
    workspace: Workspace,
    data: Examples,
    ids: Tensor,
    states: Sequence[WeightedState],
    curvature: str,
    samples: int,
    moved: Mapping[str, float] | None = None,
) -> FittedFactors:
    """EK-FAC of one segment: covariances averaged over its snapshots, eigenvalues in that averaged basis, averaged too.

    Args:
        workspace: the model.
        data: training examples.
        ids: the factor examples, which are dealt over the snapshots.
        states: the snapshots.
        curvature: ``"ekfac"``, ``"kfac"`` (Kronecker eigenvalues, one pass fewer) or ``"diagonal"`` (no eigenbasis).
        samples: label draws per example for the eigenvalues.
        moved: by block, how far the segment moved it: also find how much curvature the blocks have together, each
            counted by that (:func:`eigenvalues_and_traces`); ``"kfac"`` has no pass that does.
    """
    names = [block.name for block in workspace.blocks]
    dealt = deal(workspace, states[-1].load, data, ids, len(states))
    eigenvalues: dict[str, Tensor] = {}
    if curvature == "diagonal":
        sums: list[dict[str, CovarianceSums]] = []
        bases = dict.fromkeys(names, IDENTITY)
    else:
        sums = [
            covariances_of(workspace, state.load(), data, own) if state.covariances is None else state.covariances
            for state, own in zip(states, dealt, strict=True)
        ]
        bases, eigenvalues = _eigenbases(workspace, sums, [state.weight for state in states])
    traces: list[tuple[float, Traces]] = []
    if curvature != "kfac":
        eigenvalues = {}
        for state, own in zip(states, dealt, strict=True):
            if moved is not None:
                of_state, both = eigenvalues_and_traces(workspace, state.load(), data, own, bases, samples, moved)
                traces.append((state.weight, both))
            else:
                of_state = eigenvalues_of(workspace, state.load(), data, own, bases, samples)
            for name, values in of_state.items():
                weighted = state.weight * values
                eigenvalues[name] = eigenvalues[name] + weighted if name in eigenvalues else weighted
    factors = {name: BlockFactors(bases[name], eigenvalues[name]) for name in names}
    return FittedFactors(factors, sums, coupling_of(traces) if traces else None)


def coupling_of(traces: Sequence[tuple[float, Traces]]) -> float:
    """``tr (ΛH)² / Σ (Λλ)²`` over weighted snapshots, at least 1: what the blocks have together beyond their own."""
    full = sum(weight * of_state.full for weight, of_state in traces)
    blocks = sum(weight * of_state.blocks for weight, of_state in traces)
    return max(1.0, full / blocks) if blocks > 0 else 1.0


def _eigenbases(
    workspace: Workspace, sums: Sequence[dict[str, CovarianceSums]], weights: Sequence[float]
) -> tuple[dict[str, Basis], dict[str, Tensor]]:
    """Eigenvectors and Kronecker eigenvalues of the averaged covariances; each rank decomposes some of the blocks."""
    names = [block.name for block in workspace.blocks]
    decomposed, device = [], workspace.module.device
    exchange = device if workspace.ranks.world_size == 1 else torch.device("cpu")

    def own_part() -> None:
        for name in workspace.ranks.shard(names):
            mean = mean_covariances([of_state[name] for of_state in sums], weights)
            basis, kronecker = eigenbasis(*mean, dtype=sums[0][name].activations.dtype)
            decomposed.append((basis.to(exchange), kronecker.to(exchange)))

    workspace.ranks.on_all_ranks(own_part)
    gathered = dict(zip(names, workspace.ranks.gather(decomposed), strict=True))
    return (
        {name: basis.to(device) for name, (basis, _) in gathered.items()},
        {name: kronecker.to(device) for name, (_, kronecker) in gathered.items()},
    )


def covariances_of(workspace: Workspace, state: State, data: Examples, ids: Tensor) -> dict[str, CovarianceSums]:
    """Covariance sums of every block at one set of parameters, labels sampled (method §5.1)."""
    sums: dict[str, CovarianceSums] = {}

    def own_part() -> None:
        with workspace.at(state):
            for _, captured in workspace.captures(data, workspace.sampled(), workspace.shard(data, ids)):
                for name, gradients in captured.items():
                    new = CovarianceSums.of(gradients)
                    sums[name] = sums[name].merge(new) if name in sums else new

    workspace.ranks.on_all_ranks(own_part)
    for block in workspace.blocks:
        if block.name not in sums:  # control flow skipped it on every factor example: no curvature
            like = next(workspace.module.parameters()).detach()
            sums[block.name] = CovarianceSums.zeros(block.shape, block.indexed, like)
        total = sums[block.name]
        workspace.ranks.all_reduce_([total.activations, total.gradients])
        require_finite(total.activations, block.name, "activations")
        require_finite(total.gradients, block.name, "gradients")
        total.examples = len(ids)  # a batch that skips the block has gradient 0 there
    return sums


def coupling_at(
    workspace: Workspace,
    data: Examples,
    ids: Tensor,
    states: Sequence[WeightedState],
    bases: Mapping[str, Basis],
    moved: Mapping[str, float],
) -> float:
    """:func:`coupling_of` by a pass of its own, where factors are known; arguments as in :func:`fit_factors`."""
    dealt = deal(workspace, states[-1].load, data, ids, len(states))
    passes = zip(states, dealt, strict=True)
    return coupling_of(
        [(s.weight, eigenvalues_and_traces(workspace, s.load(), data, own, bases, moved=moved)[1]) for s, own in passes]
    )


class Traces(NamedTuple):
    """Two estimates of one segment's ``ΛH``, without bias; its operators are functions of that product."""

    full: float  # tr (ΛH)² = E[⟨g_m, Λ g_n⟩²] over pairs of examples, their gradients over all blocks together
    blocks: float  # Σ (Λλ)², what EK-FAC sees of it; the traces of both are the same


def eigenvalues_of(
    workspace: Workspace, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis], samples: int
) -> dict[str, Tensor]:
    """Mean squared gradients of every block in the given bases, ``[P, O, I]`` (method §5.2)."""
    (total,) = _squares(workspace, state, data, ids, bases, samples, parts=1)
    return {name: values / (len(ids) * samples) for name, values in total.items()}


def eigenvalues_and_traces(
    workspace: Workspace,
    state: State,
    data: Examples,
    ids: Tensor,
    bases: Mapping[str, Basis],
    samples: int = 1,
    moved: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], Traces]:
    """:func:`eigenvalues_of`, and by the same pass how much curvature the blocks have together beyond their own.

    Args:
        workspace: the model.
        state: the parameters.
        data: training examples.
        ids: those that are visited; pairs are those of one batch.
        bases: the eigenbases in which the blocks' eigenvalues are taken.
        samples: label draws per example.
        moved: ``Λ`` of each block in any unit; all alike by default. A block that stood still has no part in what the
            others have together.
    """
    rates = dict.fromkeys(bases, 1.0) if moved is None else moved
    sizes = torch.zeros(2, dtype=torch.float64, device=workspace.module.device)
    pairs = torch.zeros(2, dtype=torch.float64, device=workspace.module.device)  # Σ ⟨g_m, g_n⟩², and how many

    def look(half: int, index: Tensor, captured: Mapping[str, BlockGradients]) -> None:
        sizes[half] += len(index)
        moving = [(rates[name], gradients) for name, gradients in captured.items() if rates[name]]
        products = sum((rate * gram(gradients).double() for rate, gradients in moving), pairs.new_zeros(()))
        if products.dim():
            pairs[0] += products.square().sum() - products.diagonal().square().sum()
            pairs[1] += len(products) * (len(products) - 1)

    # Two halves of the batches: the product of two means of squares has no share of their noise.
    halves = _squares(workspace, state, data, ids, bases, samples, parts=2, look=look)
    workspace.ranks.all_reduce_([pairs, sizes])
    blocks = sum(rates[n] ** 2 * float((halves[0][n].double() * halves[1][n]).sum()) for n in halves[0])
    traces = Traces(float(pairs[0] / pairs[1].clamp_min(1)), blocks / float(sizes.prod().clamp_min(1)))
    return {name: (halves[0][name] + halves[1][name]) / (len(ids) * samples) for name in halves[0]}, traces


def _squares(
    workspace: Workspace,
    state: State,
    data: Examples,
    ids: Tensor,
    bases: Mapping[str, Basis],
    samples: int,
    parts: int,
    look: Callable[[int, Tensor, Mapping[str, BlockGradients]], None] = lambda part, index, captured: None,
) -> list[dict[str, Tensor]]:
    """Sums of squared gradients in the given bases, ``[P, O, I]`` by block, the batches dealt over some parts.

    Args:
        workspace: the model.
        state: the parameters.
        data: training examples.
        ids: those that are visited.
        bases: by block.
        samples: label draws per example.
        parts: how many sums are kept apart.
        look: is given each batch's part, ids and gradients.
    """
    sums: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    order = ids  # pairs and halves must be drawn at random, whatever the order of the data
    if parts > 1:
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(workspace.seed))]

    def own_part() -> None:
        with workspace.at(state):
            for draw in range(samples):
                passes = workspace.captures(data, workspace.sampled(draw + 1), workspace.shard(data, order))
                # By the batch's place among those of all ranks, so that parts do not depend on how many share them.
                places = itertools.count(workspace.ranks.global_rank, workspace.ranks.world_size)
                for place, (index, captured) in zip(places, passes, strict=False):
                    own = sums[place % parts]
                    look(place % parts, index, captured)
                    for name, gradients in captured.items():
                        new = eigenvalue_sums(gradients, bases[name])
                        own[name] = own[name].add_(new) if name in own else new

    workspace.ranks.on_all_ranks(own_part)
    for own in sums:
        for block in workspace.blocks:
            if block.name not in own:  # control flow skipped it on every factor example: no curvature
                like = next(workspace.module.parameters()).detach()
                own[block.name] = like.new_zeros(block.shape, dtype=accumulator_dtype(like))
            workspace.ranks.all_reduce_([own[block.name]])
            require_finite(own[block.name], block.name, "eigenvalues")
    return sums
