"""The two usual forms, of which most kinds of layer are: a matrix, and entries that scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers.contract import LayerForm, ModuleT


class MatrixForm(LayerForm[ModuleT]):
    """A layer whose weight gradient is ``Σ_t g_t a_tᵀ``; the bias is one more input, which is always 1."""

    def shape(self, module: ModuleT) -> tuple[int, int, int]:
        """``(parts, outputs a part, inputs a part)``, the bias not counted."""
        raise NotImplementedError

    def activations(self, module: ModuleT, inputs: Tensor, examples: int) -> Tensor:
        """The forward's input as ``[P, B, T, I]``."""
        raise NotImplementedError

    def gradients(self, module: ModuleT, gradients: Tensor, examples: int) -> Tensor:
        """A gradient shaped like the forward's output as ``[P, B, T, O]``."""
        raise NotImplementedError

    def weight_matrix(self, weight: Tensor, parts: int, outputs: int) -> Tensor:
        """The weight as ``[P, O, I]``."""
        return weight.reshape(parts, outputs, -1)

    def block_shape(self, module: ModuleT, weight: bool, bias: bool) -> tuple[int, int, int]:
        """See :class:`LayerForm`."""
        parts, outputs, inputs = self.shape(module)
        return parts, outputs, inputs * weight + bias

    def capture(
        self, module: ModuleT, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """See :class:`LayerForm`."""
        by_position = self.gradients(module, gradients, examples)
        return with_bias(self.activations(module, inputs, examples) if weight else None, by_position, bias)

    def matrix(self, shape: tuple[int, int, int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :class:`LayerForm`."""
        parts, outputs, _ = shape
        columns = [] if weight is None else [self.weight_matrix(weight, parts, outputs)]
        return torch.cat(columns if bias is None else [*columns, bias.reshape(parts, outputs, 1)], dim=-1)


class VectorForm(LayerForm[ModuleT]):
    """A layer that scales by ``weight`` and shifts by ``bias``: one full block of all its entries.

    Its per-example gradient is a vector, so the block is ``O`` entries by one input that is always 1, and the
    covariance of the gradients is the block's Fisher itself.
    """

    def entries(self, module: ModuleT) -> int:
        """Number of entries of the weight."""
        return module.get_parameter("weight").numel()

    def rows(self, module: ModuleT, values: Tensor, examples: int) -> Tensor:
        """A tensor shaped like the forward's input or output as ``[B, T, entries]``."""
        raise NotImplementedError

    def normalized(self, module: ModuleT, inputs: Tensor) -> Tensor:
        """What the weight multiplies, shaped like the input."""
        raise NotImplementedError

    def block_shape(self, module: ModuleT, weight: bool, bias: bool) -> tuple[int, int, int]:
        """See :class:`LayerForm`."""
        return 1, self.entries(module) * (weight + bias), 1

    def capture(
        self, module: ModuleT, inputs: Tensor, gradients: Tensor, examples: int, weight: bool, bias: bool
    ) -> BlockGradients:
        """See :class:`LayerForm`."""
        rows = self.rows(module, gradients, examples)
        pieces = [(rows * self.rows(module, self.normalized(module, inputs), examples)).sum(1)] if weight else []
        return captured_vectors(torch.cat([*pieces, rows.sum(1)] if bias else pieces, dim=-1))


def with_bias(activations: Tensor | None, gradients: Tensor, bias: bool) -> BlockGradients:
    """Activations ``[P, B, T, I]``, with a column of ones for the bias, beside output gradients ``[P, B, T, O]``."""
    inputs = gradients.new_empty(*gradients.shape[:3], 0) if activations is None else activations
    return BlockGradients(
        torch.cat([inputs, inputs.new_ones(*inputs.shape[:3], 1)], dim=-1) if bias else inputs, gradients
    )


def captured_vectors(gradients: Tensor) -> BlockGradients:
    """Per-example gradients ``[B, entries]`` as outputs of one input that is always 1."""
    return BlockGradients(gradients.new_ones(1, len(gradients), 1, 1), gradients[None, :, None])


def rows_by_example(values: Tensor, examples: int) -> Tensor:
    """``[B, ..., F]``, examples flattened into rows, ``[B · T, F]``, or one example's vector as ``[1, B, T, F]``."""
    rows = values.numel() // values.shape[-1]
    if (values.dim() < 2 and examples > 1) or rows % examples or (values.dim() > 2 and values.shape[0] % examples):
        raise not_by_example(values, examples)
    return values.reshape(1, examples, -1, values.shape[-1])


def not_by_example(values: Tensor, examples: int) -> ValueError:
    """The error for a tensor whose leading dimensions do not count the batch's examples."""
    return ValueError(f"its input of shape {tuple(values.shape)} does not begin with the batch's {examples} examples")
