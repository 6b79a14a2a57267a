"""Embeddings of positions: one lookup that serves all examples of a batch."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_source.layers.indexed import IndexedForm
from lightning_source.layers.registry import register_layer


@register_layer()
class PositionsForm(IndexedForm[nn.Embedding]):
    """An embedding that is looked up by ``[T]`` or ``[1, T]`` (``[T, 1]`` under layout 1), not by example.

    Autograd adds up the examples' gradients where the rows meet the batch. Passes therefore repeat the rows for each
    example as a view (:meth:`repeat`): broadcasting gives the same values, and the gradient comes by example.
    """

    repeats = True

    def repeat(self, inputs: Tensor, output: Tensor, examples: int, layout: int) -> tuple[Tensor, Tensor]:
        """The layer's output ``[T, E]`` or ``[1, T, E]`` as ``[B, T, E]``, and its indices alike; others as given."""
        if output.dim() == 2 and not layout:
            output = output.expand(examples, *output.shape)
        elif output.dim() > 2 and output.shape[layout] == 1:
            sizes = list(output.shape)
            sizes[layout] = examples
            output = output.expand(sizes)
        return inputs.expand(output.shape[:-1]), output
