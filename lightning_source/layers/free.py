"""Parameters that no form makes of positions: class tokens, learned scales, a recurrent layer's weights."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_source.layers.registry import Block, register_layer

# A parameter with more scalars than this is left out: an example's gradient is held whole.
MAX_FREE = 1_000_000


class FreeForm:
    """One vector block for a parameter, from the gradient of each example's own loss.

    This is exact whatever the forward does with the parameter, and costs a backward through the network for each
    example instead of one for the batch (:func:`per_example_gradients`). It needs a loss that
    is known example by example. Up to ``factors.MAX_VECTOR`` entries the block is full, beyond that diagonal.
    """

    free = True
    joint = False

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The entries in a column."""
        assert weight is not None
        return weight.reshape(shape)


register_layer()(FreeForm)


def free_block(name: str, module: str, parameter: nn.Parameter, group: int) -> Block | None:
    """The block of a parameter; ``None`` if it is too large."""
    size = parameter.numel()
    if size > MAX_FREE:
        return None
    return Block(name, module, name, None, group, (1, size, 1), FreeForm.__name__, (size,))
