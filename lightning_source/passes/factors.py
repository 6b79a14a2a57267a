"""EK-FAC factors of a segment: the passes that gather covariances and eigenvalues."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_source.capture.data import Examples, to_module
from lightning_source.capture.objective import NoLoss
from lightning_source.curvature.block_gradients import (
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
from lightning_source.passes.workspace import State, Workspace, require_finite

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


def fit_factors(
    workspace: Workspace,
    data: Examples,
    ids: Tensor,
    states: Sequence[WeightedState],
    curvature: str,
    samples: int,
) -> tuple[Factors, list[dict[str, CovarianceSums]]]:
    """EK-FAC of one segment: covariances averaged over its snapshots, eigenvalues in that averaged basis, averaged too.

    Args:
        workspace: the model.
        data: training examples.
        ids: the factor examples, which are dealt over the snapshots.
        states: the snapshots.
        curvature: ``"ekfac"``, ``"kfac"`` (Kronecker eigenvalues, one pass fewer) or ``"diagonal"`` (no eigenbasis).
        samples: label draws per example for the eigenvalues.

    Returns:
        The factors by block, and the covariance sums of each snapshot (empty for ``"diagonal"``).
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
    if curvature != "kfac":
        eigenvalues = {}
        for state, own in zip(states, dealt, strict=True):
            for name, values in eigenvalues_of(workspace, state.load(), data, own, bases, samples).items():
                weighted = state.weight * values
                eigenvalues[name] = eigenvalues[name] + weighted if name in eigenvalues else weighted
    return {name: BlockFactors(bases[name], eigenvalues[name]) for name in names}, sums


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


def eigenvalues_of(
    workspace: Workspace, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis], samples: int
) -> dict[str, Tensor]:
    """Mean squared gradients of every block in the given bases, ``[P, O, I]`` (method §5.2)."""
    sums: dict[str, Tensor] = {}

    def own_part() -> None:
        with workspace.at(state):
            for draw in range(samples):
                for _, captured in workspace.captures(data, workspace.sampled(draw + 1), workspace.shard(data, ids)):
                    for name, gradients in captured.items():
                        new = eigenvalue_sums(gradients, bases[name])
                        sums[name] = sums[name].add_(new) if name in sums else new

    workspace.ranks.on_all_ranks(own_part)
    for block in workspace.blocks:
        if block.name not in sums:  # control flow skipped it on every factor example: no curvature
            like = next(workspace.module.parameters()).detach()
            sums[block.name] = like.new_zeros(block.shape, dtype=accumulator_dtype(like))
        workspace.ranks.all_reduce_([sums[block.name]])
        require_finite(sums[block.name], block.name, "eigenvalues")
    return {name: total / (len(ids) * samples) for name, total in sums.items()}


def squared_traces(
    workspace: Workspace, state: State, data: Examples, ids: Tensor, bases: Mapping[str, Basis]
) -> tuple[float, float]:
    """``tr H²`` and ``Σ λ²``, what EK-FAC sees of it; their traces are the same.

    ``tr H² = E[⟨g_m, g_n⟩²]`` over pairs of examples with labels sampled, their gradients over all blocks together;
    the pairs are those of one batch, and batches are drawn at random. Both are estimated without bias.

    Args:
        workspace: the model.
        state: the parameters.
        data: training examples.
        ids: those that are visited.
        bases: the eigenbases in which the blocks' eigenvalues are taken.
    """
    order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(workspace.seed))]
    like = next(workspace.module.parameters()).detach()
    empty = {b.name: like.new_zeros(b.shape, dtype=accumulator_dtype(like)) for b in workspace.blocks}
    # Two halves of the batches: the product of two means of squares has no share of their noise.
    halves = [empty, {name: total.clone() for name, total in empty.items()}]
    sizes = torch.zeros(2, dtype=torch.float64, device=workspace.module.device)
    pairs = torch.zeros(2, dtype=torch.float64, device=workspace.module.device)  # Σ ⟨g_m, g_n⟩², and how many

    def own_part() -> None:
        with workspace.at(state):
            passes = workspace.captures(data, workspace.sampled(), workspace.shard(data, order))
            # By the batch's place among those of all ranks, so that the halves do not depend on how many share them.
            places = itertools.count(workspace.ranks.global_rank, workspace.ranks.world_size)
            for place, (index, captured) in zip(places, passes, strict=False):
                half = place % 2
                sizes[half] += len(index)
                for name, gradients in captured.items():
                    halves[half][name] += eigenvalue_sums(gradients, bases[name])
                products = sum((gram(gradients).double() for gradients in captured.values()), pairs.new_zeros(()))
                if products.dim():
                    pairs[0] += products.square().sum() - products.diagonal().square().sum()
                    pairs[1] += len(products) * (len(products) - 1)

    workspace.ranks.on_all_ranks(own_part)
    workspace.ranks.all_reduce_([pairs, sizes, *(half[block.name] for half in halves for block in workspace.blocks)])
    blocks = sum(float((halves[0][b.name].double() * halves[1][b.name]).sum()) for b in workspace.blocks)
    return float(pairs[0] / pairs[1].clamp_min(1)), blocks / float(sizes.prod().clamp_min(1))
