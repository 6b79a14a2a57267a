"""Parameters of modules that have no form: the module's own use of them is repeated one example at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, grad

from lightning_source.curvature.batched_autograd import batched_rows
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.contract import Block, Call, LayerForm
from lightning_source.layers.forms import captured_vectors
from lightning_source.layers.registry import register_layer


class Use(NamedTuple):
    """One call of a module, its tensors detached."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@register_layer()
class LocalForm(LayerForm[nn.Module]):
    """One vector block for a parameter, like :class:`~lightning_source.layers.free.FreeForm` but from its module alone.

    Given the module's input and the gradient at its output, the module's own backward gives an example's gradient
    without the rest of the network: norms of other libraries, learned scales, recurrent layers, an embedding of patches
    with its class token. The module must take one tensor, laid out by example.
    """

    local = True
    joint = False

    def keep(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Use:
        """All that is needed to call the module again."""
        args, kwargs = apply_to_collection((args, kwargs), Tensor, Tensor.detach)
        return Use(module, args, kwargs)

    def outputs(self, output: object) -> list[Tensor]:
        """All tensors in the module's output."""
        return tensors_of(output)

    def combine(self, block: Block, module: nn.Module, calls: Sequence[Call], examples: int) -> BlockGradients:
        """The sum over the module's calls."""
        assert block.weight is not None
        key = block.weight.removeprefix(f"{block.module}.")
        rows = [_gradients(call, key, examples, block.layout) for call in calls]
        return captured_vectors(torch.stack(rows).sum(0))


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in a module's arguments or output, in a fixed order."""
    tensors: list[Tensor] = []
    apply_to_collection(value, Tensor, tensors.append)
    return tensors


def _gradients(call: Call, key: str, examples: int, layout: int) -> Tensor:
    """Every example's gradient of the parameter ``key`` of the module that was called, ``[B, entries]``."""
    use: Use = call.inputs
    given = tensors_of((use.args, use.kwargs))
    if len(given) != 1:  # a second one, such as a mask, may be every example's
        raise ValueError(f"no layer form for {type(use.module).__name__}, which was given {len(given)} tensors")
    parameter = use.module.get_parameter(key).detach()

    def product(value: Tensor, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """``⟨output, its gradient⟩`` of one example, whose gradient by ``value`` is the example's."""
        if layout:
            inputs, output_gradient = inputs.unsqueeze(1), output_gradient.unsqueeze(1)
        args, kwargs = apply_to_collection((use.args, dict(use.kwargs)), Tensor, lambda _: inputs)
        outputs = tensors_of(functional_call(use.module, {key: value}, args, kwargs))
        return (outputs[call.output] * output_gradient).sum()

    gradient_of = partial(grad(product), parameter)
    rows = _by_example(given[0], examples, layout), _by_example(call.gradients, examples, layout)
    try:
        by_example = batched_rows(gradient_of, *rows)
    except RuntimeError as error:
        raise ValueError(f"{type(use.module).__name__} cannot be run on a single example: {error}") from error
    return by_example.reshape(examples, -1)


def _by_example(values: Tensor, examples: int, layout: int) -> Tensor:
    """``[B, rows of an example, ...]``; from sequences before examples (layout 1), ``[B, T, ...]``."""
    if layout and values.dim() > 1 and values.shape[1] == examples:
        return values.movedim(1, 0)
    if not layout and values.dim() and values.shape[0] and values.shape[0] % examples == 0:
        return values.unflatten(0, (examples, -1))
    raise ValueError(f"its tensor of shape {tuple(values.shape)} is not laid out by the batch's {examples} examples")
