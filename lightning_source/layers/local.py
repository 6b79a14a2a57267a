"""Parameters of modules that have no form: the module's own use of them is repeated one example at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, grad

from lightning_source.curvature.batched_autograd import batched_rows
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.registry import Block, Call, captured_vectors, register_layer


class Use(NamedTuple):
    """One call of a module, and which tensor of its output the gradient belongs to."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: int


class LocalForm:
    """One vector block for a parameter, like :class:`~lightning_source.layers.free.FreeForm` but from its module alone.

    Given the module's input and the gradient at its output, the module's own backward gives an example's gradient
    without the rest of the network: norms of other libraries, learned scales, recurrent layers, an embedding of patches
    with its class token. The module must take one tensor, laid out by example.
    """

    local = True
    joint = False

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The entries in a column."""
        assert weight is not None
        return weight.reshape(shape)

    def combine(self, block: Block, calls: Sequence[Call], examples: int) -> BlockGradients:
        """The sum over the module's calls."""
        assert block.weight is not None
        key = block.weight.removeprefix(f"{block.module}.")
        rows = [_gradients(call.inputs, key, call.gradients, examples, block.layout) for call in calls]
        return captured_vectors(torch.stack(rows).sum(0))


register_layer()(LocalForm)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a module's arguments or output, in a fixed order."""
    found: list[Tensor] = []
    apply_to_collection(value, Tensor, found.append)
    return found


def _gradients(use: Use, key: str, gradients: Tensor, examples: int, layout: int) -> Tensor:
    """Every example's gradient with respect to the module's parameter ``key``, ``[B, entries]``."""
    given = tensors_of((use.args, use.kwargs))
    if len(given) != 1:  # a second one, such as a mask, may be every example's
        raise ValueError(f"no layer form for {type(use.module).__name__}, which was given {len(given)} tensors")
    parameter = use.module.get_parameter(key).detach()

    def product(value: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
        x, g = (y.unsqueeze(1) if layout else y for y in (inputs, gradient))
        args, kwargs = apply_to_collection((use.args, dict(use.kwargs)), Tensor, lambda _: x)
        return (tensors_of(functional_call(use.module, {key: value}, args, kwargs))[use.output] * g).sum()

    gradient_of = partial(grad(product), parameter)
    rows = _by_example(given[0], examples, layout), _by_example(gradients, examples, layout)
    try:
        by_example = batched_rows(gradient_of, *rows)
    except RuntimeError as error:
        raise ValueError(f"{type(use.module).__name__} cannot be run on a single example: {error}") from error
    return by_example.reshape(examples, -1)


def _by_example(x: Tensor, examples: int, layout: int) -> Tensor:
    """``[B, rows of an example, ...]``; from sequences before examples (layout 1), ``[B, T, ...]``."""
    if layout and x.dim() > 1 and x.shape[1] == examples:
        return x.movedim(1, 0)
    if not layout and x.dim() and x.shape[0] and x.shape[0] % examples == 0:
        return x.unflatten(0, (examples, -1))
    raise ValueError(f"its tensor of shape {tuple(x.shape)} is not laid out by the batch's {examples} examples")
