"""Weights that torch's functions use: attention's output projection, and weights that several layers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_source.curvature.block_gradients import BlockGradients, join
from lightning_source.layers.contract import Block, Call
from lightning_source.layers.forms import MatrixForm, rows_by_example, with_bias
from lightning_source.layers.indexed import IndexedForm, token_positions
from lightning_source.layers.registry import form_of, register_layer


@register_layer(NonDynamicallyQuantizableLinear)
class FunctionalLinearForm(MatrixForm[nn.Linear]):
    """Every call of ``F.linear`` on the weight, and of ``F.embedding`` if it is tied to one.

    Attention's output projection is such a layer, and so are tied weights, whose gradient has all uses in one sum.
    An embedding's gradient ``Σ_t onehot_t g_tᵀ`` is a linear layer's with the one-hot rows for output gradients and the
    gradient at its output for activations: it adds such positions. They enter gradients and eigenvalues, but not the
    covariances, which stay those of the linear uses.
    """

    functional = True

    def shape(self, module: nn.Linear) -> tuple[int, int, int]:
        """``(1, out_features, in_features)``."""
        return 1, module.out_features, module.in_features

    def combine(self, block: Block, module: nn.Module, calls: Sequence[Call], examples: int) -> BlockGradients:
        """All uses as positions, the linear ones first."""
        linear = [self._linear(block, call, examples) for call in calls if call.kind == "linear"]
        tokens = [self._embedding(block, call, examples) for call in calls if call.kind == "embedding"]
        own = sum(use.shape[2] for use in linear) if linear and tokens else None
        return join([*linear, *tokens], dim=2)._replace(own=own)

    def _linear(self, block: Block, call: Call, examples: int) -> BlockGradients:
        positions = linear_positions(block, call, examples)
        if block.bias is not None and call.bias != block.bias:
            positions.activations[..., -1] = 0
        return positions

    def _embedding(self, block: Block, call: Call, examples: int) -> BlockGradients:
        rows = rows_by_example(call.gradients, examples)
        ids = call.inputs.reshape(rows.shape[:-1])
        rows = rows if call.padding is None else rows.masked_fill((ids == call.padding).unsqueeze(-1), 0)
        inputs = torch.cat([rows, torch.zeros_like(rows[..., :1])], -1) if block.bias is not None else rows
        return BlockGradients(inputs, F.one_hot(ids, block.shape[1]).to(rows.dtype))


@register_layer()
class FunctionalEmbeddingForm(IndexedForm[nn.Embedding]):
    """Embeddings that share one weight: every call of ``F.embedding`` on it."""

    functional = True

    def combine(self, block: Block, module: nn.Module, calls: Sequence[Call], examples: int) -> BlockGradients:
        """All uses as positions."""
        uses = [token_positions(call.inputs, call.gradients, examples, call.padding, block.shape[2]) for call in calls]
        return join(uses, dim=2)


def linear_positions(block: Block, call: Call, examples: int) -> BlockGradients:
    """A call of ``F.linear``: ``[1, B, T, I]`` and ``[1, B, T, O]``."""
    gradients = rows_by_example(call.gradients, examples)
    activations = None if block.weight is None else rows_by_example(call.inputs, examples)
    return with_bias(activations, gradients, block.bias is not None)


def tied_block(name: str, module: str, parameter: Tensor, owners: Sequence[nn.Module], group: int) -> Block | None:
    """The one block of a weight that several layers share; ``None`` if some do more than call one function on it.

    Args:
        name: the parameter's clean name.
        module: clean name of the first module that has it.
        parameter: the weight, ``[O, I]`` of a linear layer, ``[tokens, size]`` of an embedding.
        owners: all modules that have it.
        group: its optimizer group.
    """
    functions = set()
    for owner in owners:
        form = form_of(owner)
        function = None if form is None else form.weight_function
        if function is None or dict(owner.named_parameters(recurse=False)).get("weight") is not parameter:
            return None
        functions.add(function)
    rows, columns = parameter.shape
    if "linear" in functions:
        form_name, shape = FunctionalLinearForm.__name__, (1, rows, columns)
    else:
        form_name, shape = FunctionalEmbeddingForm.__name__, (1, columns, rows)
    return Block(name, module, name, None, group, shape, form_name, (rows * columns,))
