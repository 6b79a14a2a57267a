"""How a training step weights its elements (method §4), learnt from two batches of different size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples, to_module
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import CallScale, Kind, Losses, NoLoss, ObjectiveSpec
from lightning_source.curvature.block_gradients import (
    squared_norms,
)
from lightning_source.names import named_parameters
from lightning_source.passes.factors import factor_ids
from lightning_source.passes.finite import shorten
from lightning_source.passes.workspace import Workspace

# Batches that are looked at for one with a loss.
TRIED_BATCHES = 16


def calibrate(workspace: Workspace, data: Examples, examples_per_batch: float, maximize: bool = False) -> ObjectiveSpec:
    """Learn how training batches weight elements (method §4), from two batches of different size.

    Args:
        workspace: the model; its objective's scale is set.
        data: training examples.
        examples_per_batch: mean number of examples in a micro-batch of training.
        maximize: training went up the loss, so what it minimised is the negative.
    """
    spec = _calibrate(workspace, data, examples_per_batch)
    workspace.spec = gone_up(spec) if maximize else spec
    return workspace.spec


def gone_up(spec: ObjectiveSpec) -> ObjectiveSpec:
    """The scale of a loss that training went up: what it minimised is the negative."""
    calls = tuple(replace(call, factor=-call.factor) for call in spec.calls)
    return replace(spec, calls=calls, rest=None if spec.rest is None else -spec.rest)


def _calibrate(workspace: Workspace, data: Examples, examples_per_batch: float) -> ObjectiveSpec:
    size = max(1, min(16, data.batch_size, len(data) // 2))
    ids, whole = first_with_loss(workspace, data, 2 * size)
    if not whole.calls:
        return _calibrate_whole(workspace, data, ids, size, examples_per_batch)
    # The half with the fewest elements: normalisers are told apart where its examples differ from the rest.
    counts = torch.stack([whole.by_example(i, whole.weights(i, "mean")[1]).sum(1) for i in range(len(whole.calls))])
    counts = (counts / counts.sum(1, keepdim=True)).sum(0)
    chosen = counts.masked_fill(counts == 0, torch.inf).argsort(stable=True)[:size].tolist()
    ratio, alone = hook_ratio(workspace, data, ids, size, examples_per_batch)
    scales = []
    for index, call in enumerate(whole.calls):
        kind: Kind = "sum" if call.reduction == "sum" else "mean"  # all that one example can tell
        if len(ids) > size:
            kind = _kind_of(workspace, data, whole, index, chosen)
        factor = examples_per_batch if kind == "sum" else 1 / _weight_per_example(workspace, data, whole, index, kind)
        scales.append(CallScale(call.name, kind, factor * ratio, alone))
    hook = workspace.objective.hook
    return ObjectiveSpec(
        "hook" if hook else "recognised",
        "empirical" if hook == "attribution_losses" else "true",
        tuple(scales),
    )


def first_with_loss(workspace: Workspace, data: Examples, size: int) -> tuple[list[int], Losses]:
    """The first ``size`` examples, in their order, for which the step gives a loss; a few batches are tried.

    Raises:
        NoLoss: it gives none for any.
    """
    for start in range(0, max(1, min(len(data), TRIED_BATCHES * size)), size):
        ids = list(range(start, min(len(data), start + size)))
        try:
            return ids, evaluate(workspace, data, ids)
        except NoLoss:
            continue
    raise NoLoss(
        f"`{type(workspace.module).__name__}.training_step` gave no loss for any of the first training examples"
    )


def evaluate(
    workspace: Workspace,
    data: Examples,
    ids: Sequence[int],
    hooked: bool = True,
    recording: GradientCapture | None = None,
) -> Losses:
    """The training step's losses on one batch of some examples.

    Raises:
        NoLoss: the step gives none.
        FloatingPointError: the loss is not finite.
    """
    (_, batch), *_ = data.in_batches_of(len(ids)).batches(ids)
    if batch is None:
        raise NoLoss("the collate function gives no batch")
    workspace.begin_step()
    losses = workspace.objective.evaluate(
        to_module(batch, workspace.module, workspace.hooks), len(ids), recording, hooked
    )
    if not torch.isfinite(losses.loss):
        raise FloatingPointError(
            f"the objective is {losses.loss.item()} on examples {shorten(data.named(torch.tensor(ids)))}"
        )
    return losses


def _kind_of(workspace: Workspace, data: Examples, whole: Losses, index: int, chosen: Sequence[int]) -> Kind:
    """What a call's elements are divided by: that under which they weigh the same in another batch."""
    half, again = (evaluate(workspace, data, chosen) for _ in range(2))
    if [call.name for call in half.calls] != [call.name for call in whole.calls]:
        raise MisconfigurationException("`training_step` computes other losses on another batch.")
    call = whole.calls[index]
    random = not torch.equal(half.scales[index], again.scales[index])  # drawn weights agree only in sum

    def mismatch(kind: Kind) -> float:
        # An ignored element is 0 whatever it is multiplied by.
        in_whole, in_half = (
            losses.by_example(index, losses.weights(index, kind)[0] * (losses.calls[index].weights != 0))
            for losses in (whole, half)
        )
        in_whole, in_half = _of_equal_width(in_whole[list(chosen)], in_half)
        if random:
            in_whole, in_half = in_whole.sum(), in_half.sum()
        return round(float((in_whole - in_half).norm() / in_half.norm()), 4)

    kinds: list[Kind] = ["mean", "sum", "examples"]
    best = min(sorted(kinds, key=lambda kind: kind != call.reduction), key=mismatch)
    if not random and mismatch(best) > 1e-2:
        raise MisconfigurationException(weighted_otherwise(call.name))
    return best


