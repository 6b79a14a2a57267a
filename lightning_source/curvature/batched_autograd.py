"""Many derivatives in one run where every operation has a batching rule, one after another where not. Pure tensors.

What cannot be batched is only slower. An error of the differentiated code itself comes again when it runs one after
another, and from there it is raised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap

T = TypeVar("T")


def batched_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``Σ outputs · direction`` for each of ``Q`` directions; the graph is kept.

    Batched, they cost ``Q`` times the memory of one backward.

    Args:
        outputs: what is differentiated, of any shapes.
        inputs: with respect to what, of any shapes.
        directions: ``[Q, *shape]`` for each output.

    Returns:
        ``[Q, *shape]``, dense, for each input; ``None`` where an input does not reach the outputs.
    """

    def batched() -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            outputs, inputs, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
        )

    def one_by_one() -> Sequence[Tensor | None]:
        rows = [
            torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)
            for row in zip(*directions, strict=True)
        ]
        return [_stack(column) for column in zip(*rows, strict=True)]

    gradients = _batched_or(batched, one_by_one)
    return [None if gradient is None else gradient.to_dense() for gradient in gradients]


def batched_rows(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """``function`` of each row of the arguments, ``[B, ...]`` each, stacked along a new first dimension."""
    return _batched_or(
        lambda: vmap(function)(*arguments),
        lambda: torch.stack([function(*rows) for rows in zip(*arguments, strict=True)]),
    )


def _batched_or(batched: Callable[[], T], one_by_one: Callable[[], T]) -> T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operation without a batching rule is slower, not wrong
            return batched()
    except RuntimeError:  # an operation that cannot run batched, or a memory that is too small for all at once
        pass
    return one_by_one()


def _stack(column: Sequence[Tensor | None]) -> Tensor | None:
    present = [gradient.to_dense() for gradient in column if gradient is not None]
    return torch.stack(present) if len(present) == len(column) else None
