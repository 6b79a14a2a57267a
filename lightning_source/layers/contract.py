"""What a kind of layer may define: :class:`LayerForm`, with a default for all that most kinds do alike.

A form turns what a layer got and gave in one forward into blocks in the one internal format
(:mod:`lightning_source.curvature.block_gradients`). :class:`~lightning_source.layers.forms.MatrixForm` and
:class:`~lightning_source.layers.forms.VectorForm` leave only a few lines to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_source.curvature.block_gradients import BlockGradients, in_full_precision, join

ModuleT = TypeVar("ModuleT", bound=nn.Module)
GroupOf = Callable[[nn.Parameter], "int | None"]  # a parameter's optimizer group; None where it is not attributed


class Call(NamedTuple):
    """One use of a layer, or of a parameter by itself, in a forward."""

    inputs: Any  # what the form's ``keep`` made of the forward's arguments: for most kinds, a tensor
    gradients: Tensor  # gradient at the output, shaped like it
    kind: Literal["layer", "linear", "embedding"] = "layer"  # a module's forward, or the function that was called
    start: int = 0  # the first row of the parameter that the function used
    bias: str | None = None  # clean name of the bias that a linear function used, if that is known
    padding: int | None = None  # the token whose row gets no gradient
    output: int = 0  # which of the form's ``outputs`` the gradient belongs to


class LayerForm(Generic[ModuleT]):
    """One kind of layer: how its parameters become blocks, and how these are captured.

    A layer has a parameter ``weight`` and may have ``bias``, unless :meth:`blocks` says otherwise. A form that serves
    modules must define :meth:`block_shape`, and :meth:`capture` or :meth:`combine`; all else has a default.

    Attributes:
        joint: whether one block can hold weight and bias.
        indexed: whether its inputs are one-hot rows over a vocabulary, kept as indices.
        functional: whether it is captured where torch's functions use its parameters, not by a hook on its module.
        free: whether its gradients are those of each example's own loss, from a backward through the whole network.
        local: whether its gradients come from its module run again; its calls are then laid out as the module had them.
        broadcasts: whether it is captured where its parameter meets the batch in an elementwise function.
        repeats: whether its output must be repeated for each example to tell their gradients apart (:meth:`repeat`).
        weight_function: the torch function of whose one call on the weight its forward consists, if that is so. Such
            layers can share a weight with each other.
        representation: whether its input stands for the example, so that ``method="repsim"`` may compare it.
    """

    joint: bool = True
    indexed: bool = False
    functional: bool = False
    free: bool = False
    local: bool = False
    broadcasts: bool = False
    repeats: bool = False
    weight_function: Literal["linear", "embedding"] | None = None
    representation: bool = False

    def block_shape(self, module: ModuleT, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(P, O, I)`` of a block that holds the weight, the bias, or both."""
        raise NotImplementedError(f"`{type(self).__name__}` defines no `block_shape`")

    def blocks(self, name: str, module: ModuleT, group_of: GroupOf) -> list[Block]:
        """The blocks of a module: weight and bias in one where they are joint and one optimizer group holds both.

        Args:
            name: the module's clean name.
            module: the layer.
            group_of: a parameter's optimizer group; one for which it gives ``None`` is left out.
        """
        held = {key: p for key, p in module.named_parameters(recurse=False) if key in ("weight", "bias")}
        groups = {key: group for key, parameter in held.items() if (group := group_of(parameter)) is not None}
        together = [list(groups)] if self.joint and len(set(groups.values())) == 1 else [[key] for key in groups]
        prefix = f"{name}." if name else ""
        return [
            Block(
                name=(prefix + keys[0]) if len(keys) < len(held) else (name or type(module).__name__),
                module=name,
                weight=prefix + "weight" if "weight" in keys else None,
                bias=prefix + "bias" if "bias" in keys else None,
                group=groups[keys[0]],
                shape=self.block_shape(module, "weight" in keys, "bias" in keys),
                form=type(self).__name__,
                sizes=tuple(held[key].numel() for key in keys),
            )
            for keys in together
            if keys
        ]

    def attempts(self, block: Block, network: nn.Module) -> list[Block]:
        """The ways to capture a block, in the order in which the probe tries them on a real batch.

        By default the block itself, with examples in the first dimension of its layer's tensors, then in the second.

        Args:
            block: a block of this form.
            network: the module that all of the blocks belong to.
        """
        return [block, replace(block, layout=1)]

    def keep(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """What must be remembered of the arguments of a forward: by default the first, which must be a tensor."""
        given = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if not isinstance(given, Tensor):
            raise TypeError(f"`{type(self).__name__}` expects a tensor first, got `{type(given).__name__}`")
        return given.detach()

    def outputs(self, output: object) -> list[Tensor]:
        """The tensors in a forward's output at which gradients are needed: by default one, which is the output."""
        return [output] if isinstance(output, Tensor) else []

    def repeat(self, inputs: Any, output: Tensor, examples: int, layout: int) -> tuple[Tensor, Tensor]:
        """For forms with ``repeats``: input and output of a layer whose rows serve all examples, once for each."""
        raise NotImplementedError(f"`{type(self).__name__}` defines no `repeat`")

    def capture(
        self, module: ModuleT, inputs: Any, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """One call of the layer in the internal format.

        Args:
            module: the layer.
            inputs: what :meth:`keep` made of its arguments.
            gradients: gradient at its output, shaped like it.
            examples: number of examples in the batch, ``B``.
            weight: whether the block holds the weight.
            bias: whether the block holds the bias.

        Returns:
            Activations ``[P, B, T, I]`` and gradients ``[P, B, T, O]``.

        Raises:
            ValueError: the input is not laid out by example.
        """
        raise NotImplementedError(f"`{type(self).__name__}` defines neither `capture` nor `combine`")

    def combine(self, block: Block, module: ModuleT, calls: Sequence[Call], examples: int) -> BlockGradients:
        """All uses in one forward in the internal format: by default each is captured and adds its positions."""
        held = block.weight is not None, block.bias is not None
        pieces = [self.capture(module, call.inputs, call.gradients, examples, *held) for call in calls]
        return join([in_full_precision(piece) for piece in pieces], dim=2)

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Parameter-shaped values in the block's layout ``[P, O, I]``: by default all entries in a row."""
        return torch.cat([values.flatten() for values in (weight, bias) if values is not None]).view(shape)


AnyForm = LayerForm[Any]  # of whichever kind of module
forms_by_name: dict[str, AnyForm] = {}  # filled by `register_layer`; a block names its form


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
    def layer_form(self) -> AnyForm:
        """The form, which says how the block is captured.

        Raises:
            LookupError: no form of that name is registered in this process.
        """
        form = forms_by_name.get(self.form)
        if form is None:
            raise LookupError(
                f"`{self.name}` is a layer of the form `{self.form}`, which is not registered. HINT: import the file"
                " that registers it (`lightning_source.layers.register_layer`) first."
            )
        return form

    @property
    def free(self) -> bool:
        """Whether its gradients are those of each example's own loss, since no form makes them of positions."""
        return self.layer_form.free

    @property
    def indexed(self) -> bool:
        """Whether its inputs are one-hot rows over a vocabulary, kept as indices."""
        return self.layer_form.indexed

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the block holds."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def numel(self) -> int:
        """Number of scalars in the block."""
        return sum(self.sizes)

    def capture(self, module: nn.Module, calls: Sequence[Call], size: int) -> BlockGradients:
        """All uses in one forward in the internal format: each adds positions.

        Args:
            module: the layer.
            calls: its uses.
            size: number of examples in the batch.

        Raises:
            ValueError: an input is not laid out by example.
        """
        form = self.layer_form
        if self.layout and not (form.local or form.broadcasts):
            calls = [
                call._replace(
                    inputs=_examples_first(call.inputs, size), gradients=_examples_first(call.gradients, size)
                )
                for call in calls
            ]
        captured = in_full_precision(form.combine(self, module, calls, size))
        parts, examples, _, outputs, inputs = captured.shape
        known = (parts, outputs, inputs) == self.shape and examples == size
        if not known or captured.gradients.shape[:3] != captured.activations.shape[:3]:
            raise ValueError(
                f"`{self.form}` makes activations {tuple(captured.activations.shape)} and gradients"
                f" {tuple(captured.gradients.shape)} of it, which are no block {self.shape} of {size} examples"
            )
        return captured

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped ``values`` (parameters or their gradients, by name) as the block's ``[P, O, I]``."""
        weight, bias = (None if name is None else values[name] for name in (self.weight, self.bias))
        return self.layer_form.matrix(self.shape, weight, bias)


def _examples_first(given: object, examples: int) -> Tensor:
    """``[T, B, ...]``, or rows ``[T · B, F]``, as ``[B, T, ...]``."""
    if isinstance(given, Tensor):
        is_rows = given.dim() == 2 and given.is_floating_point()  # else its last dimension is no feature
        if not is_rows and given.dim() > 1 and given.shape[1] == examples:
            return given.transpose(0, 1)
        if is_rows and not given.shape[0] % examples:
            return given.unflatten(0, (-1, examples)).transpose(0, 1)
    raise ValueError(f"its input has no second dimension that counts the batch's {examples} examples")
