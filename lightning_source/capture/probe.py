"""Checks on a real batch that each block's captured gradients are those of its parameters, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.coverage import Coverage
from lightning_source.capture.data import Batch
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Losses, Objective
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers import Block
from lightning_source.layers.free import held_whole
from lightning_source.names import named_parameters

# A layer's captured gradient must match autograd's weight gradient to this share of its norm; float32 sums in another
# order differ by about 1e-6, a missing use of the weight by its whole contribution.
TOLERANCE = 1e-3
# Under autocast autograd itself rounds to 8 bits.
HALF_TOLERANCE = 3e-2

_BESIDE = "its gradient comes from no example's loss, but from what weighs the losses or is added to them"
_ELSEWHERE = "used outside its layer's forward"
_DIFFERS = "captured gradient differs from autograd's"
_NO_GRADIENT = "its output carries no gradient (reentrant checkpointing, or torch.no_grad)"


def probe(module: nn.Module, objective: Objective, coverage: Coverage, batch: Batch, size: int) -> Coverage:
    """Check every block on a real batch; blocks that do not account for their weights' gradient are left out.

    Two checks, so that no layout or unusual use of a weight is guessed at: the captured gradients of all examples must
    add up to autograd's weight gradient, and an example's own loss must reach only its own rows. A block that fails is
    tried in the other ways that its form knows (``LayerForm.attempts``), and where its weights serve more than the
    layer's own output each of them is held whole, at the cost of a backward for each example, before it is left out.

    Raises:
        MisconfigurationException: no block is left.
    """
    passed: dict[str, list[Block]] = {}
    failed: dict[str, str] = {}
    waiting = {block.name: block.layer_form.attempts(block, module) for block in coverage.blocks}
    while waiting:
        blocks = [attempts.pop(0) for attempts in waiting.values()]
        plain = [block for block in blocks if not block.layer_form.repeats]
        reasons = dict(zip(plain, _check(module, objective, plain, batch, size), strict=True)) if plain else {}
        for block in blocks:
            if block.layer_form.repeats:
                reasons[block] = _check_repeated(module, objective, block, batch, size)
        for block, reason in reasons.items():
            if reason is None:
                passed[block.name] = [block]
            elif reason == _NO_GRADIENT:  # no other way would see more
                failed[block.name] = reason
                waiting[block.name].clear()
            elif not (block.layer_form.broadcasts and waiting[block.name]):  # the next way knows why better
                failed.setdefault(block.name, reason)
        waiting = {name: attempts for name, attempts in waiting.items() if attempts and name not in passed}
    for block in coverage.blocks:
        if block.name not in passed and _may_be_held_whole(block, failed[block.name], size):
            whole = held_whole(block, module)
            if whole and not any(_check(module, objective, whole, batch, size)):
                passed[block.name] = whole
    checked = coverage.without({name: reason for name, reason in failed.items() if name not in passed})
    checked = replace(checked, blocks=tuple(block for kept in checked.blocks for block in passed[kept.name]))
    if not checked.blocks:
        raise MisconfigurationException(
            f"`{type(module).__name__}` has no layer whose gradients can be attributed.\n  {checked.summary()}"
        )
    return checked


def _may_be_held_whole(block: Block, reason: str, size: int) -> bool:
    """Whether examples' own losses tell a block's gradients, although the forms of its layer failed for that reason."""
    if block.free or reason in (_NO_GRADIENT, _BESIDE):
        return False
    return size == 1 or reason.startswith((_ELSEWHERE, _DIFFERS))  # other reasons are that examples mix in a batch


def unknown_share(
    module: nn.Module, objective: Objective, blocks: Sequence[Block], batch: Batch, size: int
) -> tuple[float, float]:
    """Norm of what known elements do not explain of the layers' gradients, over that of all; and its round-off.

    Gradients are taken from the layers' outputs, where a penalty on the weights, which belongs to no example, has none.
    """
    recording = GradientCapture(module, [block for block in blocks if not block.free])
    losses = objective.evaluate(batch, size, recording)
    round_off = HALF_TOLERANCE if recording.half else TOLERANCE
    if not losses.calls:
        return 0.0, round_off
    total, rest = (
        sum(float(captured.squares().sum()) for captured in recording.captured(part, size, True, {}).values())
        for part in (losses.loss, losses.rest)
    )
    return (rest / total) ** 0.5 if total else 0.0, round_off


def _check(
    module: nn.Module, objective: Objective, blocks: Sequence[Block], batch: Batch, size: int
) -> list[str | None]:
    """For each block, why it cannot be attributed."""
    recording = GradientCapture(module, blocks)
    losses = objective.evaluate(batch, size, recording)
    each = losses.each()
    if losses.calls and each.shape != (size,):
        raise MisconfigurationException(_not_by_example(losses))
    target = losses.recognised  # a penalty on the weights is not data
    refused: dict[str, str] = {}
    captured = recording.captured(target, size, True, refused, each)
    of_last: dict[str, BlockGradients] = {}
    if size > 1 and each.shape == (size,):
        of_last = recording.captured(each[-1], size, True, {})
    parameters = {name: p for name, p in named_parameters(module).items() if p.requires_grad}
    wanted = [name for block in blocks for name in block.parameters]
    totals = torch.autograd.grad(target, [parameters[n] for n in wanted], retain_graph=True, allow_unused=True)
    gradients = {name: total for name, total in zip(wanted, totals, strict=True) if total is not None}
    whole = torch.autograd.grad(losses.loss, [parameters[n] for n in wanted], retain_graph=True, allow_unused=True)
    reached = {name for name, total in gradients.items() if total.to_dense().any()}
    beside = {n for n, g in zip(wanted, whole, strict=True) if g is not None and g.to_dense().any()} - reached
    return [
        refused.get(block.name)
        or _mismatch(
            block,
            captured.get(block.name),
            gradients,
            HALF_TOLERANCE if recording.key(block) in recording.half else TOLERANCE,
        )
        or (None if block.free else _mixing(of_last.get(block.name)))
        or _unseen(block, captured, recording)
        or (_BESIDE if beside.issuperset(block.parameters) else None)
        for block in blocks
    ]


def _check_repeated(module: nn.Module, objective: Objective, block: Block, batch: Batch, size: int) -> str | None:
    """Like :func:`_check` for a block whose layer's output is repeated, which the user's code must not notice."""
    reason = "its rows serve all examples, and cannot be repeated for each"
    try:
        repeated = objective.evaluate(batch, size, GradientCapture(module, [block])).loss
    except Exception:  # whatever the user's code raises on a tensor of another shape
        return reason
    if not torch.allclose(repeated, objective.evaluate(batch, size).loss, rtol=TOLERANCE, atol=0):
        return reason
    return _check(module, objective, [block], batch, size)[0]


def _not_by_example(losses: Losses) -> str:
    shapes = ", ".join(f"`{call.name}` has elements of shape {tuple(call.elements.shape)}" for call in losses.calls)
    return (
        f"{shapes}, which do not begin with the batch's {losses.size} examples, so no loss can be told for one of them."
    )


def _unseen(block: Block, captured: Mapping[str, BlockGradients], recording: GradientCapture) -> str | None:
    """Why a block's layer ran and yet nothing was captured; ``None`` if it was, or the layer did not run."""
    if block.name in captured or recording.key(block) not in recording.without_gradient:
        return None
    return _NO_GRADIENT