def weighted_otherwise(name: str) -> str:
    """The error where a loss's elements weigh something else in one batch than in another."""
    return (
        f"`training_step` weights the elements of `{name}` neither as a mean nor as a sum over the batch, so they"
        " cannot be told for others. HINT: pass weights to the loss itself (`weight=`), or divide by the number of"
        " examples or elements."
    )


def _weight_per_example(workspace: Workspace, data: Examples, losses: Losses, index: int, kind: Kind) -> float:
    """Mean normaliser an example adds to a training batch; a pass over data only where examples differ."""
    weights = losses.by_example(index, losses.weights(index, kind)[1]).sum(1)
    if kind == "examples":
        return 1.0
    if bool((weights == weights[0]).all()):
        return float(weights[0])
    total, ids = 0.0, factor_ids(len(data), 4096, workspace.seed)
    for chosen, batch in data.batches(ids):
        workspace.begin_step()
        try:
            evaluated = workspace.objective.evaluate(to_module(batch, workspace.module, workspace.hooks), len(chosen))
        except NoLoss:
            continue
        total += float(evaluated.weights(index, kind)[1].sum())
    return total / len(ids)


def hook_ratio(
    workspace: Workspace, data: Examples, ids: Sequence[int], size: int, examples_per_batch: float
) -> tuple[float, float]:
    """Where the module names its own losses: the trained loss over their mean, in training batches and alone.

    Gradients are compared, since the two may differ by a constant term.
    """
    if workspace.objective.hook is None:
        return 1.0, 1.0
    large, small = (_gradient_ratio(workspace, data, ids[:count]) for count in (len(ids), size))
    # Where the ratio does not grow with the batch, training takes a mean; one example tells no difference.
    if len(ids) == size or large / small < (len(ids) / size) ** 0.5:
        return large, large
    return large / len(ids) * examples_per_batch, large / len(ids)


def _gradient_ratio(workspace: Workspace, data: Examples, ids: Sequence[int]) -> float:
    own = named_parameters(workspace.module)
    parameters = [own[name] for block in workspace.blocks for name in block.parameters]
    trained, hooked = (
        torch.autograd.grad(evaluate(workspace, data, ids, hooked=h).loss, parameters, allow_unused=True)
        for h in (False, True)
    )
    pairs = [(t, h) for t, h in zip(trained, hooked, strict=True) if t is not None and h is not None]
    return float(sum((t * h).sum() for t, h in pairs)) / float(sum(h.square().sum() for _, h in pairs))


def _calibrate_whole(
    workspace: Workspace, data: Examples, ids: Sequence[int], size: int, examples_per_batch: float
) -> ObjectiveSpec:
    rows = []
    for count in (len(ids), min(size, len(ids))):
        recording = GradientCapture(workspace.module, workspace.blocks)
        losses = evaluate(workspace, data, ids[:count], recording=recording)
        captured = recording.captured(losses.loss, count)
        rows.append(torch.stack([squared_norms(c.select(slice(size))).sum() for c in captured.values()]).sum().sqrt())
    kind = _kind(float(rows[1] / rows[0]), len(ids) / size) if len(ids) > size else "mean"
    scale = CallScale("whole", kind, examples_per_batch if kind == "sum" else 1.0)
    return ObjectiveSpec("whole", "empirical", (scale,))


def _kind(ratio: float, sizes: float) -> Kind:
    """``"mean"`` if a smaller batch gave its examples ``sizes`` times the weight, ``"sum"`` if the same weight."""
    return "mean" if ratio > sizes**0.5 else "sum"


def _of_equal_width(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of elements that can be compared: batches may be padded to different lengths, on either side."""
    if rows.shape == others.shape:
        return rows, others
    width = max(rows.shape[1], others.shape[1])
    rows, others = (F.pad(x, (0, width - x.shape[1])).sort(1).values for x in (rows, others))
    return rows, others
