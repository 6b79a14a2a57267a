"""Whether row ``i`` of a batch is example ``i``: a few examples are run alone and inside a batch, and compared.

A collate function or a step may sort, permute, repeat, pack or drop rows; gradients by row are then those of other
examples. Where the two disagree, examples are run one at a time, which is right whatever the code does with a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_source.capture.data import Examples
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.passes.workspace import Workspace

# Examples that are compared; with fewer, rows that are in another order by chance agree more often.
COMPARED = 6
# A gradient's row must be the example's own to this share of its norm. Batches of other sizes sum in another order,
# which moves float32 by 1e-5 and half precision by 1e-2; a row of another example is off by about its whole norm.
TOLERANCE = 5e-2
# Draws that are averaged where the step draws noise of its own.
DRAWS = 8


def compared_ids(data: Examples, seed: int) -> Tensor:
    """Some examples drawn at random, in ascending order: neighbours may be alike."""
    count = min(COMPARED, len(data), max(1, data.batch_size))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def rows_differ(workspace: Workspace, data: Examples, ids: Tensor, tolerance: float = TOLERANCE) -> str | None:
    """Compare examples' gradients in a batch with those of the examples alone.

    Call it inside :meth:`Workspace.at`, with a calibrated objective and blocks that were probed.

    Args:
        workspace: the model.
        data: where the examples come from.
        ids: the examples that make the batch.
        tolerance: share of a row's norm that it may differ by.

    Returns:
        ``None`` where every row is its example's own, else the reason in a few words.
    """
    if len(ids) < 2:
        return None
    batch = data.in_batches_of(len(ids))
    first, again = (_flat(workspace, batch, ids) for _ in range(2))
    alone = data.in_batches_of(1)
    if not _close(first, again, tolerance).all():
        return _random_rows_differ(workspace, batch, alone, ids)
    separate = [_alone(workspace, alone, index) for index in ids.split(1)]
    known = torch.tensor([gradient is not None for gradient in separate])
    if not known.any():
        return "no example has a loss by itself"
    close = _close(first[known], torch.cat([gradient for gradient in separate if gradient is not None]), tolerance)
    if bool(close.all()):
        return None
    return f"gradients of {int((~close).sum())} of {len(ids)} examples are others in a batch than alone"


def _random_rows_differ(workspace: Workspace, batch: Examples, alone: Examples, ids: Tensor) -> str | None:
    """The same for a step that draws noise: each example must be nearest to itself in the mean over draws."""
    means = [sum(_flat(workspace, source, ids) for _ in range(DRAWS)) for source in (batch, alone)]
    inside, outside = (torch.nn.functional.normalize(torch.as_tensor(mean), dim=1) for mean in means)
    likeness = inside @ outside.T
    if bool((likeness.argmax(1) == torch.arange(len(ids), device=likeness.device)).all()):
        return None
    return "the step draws noise, and examples in a batch cannot be told from the same ones alone"


def _close(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Which rows agree, ``[B]``; a gradient that is small beside the others' may differ by as much as theirs do."""
    sizes = other.norm(dim=1)
    return (one - other).norm(dim=1) <= tolerance * torch.maximum(sizes, 1e-2 * sizes.mean()) + 1e-12


def _alone(workspace: Workspace, data: Examples, index: Tensor) -> Tensor | None:
    """One example's gradient, ``[1, scalars]``; ``None`` where its own loss is not finite, a mean over nothing, say.

    A step that does not run on a batch of one, which it squeezes, say, is given the example twice.
    """
    try:
        return _flat(workspace, data, index)
    except FloatingPointError:
        return None
    except Exception:
        twice = _flat(workspace, data.in_batches_of(2), index.repeat(2))
        if not _close(twice[:1], twice[1:]).all():
            raise
        return twice[:1]


def _flat(workspace: Workspace, data: Examples, ids: Tensor) -> Tensor:
    """Gradients of examples over all blocks, ``[B, scalars]``, on the CPU."""
    rows = []
    for index, captured in workspace.captures(data, workspace.trained(), ids):
        pieces = [_matrix(captured.get(block.name), math.prod(block.shape), len(index)) for block in workspace.blocks]
        rows.append(torch.cat(pieces, 1))
    return torch.cat(rows)


def _matrix(gradients: BlockGradients | None, scalars: int, examples: int) -> Tensor:
    """One block's gradients ``[B, entries]``; of a block that the pass did not reach, 0."""
    if gradients is None:
        return torch.zeros(examples, scalars)
    return gradients.per_example().transpose(0, 1).flatten(1).float().cpu()


def total_gradient(target: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a target's sum over parameters that may not reach it, flat, on the CPU; the graph is kept."""
    gradients = torch.autograd.grad(target.sum(), list(parameters), allow_unused=True, retain_graph=True)
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([piece.to_dense().flatten().float().cpu() for piece in pieces])
