"""Transposed convolutions: a convolution's adjoint, so input and output gradient change their roles."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.contract import LayerForm
from lightning_source.layers.conv import by_position, check_images, patches
from lightning_source.layers.forms import captured_vectors
from lightning_source.layers.registry import register_layer


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeForm(LayerForm[_ConvTransposeNd]):
    """A position is an input pixel, which meets the patch of the output gradient that it was spread over.

    The weight, ``[in_channels, out_channels / groups, *kernel]``, therefore has input channels as inputs and entries
    of the patch as outputs, and the bias is no further input: its gradient is not made of patches. It is a vector.
    """

    joint = False

    def block_shape(self, module: _ConvTransposeNd, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(groups, out_channels / groups · kernel size, in_channels / groups)``, bias ``(1, out_channels, 1)``."""
        if bias:
            return 1, module.out_channels, 1
        return module.groups, module.weight[0].numel(), module.in_channels // module.groups

    def capture(
        self, module: _ConvTransposeNd, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """See :class:`~lightning_source.layers.LayerForm`."""
        check_images(module, inputs, examples)
        if bias:
            return captured_vectors(gradients.flatten(2).sum(2).unflatten(0, (examples, -1)).sum(1))
        assert isinstance(module.padding, tuple)  # a name such as "same" is for plain convolutions
        spread = patches(F.pad(gradients, [size for size in reversed(module.padding) for _ in "lr"]), module)
        for dim, size in enumerate(inputs.shape[2:], start=2):
            spread = spread.narrow(dim, 0, size)  # output padding beyond the stride leaves room for further windows
        return BlockGradients(by_position(inputs, module, examples), by_position(spread, module, examples))

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :class:`~lightning_source.layers.LayerForm`."""
        if weight is None:
            return super().matrix(shape, weight, bias)
        parts, outputs, inputs = shape
        return weight.reshape(parts, inputs, outputs).mT
