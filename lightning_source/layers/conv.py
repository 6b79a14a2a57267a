"""``nn.Conv2d`` with every padding mode, stride, dilation and number of groups, unfolded into positions."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_source.layers.registry import MatrixForm, register


@register(nn.Conv2d)
class Conv2dForm(MatrixForm):
    """A position is an output pixel, a part is a group; inputs are ordered as in ``weight.flatten(1)``."""

    def shape(self, module: nn.Conv2d) -> tuple[int, int, int]:
        """``(groups, out_channels / groups, in_channels / groups · kernel area)``."""
        return module.groups, module.out_channels // module.groups, module.weight[0].numel()

    def activations(self, module: nn.Conv2d, inputs: Tensor, examples: int) -> Tensor:
        """``[B, C, H, W]`` as ``[groups, B, positions, C / groups · kernel area]``."""
        _check(inputs, examples)
        # The module pads explicitly for the other modes, and (for "same") by what this attribute says in any mode.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        return patches.view(examples, module.groups, -1, patches.shape[-1]).permute(1, 0, 3, 2)

    def gradients(self, module: nn.Conv2d, gradients: Tensor, examples: int) -> Tensor:
        """``[B, O, H', W']`` as ``[groups, B, positions, O / groups]``."""
        _check(gradients, examples)
        return gradients.reshape(examples, module.groups, -1, gradients[0, 0].numel()).permute(1, 0, 3, 2)


def _check(x: Tensor, examples: int) -> None:
    if x.dim() != 4 or x.shape[0] != examples:
        raise ValueError(f"its input of shape {tuple(x.shape)} is not [batch of {examples}, channels, height, width]")
