"""``nn.Embedding`` and ``nn.EmbeddingBag``: no tensor is as large as examples by vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_source.curvature.block_gradients import BlockGradients, join
from lightning_source.layers.attention import FunctionalLinearForm
from lightning_source.layers.linear import LinearForm
from lightning_source.layers.registry import Block, Call, form_of, register_layer


@register_layer(nn.Embedding)
class EmbeddingForm:
    """The inputs are one-hot rows, so their covariance is diagonal: the frequencies of the tokens."""

    joint = True
    indexed = True

    def block_shape(self, module: Any, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(1, embedding size, vocabulary)``."""
        return 1, module.embedding_dim, module.num_embeddings

    def capture(
        self, module: Any, inputs: Any, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """Tokens ``[B, ...]``, or ``[B · T]``, and the gradient at their rows."""
        return self.positions(inputs, gradients, examples, module.padding_idx, module.num_embeddings)

    def positions(
        self, ids: Tensor, gradients: Tensor, examples: int, padding: int | None, size: int
    ) -> BlockGradients:
        """One position for each token; ``padding`` gets no gradient."""
        if not ids.dim() or ids.numel() % examples or (ids.dim() > 1 and ids.shape[0] % examples):
            raise ValueError(
                f"its input of shape {tuple(ids.shape)} does not begin with the batch's {examples} examples"
            )
        g = gradients.reshape(1, examples, -1, gradients.shape[-1])
        ids = ids.reshape(1, examples, -1)
        return BlockGradients(
            ids.long(), g if padding is None else g.masked_fill((ids == padding).unsqueeze(-1), 0), size
        )

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The weight, transposed: tokens are inputs."""
        assert weight is not None
        return weight.mT.unsqueeze(0)


class FunctionalEmbeddingForm(EmbeddingForm):
    """Embeddings that share one weight: every call of ``F.embedding`` on it."""

    functional = True

    def combine(self, block: Block, calls: Sequence[Call], examples: int) -> BlockGradients:
        """All uses as positions."""
        return join([self.positions(c.inputs, c.gradients, examples, c.padding, block.shape[2]) for c in calls], dim=2)


register_layer()(FunctionalEmbeddingForm)


class _Bags(NamedTuple):
    tokens: Tensor  # [bags, T], shorter bags filled up
    weights: Tensor  # [bags, T], 0 where filled up


@register_layer(nn.EmbeddingBag)
class EmbeddingBagForm(EmbeddingForm):
    """A bag's tokens are positions that share the gradient at the bag's sum or mean."""

    def keep(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Any:
        """The bags as rows of equal length."""
        if input.dim() == 2:
            weights = torch.ones_like(input, dtype=torch.get_default_dtype())
            return _Bags(input, weights if per_sample_weights is None else per_sample_weights.detach())
        assert offsets is not None
        return input, offsets, per_sample_weights

    def capture(
        self, module: Any, inputs: Any, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """See :class:`~lightning_source.layers.LayerForm`."""
        if module.mode == "max":
            raise ValueError("the maximum over a bag is no sum over its tokens")
        bags = inputs if isinstance(inputs, _Bags) else _padded(inputs, len(gradients))
        weights = bags.weights.to(gradients.dtype)
        if module.padding_idx is not None:
            weights = weights * (bags.tokens != module.padding_idx)
        if module.mode == "mean":
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        rows = gradients.unsqueeze(1) * weights.unsqueeze(2)
        return self.positions(bags.tokens, rows, examples, None, module.num_embeddings)


def _padded(given: tuple[Tensor, Tensor, Tensor | None], bags: int) -> _Bags:
    tokens, offsets, weights = given
    order = torch.arange(len(tokens), device=tokens.device, dtype=offsets.dtype)
    bag = torch.searchsorted(offsets[:bags].contiguous(), order, right=True) - 1
    place = order - offsets[bag]
    table = tokens.new_zeros(bags, int(place.max()) + 1)
    found = _Bags(table, torch.zeros_like(table, dtype=torch.get_default_dtype()))
    found.tokens[bag, place] = tokens
    found.weights[bag, place] = 1.0 if weights is None else weights.detach()
    return found


def tied_block(name: str, module: str, owners: Sequence[nn.Module], group: int) -> Block | None:
    """The one block of a weight that several linear layers and embeddings share; ``None`` if others do."""
    tables = [owner for owner in owners if type(form_of(owner)) is EmbeddingForm]
    layers = [owner for owner in owners if type(form_of(owner)) is LinearForm]
    weights: list[Any] = [owner.weight for owner in owners]
    if len(tables) + len(layers) < len(owners) or any(weight is not weights[0] for weight in weights):
        return None
    rows, columns = weights[0].shape
    form, shape = (
        (FunctionalLinearForm, (1, rows, columns)) if layers else (FunctionalEmbeddingForm, (1, columns, rows))
    )
    return Block(name, module, name, None, group, shape, form.__name__, (rows * columns,))
