"""``nn.EmbeddingBag``: sums and means over bags of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.indexed import IndexedForm, token_positions
from lightning_source.layers.registry import register_layer


class _Bags(NamedTuple):
    tokens: Tensor  # [bags, T], shorter bags filled up
    weights: Tensor  # [bags, T], 0 where filled up


class _FlatBags(NamedTuple):
    tokens: Tensor  # [tokens of all bags]
    offsets: Tensor  # where each bag begins, and perhaps the end
    weights: Tensor | None  # [tokens of all bags]


@register_layer(nn.EmbeddingBag)
class EmbeddingBagForm(IndexedForm[nn.EmbeddingBag]):
    """A bag's tokens are positions that share the gradient at the bag's sum or mean."""

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Bags | _FlatBags:
        """The bags as rows of equal length, or as they were given, until the number of bags is known."""
        return _kept(*args, **kwargs)

    def capture(
        self,
        module: nn.EmbeddingBag,
        inputs: _Bags | _FlatBags,
        gradients: Tensor,
        examples: int,
        weight: bool,
        bias: bool,
    ) -> BlockGradients:
        """See :class:`~lightning_source.layers.LayerForm`."""
        if module.mode == "max":
            raise ValueError("the maximum over a bag is no sum over its tokens")
        bags = inputs if isinstance(inputs, _Bags) else _filled_up(inputs, len(gradients))
        weights = bags.weights.to(gradients.dtype)
        if module.padding_idx is not None:
            weights = weights * (bags.tokens != module.padding_idx)
        if module.mode == "mean":
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        rows = gradients.unsqueeze(1) * weights.unsqueeze(2)
        return token_positions(bags.tokens, rows, examples, None, module.num_embeddings)


def _kept(input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> _Bags | _FlatBags:
    """The arguments of ``nn.EmbeddingBag.forward``."""
    if input.dim() == 2:
        weights = torch.ones_like(input, dtype=torch.get_default_dtype())
        return _Bags(input, weights if per_sample_weights is None else per_sample_weights.detach())
    assert offsets is not None
    return _FlatBags(input, offsets, per_sample_weights)


def _filled_up(given: _FlatBags, bags: int) -> _Bags:
    tokens, offsets, weights = given
    order = torch.arange(len(tokens), device=tokens.device, dtype=offsets.dtype)
    bag = torch.searchsorted(offsets[:bags].contiguous(), order, right=True) - 1
    place = order - offsets[bag]
    table = tokens.new_zeros(bags, int(place.max()) + 1)
    filled = _Bags(table, torch.zeros_like(table, dtype=torch.get_default_dtype()))
    filled.tokens[bag, place] = tokens
    filled.weights[bag, place] = 1.0 if weights is None else weights.detach()
    return filled
