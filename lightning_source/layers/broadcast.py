"""Bare parameters that enter the forward by broadcasting: position tables, class tokens, scales, gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_source.curvature.batched_autograd import batched_gradients
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.contract import Block, Call, LayerForm
from lightning_source.layers.forms import captured_vectors
from lightning_source.layers.registry import register_layer


@register_layer()
class BroadcastForm(LayerForm[nn.Module]):
    """One vector block for a parameter, like :class:`~lightning_source.layers.free.FreeForm`, from where it enters.

    In ``x + self.w`` or ``x * self.g`` one value serves all examples, and autograd adds up their gradients. Passes
    therefore spread the operand over the examples as a view (``capture.broadcasts``): the values are the same, and the
    gradient comes by example, in the one backward of the batch. What is made of the parameter alone before it enters,
    slices and ``self.gate.sigmoid()``, is differentiated by itself.
    """

    broadcasts = True
    joint = False

    def combine(self, block: Block, module: nn.Module, calls: Sequence[Call], examples: int) -> BlockGradients:
        """The sum over the places where the parameter enters; ``inputs`` of a call are operand and parameter."""
        rows = []
        for call in calls:
            operand, parameter = call.inputs
            found = _of_parameter(operand, parameter, call.gradients, examples, block.layout)
            rows.append(found.reshape(examples, -1))
        return captured_vectors(torch.stack(rows).sum(0))


def _of_parameter(operand: Tensor, parameter: Tensor, gradients: Tensor, examples: int, layout: int) -> Tensor:
    """Every example's gradient of the parameter, ``[B, *shape]``, from that of the operand spread over the examples."""
    by_example = gradients.movedim(layout, 0) if layout else gradients
    if len(by_example) != examples:
        raise ValueError(f"its operand of shape {tuple(gradients.shape)} is not laid out by the {examples} examples")
    # Without the examples' dimension the operand has the result's dimensions, or fewer, or 1 where it was spread.
    shape = list(operand.shape)
    if len(shape) == gradients.dim():
        del shape[layout]
    if shape:
        by_example = torch.stack([one.sum_to_size(shape) for one in by_example])
    else:  # one number, which may meet one number an example
        by_example = by_example.reshape(examples, -1).sum(1)
    by_example = by_example.reshape(examples, *operand.shape)
    if operand is parameter:
        return by_example
    (found,) = batched_gradients([operand], [parameter], [by_example.to(operand.dtype)])
    if found is None:
        raise ValueError("the value that enters does not depend on it")
    return found
