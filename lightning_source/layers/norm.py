"""Normalisation layers: what their weight multiplies, and where the entries of the weight lie in a tensor."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_source.layers.contract import ModuleT
from lightning_source.layers.forms import VectorForm, not_by_example
from lightning_source.layers.registry import register_layer

LastDimensionsT = TypeVar("LastDimensionsT", nn.LayerNorm, nn.RMSNorm)


class _LastDimensions(VectorForm[LastDimensionsT]):
    """The weight has the shape of the input's last dimensions."""

    def rows(self, module: LastDimensionsT, values: Tensor, examples: int) -> Tensor:
        """``[B, ..., *normalized_shape]``, or with examples flattened into rows, as ``[B, T, entries]``."""
        if values.dim() == len(module.normalized_shape) or values.shape[0] % examples:
            raise not_by_example(values, examples)
        return values.reshape(examples, -1, self.entries(module))


@register_layer(nn.LayerNorm)
class LayerNormForm(_LastDimensions[nn.LayerNorm]):
    """``nn.LayerNorm``."""

    def normalized(self, module: nn.LayerNorm, inputs: Tensor) -> Tensor:
        """The input with mean 0 and variance 1 over the normalised dimensions."""
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)


@register_layer(nn.RMSNorm)
class RMSNormForm(_LastDimensions[nn.RMSNorm]):
    """``nn.RMSNorm``."""

    def normalized(self, module: nn.RMSNorm, inputs: Tensor) -> Tensor:
        """The input with mean square 1 over the normalised dimensions."""
        return F.rms_norm(inputs, module.normalized_shape, eps=module.eps)


class _Channels(VectorForm[ModuleT]):
    """The weight has one entry a channel, which is the input's second dimension."""

    def rows(self, module: ModuleT, values: Tensor, examples: int) -> Tensor:
        """``[N, C, ...]`` as ``[B, T, C]``."""
        if values.dim() < 2 or values.shape[0] % examples or values.shape[1] != self.entries(module):
            raise ValueError(f"its input of shape {tuple(values.shape)} is not [batch of {examples}, channels, ...]")
        return values.movedim(1, -1).reshape(examples, -1, values.shape[1])


@register_layer(nn.GroupNorm)
class GroupNormForm(_Channels[nn.GroupNorm]):
    """``nn.GroupNorm``."""

    def normalized(self, module: nn.GroupNorm, inputs: Tensor) -> Tensor:
        """The input with mean 0 and variance 1 over each group of channels."""
        return F.group_norm(inputs, module.num_groups, eps=module.eps)


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormForm(_Channels[_BatchNorm]):
    """Batch normalisation by running statistics, as in eval mode; those of the batch would mix its examples."""

    def normalized(self, module: _BatchNorm, inputs: Tensor) -> Tensor:
        """The input less the running mean, over the running standard deviation."""
        if module.training or module.running_mean is None:
            raise ValueError("it normalises by the batch's own statistics, which mix examples")
        return F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)


@register_layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormForm(_Channels[_InstanceNorm]):
    """Instance normalisation, by running statistics if the module keeps any."""

    def normalized(self, module: _InstanceNorm, inputs: Tensor) -> Tensor:
        """The input with mean 0 and variance 1 over each channel of each example, or less running ones."""
        own = module.training or not module.track_running_stats
        return F.instance_norm(inputs, module.running_mean, module.running_var, use_input_stats=own, eps=module.eps)
