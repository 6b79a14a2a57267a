"""What embeddings have in common: no tensor is as large as examples by vocabulary."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.contract import LayerForm
from lightning_source.layers.forms import not_by_example

TableT = TypeVar("TableT", nn.Embedding, nn.EmbeddingBag)


class IndexedForm(LayerForm[TableT]):
    """The inputs are one-hot rows, so their covariance is diagonal: the frequencies of the tokens."""

    indexed = True

    def block_shape(self, module: TableT, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(1, embedding size, vocabulary)``."""
        return 1, module.embedding_dim, module.num_embeddings

    def capture(
        self, module: TableT, inputs: Any, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """Tokens ``[B, ...]``, or ``[B · T]``, and the gradient at their rows."""
        return token_positions(inputs, gradients, examples, module.padding_idx, module.num_embeddings)

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The weight, transposed: tokens are inputs."""
        assert weight is not None
        return weight.mT.unsqueeze(0)


def token_positions(
    tokens: Tensor, gradients: Tensor, examples: int, padding: int | None, vocabulary: int
) -> BlockGradients:
    """One position for each token.

    Args:
        tokens: indices, ``[B, ...]`` or ``[B · T]``.
        gradients: gradient at each token's row, ``[*tokens.shape, O]``.
        examples: ``B``.
        padding: the token that gets no gradient.
        vocabulary: number of tokens that there are.
    """
    leading = tokens.shape[0] if tokens.dim() > 1 else tokens.numel()
    if not tokens.dim() or tokens.numel() % examples or leading % examples:
        raise not_by_example(tokens, examples)
    rows = gradients.reshape(1, examples, -1, gradients.shape[-1])
    tokens = tokens.reshape(1, examples, -1)
    if padding is not None:
        rows = rows.masked_fill((tokens == padding).unsqueeze(-1), 0)
    return BlockGradients(tokens.long(), rows, vocabulary)
