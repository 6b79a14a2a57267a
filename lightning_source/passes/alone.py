"""How training batches weight their examples, learnt from examples that are run alone: right for any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Batch, Examples, to_module
from lightning_source.capture.objective import CallScale, Kind, Losses, NoLoss, ObjectiveSpec
from lightning_source.capture.probe import unknown_share
from lightning_source.names import named_parameters
from lightning_source.passes.calibration import TRIED_BATCHES, evaluate, gone_up, hook_ratio, weighted_otherwise
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.rows import COMPARED, total_gradient
from lightning_source.passes.workspace import Workspace

# What single examples leave unexplained of their batch's gradient, as a share of it: round-off is below 1e-3 in float32
# and 1e-2 in half precision, what couples examples is most of the gradient.
COUPLED = 5e-2
# Examples on which blocks are probed one at a time: one alone may skip a layer.
PROBED = 3


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
        spec = _whole(batch, alone, workspace, examples_per_batch)
    else:
        ratio, single = hook_ratio(workspace, data, ids, max(1, len(ids) // 2), examples_per_batch)
        scales = []
        for index, call in enumerate(batch.calls):
            kind = _kind_of(batch, alone, index, noisy)
            weight = _weight_of_example(workspace, data, alone, index, kind)
            factor = examples_per_batch if kind == "sum" else 1 / weight
            scales.append(CallScale(call.name, kind, factor * ratio, single))
        hook = workspace.objective.hook
        spec = ObjectiveSpec(
            "hook" if hook else "recognised",
            "empirical" if hook == "attribution_losses" else "true",
            tuple(scales),
            rest=_rest(workspace, data, batch, alone, examples_per_batch),
        )
    if len(ids) > 1 and not noisy:  # noise of the step's own tells nothing of other examples
        _refuse_coupled(workspace, batch, alone, spec)
    workspace.spec = gone_up(spec) if maximize else spec
    return workspace.spec


def examples_with_loss(workspace: Workspace, data: Examples) -> tuple[list[int], list[Losses]]:
    """A few examples that have a loss of their own, drawn at random, and these losses.

    Raises:
        NoLoss: none has.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(workspace.seed)).tolist()
    ids: list[int] = []
    alone = []
    for index in order[: TRIED_BATCHES * COMPARED]:
        try:
            alone.append(evaluate(workspace, data.one_at_a_time(), [index]))
        except (NoLoss, FloatingPointError):  # a mean over nothing, say
            continue
        ids.append(index)
        if len(ids) == COMPARED:
            break
    if not ids:
        raise NoLoss(f"`{type(workspace.module).__name__}.training_step` gave no loss for any example by itself")
    return ids, alone


def _whole(batch: Losses, alone: Sequence[Losses], workspace: Workspace, examples_per_batch: float) -> ObjectiveSpec:
    """The loss as a whole, a mean or a sum over examples, by the size of its gradient."""
    kind = _share(workspace, batch.loss, [one.loss for one in alone])
    return ObjectiveSpec(
        "whole", "empirical", (CallScale("whole", kind, examples_per_batch if kind == "sum" else 1.0),)
    )


def _share(workspace: Workspace, batch: Tensor, alone: Sequence[Tensor]) -> Kind:
    """Whether a batch's value is the mean or the sum of those of its examples alone, by the size of its gradient."""
    parameters = block_parameters(workspace)
    together = total_gradient(batch, parameters)
    separate = sum((total_gradient(one, parameters) for one in alone), together.new_zeros(()))
    share = float((together * separate).sum() / separate.square().sum().clamp_min(1e-30))
    return "mean" if share < len(alone) ** -0.5 else "sum"


def _rest(
    workspace: Workspace, data: Examples, batch: Losses, alone: Sequence[Losses], examples_per_batch: float
) -> float | None:
    """What multiplies the part of an example's loss that is in no call; ``None`` where that is next to nothing."""
    ids, _ = examples_with_loss(workspace, data)
    if not any(unknown_of(workspace, data.one_at_a_time(), [index]) for index in ids[:PROBED]):
        return None
    return examples_per_batch if _share(workspace, batch.rest, [one.rest for one in alone]) == "sum" else 1.0


def _kind_of(batch: Losses, alone: Sequence[Losses], index: int, noisy: bool) -> Kind:
    """What a call's elements are divided by: that under which they weigh as much in the batch as alone.

    Raises:
        MisconfigurationException: under none.
    """

    def weights(losses: Losses, kind: Kind) -> Tensor:
        return (losses.weights(index, kind)[0] * (losses.calls[index].weights != 0)).flatten()

    def mismatch(kind: Kind) -> float:
        together, separate = weights(batch, kind), torch.cat([weights(losses, kind) for losses in alone])
        if noisy or len(together) != len(separate):  # drawn weights, and padding, agree only in sum
            together, separate = together.sum(), separate.sum()
        else:
            together, separate = together.sort().values, separate.sort().values
        return round(float((together - separate).norm() / separate.norm().clamp_min(1e-30)), 4)

    kinds: list[Kind] = ["mean", "sum", "examples"]
    best = min(sorted(kinds, key=lambda kind: kind != batch.calls[index].reduction), key=mismatch)
    if not noisy and mismatch(best) > 1e-2:
        raise MisconfigurationException(weighted_otherwise(batch.calls[index].name))
    return best


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
    if spec.rest is not None:
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


def block_parameters(workspace: Workspace) -> list[Tensor]:
    """The parameters of all blocks."""
    own = named_parameters(workspace.module)
    return [own[name] for block in workspace.blocks for name in block.parameters]


def unknown_of(workspace: Workspace, data: Examples, ids: Sequence[int]) -> float:
    """Share of the gradient that no recognised loss explains, a penalty of the weights alone left aside.

    It is 0 where round-off may explain it, which keeps batches, and scores of that accuracy, where they are fast. That is the gradient at the layers' outputs; or, where the loss holds gradients itself, which come to the weights by
    other ways, what of it differs between two examples. A module that names its losses is taken by its word.
    """
    if workspace.objective.hook:
        return 0.0
    batch = batch_of(workspace, data, ids)
    at_layers, round_off = unknown_share(workspace.module, workspace.objective, workspace.blocks, batch, len(ids))
    if at_layers > round_off:
        return at_layers
    parameters, differences = block_parameters(workspace), []
    try:
        one, other = (evaluate(workspace, data.one_at_a_time(), [index]) for index in ids[:2])
        for mine, its in ((one.rest, other.rest), (one.loss, other.loss)):
            differences.append((total_gradient(mine, parameters) - total_gradient(its, parameters)).norm())
    except Exception:  # of one example only, or of a step that needs several; the user's own errors come elsewhere
        return 0.0
    known = one.calls and other.calls and differences[1] > 0
    share = float(differences[0] / differences[1]) if known else 0.0
    return share if share > round_off else 0.0


def batch_of(workspace: Workspace, data: Examples, ids: Sequence[int]) -> Batch:
    """One batch of some examples, on the module's device, for the next call of the user's step."""
    (_, batch), *_ = data.in_batches_of(len(ids)).batches(list(ids))
    workspace.begin_step()
    return to_module(batch, workspace.module, workspace.hooks)
