"""``nn.Embedding``: tokens of each example, or positions that serve all of them."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lightning_source.layers.contract import Block
from lightning_source.layers.free import free_block
from lightning_source.layers.functional import FunctionalLinearForm
from lightning_source.layers.indexed import IndexedForm
from lightning_source.layers.positions import PositionsForm
from lightning_source.layers.registry import register_layer
from lightning_source.names import named_parameters


@register_layer(nn.Embedding)
class EmbeddingForm(IndexedForm[nn.Embedding]):
    """A position is a token."""

    weight_function = "embedding"

    def attempts(self, block: Block, network: nn.Module) -> list[Block]:
        """By the layer's forward, wherever functions use its weight, as positions, and from each example's loss."""
        ways = super().attempts(block, network)
        if block.weight is None:
            return ways
        _, size, vocabulary = block.shape
        ways += super().attempts(
            replace(block, form=FunctionalLinearForm.__name__, shape=(1, vocabulary, size)), network
        )
        ways += super().attempts(replace(block, form=PositionsForm.__name__), network)
        table = named_parameters(network)[block.weight]
        free = free_block(block.name, block.module, table, block.group)
        return ways if free is None else [*ways, replace(free, weight=block.weight)]
