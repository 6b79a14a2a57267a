"""A given batch as batches of one example each, where its layout says how."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def split(batch: Any, examples: int) -> list[Any] | None:
    """The batch's examples, each as a batch of its own; ``None`` where nothing in it counts ``examples``.

    Tensors whose first dimension counts the examples are cut, and lists of as many things; what does not count them is
    shared. Batches of graphs that know their list (``to_data_list``, as PyTorch Geometric has it) are cut by it.

    Args:
        batch: what ``training_step`` takes.
        examples: how many examples it holds.
    """
    if hasattr(batch, "to_data_list") and hasattr(type(batch), "from_data_list"):
        graphs = batch.to_data_list()
        return [type(batch).from_data_list([graph]) for graph in graphs] if len(graphs) == examples else None
    if not _counts(batch, examples):
        return None
    return [_cut(batch, slice(index, index + 1), examples) for index in range(examples)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return list(value) if isinstance(value, (list, tuple)) else []


def _counts(value: Any, examples: int) -> bool:
    """Whether something in a value has the examples for its first dimension."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == examples
    return any(_counts(part, examples) for part in _parts(value)) or _lists(value, examples)


def _lists(value: Any, examples: int) -> bool:
    """Whether a value is a plain list of one thing for each example: strings, numbers, or tensors of any lengths."""
    return type(value) in (list, tuple) and len(value) == examples and not any(_counts(p, examples) for p in value)


def _cut(value: Any, rows: slice, examples: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if _counts(value, examples) else value
    if _lists(value, examples):
        return value[rows]
    if isinstance(value, dict):
        return type(value)({key: _cut(part, rows, examples) for key, part in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _cut(getattr(value, f.name), rows, examples) for f in fields(value) if f.init})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut(part, rows, examples) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(part, rows, examples) for part in value)
    return value
