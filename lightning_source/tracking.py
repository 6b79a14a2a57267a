"""Which parameters are attributed: found once, checked on a real batch, and reported with what is left out and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_source.capture import Recording
from lightning_source.factors import Captured
from lightning_source.layers import Block, blocks_of, clean_name, form_of
from lightning_source.objective import Objective

# A layer's captured gradient must match autograd's weight gradient to this share of its norm; float32 sums in another
# order differ by about 1e-6, a missing use of the weight by its whole contribution.
TOLERANCE = 1e-3
# Under autocast autograd itself rounds to 8 bits.
HALF_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Coverage:
    """What is attributed and what is not.

    Attributes:
        blocks: the tracked blocks.
        left_out: for each trainable parameter that is not tracked, ``(name, size, reason)``.
        trainable: number of trainable scalars.
    """

    blocks: tuple[Block, ...]
    left_out: tuple[tuple[str, int, str], ...]
    trainable: int

    @property
    def share(self) -> float:
        """Tracked share of the trainable parameters, 0 to 1."""
        return 1 - sum(size for _, size, _ in self.left_out) / max(1, self.trainable)

    def summary(self) -> str:
        """A line for the log, then one for each reason why something is left out."""
        lines = [f"attributing {len(self.blocks)} blocks, {self.share:.2%} of {self.trainable:,} trainable parameters"]
        reasons: dict[str, list[tuple[str, int]]] = {}
        for name, size, reason in self.left_out:
            reasons.setdefault(reason, []).append((name, size))
        for reason, items in reasons.items():
            share = sum(size for _, size in items) / self.trainable
            lines.append(f"not attributed, {share:.2%}: {', '.join(name for name, _ in items)} ({reason})")
        return "\n  ".join(lines)

    def without(self, reasons: Mapping[str, str]) -> Coverage:
        """The coverage with some blocks left out, given the reasons by block name."""
        left = [
            (name, size, reasons[block.name])
            for block in self.blocks
            if block.name in reasons
            for name, size in zip(block.parameters, block.sizes, strict=True)
        ]
        kept = tuple(block for block in self.blocks if block.name not in reasons)
        return Coverage(kept, (*self.left_out, *left), self.trainable)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary for the manifest."""
        return {
            "share": self.share,
            "trainable": self.trainable,
            "blocks": [asdict(block) for block in self.blocks],
            "left_out": [list(item) for item in self.left_out],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Coverage:
        """The inverse of :meth:`to_json`."""
        blocks = tuple(
            Block(**(b | {"shape": tuple(b["shape"]), "sizes": tuple(b["sizes"])})) for b in values["blocks"]
        )
        return cls(blocks, tuple((n, s, r) for n, s, r in values["left_out"]), values["trainable"])


def find_blocks(
    module: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Coverage:
    """The blocks that can be tracked, before any has been seen at work.

    Args:
        module: the LightningModule.
        groups: parameters by optimizer group; a parameter in none is not trained.
        include: glob patterns of module names; only matching ones are tracked.
        exclude: glob patterns of module names that are not tracked.
    """
    group_of = {id(p): index for index, group in enumerate(groups) for p in group if p.requires_grad}
    names = {id(p): clean_name(name) for name, p in module.named_parameters()}
    trainable = {id(p): p for p in module.parameters() if id(p) in group_of}
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    blocks: list[Block] = []
    reasons: dict[int, str] = {}
    for name, child in module.named_modules():
        own = [p for p in child.parameters(recurse=False) if id(p) in trainable]
        reason = _why_not(name, child, own, owners, include, exclude)
        if own and reason is None:
            blocks += blocks_of(name, child, lambda p: group_of.get(id(p)))
        else:
            reasons |= {id(p): str(reason) for p in own}
    left = [(names[key], trainable[key].numel(), reason) for key, reason in reasons.items()]
    return Coverage(tuple(blocks), tuple(left), sum(p.numel() for p in trainable.values()))


def _why_not(
    name: str,
    module: nn.Module,
    own: Sequence[nn.Parameter],
    owners: Mapping[int, int],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> str | None:
    if any(owners[id(p)] > 1 for p in own):
        return "weights tied between modules"
    if form_of(module) is None:
        return f"no layer form for {type(module).__name__}"
    if exclude and any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    return None


def probe(module: nn.Module, objective: Objective, coverage: Coverage, batch: Any, size: int) -> Coverage:
    """Check every block on a real batch; blocks that do not account for their weights' gradient are left out.

    Two checks, so that no layout or unusual use of a weight is guessed at: the captured gradients of all examples must
    add up to autograd's weight gradient, and an example's own loss must reach only its own rows.

    Raises:
        MisconfigurationException: no block is left.
    """
    reasons: dict[str, str] = {}
    blocks = list(coverage.blocks)
    while blocks:
        recording = Recording(module, blocks)
        losses = objective.evaluate(batch, size, recording)
        target = losses.recognised  # a penalty on the weights is not data
        last = _last_example(losses) if size > 1 and losses.calls else None
        parameters = {clean_name(n): p for n, p in module.named_parameters() if p.requires_grad}
        try:
            captured = recording.captured(target, size, retain_graph=True)
            one = {} if last is None else recording.captured(last, size, retain_graph=True)
            everything = recording.captured(losses.loss, size, retain_graph=True) if losses.calls else {}
        except ValueError as error:
            name = str(error).split("`")[1]
            bad = [b.name for b in blocks if b.module == name]
            reasons |= dict.fromkeys(bad, str(error).split(": ", 1)[1])
            blocks = [b for b in blocks if b.name not in bad]
            continue
        wanted = [name for b in blocks for name in b.parameters]
        found = torch.autograd.grad(target, [parameters[n] for n in wanted], allow_unused=True)
        gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
        for block in blocks:
            tolerance = HALF_TOLERANCE if block.module in recording.half else TOLERANCE
            reason = _mismatch(block, captured.get(block.name), gradients, tolerance) or _mixing(one.get(block.name))
            if reason is None and block.name not in captured and block.module in recording.without_gradient:
                reason = "its output carries no gradient (reentrant checkpointing, or torch.no_grad)"
            if reason:
                reasons[block.name] = reason
        unknown = _unknown_share(everything, captured)
        if unknown > HALF_TOLERANCE:
            rank_zero_warn(
                f"Part of the loss in `{type(module).__name__}.training_step` was not recognised, {unknown:.0%} of its"
                " gradient at the layers, and no score counts it. HINT: use torch's losses, or define"
                " `attribution_losses(batch)` on the module."
            )
        break
    checked = coverage.without(reasons)
    if not checked.blocks:
        raise MisconfigurationException(
            f"`{type(module).__name__}` has no layer whose gradients can be attributed.\n  {checked.summary()}"
        )
    return checked


def _unknown_share(everything: Mapping[str, Captured], known: Mapping[str, Captured]) -> float:
    """Norm of the layers' output gradients that known elements do not explain, over that of all."""
    total, rest = 0.0, 0.0
    for name, one in everything.items():
        total += float(one.gradients.square().sum())
        rest += float((one.gradients - known[name].gradients if name in known else one.gradients).square().sum())
    return (rest / total) ** 0.5 if total else 0.0


def _last_example(losses: Any) -> Tensor:
    total = losses.loss.new_zeros(())
    for call, scale in zip(losses.calls, losses.scales, strict=True):
        total = total + (losses.by_example(scale)[-1] * losses.by_example(call.elements)[-1]).sum()
    return total


def _mismatch(block: Block, captured: Captured | None, gradients: Mapping[str, Tensor], tolerance: float) -> str | None:
    present = {n: gradients[n] for n in block.parameters if n in gradients}
    if captured is None:
        return "used outside its layer's forward" if any(g.any() for g in present.values()) else None
    if len(present) < len(block.parameters):
        return "its layer ran but its parameters got no gradient"
    expected = block.matrix(present)
    a, g = (x.flatten(1, 2) for x in captured)
    error = (g.mT @ a - expected).norm()
    if error > tolerance * expected.norm() + 1e-12:
        return f"captured gradient differs from autograd's by {float(error / expected.norm()):.1%}"
    return None


def _mixing(captured: Captured | None) -> str | None:
    if captured is None:
        return None
    norms = captured.gradients.square().sum((0, 2, 3))
    if norms[:-1].max() > TOLERANCE**2 * norms[-1]:
        return "examples of a batch influence each other's rows"
    return None
