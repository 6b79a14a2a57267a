"""Linear layers on any leading dimensions: ``[B, ..., I]``, or examples flattened into rows, ``[B·T, I]``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from lightning_source.layers.contract import Block, ModuleT
from lightning_source.layers.forms import MatrixForm, rows_by_example
from lightning_source.layers.functional import FunctionalLinearForm
from lightning_source.layers.registry import register_layer


class _RowsForm(MatrixForm[ModuleT]):
    """Every position is a row."""

    def activations(self, module: ModuleT, inputs: Tensor, examples: int) -> Tensor:
        """``[..., I]`` as ``[1, B, T, I]``."""
        return rows_by_example(inputs, examples)

    def gradients(self, module: ModuleT, gradients: Tensor, examples: int) -> Tensor:
        """``[..., O]`` as ``[1, B, T, O]``."""
        return rows_by_example(gradients, examples)


@register_layer(nn.Linear)
class LinearForm(_RowsForm[nn.Linear]):
    """``nn.Linear``."""

    weight_function = "linear"
    representation = True

    def shape(self, module: nn.Linear) -> tuple[int, int, int]:
        """``(1, out_features, in_features)``."""
        return 1, module.out_features, module.in_features

    def attempts(self, block: Block, network: nn.Module) -> list[Block]:
        """By the layer's forward, then wherever functions use its weight."""
        ways = super().attempts(block, network)
        if block.weight is not None:
            ways += super().attempts(replace(block, form=FunctionalLinearForm.__name__), network)
        return ways


@register_layer("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
class InputFirstForm(_RowsForm[nn.Module]):
    """GPT-2's linear layer, which keeps its weight as ``[inputs, outputs]``."""

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """``(1, outputs, inputs)``."""
        inputs, outputs = module.get_parameter("weight").shape
        return 1, outputs, inputs

    def weight_matrix(self, weight: Tensor, parts: int, outputs: int) -> Tensor:
        """The weight as ``[1, O, I]``."""
        return weight.mT.unsqueeze(0)
