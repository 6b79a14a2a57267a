"""``nn.MultiheadAttention``, and any linear layer whose weight is used by a function instead of its forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_source.curvature.block_gradients import BlockGradients, join
from lightning_source.layers.linear import LinearForm
from lightning_source.layers.registry import Block, Call, MatrixForm, register_layer


@register_layer(NonDynamicallyQuantizableLinear)
class FunctionalLinearForm(LinearForm):
    """Every call of ``F.linear`` on the weight, and of ``F.embedding`` if it is tied to one.

    Attention's output projection is such a layer, and so are tied weights, whose gradient has all uses in one sum.
    An embedding's gradient ``Σ_t onehot_t g_tᵀ`` is a linear layer's with the one-hot rows for output gradients and the
    gradient at its output for activations: it adds such positions. They enter gradients and eigenvalues, but not the
    covariances, which stay those of the linear uses.
    """

    functional = True

    def combine(self, block: Block, calls: Sequence[Call], examples: int) -> BlockGradients:
        """All uses as positions, the linear ones first."""
        linear = [self._linear(block, call, examples) for call in calls if call.kind == "linear"]
        tokens = [self._embedding(block, call, examples) for call in calls if call.kind == "embedding"]
        own = sum(one.shape[2] for one in linear) if linear and tokens else None
        return join([*linear, *tokens], dim=2)._replace(own=own)

    def _linear(self, block: Block, call: Call, examples: int) -> BlockGradients:
        one = self.capture(
            None, call.inputs, call.gradients, examples, block.weight is not None, block.bias is not None
        )
        if block.bias is not None and call.bias != block.bias:
            one.activations[..., -1] = 0
        return one

    def _embedding(self, block: Block, call: Call, examples: int) -> BlockGradients:
        rows = self.gradients(None, call.gradients, examples)
        ids = call.inputs.reshape(rows.shape[:-1])
        rows = rows if call.padding is None else rows.masked_fill((ids == call.padding).unsqueeze(-1), 0)
        inputs = torch.cat([rows, torch.zeros_like(rows[..., :1])], -1) if block.bias is not None else rows
        return BlockGradients(inputs, F.one_hot(ids, block.shape[1]).to(rows.dtype))


@register_layer(nn.MultiheadAttention)
class InProjectionForm(MatrixForm):
    """Attention's input projections: query, key and value are the parts of one block.

    The parts may have different numbers of positions (cross-attention); shorter ones are filled up with zeros, which
    add nothing to any sum. Where key and value have sizes of their own, each projection is a block without the bias,
    which all three share.
    """

    functional = True

    def blocks(
        self, name: str, module: nn.MultiheadAttention, group_of: Callable[[nn.Parameter], int | None]
    ) -> list[Block]:
        """The blocks of ``in_proj_weight`` and ``in_proj_bias``, or of the separate weights."""
        held = dict(module.named_parameters(recurse=False))
        groups = {key: group for key, p in held.items() if (group := group_of(p)) is not None}
        prefix, size = (f"{name}." if name else ""), module.embed_dim
        packed, bias = "in_proj_weight", "in_proj_bias"

        def block(title: str, weight: str | None, bias: str | None, *shape: int) -> Block:
            keys = [key for key in (weight, bias) if key is not None]
            parts, outputs, inputs = shape
            return Block(
                name=prefix + title,
                module=name,
                weight=prefix + weight if weight else None,
                bias=prefix + bias if bias else None,
                group=groups[keys[0]],
                shape=(parts, outputs, inputs),
                form=type(self).__name__,
                sizes=tuple(held[key].numel() for key in keys),
            )

        if packed in groups and groups[packed] == groups.get(bias):
            return [block("in_proj", packed, bias, 3, size, size + 1)]
        sizes = {"q_proj_weight": size, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
        found = [block(key, key, None, 1, size, inputs) for key, inputs in sizes.items() if key in groups]
        found += [block(packed, packed, None, 3, size, size)] if packed in groups else []
        return found + ([block(bias, None, bias, 3, size, 1)] if bias in groups else [])

    def combine(self, block: Block, calls: Sequence[Call], examples: int) -> BlockGradients:
        """The calls on some or all of query, key and value as parts."""
        parts, outputs, _ = block.shape
        rows: list[list[BlockGradients]] = [[] for _ in range(parts)]
        for call in calls:
            whole = LinearForm.capture(
                _LINEAR, None, call.inputs, call.gradients, examples, block.weight is not None, block.bias is not None
            )
            for offset, g in enumerate(whole.gradients.split(outputs, -1)):
                rows[call.start // outputs + offset].append(BlockGradients(whole.activations, g))
        joined = [join(pieces, dim=2) for pieces in rows]
        longest = max(one.shape[2] for one in joined)
        activations = torch.cat([_filled(one.activations, longest) for one in joined])
        return BlockGradients(activations, torch.cat([_filled(one.gradients, longest) for one in joined]))


_LINEAR: Any = FunctionalLinearForm()


def _filled(x: Tensor, positions: int) -> Tensor:
    return F.pad(x, (0, 0, 0, positions - x.shape[2]))
