"""``nn.MultiheadAttention``, whose function uses its parameters itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_source.curvature.block_gradients import BlockGradients, join
from lightning_source.layers.contract import Block, Call, GroupOf
from lightning_source.layers.forms import MatrixForm
from lightning_source.layers.functional import linear_positions
from lightning_source.layers.registry import register_layer


@register_layer(nn.MultiheadAttention)
class InProjectionForm(MatrixForm[nn.MultiheadAttention]):
    """Attention's input projections: query, key and value are the parts of one block.

    The parts may have different numbers of positions (cross-attention); shorter ones are filled up with zeros, which
    add nothing to any sum. Where key and value have sizes of their own, each projection is a block without the bias,
    which all three share.
    """

    functional = True

    def blocks(self, name: str, module: nn.MultiheadAttention, group_of: GroupOf) -> list[Block]:
        """The blocks of ``in_proj_weight`` and ``in_proj_bias``, or of the separate weights."""
        held = dict(module.named_parameters(recurse=False))
        groups = {key: group for key, p in held.items() if (group := group_of(p)) is not None}
        prefix, size = (f"{name}." if name else ""), module.embed_dim
        packed, bias = "in_proj_weight", "in_proj_bias"

        def block(title: str, weight: str | None, bias: str | None, parts: int, inputs: int) -> Block:
            keys = [key for key in (weight, bias) if key is not None]
            return Block(
                name=prefix + title,
                module=name,
                weight=prefix + weight if weight else None,
                bias=prefix + bias if bias else None,
                group=groups[keys[0]],
                shape=(parts, size, inputs),
                form=type(self).__name__,
                sizes=tuple(held[key].numel() for key in keys),
            )

        if packed in groups and groups[packed] == groups.get(bias):
            return [block("in_proj", packed, bias, 3, size + 1)]
        sizes = {"q_proj_weight": size, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
        blocks = [block(key, key, None, 1, inputs) for key, inputs in sizes.items() if key in groups]
        blocks += [block(packed, packed, None, 3, size)] if packed in groups else []
        return blocks + ([block(bias, None, bias, 3, 1)] if bias in groups else [])

    def combine(self, block: Block, module: nn.Module, calls: Sequence[Call], examples: int) -> BlockGradients:
        """The calls on some or all of query, key and value as parts."""
        parts, outputs, _ = block.shape
        pieces: list[list[BlockGradients]] = [[] for _ in range(parts)]
        for call in calls:
            whole = linear_positions(block, call, examples)
            for offset, gradients in enumerate(whole.gradients.split(outputs, -1)):
                pieces[call.start // outputs + offset].append(BlockGradients(whole.activations, gradients))
        joined = [join(uses, dim=2) for uses in pieces]
        longest = max(part.shape[2] for part in joined)
        activations = torch.cat([_filled_up(part.activations, longest) for part in joined])
        return BlockGradients(activations, torch.cat([_filled_up(part.gradients, longest) for part in joined]))


def _filled_up(values: Tensor, positions: int) -> Tensor:
    """``[1, B, T, F]`` with zeros at the end up to the given number of positions."""
    return F.pad(values, (0, 0, 0, positions - values.shape[2]))
