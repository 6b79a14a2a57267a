"""How a module becomes blocks in the one internal format (:mod:`lightning_source.factors`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_source.factors import Captured

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def clean_name(name: str) -> str:
    """A module's or parameter's name without what wrappers (compile, checkpointing, FSDP) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class LayerForm(Protocol):
    """One kind of layer whose weight gradient is ``Σ_t g_t a_tᵀ``: what a file in this package provides.

    ``module`` has a parameter ``weight`` and may have ``bias`` (``None`` if absent), one entry an output feature.
    """

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """``(parts, outputs a part, inputs a part)``, the bias not counted."""
        ...

    def activations(self, module: nn.Module, inputs: Tensor, examples: int) -> Tensor:
        """The forward's input as ``[P, B, T, I]``."""
        ...

    def gradients(self, module: nn.Module, gradients: Tensor, examples: int) -> Tensor:
        """A gradient shaped like the forward's output as ``[P, B, T, O]``."""
        ...


_FORMS: dict[type[nn.Module], LayerForm] = {}
Form = TypeVar("Form", bound=type)


def register(*kinds: type[nn.Module]) -> Callable[[Form], Form]:
    """Class decorator: the decorated :class:`LayerForm` serves these module classes and their subclasses."""

    def enter(form: Form) -> Form:
        _FORMS.update(dict.fromkeys(kinds, form()))
        return form

    return enter


def form_of(module: nn.Module) -> LayerForm | None:
    """The form for a module, found along its class's bases; ``None`` where there is none."""
    return next((_FORMS[kind] for kind in type(module).__mro__ if kind in _FORMS), None)


@dataclass(frozen=True)
class Block:
    """One attributed parameter matrix, or stack of equally shaped ones: the unit of curvature.

    Weight and bias share a block while one optimizer group holds both; otherwise each is a block of its own, since
    learning rate and weight decay belong to the block.
    """

    name: str  # the module's name, with ".weight" or ".bias" if the block holds only that
    module: str  # the module's clean name
    weight: str | None  # clean name of the weight parameter, if the block holds it
    bias: str | None  # clean name of the bias parameter, if the block holds it
    group: int  # index over the optimizers' parameter groups
    shape: tuple[int, int, int]  # (P, O, I), the bias column counted

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the block holds."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def numel(self) -> int:
        """Number of scalars in the block."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def size_of(self, parameter: str) -> int:
        """Number of scalars of one of the block's parameters."""
        bias = self.shape[0] * self.shape[1]
        return bias if parameter == self.bias else self.numel - (bias if self.bias else 0)

    def capture(self, form: LayerForm, module: nn.Module, inputs: Tensor, gradients: Tensor, size: int) -> Captured:
        """One call of the layer in the internal format.

        Args:
            form: the layer's form.
            module: the layer.
            inputs: what its forward got.
            gradients: gradient at its output.
            size: number of examples in the batch.
        """
        g = form.gradients(module, gradients, size)
        a = form.activations(module, inputs, size) if self.weight else g.new_empty(*g.shape[:3], 0)
        # They may differ under autocast, and what is computed of them needs more than half precision.
        dtype = torch.promote_types(torch.promote_types(a.dtype, g.dtype), torch.float32)
        a, g = a.to(dtype), g.to(dtype)
        if self.bias:
            a = torch.cat([a, a.new_ones(*a.shape[:3], 1)], dim=-1)
        return Captured(a, g)

    def matrix(self, values: dict[str, Tensor]) -> Tensor:
        """Parameter-shaped ``values`` (parameters or their gradients, by name) as the block's ``[P, O, I]``."""
        parts, outputs, _ = self.shape
        return torch.cat([values[name].reshape(parts, outputs, -1) for name in self.parameters], dim=-1)


def blocks_of(name: str, module: nn.Module, group_of: Callable[[nn.Parameter], int | None]) -> Sequence[Block]:
    """The blocks of a module that has a form; parameters for which ``group_of`` gives ``None`` are left out."""
    form = form_of(module)
    assert form is not None
    parts, outputs, inputs = form.shape(module)
    name = clean_name(name)
    held = {key: parameter for key, parameter in module.named_parameters(recurse=False) if key in ("weight", "bias")}
    groups = {key: group for key, parameter in held.items() if (group := group_of(parameter)) is not None}
    together = [list(groups)] if len(set(groups.values())) == 1 else [[key] for key in groups]
    prefix = f"{name}." if name else ""
    return [
        Block(
            name=(prefix + keys[0]) if len(keys) < len(held) else (name or type(module).__name__),
            module=name,
            weight=prefix + "weight" if "weight" in keys else None,
            bias=prefix + "bias" if "bias" in keys else None,
            group=groups[keys[0]],
            shape=(parts, outputs, inputs * ("weight" in keys) + ("bias" in keys)),
        )
        for keys in together
        if keys
    ]
