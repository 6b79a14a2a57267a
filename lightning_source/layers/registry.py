"""How a module becomes blocks in the one internal format (:mod:`lightning_source.factors`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_source.factors import Captured

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def clean_name(name: str) -> str:
    """A module's or parameter's name without what wrappers (compile, checkpointing, FSDP) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class LayerForm(Protocol):
    """One kind of layer, which has a parameter ``weight`` and may have ``bias``: what a file in this package provides.

    :class:`MatrixForm` and :class:`VectorForm` leave only a few lines to write.
    """

    def block_shape(self, module: nn.Module, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(P, O, I)`` of a block that holds the weight, the bias, or both."""
        ...

    def capture(
        self, module: nn.Module, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> Captured:
        """One call of the layer in the internal format, from its input and the gradient at its output."""
        ...

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Parameter-shaped values in the block's layout ``[P, O, I]``."""
        ...


class MatrixForm:
    """A layer whose weight gradient is ``Σ_t g_t a_tᵀ``; the bias is one more input, which is always 1."""

    def shape(self, module: Any) -> tuple[int, int, int]:
        """``(parts, outputs a part, inputs a part)``, the bias not counted."""
        raise NotImplementedError

    def activations(self, module: Any, inputs: Tensor, examples: int) -> Tensor:
        """The forward's input as ``[P, B, T, I]``."""
        raise NotImplementedError

    def gradients(self, module: Any, gradients: Tensor, examples: int) -> Tensor:
        """A gradient shaped like the forward's output as ``[P, B, T, O]``."""
        raise NotImplementedError

    def weight_matrix(self, weight: Tensor, parts: int, outputs: int) -> Tensor:
        """The weight as ``[P, O, I]``."""
        return weight.reshape(parts, outputs, -1)

    def block_shape(self, module: Any, weight: bool, bias: bool) -> tuple[int, int, int]:
        """See :class:`LayerForm`."""
        parts, outputs, inputs = self.shape(module)
        return parts, outputs, inputs * weight + bias

    def capture(
        self, module: Any, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> Captured:
        """See :class:`LayerForm`."""
        g = self.gradients(module, gradients, examples)
        a = self.activations(module, inputs, examples) if weight else g.new_empty(*g.shape[:3], 0)
        return Captured(torch.cat([a, a.new_ones(*a.shape[:3], 1)], dim=-1) if bias else a, g)

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :class:`LayerForm`."""
        parts, outputs, _ = shape
        columns = [] if weight is None else [self.weight_matrix(weight, parts, outputs)]
        return torch.cat(columns if bias is None else [*columns, bias.reshape(parts, outputs, 1)], dim=-1)


class VectorForm:
    """A layer that scales by ``weight`` and shifts by ``bias``: one full block of all its entries.

    Its per-example gradient is a vector, so the block is ``O`` entries by one input that is always 1, and the
    covariance of the gradients is the block's Fisher itself.
    """

    def entries(self, module: Any) -> int:
        """Number of entries of the weight."""
        return module.weight.numel()

    def rows(self, module: Any, x: Tensor, examples: int) -> Tensor:
        """A tensor shaped like the forward's input or output as ``[B, T, entries]``."""
        raise NotImplementedError

    def normalized(self, module: Any, inputs: Tensor) -> Tensor:
        """What the weight multiplies, shaped like the input."""
        raise NotImplementedError

    def block_shape(self, module: Any, weight: bool, bias: bool) -> tuple[int, int, int]:
        """See :class:`LayerForm`."""
        return 1, self.entries(module) * (weight + bias), 1

    def capture(
        self, module: Any, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> Captured:
        """See :class:`LayerForm`."""
        g = self.rows(module, gradients, examples)
        pieces = [(g * self.rows(module, self.normalized(module, inputs), examples)).sum(1)] if weight else []
        vector = torch.cat([*pieces, g.sum(1)] if bias else pieces, dim=-1)
        return Captured(vector.new_ones(1, examples, 1, 1), vector.view(1, examples, 1, -1))

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :class:`LayerForm`."""
        return torch.cat([v.flatten() for v in (weight, bias) if v is not None]).view(shape)


_FORMS: dict[type[nn.Module], LayerForm] = {}
_BY_NAME: dict[str, LayerForm] = {}
Form = TypeVar("Form", bound=type)


def register(*kinds: type[nn.Module]) -> Callable[[Form], Form]:
    """Class decorator: the decorated :class:`LayerForm` serves these module classes and their subclasses."""

    def enter(form: Form) -> Form:
        instance = form()
        _FORMS.update(dict.fromkeys(kinds, instance))
        _BY_NAME[form.__name__] = instance
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
    form: str  # class name of the layer's form
    sizes: tuple[int, ...]  # scalars of each parameter

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the block holds."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def numel(self) -> int:
        """Number of scalars in the block."""
        return sum(self.sizes)

    def capture(self, module: nn.Module, inputs: Tensor, gradients: Tensor, size: int) -> Captured:
        """One call of the layer in the internal format.

        Args:
            module: the layer.
            inputs: what its forward got.
            gradients: gradient at its output.
            size: number of examples in the batch.
        """
        form = _BY_NAME[self.form]
        one = form.capture(module, inputs, gradients, size, self.weight is not None, self.bias is not None)
        # They may differ under autocast, and what is computed of them needs more than half precision.
        dtype = torch.promote_types(torch.promote_types(one.activations.dtype, one.gradients.dtype), torch.float32)
        return Captured(one.activations.to(dtype), one.gradients.to(dtype))

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped ``values`` (parameters or their gradients, by name) as the block's ``[P, O, I]``."""
        weight, bias = (None if name is None else values[name] for name in (self.weight, self.bias))
        return _BY_NAME[self.form].matrix(self.shape, weight, bias)


def blocks_of(name: str, module: nn.Module, group_of: Callable[[nn.Parameter], int | None]) -> Sequence[Block]:
    """The blocks of a module that has a form; parameters for which ``group_of`` gives ``None`` are left out."""
    form = form_of(module)
    assert form is not None
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
            shape=form.block_shape(module, "weight" in keys, "bias" in keys),
            form=type(form).__name__,
            sizes=tuple(held[key].numel() for key in keys),
        )
        for keys in together
        if keys
    ]
