"""The part of a loss that no recognised call holds, a penalty of the outputs say: how large it is and how it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_source.capture.coverage import Coverage
from lightning_source.capture.data import Examples
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Losses, ObjectiveSpec
from lightning_source.capture.probe import HALF_TOLERANCE, TOLERANCE, unknown_share
from lightning_source.layers import Block
from lightning_source.layers.free import held_whole
from lightning_source.names import named_parameters
from lightning_source.passes.calibration import evaluate
from lightning_source.passes.rows import rows_differ, total_gradient
from lightning_source.passes.singles import batch_of, block_parameters, examples_with_loss, share_of_sum
from lightning_source.passes.workspace import Workspace


def unknown_of(workspace: Workspace, data: Examples, ids: Sequence[int]) -> float:
    """Share of the gradient that no recognised loss explains, a penalty of the weights alone left aside.

    That is the gradient at the layers' outputs; or, where the loss holds gradients itself, which come to the weights by
    other ways, what of it differs between two examples. 0 where round-off may explain it, and of a module that names
    its losses, which is taken by its word.
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


def with_rest(
    workspace: Workspace, spec: ObjectiveSpec, batch: Losses, alone: Sequence[Losses], examples_per_batch: float
) -> ObjectiveSpec:
    """The scale of a loss with that of its unrecognised part: a mean or a sum over examples, as its gradients say."""
    share = share_of_sum(workspace, batch.rest, [one.rest for one in alone])
    mean = share < len(alone) ** -0.5
    return replace(spec, rest=1.0 if mean else examples_per_batch, rest_kind="mean" if mean else "sum")


def counted_in_batches(
    workspace: Workspace,
    coverage: Coverage,
    data: Examples,
    spec: ObjectiveSpec,
    examples_per_batch: float,
    maximize: bool,
) -> ObjectiveSpec | None:
    """The scale with the unrecognised part, where a batch's rows hold what each example adds to it.

    Args:
        workspace: the model, with the blocks of ``coverage``; its spec is used meanwhile.
        coverage: blocks that were probed on batches.
        data: the training examples.
        spec: the scale of the recognised part.
        examples_per_batch: mean number of examples in a micro-batch of training.
        maximize: training went up the loss.

    Returns:
        ``None`` where only examples that are run alone tell it: it couples them, reaches parameters by other ways than
        their layers' outputs, or a block needs the losses of single examples.
    """
    if any(block.free for block in coverage.blocks):
        return None
    ids, alone = examples_with_loss(workspace, data)
    counted = with_rest(workspace, spec, evaluate(workspace, data, ids), alone, examples_per_batch)
    if maximize:
        counted = replace(counted, rest=-(counted.rest or 0.0))
    workspace.spec = replace(counted, calls=tuple(replace(call, factor=0.0) for call in counted.calls))
    try:
        if len(ids) < 2 or rows_differ(workspace, data, torch.tensor(ids), TOLERANCE):
            return None
        if whole_where_reached_otherwise(workspace, coverage, data) != coverage:
            return None
    finally:
        workspace.spec = spec
    return counted


def whole_where_reached_otherwise(workspace: Workspace, coverage: Coverage, data: Examples) -> Coverage:
    """Parameters that the unrecognised part of the loss reaches by other ways than their layers' outputs: held whole.

    A penalty on gradients, say, is differentiated through them. What penalises the weights themselves is the same for
    all examples, so that differences between two are compared. A parameter too large to be held is left out.
    """
    ids, _ = examples_with_loss(workspace, data)
    if len(ids) < 2:
        return coverage
    recording = GradientCapture(workspace.module, coverage.blocks)
    found, expected = [], []
    for example in ids[:2]:
        rest = evaluate(workspace, data.one_at_a_time(), [example], recording=recording).rest
        captured = recording.captured(rest, 1, True, {}, rest.reshape(1))
        found.append([g.per_example().sum(1) if (g := captured.get(b.name)) else None for b in coverage.blocks])
        own = named_parameters(workspace.module)
        names = [name for block in coverage.blocks for name in block.parameters]
        gradients = torch.autograd.grad(rest, [own[name] for name in names], allow_unused=True)
        values = {n: torch.zeros_like(own[n]) if g is None else g for n, g in zip(names, gradients, strict=True)}
        expected.append([block.matrix(values) for block in coverage.blocks])
    tolerance = HALF_TOLERANCE if recording.half else TOLERANCE
    blocks: list[Block] = []
    reasons = {}
    for block, one, other, here, there in zip(coverage.blocks, *found, *expected, strict=True):
        wanted = here - there
        left = wanted - (0 if one is None else one) + (0 if other is None else other)
        if block.free or left.norm() <= tolerance * torch.stack([wanted.norm(), 1e-4 * here.norm()]).max():
            blocks.append(block)
            continue
        whole = held_whole(block, workspace.module)
        if not whole:
            reasons[block.name] = "the unrecognised part of the loss reaches it by another way than its output"
        blocks += whole or [block]
    return replace(coverage, blocks=tuple(blocks)).without(reasons)
