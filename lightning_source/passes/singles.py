"""A few training examples that are run by themselves, and what is told from their losses' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_source.capture.data import Batch, Examples, to_module
from lightning_source.capture.objective import Losses, NoLoss
from lightning_source.names import named_parameters
from lightning_source.passes.calibration import TRIED_BATCHES, evaluate
from lightning_source.passes.rows import COMPARED, total_gradient
from lightning_source.passes.workspace import Workspace

# Examples on which blocks are probed one at a time: one alone may skip a layer.
PROBED = 3


def examples_with_loss(workspace: Workspace, data: Examples, count: int = COMPARED) -> tuple[list[int], list[Losses]]:
    """At most ``count`` examples that have a loss of their own, drawn at random, and these losses.

    Raises:
        NoLoss: none has.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(workspace.seed)).tolist()
    ids: list[int] = []
    alone = []
    for index in order[: TRIED_BATCHES * count]:
        try:
            alone.append(evaluate(workspace, data.one_at_a_time(), [index]))
        except (NoLoss, FloatingPointError):  # a mean over nothing, say
            continue
        ids.append(index)
        if len(ids) == count:
            break
    if not ids:
        raise NoLoss(f"`{type(workspace.module).__name__}.training_step` gave no loss for any example by itself")
    return ids, alone


def batch_of(workspace: Workspace, data: Examples, ids: Sequence[int]) -> Batch:
    """One batch of some examples, on the module's device, for the next call of the user's step."""
    (_, batch), *_ = data.in_batches_of(len(ids)).batches(list(ids))
    workspace.begin_step()
    return to_module(batch, workspace.module, workspace.hooks)


def block_parameters(workspace: Workspace) -> list[Tensor]:
    """The parameters of all blocks."""
    own = named_parameters(workspace.module)
    return [own[name] for block in workspace.blocks for name in block.parameters]


def share_of_sum(workspace: Workspace, batch: Tensor, alone: Sequence[Tensor]) -> float:
    """What a batch's value is of the sum of those of its examples alone, by their gradients: 1/B for a mean."""
    parameters = block_parameters(workspace)
    together = total_gradient(batch, parameters)
    separate = sum((total_gradient(one, parameters) for one in alone), together.new_zeros(()))
    return float((together * separate).sum() / separate.square().sum().clamp_min(1e-30))