def _mismatch(
    block: Block, captured: BlockGradients | None, gradients: Mapping[str, Tensor], tolerance: float
) -> str | None:
    """Why the captured gradients do not add up to autograd's, ``gradients`` by parameter; ``None`` if they do."""
    present = {name: gradients[name].to_dense() for name in block.parameters if name in gradients}
    if captured is None:
        return _ELSEWHERE if any(total.any() for total in present.values()) else None
    if len(present) < len(block.parameters):
        return "its layer ran but its parameters got no gradient"
    expected = block.matrix(present)
    error = (_total(captured) - expected).norm()
    # Where examples' gradients cancel, what is left of their sum is round-off of its parts.
    parts = float(captured.squares().sum().sqrt())
    if error > tolerance * expected.norm() + 1e-6 * parts + 1e-12:
        return f"{_DIFFERS} by {float(error / expected.norm()):.1%}"
    return None


def _total(captured: BlockGradients) -> Tensor:
    """The sum of all examples' gradients, ``[P, O, I]``."""
    activations, gradients = (side.flatten(1, 2) for side in captured[:2])
    if captured.vocabulary is None:
        return gradients.mT @ activations
    table = gradients.new_zeros(1, captured.vocabulary, gradients.shape[-1])
    return table.index_add_(1, activations[0], gradients).mT


def _mixing(captured: BlockGradients | None) -> str | None:
    """Why the last example's loss, of which the gradients were captured, is not its own; ``None`` if it is."""
    if captured is None:
        return None
    squares = captured.squares()
    if squares[:-1].max() > TOLERANCE**2 * squares[-1]:
        return "examples of a batch influence each other's rows"
    return None
