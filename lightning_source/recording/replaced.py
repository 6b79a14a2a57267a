"""Parameters that a layer stops using while training goes on: pruned, parametrized, or put another one in place of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_source._lightning import rank_zero_warn
from lightning_source.capture.coverage import Coverage, listed
from lightning_source.names import clean_name


class Replaced(NamedTuple):
    """A parameter that its layer no longer uses as it is."""

    size: int  # number of scalars
    reason: str


class UsedParameters:
    """What a module's layers use under the names that its parameters had at first.

    ``torch.nn.utils.prune`` and parametrizations rename a parameter, and compute what the layer uses of it: the network
    is then that of the computed values.

    Attributes:
        replaced: parameters that layers no longer use as they are, by name.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.replaced: dict[str, Replaced] = {}
        self._module = module
        self._places: dict[str, tuple[nn.Module, str, Tensor]] = {}

    def follow(self, names: Iterable[str]) -> None:
        """Follow these parameters, named without what wrappers add, and no others."""
        found: dict[str, tuple[nn.Module, str, Tensor]] = {}
        for prefix, owner in self._module.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                found.setdefault(clean_name(f"{prefix}.{leaf}" if prefix else leaf), (owner, leaf, parameter))
        # One that has another name by now keeps its place.
        self._places = {name: found.get(name) or self._places[name] for name in names}

    def values(self) -> dict[str, Tensor]:
        """The values that the layers use now, by name."""
        return {name: self._value(name, *place) for name, place in self._places.items()}

    def _value(self, name: str, owner: nn.Module, leaf: str, parameter: Tensor) -> Tensor:
        if isinstance(owner, torch.jit.ScriptModule):  # its parameters cannot be exchanged
            return parameter
        now: object = owner._parameters.get(leaf)
        if now is parameter:
            return parameter
        # Pruning sets the masked weight as a plain attribute. A parametrization computes it whenever it is read, which
        # may write to the module, so nothing of it is read here.
        used = owner.__dict__.get(leaf) if now is None else now
        if isinstance(used, Tensor) and used.shape == parameter.shape:
            self._name(name, parameter, "its layer uses other values, computed of it or put in its place")
            return used
        self._name(name, parameter, "its layer computes what it uses of it, and that is not recorded")
        return parameter

    def _name(self, name: str, parameter: Tensor, reason: str) -> None:
        self.replaced.setdefault(name, Replaced(parameter.numel(), reason))


def without_replaced(
    coverage: Coverage | None, replaced: Mapping[str, Replaced], columns: Iterable[Iterable[str]], step: int
) -> Coverage | None:
    """The coverage without blocks of replaced parameters, which have no gradients of their own; each is named once.

    Args:
        coverage: as it was; ``None`` where it is not known yet.
        replaced: by name.
        columns: names of the parameters that the optimizer steps.
        step: how many steps have been made.
    """
    if coverage is None or not replaced:
        return coverage
    held = {block.name: replaced[n] for block in coverage.blocks for n in block.parameters if n in replaced}
    left = coverage.without({name: why.reason for name, why in held.items()})
    known = {name for name, _, _ in left.left_out}
    # Blocks found since a parameter was replaced do not know its name.
    others = [(name, *replaced[name]) for name in itertools.chain(*columns) if name in replaced and name not in known]
    left = Coverage(left.blocks, (*left.left_out, *others), left.trainable + sum(size for _, size, _ in others))
    if held:
        rank_zero_warn(
            f"SourceCallback: from step {step} on, {listed([*held])} cannot be attributed, since"
            f" {next(iter(held.values())).reason} (pruning, say, or a parametrization): {left.share:.0%} of the trained"
            " parameters are left."
        )
    return left
