"""What is read off one call of a loss, and which calls can be read.

:func:`register_loss` enters a reader for a function; :mod:`lightning_source.capture.losses` has those of torch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor

# ``(weights, tangents) -> products``: each tangent ``[Q, *output.shape]`` times the Fisher matrix ``E[∇ℓ ∇ℓᵀ]`` of the
# sampled elements with respect to the outputs, each element weighted (``weights`` are shaped like ``elements``).
Information = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


@dataclass
class LossCall:
    """One recognised loss call.

    ``value`` is ``elements.sum() / weights.sum()`` for ``reduction="mean"``, ``elements.sum()`` for ``"sum"``. All
    tensors below have the shape of ``elements``.
    """

    name: str
    reduction: str  # the user's: "mean" | "sum" | "none"
    elements: Tensor  # the loss with reduction="none", all of the user's arguments applied
    weights: Tensor  # what "mean" divides by, element by element; 0 where the target is ignored
    curvature: Tensor  # Gauss-Newton matrix of an element over that of its sampled form
    sample: Callable[[torch.Generator], Tensor]  # elements with labels drawn from the model
    margin: Callable[[], Tensor] | None = None  # log(p / (1 - p)) of the target, if the target is a class
    log_prob: Callable[[], Tensor] | None = None  # log-likelihood of the target
    outputs: tuple[Tensor, ...] = ()  # what the network put in, up to a constant
    information: Information | None = None  # of the outputs; None where it is only known by sampling

    @property
    def normalizer(self) -> Tensor:
        """What the user's reduction divided the sum of elements by."""
        total = self.weights.sum() if self.reduction == "mean" else self.weights.new_ones(())
        return torch.where(total == 0, 1.0, total)  # a batch of ignored targets only

    @property
    def value(self) -> Tensor:
        """What the user's call returns."""
        return self.elements if self.reduction == "none" else self.elements.sum() / self.normalizer


class LossArguments(TypedDict, total=False):
    """A call's arguments by name: those that the function has, defaults filled in."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    pos_weight: Tensor | None
    delta: float
    beta: float
    var: Tensor | float
    full: bool
    eps: float
    log_input: bool
    log_target: bool


LossFunction = Callable[..., Tensor]
Reader = Callable[[LossArguments], LossCall | None]
_READERS: dict[Callable[..., object], tuple[inspect.Signature, Reader]] = {}


def register_loss(function: LossFunction) -> Callable[[Reader], Reader]:
    """Decorator: the decorated function reads calls of ``function``, given its bound arguments.

    Torch shows calls of its own functions; one written in Python needs :func:`torch.overrides.wrap_torch_function`.
    ``CONTRIBUTING.md`` has an example.
    """

    def enter(reader: Reader) -> Reader:
        _READERS[function] = (inspect.signature(function), reader)
        return reader

    return enter


def read_call(function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> LossCall | None:
    """The call as a :class:`LossCall`; ``None`` if it is not one of a loss that is known here as a likelihood."""
    if function not in _READERS:
        return None
    signature, reader = _READERS[function]
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        mean, reduce = arguments["size_average"], arguments["reduce"]
        arguments["reduction"] = "none" if reduce is False else "sum" if mean is False else "mean"
    return reader(cast(LossArguments, arguments))


def unreduced(function: LossFunction, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """The elements of a call that :func:`read_call` may know, without looking at values: for use under ``vmap``."""
    if function not in _READERS:
        return None
    bound = _READERS[function][0].bind(*args, **kwargs)
    arguments = bound.arguments | {"reduction": "none"}
    return function(**{name: value for name, value in arguments.items() if name not in ("size_average", "reduce")})


def diagonal(information: Tensor | float) -> Information:
    """Of one output that has its own information for each element."""
    return lambda weights, tangents: [weights * information * tangents[0]]
