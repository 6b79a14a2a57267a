"""Which parameters are attributed: found once, checked on a real batch, and reported with what is left out and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass

from torch import nn

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.isolation import thawed
from lightning_source.layers import Block, blocks_of
from lightning_source.layers.free import free_block
from lightning_source.layers.functional import tied_block
from lightning_source.names import clean_name, named_parameters, parameter_names

LISTED = 12  # names in a line of the log


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
        if free := [block.name for block in self.blocks if block.free]:
            lines.append(f"a backward for each example, as they have no layer form: {listed(free)}")
        reasons: dict[str, list[tuple[str, int]]] = {}
        for name, size, reason in self.left_out:
            reasons.setdefault(reason, []).append((name, size))
        for reason, items in reasons.items():
            share = sum(size for _, size in items) / self.trainable
            lines.append(f"not attributed, {share:.2%}: {listed([name for name, _ in items])} ({reason})")
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

    def to_json(self) -> dict[str, object]:
        """As a dictionary for the manifest."""
        return {
            "share": self.share,
            "trainable": self.trainable,
            "blocks": [asdict(block) for block in self.blocks],
            "left_out": [list(item) for item in self.left_out],
        }


def listed(names: Sequence[str]) -> str:
    """Names in a line; of many, the first few and where to see them all."""
    if len(names) <= LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more, which `lightning-source inspect` lists"


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
    names = parameter_names(module)
    trainable = {id(p): p for p in module.parameters() if id(p) in group_of and p.numel()}
    owners: dict[int, list[nn.Module]] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(child)
    blocks: list[Block] = []
    reasons: dict[int, str] = {}
    seen: set[int] = set()
    for name, child in module.named_modules():
        own = {id(p): p for p in child.parameters(recurse=False) if id(p) in trainable and id(p) not in seen}
        seen |= own.keys()
        complex_valued = {key for key, parameter in own.items() if parameter.is_complex()}
        reasons |= dict.fromkeys(complex_valued, "complex numbers")
        own = {key: parameter for key, parameter in own.items() if key not in complex_valued}
        if reason := _why_not(name, include, exclude):
            reasons |= dict.fromkeys(own, reason)
            continue
        tied = {key for key in own if len(owners[key]) > 1}
        formed = blocks_of(name, child, _only(own.keys() - tied, group_of))
        held = {parameter for block in formed for parameter in block.parameters}
        blocks += formed
        for key, parameter in own.items():
            if names[key] in held:
                continue
            if key in tied:
                block = tied_block(names[key], clean_name(name), parameter, owners[key], group_of[key])
                reason = "weights tied between modules"
            else:
                block = free_block(names[key], clean_name(name), parameter, group_of[key])
                reason = f"no layer form for {type(child).__name__}"
            if block is None:
                reasons[key] = reason
            else:
                blocks.append(block)
    left = [(names[key], trainable[key].numel(), reason) for key, reason in reasons.items()]
    return Coverage(tuple(blocks), tuple(left), sum(p.numel() for p in trainable.values()))


def find_trained_blocks(
    module: nn.Module,
    columns: Sequence[Sequence[str]],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Coverage:
    """:func:`find_blocks` of parameters that were trained once, whether or not they are frozen by now.

    Args:
        module: the LightningModule.
        columns: names of the trained parameters.
        include: see :func:`find_blocks`.
        exclude: see :func:`find_blocks`.

    Raises:
        MisconfigurationException: there is nothing to attribute, whatever the examples are.
    """
    own = named_parameters(module)
    # A parameter that its layer has stopped using has another name by now.
    groups = [[own[name] for name in column if name in own] for column in columns]
    with thawed(p for group in groups for p in group):
        coverage = find_blocks(module, groups, include, exclude)
    if not coverage.blocks:
        raise MisconfigurationException(
            f"`{type(module).__name__}` has no layer whose gradients can be attributed.\n  {coverage.summary()}"
        )
    return coverage


def _only(keys: Set[int], group_of: Mapping[int, int]) -> Callable[[nn.Parameter], int | None]:
    return lambda parameter: group_of[id(parameter)] if id(parameter) in keys else None


def _why_not(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str | None:
    if exclude and any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    if include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    return None
