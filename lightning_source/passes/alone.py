"""How training batches weight their examples, learnt from examples that are run alone: right for any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples
from lightning_source.capture.objective import CallScale, Kind, Losses, ObjectiveSpec
from lightning_source.capture.probe import HALF_TOLERANCE
from lightning_source.passes.calibration import evaluate, gone_up, hook_ratio, weighted_otherwise
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.rows import total_gradient
from lightning_source.passes.singles import PROBED, block_parameters, examples_with_loss, share_of_sum
from lightning_source.passes.unrecognised import unknown_of, with_rest
from lightning_source.passes.workspace import Workspace

# What single examples leave unexplained of their batch's gradient, as a share of it: round-off is below 1e-3 in float32
# and 1e-2 in half precision, what couples examples is most of the gradient.
COUPLED = 5e-2
# Examples of a training batch that are all run alone, where a few do not tell how it weights them.
LARGEST = 64


def calibrate_alone(
    workspace: Workspace, data: Examples, examples_per_batch: float, maximize: bool = False
) -> ObjectiveSpec:
    """Learn how training batches weight elements from examples alone and from one batch of them, in whatever order.

    Args:
        workspace: the model.
        data: the training examples, with the batch size of training.
        examples_per_batch: mean number of examples in a micro-batch of training.
        maximize: training went up the loss.

    Raises:
        MisconfigurationException: an example's loss depends on the others of its batch.
    """
    ids, alone = examples_with_loss(workspace, data)
    batch, again = (evaluate(workspace, data, ids) for _ in range(2))
    noisy = not torch.equal(batch.loss, again.loss)
    named = {tuple(call.name for call in losses.calls) for losses in (batch, *alone)}
    if len(named) > 1 or not batch.calls:  # none is known, or each example has calls of its own
        spec = _whole(workspace, data, batch, alone, examples_per_batch, noisy)
    else:
        ratio, single = hook_ratio(workspace, data, ids, max(1, len(ids) // 2), examples_per_batch)
        scales = []
        for index, call in enumerate(batch.calls):
            try:
                kind, size = _kind_of(batch, alone, index, noisy)
            except MisconfigurationException:  # of a batch of this size
                kind, size = _kind_of(*_as_in_training(workspace, data), index, noisy, any_size=True)
            weight = _weight_of_example(workspace, data, alone, index, kind)
            factor = examples_per_batch if kind == "sum" else 1 / weight
            scales.append(CallScale(call.name, kind, size * factor * ratio, single))
        hook = workspace.objective.hook
        spec = ObjectiveSpec(
            "hook" if hook else "recognised",
            "empirical" if hook == "attribution_losses" else "true",
            tuple(scales),
        )
        if any(unknown_of(workspace, data.one_at_a_time(), [index]) for index in ids[:PROBED]):
            spec = with_rest(workspace, spec, batch, alone, examples_per_batch)
    if len(ids) > 1 and not noisy:  # noise of the step's own tells nothing of other examples
        _refuse_coupled(workspace, batch, alone, spec)
    workspace.spec = gone_up(spec) if maximize else spec
    return workspace.spec


def _whole(
    workspace: Workspace,
    data: Examples,
    batch: Losses,
    alone: Sequence[Losses],
    examples_per_batch: float,
    noisy: bool,
) -> ObjectiveSpec:
    """The loss as a whole, a mean or a sum over examples, or a part of a sum, by the size of its gradient."""
    share = share_of_sum(workspace, batch.loss, [one.loss for one in alone])
    mean = share < len(alone) ** -0.5
    part = 1.0
    if not noisy and abs((share * len(alone) if mean else share) - 1) > COUPLED:
        as_in_training, singles = _as_in_training(workspace, data)
        part, mean = share_of_sum(workspace, as_in_training.loss, [one.loss for one in singles]), False
    scale = CallScale("whole", "mean", 1.0) if mean else CallScale("whole", "sum", examples_per_batch * part)
    return ObjectiveSpec("whole", "empirical", (scale,))


def _as_in_training(workspace: Workspace, data: Examples) -> tuple[Losses, list[Losses]]:
    """A batch of training's size, and each of its examples alone.

    A step that cuts its batch into pieces may weight them by how many there should have been: an example alone, which
    is one piece, then weighs less than in training.
    """
    ids, alone = examples_with_loss(workspace, data, min(data.batch_size, LARGEST))
    return evaluate(workspace, data, ids), alone


def _kind_of(
    batch: Losses, alone: Sequence[Losses], index: int, noisy: bool, any_size: bool = False
) -> tuple[Kind, float]:
    """What a call's elements are divided by: that under which they weigh as much in the batch as alone.

    Args:
        batch: losses of some examples together.
        alone: of each of them by itself.
        index: of the call.
        noisy: whether the step draws weights, which agree only in sum.
        any_size: whether elements may weigh all of them some other number of times as much in the batch as alone.

    Returns:
        The kind and that number.

    Raises:
        MisconfigurationException: there is no such kind.
    """

    def weights(losses: Losses, kind: Kind) -> Tensor:
        return (losses.weights(index, kind)[0] * (losses.calls[index].weights != 0)).flatten()

    def compared(kind: Kind) -> tuple[float, float]:
        together, separate = weights(batch, kind), torch.cat([weights(losses, kind) for losses in alone])
        if noisy or len(together) != len(separate):  # drawn weights, and padding, agree only in sum
            together, separate = together.sum(), separate.sum()
        else:
            together, separate = together.sort().values, separate.sort().values
        norm = separate.norm().clamp_min(1e-30)
        size = float((together * separate).sum() / norm.square()) if any_size else 1.0
        return round(float((together - size * separate).norm() / norm), 4), size

    kinds: list[Kind] = ["mean", "sum", "examples"]
    kinds.sort(key=lambda kind: kind != batch.calls[index].reduction)
    found = {kind: compared(kind) for kind in kinds}
    best = min(kinds, key=lambda kind: found[kind][0])
    mismatch, size = found[best]
    if not noisy and mismatch > 1e-2:
        raise MisconfigurationException(weighted_otherwise(batch.calls[index].name))
    return best, size


def _weight_of_example(workspace: Workspace, data: Examples, alone: Sequence[Losses], index: int, kind: Kind) -> float:
    """Mean normaliser that an example adds to a training batch; a pass over data only where examples differ."""
    if kind == "examples":
        return 1.0
    weights = [float(losses.weights(index, kind)[1].sum()) for losses in alone]
    if kind == "sum" or len(set(weights)) == 1:
        return weights[0]
    ids = factor_ids(len(data), 1024, workspace.seed).tolist()
    total = sum(float(evaluate(workspace, data, [i]).weights(index, kind)[1].sum()) for i in ids)
    return total / len(ids)


def _refuse_coupled(workspace: Workspace, batch: Losses, alone: Sequence[Losses], spec: ObjectiveSpec) -> None:
    """A batch's gradient must be made of those of its examples alone, whatever it weighs each of them by."""
    known = replace(spec, rest=None)
    left = _unspanned(workspace, batch.data_target(known), [losses.data_target(known) for losses in alone])
    # Alone, what couples examples may be a constant, so that none of it is counted there.
    parameters = block_parameters(workspace)
    share = total_gradient(batch.rest, parameters).norm() / total_gradient(batch.loss, parameters).norm()
    if spec.rest is not None or share > HALF_TOLERANCE:
        left = max(left, _unspanned(workspace, batch.rest, [losses.rest for losses in alone]))
    if left > COUPLED:
        raise MisconfigurationException(
            f"in `{type(workspace.module).__name__}.training_step` the loss of an example depends on the other examples"
            f" of its batch: run alone, they leave {left:.0%} of the batch's gradient unexplained. Contrastive losses,"
            " statistics of the batch and losses that select among its examples have no gradient of one example."
        )


def _unspanned(workspace: Workspace, batch: Tensor, alone: Sequence[Tensor]) -> float:
    """Share of a batch's gradient that no sum of the gradients of its examples gives, whatever each is weighed by."""
    parameters = block_parameters(workspace)
    together = total_gradient(batch, parameters).double()
    separate = torch.stack([total_gradient(one, parameters) for one in alone]).double()
    weights = torch.linalg.lstsq(separate @ separate.T, separate @ together, driver="gelsd").solution
    return float((together - weights @ separate).norm() / together.norm().clamp_min(1e-30))
