"""Where bare parameters enter the forward by broadcasting: their operand is spread over the examples, as a view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Elementwise functions of two or three operands, by name; in-place and reflected ones reduce to these.
ELEMENTWISE = {"add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "truediv"}
ELEMENTWISE |= {"addcmul", "lerp", "where", "maximum", "minimum", "pow", "masked_fill"}
# Functions that make a value for each example of one that serves all.
SPREADING = {"expand", "expand_as", "repeat", "broadcast_to", "tile"}
# What neither uses a value nor makes one.
LOOKING = {
    "size",
    "dim",
    "numel",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "__get__",
    "__len__",
    "requires_grad",
}

Enter = Callable[[str, Tensor, Tensor, Tensor], None]  # name, tensor by example, operand, parameter
Escape = Callable[[str, str], object]  # name, by which function


class BroadcastTap(TorchFunctionMode):
    """Follows parameters, and what is made of them alone, to where they meet the batch.

    Args:
        parameters: those that are followed, by name.
        layouts: the dimension of each one's tensors that counts examples.
        examples: number of examples in the batch.
        enter: told of each value by example that a parameter enters with; the gradient there is the examples'.
        escape: told of a parameter that is used in a way that is not understood.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layouts: Mapping[str, int],
        examples: int,
        enter: Enter,
        escape: Escape,
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.layouts = layouts
        self.examples = examples
        self.enter = enter
        self.escape = escape
        # By id: the parameter that a value is made of, and the value, which must not be collected and its id used anew.
        self.followed: dict[int, tuple[str, Tensor]] = {id(p): (name, p) for name, p in parameters.items()}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors_in((*args, *kwargs.values()))
        own = [tensor for tensor in tensors if id(tensor) in self.followed]
        if not own:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        plain = name.strip("_").removeprefix("i" if name.startswith("__i") else "")
        plain = plain.removeprefix("r") if name.startswith("__r") else plain
        if plain in ELEMENTWISE and len(own) < len(tensors):
            return self._meet(function, args, kwargs, tensors, own)
        output = function(*args, **kwargs)
        if name in LOOKING or not isinstance(output, Tensor) or not output.requires_grad:
            if isinstance(output, (tuple, list)) and any(isinstance(one, Tensor) for one in output):
                self._escape(own, name)
            return output
        if len(own) < len(tensors) and plain not in SPREADING:  # a matrix product, say, with something of the batch
            self._escape(own, name)
        elif plain in SPREADING and self._serves_all(own[0], output.shape):
            self._enter(output, own[0])
        elif len({self.followed[id(tensor)][0] for tensor in own}) > 1:  # of two parameters together
            self._escape(own, name)
        else:
            self.followed[id(output)] = (self.followed[id(own[0])][0], output)
        return output

    def _meet(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        own: Sequence[Tensor],
    ) -> Any:
        """An elementwise function of the parameter's value and another: the value is spread over the examples."""
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        spread: dict[int, Tensor] = {}
        for operand in own:
            if not self._serves_all(operand, shape):
                self._escape(own, function.__name__)
                return function(*args, **kwargs)
            spread[id(operand)] = operand.expand(shape)
        args, kwargs = apply_to_collection((args, kwargs), Tensor, lambda tensor: spread.get(id(tensor), tensor))
        output = function(*args, **kwargs)
        for operand in own:
            self._enter(spread[id(operand)], operand)
        return output

    def _serves_all(self, value: Tensor, shape: Sequence[int]) -> bool:
        """Whether a value of which a tensor by example is made has no dimension for them, or one of length 1."""
        layout = self.layouts[self.followed[id(value)][0]]
        missing = len(shape) - value.dim()
        if len(shape) <= layout or shape[layout] != self.examples or 0 < missing <= layout:
            return False
        return missing > layout or value.shape[layout - missing] == 1

    def _enter(self, value: Tensor, operand: Tensor) -> None:
        parameter = self.followed[id(operand)][0]
        self.enter(parameter, value, operand, self.parameters[parameter])

    def _escape(self, own: Sequence[Tensor], function: str) -> None:
        for tensor in own:
            self.escape(self.followed[id(tensor)][0], function)


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists of them."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _tensors_in(value)
    return tensors
