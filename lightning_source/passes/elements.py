"""One example as many: its loss is made of elements, the tokens of a text say, each of which has its own gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples, GivenBatches, NumberedBatch
from lightning_source.capture.objective import Losses, ObjectiveSpec


@dataclass(frozen=True)
class Elements(GivenBatches):
    """Some elements of one example as the examples of a pass: the batch that holds it comes once for each of them.

    Attributes:
        first: the first element.
        count: how many.
    """

    first: int = 0
    count: int = 0

    def __len__(self) -> int:
        return self.count

    def batches(self, ids: Sequence[int] | Tensor | None = None) -> Iterator[NumberedBatch]:
        """The example's batch for each of some elements; all by default."""
        for one in range(self.count) if ids is None else torch.as_tensor(ids).tolist():
            yield torch.tensor([one]), self.given[0]

    def part(self, first: int, count: int) -> Elements:
        """At most ``count`` elements from one on."""
        return Elements(self.given, self.counting, first, min(count, self.count - first))

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """The element that a pass is at, of ``[1, E]``: ``[1]``."""
        return values[:, self.first + int(ids[0])]


def single(examples: Examples | GivenBatches, row: int) -> GivenBatches:
    """One example as a batch of its own.

    Raises:
        MisconfigurationException: there is no such example, or it gives no batch.
    """
    if not 0 <= row < len(examples):
        raise MisconfigurationException(f"there is no example {row} among {len(examples)}.")
    alone = examples.one_at_a_time()
    batch = alone.given[row] if isinstance(alone, GivenBatches) else next(alone.batches([row]))[1]
    if batch is None:
        raise MisconfigurationException(f"the collate function gives no batch for the example {row} by itself.")
    return GivenBatches([batch])


def require_elements(spec: ObjectiveSpec, losses: Losses) -> None:
    """Refuse a loss that is not the sum of elements.

    Raises:
        MisconfigurationException: it is known as a whole, or in part.
    """
    if spec.origin == "whole" or spec.rest is not None or not losses.calls:
        raise MisconfigurationException(
            "the loss of an example is known as a whole, or a part of it is, so that it has no elements to tell apart."
            " HINT: use torch's losses, or define `attribution_losses(batch)` on the module."
        )
