"""Embeddings of positions: one lookup that serves all examples of a batch."""

from __future__ import annotations

from torch import Tensor

from lightning_source.layers.embedding import EmbeddingForm
from lightning_source.layers.registry import register_layer


class PositionsForm(EmbeddingForm):
    """An embedding that is looked up by ``[T]`` or ``[1, T]`` (``[T, 1]`` under layout 1), not by example.

    Autograd adds up the examples' gradients where the rows meet the batch. Passes therefore repeat the rows for each
    example as a view (:meth:`repeat`): broadcasting gives the same values, and the gradient comes by example.
    """

    def repeat(self, output: Tensor, examples: int, layout: int) -> Tensor:
        """The layer's output ``[T, E]`` or ``[1, T, E]`` as ``[B, T, E]``; others are left alone."""
        if output.dim() == 2 and not layout:
            return output.expand(examples, *output.shape)
        if output.dim() > 2 and output.shape[layout] == 1:
            sizes = list(output.shape)
            sizes[layout] = examples
            return output.expand(sizes)
        return output


register_layer()(PositionsForm)
