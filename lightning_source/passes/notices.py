"""What a training step does that no score can follow, found by calling it again: said in one warning each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_source._lightning import rank_zero_warn
from lightning_source.capture.attributes import tensors_beside
from lightning_source.capture.data import Batch, Examples
from lightning_source.capture.isolation import isolated_rng
from lightning_source.capture.objective import NoLoss
from lightning_source.passes.calibration import evaluate
from lightning_source.passes.singles import batch_of
from lightning_source.passes.workspace import Workspace


def warn_of_batch_idx(workspace: Workspace, data: Examples, ids: Sequence[int]) -> None:
    """One warning if the loss of a batch depends on its place in the epoch, which no score can know."""
    objective = workspace.objective
    if not getattr(workspace.module, "automatic_optimization", True):
        return  # whose index is recorded, since optimizers may take turns by it
    index = objective.batch_idx
    loss, again = (evaluate(workspace, data, ids).loss for _ in range(2))
    try:
        for other in range(index + 1, index + 4):
            objective.batch_idx = other
            elsewhere = evaluate(workspace, data, ids).loss
            if torch.equal(loss, again) and not torch.equal(loss, elsewhere):
                rank_zero_warn(
                    f"The loss of `{type(workspace.module).__name__}.training_step` depends on `batch_idx`: one batch"
                    f" has {loss.item():.4g} at index {index} and {elsewhere.item():.4g} at {other}. Scores take every"
                    f" batch as one at index {index}."
                )
                return
    except NoLoss:  # batches that are left out are not stepped on, which the record has
        return
    finally:
        objective.batch_idx = index


def warn_of_partners(workspace: Workspace, data: Examples, ids: Sequence[int]) -> None:
    """One warning if the step mixes an example with others that it draws: its loss changes with these alone."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(workspace.seed + 1)).tolist()
    others = [index for index in order if index not in ids][: len(ids) - 1]
    if len(others) < len(ids) - 1 or len(ids) < 2:
        return

    def first_loss(chosen: Sequence[int], seed: int) -> Tensor | None:
        batch = batch_of(workspace, data, chosen)
        with isolated_rng(seed):
            each = workspace.objective.evaluate(batch, len(chosen)).each().detach()
        return each[0] if each.shape == (len(chosen),) else None

    try:
        loss, again, drawn, among = (
            first_loss(*which) for which in ((ids, 0), (ids, 0), (ids, 1), ([ids[0], *others], 0))
        )
    except Exception:  # of a batch that the step leaves out, or the user's own, which comes again in passes
        return
    if loss is None or again is None or drawn is None or among is None:
        return
    if torch.equal(loss, again) and not torch.equal(loss, drawn) and not torch.allclose(loss, among, rtol=1e-3):
        rank_zero_warn(
            f"`{type(workspace.module).__name__}.training_step` draws other examples of the batch into an example's"
            f" loss (mixup, say): one has {loss.item():.4g} among some and {among.item():.4g} among others. A score"
            " counts all of a row's loss for the example that stands in it."
        )


def warn_of_carried_tensors(workspace: Workspace, data: Examples, ids: Sequence[int]) -> None:
    """One warning if the loss reads tensors that an earlier call of the step left on the module: of another batch.

    Truncated backpropagation hands a hidden state on so. What is in the ``state_dict`` is recorded with the snapshots.
    """
    module = workspace.module

    def loss_of(batch: Batch) -> Tensor:
        with isolated_rng(0):
            return workspace.objective.evaluate(batch, len(ids)).loss.detach()

    try:
        batch = batch_of(workspace, data, ids)
        before = tensors_beside(module)
        first = loss_of(batch)
        after = tensors_beside(module)
        second = loss_of(batch)
        rewound = loss_of(batch_of(workspace, data, ids))
    except Exception:  # as above
        return

    def known(tensors: Sequence[tuple[Tensor, int]]) -> list[tuple[int, int]]:
        return [(id(tensor), writes) for tensor, writes in tensors]

    left = [f"`{name}`" for name, tensors in after.items() if known(before.get(name, [])) != known(tensors)]
    if left and torch.equal(first, rewound) and not torch.equal(first, second):
        rank_zero_warn(
            f"The loss of `{type(module).__name__}.training_step` depends on what its earlier calls left in"
            f" {', '.join(left)}: one batch has {first.item():.4g} at first and {second.item():.4g} after itself."
            " Scores take every batch as the first one after training, whose examples owe nothing to other batches."
        )
