"""How a module becomes blocks in the one internal format (:mod:`lightning_source.curvature.block_gradients`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_source.curvature.block_gradients import BlockGradients, in_full_precision, join
from lightning_source.names import clean_name


class Call(NamedTuple):
    """One use of a layer, or of a parameter by itself, in a forward."""

    inputs: Any  # what the forward got: a tensor, or what the form's ``keep`` made of its arguments
    gradients: Tensor  # gradient at the output, shaped like it
    kind: Literal["layer", "linear", "embedding"] = "layer"  # a module's forward, or the function that was called
    start: int = 0  # the first row of the parameter that the function used
    bias: str | None = None  # clean name of the bias that a linear function used, if that is known
    padding: int | None = None  # the token whose row gets no gradient


class LayerForm(Protocol):
    """One kind of layer, which has a parameter ``weight`` and may have ``bias``: what a file in this package provides.

    :class:`MatrixForm` and :class:`VectorForm` leave only a few lines to write.
    """

    joint: bool  # whether one block can hold weight and bias

    def block_shape(self, module: nn.Module, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(P, O, I)`` of a block that holds the weight, the bias, or both."""
        ...

    def capture(
        self, module: nn.Module, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """One call of the layer in the internal format, from its input and the gradient at its output."""
        ...

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Parameter-shaped values in the block's layout ``[P, O, I]``."""
        ...


class MatrixForm:
    """A layer whose weight gradient is ``Σ_t g_t a_tᵀ``; the bias is one more input, which is always 1."""

    joint = True

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
    ) -> BlockGradients:
        """See :class:`LayerForm`."""
        g = self.gradients(module, gradients, examples)
        a = self.activations(module, inputs, examples) if weight else g.new_empty(*g.shape[:3], 0)
        return BlockGradients(torch.cat([a, a.new_ones(*a.shape[:3], 1)], dim=-1) if bias else a, g)

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :class:`LayerForm`."""
        parts, outputs, _ = shape
        columns = [] if weight is None else [self.weight_matrix(weight, parts, outputs)]
        return torch.cat(columns if bias is None else [*columns, bias.reshape(parts, outputs, 1)], dim=-1)


def captured_vectors(gradients: Tensor) -> BlockGradients:
    """Per-example gradients ``[B, entries]`` as outputs of one input that is always 1."""
    return BlockGradients(gradients.new_ones(1, len(gradients), 1, 1), gradients[None, :, None])


class VectorForm:
    """A layer that scales by ``weight`` and shifts by ``bias``: one full block of all its entries.

    Its per-example gradient is a vector, so the block is ``O`` entries by one input that is always 1, and the
    covariance of the gradients is the block's Fisher itself.
    """

    joint = True

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
    ) -> BlockGradients:
        """See :class:`LayerForm`."""
        g = self.rows(module, gradients, examples)
        pieces = [(g * self.rows(module, self.normalized(module, inputs), examples)).sum(1)] if weight else []
        return captured_vectors(torch.cat([*pieces, g.sum(1)] if bias else pieces, dim=-1))

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :class:`LayerForm`."""
        return torch.cat([v.flatten() for v in (weight, bias) if v is not None]).view(shape)


_FORMS: dict[type[nn.Module] | str, LayerForm] = {}
_BY_NAME: dict[str, LayerForm] = {}
Form = TypeVar("Form", bound=type)


def register_layer(*kinds: type[nn.Module] | str) -> Callable[[Form], Form]:
    """Class decorator: the decorated :class:`LayerForm` serves these module classes and their subclasses.

    A class of another library is given by its full name, ``"package.module.Class"``, so that nothing is imported.
    """

    def enter(form: Form) -> Form:
        instance = form()
        _FORMS.update(dict.fromkeys(kinds, instance))
        _BY_NAME[form.__name__] = instance
        return form

    return enter


def form_of(module: nn.Module) -> LayerForm | None:
    """The form for a module, found along its class's bases; ``None`` where there is none."""
    for kind in type(module).__mro__:
        if form := _FORMS.get(kind) or _FORMS.get(f"{kind.__module__}.{kind.__qualname__}"):
            return form
    return None


