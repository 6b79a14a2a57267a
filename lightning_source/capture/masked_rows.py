"""Rows picked out of a batch by a mask, ``logits[mask]``: whose they are is read off the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# How far a walk goes. The rows' operations behind a mask are a loss, perhaps a head of a few layers.
MAX_NODES = 64
_PARAMETERS = {"torch::autograd::AccumulateGrad", "TBackward0"}  # where a layer's weights come in


def owners_of(rows: Tensor, examples: int, clear: set[Node] | None = None) -> Tensor | None:
    """The example that each row belongs to, ``[K]``, if the rows were picked by a mask or by index tensors.

    The walk goes back through operations whose outputs have as many rows, to an indexing by a boolean mask over
    ``[B, ...]`` or ``[B · T]``, or by two or more index tensors of which the first counts examples.

    Args:
        rows: ``[K, ...]``.
        examples: number of examples in the batch, ``B``.
        clear: nodes of the graph behind which there is no mask; added to, so that later walks over the same graph stop.

    Returns:
        Indices of examples, or ``None`` if no mask was found: then rows are laid out by example, or by nothing.
    """
    if rows.dim() == 0 or rows.grad_fn is None:
        return None
    count = len(rows)
    clear = set() if clear is None else clear
    waiting: list[Node] = [rows.grad_fn]
    seen: set[Node] = set()
    while waiting and len(seen) < MAX_NODES:
        node = waiting.pop()
        name = node.name()
        if name in _PARAMETERS or node in seen or node in clear:
            continue
        outputs = node._input_metadata
        if not outputs or not outputs[0].shape or outputs[0].shape[0] != count:
            continue
        if name == "IndexBackward0":
            indexing: Any = node  # a node of this kind holds what it was indexed by
            return _owners(indexing._saved_indices, indexing._saved_self_sym_sizes, count, examples)
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    clear |= seen
    return None


def _owners(indices: tuple[Tensor | None, ...], sizes: tuple[int, ...], rows: int, examples: int) -> Tensor | None:
    first = indices[0] if indices else None
    if first is None or sizes[0] % examples:
        return None
    if first.dtype == torch.bool:
        owners = first.nonzero()[:, 0]
    elif len(indices) > 1 and first.dim() == 1 and sizes[0] == examples:
        owners = first % examples  # indices may count from the end
    else:
        return None  # a lookup in a table looks the same
    return owners // (sizes[0] // examples) if len(owners) == rows else None


def by_owner(values: Tensor, owners: Tensor, examples: int) -> Tensor:
    """Rows ``[K, ...]`` as ``[B, T, ...]`` in their order, shorter examples filled up with zeros.

    Args:
        values: the rows.
        owners: the example of each, ``[K]``.
        examples: ``B``.
    """
    order = owners.argsort(stable=True)
    counts = owners.bincount(minlength=examples)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
    table = values.new_zeros(examples, int(counts.max()) if len(owners) else 0, *values.shape[1:])
    return table.index_put((owners[order], place), values[order])
