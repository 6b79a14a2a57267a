"""Linear layers on any leading dimensions: ``[B, ..., I]``, or examples flattened into rows, ``[B·T, I]``."""

from typing import Any

from torch import Tensor, nn

from lightning_source.layers.registry import MatrixForm, register_layer


@register_layer(nn.Linear)
class LinearForm(MatrixForm):
    """Every position is a row."""

    def shape(self, module: Any) -> tuple[int, int, int]:
        """``(1, out_features, in_features)``."""
        return 1, module.out_features, module.in_features

    def activations(self, module: Any, inputs: Tensor, examples: int) -> Tensor:
        """``[..., I]`` as ``[1, B, T, I]``."""
        return _rows(inputs, examples)

    def gradients(self, module: Any, gradients: Tensor, examples: int) -> Tensor:
        """``[..., O]`` as ``[1, B, T, O]``."""
        return _rows(gradients, examples)


@register_layer("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
class InputFirstForm(LinearForm):
    """GPT-2's linear layer, which keeps its weight as ``[inputs, outputs]``."""

    def shape(self, module: Any) -> tuple[int, int, int]:
        """``(1, outputs, inputs)``."""
        inputs, outputs = module.weight.shape
        return 1, outputs, inputs

    def weight_matrix(self, weight: Tensor, parts: int, outputs: int) -> Tensor:
        """The weight as ``[1, O, I]``."""
        return weight.mT.unsqueeze(0)


def _rows(x: Tensor, examples: int) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if x.dim() < 2 or rows % examples or (x.dim() > 2 and x.shape[0] % examples):
        raise ValueError(f"its input of shape {tuple(x.shape)} does not begin with the batch's {examples} examples")
    return x.reshape(1, examples, -1, x.shape[-1])
