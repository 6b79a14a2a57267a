"""What must be known before a stage's first pass: its blocks, the scale of its losses, and whose row a row is.

All of it is learnt from training examples after training has ended, in batches as training saw them if a batch's rows
turn out to be its examples, else from the same examples one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException, rank_zero_warn
from lightning_source.capture.coverage import Coverage, listed
from lightning_source.capture.data import Examples, to_module
from lightning_source.capture.objective import CallScale, Kind, Losses, NoLoss, ObjectiveSpec
from lightning_source.capture.probe import probe
from lightning_source.names import named_parameters
from lightning_source.passes.calibration import (
    TRIED_BATCHES,
    calibrate,
    evaluate,
    first_with_loss,
    gone_up,
    hook_ratio,
    weighted_otherwise,
)
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.rows import COMPARED, compared_ids, rows_differ, total_gradient
from lightning_source.passes.workspace import Workspace

# What single examples leave unexplained of their batch's gradient, as a share of it: round-off is below 1e-3 in float32
# and 1e-2 in half precision, what couples examples is most of the gradient.
COUPLED = 5e-2
# Examples on which blocks are probed one at a time: one alone may skip a layer.
PROBED = 3


@dataclass(frozen=True)
class Preparation:
    """What is known of a stage.

    Attributes:
        coverage: its blocks, each checked against autograd.
        spec: the scale of its losses, and why its examples are run one at a time, if they are.
    """

    coverage: Coverage
    spec: ObjectiveSpec


def prepare(
    workspace: Workspace, coverage: Coverage, data: Examples, examples_per_batch: float, maximize: bool = False
) -> Preparation:
    """Probe the blocks and calibrate the objective; call it inside :meth:`Workspace.at`.

    Args:
        workspace: the model, with the blocks of ``coverage``; its blocks and spec are replaced by what is found.
        coverage: the blocks by the kinds of their layers.
        data: the training examples.
        examples_per_batch: mean number of examples in a micro-batch of training.
        maximize: training went up the loss.

    Raises:
        MisconfigurationException: no block is left, or an example's loss depends on the others of its batch.
        FloatingPointError: the loss is not finite.
    """
    reason: str | None
    try:
        spec = calibrate(workspace, data, examples_per_batch, maximize)
        ids = compared_ids(data, workspace.seed)
        probed, _ = first_with_loss(workspace, data, min(len(data), data.batch_size))
        checked = _probe(workspace, coverage, data, probed)
        workspace.blocks = checked.blocks
        reason = rows_differ(workspace, data, ids)
        if reason is None and checked.left_out != coverage.left_out:
            reason = _gained_alone(workspace, coverage, checked, data)
    except FloatingPointError:
        raise
    except Exception as error:  # of a layout that is not by example; the user's own errors come again below
        reason = str(error)
    if reason is None:
        _warn_of_batch_idx(workspace, data, ids.tolist())
        return Preparation(checked, spec)
    workspace.blocks = coverage.blocks
    try:
        spec = replace(calibrate_alone(workspace, data, examples_per_batch, maximize), one_at_a_time=reason)
    except NoLoss as error:
        raise MisconfigurationException(f"there is no loss to attribute: {error}.") from None
    checked = _probed_alone(workspace, coverage, data)
    workspace.blocks, workspace.spec = checked.blocks, spec
    return Preparation(checked, spec)


def _probed_alone(workspace: Workspace, coverage: Coverage, data: Examples) -> Coverage:
    """The coverage that is left when a few examples are run alone."""
    for example in _examples_with_loss(workspace, data)[0][:PROBED]:
        coverage = _probe(workspace, coverage, data.one_at_a_time(), [example])
    return coverage


def _gained_alone(workspace: Workspace, coverage: Coverage, checked: Coverage, data: Examples) -> str | None:
    """Why examples are better run alone: parameters that only their single gradients reach, in words; ``None`` if none.

    Rows of an inner layer may belong to nodes, instances or segments although the batch's losses are by example.
    """
    workspace.blocks = coverage.blocks
    try:
        alone = {name for name, _, _ in _probed_alone(workspace, coverage, data).left_out}
    except FloatingPointError:
        raise
    except Exception:  # a step that needs a batch of several: what batches reach stands
        return None
    finally:
        workspace.blocks = checked.blocks
    gained = [name for name, _, _ in checked.left_out if name not in alone]
    return f"{listed(gained)} can be followed by single examples only" if gained else None


def _warn_of_batch_idx(workspace: Workspace, data: Examples, ids: Sequence[int]) -> None:
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


def _probe(workspace: Workspace, coverage: Coverage, data: Examples, ids: Sequence[int]) -> Coverage:
    (_, batch), *_ = data.in_batches_of(len(ids)).batches(list(ids))
    workspace.begin_step()
    batch = to_module(batch, workspace.module, workspace.hooks)
    return probe(workspace.module, workspace.objective, coverage, batch, len(ids))


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
    ids, alone = _examples_with_loss(workspace, data)
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
        )
    if len(ids) > 1 and not noisy:  # noise of the step's own tells nothing of other examples
        _refuse_coupled(workspace, batch, alone, spec)
    workspace.spec = gone_up(spec) if maximize else spec
    return workspace.spec


def _examples_with_loss(workspace: Workspace, data: Examples) -> tuple[list[int], list[Losses]]:
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
    parameters = _parameters(workspace)
    together = total_gradient(batch.loss, parameters)
    separate = sum((total_gradient(one.loss, parameters) for one in alone), together.new_zeros(()))
    share = float((together * separate).sum() / separate.square().sum().clamp_min(1e-30))
    kind: Kind = "mean" if share < len(alone) ** -0.5 else "sum"
    return ObjectiveSpec(
        "whole", "empirical", (CallScale("whole", kind, examples_per_batch if kind == "sum" else 1.0),)
    )


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
    parameters = _parameters(workspace)
    together = total_gradient(batch.data_target(spec), parameters).double()
    separate = torch.stack([total_gradient(losses.data_target(spec), parameters) for losses in alone]).double()
    weights = torch.linalg.lstsq(separate @ separate.T, separate @ together, driver="gelsd").solution
    left = float((together - weights @ separate).norm() / together.norm().clamp_min(1e-30))
    if left > COUPLED:
        raise MisconfigurationException(
            f"in `{type(workspace.module).__name__}.training_step` the loss of an example depends on the other examples"
            f" of its batch: run alone, they leave {left:.0%} of the batch's gradient unexplained. Contrastive losses,"
            " statistics of the batch and losses that select among its examples have no gradient of one example."
        )


def _parameters(workspace: Workspace) -> list[Tensor]:
    own = named_parameters(workspace.module)
    return [own[name] for block in workspace.blocks for name in block.parameters]
