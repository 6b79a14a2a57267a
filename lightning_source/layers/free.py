"""Parameters that no form makes of positions: class tokens, learned scales, a recurrent layer's weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lightning_source.layers.broadcast import BroadcastForm
from lightning_source.layers.contract import Block, LayerForm
from lightning_source.layers.local import LocalForm
from lightning_source.layers.registry import register_layer
from lightning_source.names import named_modules, named_parameters

# A parameter with more scalars than this is left out: an example's gradient is held whole.
MAX_FREE = 1_000_000


@register_layer()
class FreeForm(LayerForm[nn.Module]):
    """One vector block for a parameter, from the gradient of each example's own loss.

    This is exact whatever the forward does with the parameter, and costs a backward through the network for each
    example instead of one for the batch (``capture.layer_gradients.per_example_gradients``). It needs a loss that is
    known example by example. Up to ``ekfac.MAX_VECTOR`` entries the block is full, beyond that diagonal.
    """

    free = True
    joint = False

    def attempts(self, block: Block, network: nn.Module) -> list[Block]:
        """Where the parameter enters by broadcasting it costs nothing; to run its own module again is cheaper, too.

        Not where the module is most of the network.
        """
        owner = named_modules(network)[block.module]
        if isinstance(owner, torch.jit.ScriptModule):  # which takes no hooks
            return [block]
        entering = super().attempts(replace(block, form=BroadcastForm.__name__), network)
        if 2 * sum(p.numel() for p in owner.parameters()) > sum(p.numel() for p in network.parameters()):
            return [*entering, block]
        return [*entering, *super().attempts(replace(block, form=LocalForm.__name__), network), block]


def free_block(name: str, module: str, parameter: nn.Parameter, group: int) -> Block | None:
    """The block of a parameter; ``None`` if it is too large."""
    size = parameter.numel()
    if size > MAX_FREE:
        return None
    return Block(name, module, name, None, group, (1, size, 1), FreeForm.__name__, (size,))


def held_whole(block: Block, network: nn.Module) -> list[Block]:
    """A block of each of its parameters in place of a layer's block; none if one of them is too large."""
    own = named_parameters(network)
    whole = [free_block(name, block.module, own[name], block.group) for name in block.parameters]
    return [] if None in whole else [one for one in whole if one is not None]