@dataclass(frozen=True)
class Block:
    """One attributed parameter matrix, or stack of equally shaped ones: the unit of curvature.

    Weight and bias share a block while one optimizer group holds both and the form can join them; otherwise each is a
    block of its own, since learning rate and weight decay belong to the block.
    """

    name: str  # the module's name, with ".weight" or ".bias" if the block holds only that
    module: str  # the module's clean name
    weight: str | None  # clean name of the weight parameter, if the block holds it
    bias: str | None  # clean name of the bias parameter, if the block holds it
    group: int  # index over the optimizers' parameter groups
    shape: tuple[int, int, int]  # (P, O, I), the bias column counted
    form: str  # class name of the layer's form
    sizes: tuple[int, ...]  # scalars of each parameter
    layout: int = 0  # the dimension of its layer's tensors that counts examples: 0, or 1 (sequence first)

    @property
    def functional(self) -> bool:
        """Whether it is captured where torch's functions use its parameters, and not by a hook on its module."""
        return getattr(_BY_NAME[self.form], "functional", False)

    @property
    def free(self) -> bool:
        """Whether its gradients are those of each example's own loss, since no form makes them of positions."""
        return getattr(_BY_NAME[self.form], "free", False)

    @property
    def local(self) -> bool:
        """Whether its gradients come from its module run again, one example at a time."""
        return getattr(_BY_NAME[self.form], "local", False)

    @property
    def indexed(self) -> bool:
        """Whether its inputs are one-hot rows over a vocabulary, kept as indices."""
        return getattr(_BY_NAME[self.form], "indexed", False)

    @property
    def repeats(self) -> bool:
        """Whether its layer's output must be repeated for each example to tell their gradients apart."""
        return hasattr(_BY_NAME[self.form], "repeat")

    def repeat(self, output: Tensor, examples: int) -> Tensor:
        """The output of a layer whose rows serve all examples, once for each of them."""
        form: Any = _BY_NAME[self.form]
        repeated: Tensor = form.repeat(output, examples, self.layout)
        return repeated

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the block holds."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def numel(self) -> int:
        """Number of scalars in the block."""
        return sum(self.sizes)

    def keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What must be remembered of its module's arguments."""
        keep = getattr(_BY_NAME[self.form], "keep", None)
        if keep is not None:
            return keep(*args, **kwargs)
        return (args[0] if args else kwargs["input"]).detach()

    def capture(self, module: nn.Module, calls: Sequence[Call], size: int) -> BlockGradients:
        """All uses in one forward in the internal format: each adds positions.

        Args:
            module: the layer.
            calls: its uses.
            size: number of examples in the batch.

        Raises:
            ValueError: an input is not laid out by example.
        """
        form = _BY_NAME[self.form]
        if self.layout and not self.local:
            calls = [
                call._replace(
                    inputs=_examples_first(call.inputs, size), gradients=_examples_first(call.gradients, size)
                )
                for call in calls
            ]
        combine = getattr(form, "combine", None)
        if combine is not None:
            found: BlockGradients = combine(self, calls, size)
            return in_full_precision(found)
        held = self.weight is not None, self.bias is not None
        pieces = [form.capture(module, call.inputs, call.gradients, size, *held) for call in calls]
        return join([in_full_precision(piece) for piece in pieces], dim=2)

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped ``values`` (parameters or their gradients, by name) as the block's ``[P, O, I]``."""
        weight, bias = (None if name is None else values[name] for name in (self.weight, self.bias))
        return _BY_NAME[self.form].matrix(self.shape, weight, bias)


def _examples_first(x: Any, examples: int) -> Tensor:
    """``[T, B, ...]``, or rows ``[T · B, F]``, as ``[B, T, ...]``."""
    rows = isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()  # else its last dimension is no feature
    if isinstance(x, Tensor) and not rows and x.dim() > 1 and x.shape[1] == examples:
        return x.transpose(0, 1)
    if rows and not x.shape[0] % examples:
        return x.unflatten(0, (-1, examples)).transpose(0, 1)
    raise ValueError(f"its input has no second dimension that counts the batch's {examples} examples")


def blocks_of(name: str, module: nn.Module, group_of: Callable[[nn.Parameter], int | None]) -> Sequence[Block]:
    """The blocks of a module that has a form; parameters for which ``group_of`` gives ``None`` are left out."""
    form = form_of(module)
    assert form is not None
    name = clean_name(name)
    if own := getattr(form, "blocks", None):  # its parameters are not `weight` and `bias`
        found: Sequence[Block] = own(name, module, group_of)
        return found
    held = {key: parameter for key, parameter in module.named_parameters(recurse=False) if key in ("weight", "bias")}
    groups = {key: group for key, parameter in held.items() if (group := group_of(parameter)) is not None}
    together = [list(groups)] if form.joint and len(set(groups.values())) == 1 else [[key] for key in groups]
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
