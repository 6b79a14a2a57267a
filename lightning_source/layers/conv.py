"""Convolutions in one to three dimensions with every option, unfolded into positions."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_source.layers.forms import MatrixForm
from lightning_source.layers.registry import register_layer


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvForm(MatrixForm[_ConvNd]):
    """A position is an output pixel, a part is a group; inputs are ordered as in ``weight.flatten(1)``."""

    def shape(self, module: _ConvNd) -> tuple[int, int, int]:
        """``(groups, out_channels / groups, in_channels / groups · kernel size)``."""
        return module.groups, module.out_channels // module.groups, module.weight[0].numel()

    def activations(self, module: _ConvNd, inputs: Tensor, examples: int) -> Tensor:
        """``[N, C, ...]`` as ``[groups, B, positions, C / groups · kernel size]``."""
        check_images(module, inputs, examples)
        # The module pads explicitly for the other modes, and (for "same") by what this attribute says in any mode.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        return by_position(patches(padded, module), module, examples)

    def gradients(self, module: _ConvNd, gradients: Tensor, examples: int) -> Tensor:
        """``[N, O, ...]`` as ``[groups, B, positions, O / groups]``."""
        check_images(module, gradients, examples)
        return by_position(gradients, module, examples)


def check_images(module: _ConvNd, images: Tensor, examples: int) -> None:
    """Refuse what has no batch dimension, or one that counts neither the examples nor equally many frames of each."""
    extent = len(module.kernel_size)
    if images.dim() != 2 + extent or images.shape[0] % examples:
        raise ValueError(
            f"its input of shape {tuple(images.shape)} is not [batch of {examples}, channels, {extent}-D image]"
        )


def patches(padded: Tensor, module: _ConvNd) -> Tensor:
    """What each position of the kernel's window sees, ``[N, C, *positions, *kernel]``: a view."""
    windows = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(windows, start=2):
        padded = padded.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return padded


def by_position(images: Tensor, module: _ConvNd, examples: int) -> Tensor:
    """``[N, C, *positions, *kernel]``, or without a kernel, as ``[groups, B, positions, C / groups · kernel size]``."""
    grouped = images.unflatten(1, (module.groups, -1))  # [N, groups, C / groups, *positions, *kernel]
    kernel = 3 + len(module.kernel_size)
    rows = grouped.permute(1, 0, *range(3, kernel), 2, *range(kernel, grouped.dim())).flatten(kernel - 1)
    return rows.reshape(module.groups, examples, -1, rows.shape[-1])
