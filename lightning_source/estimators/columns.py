"""The columns of a score matrix: positions in the training dataset, of which some may never have been trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.capture.data import Examples


@dataclass(frozen=True)
class Columns:
    """The training examples that are asked for, and those among them that have to be computed.

    Attributes:
        positions: in the dataset, ``[N]`` int64.
        ids: of those that were trained on, as the passes number them; ``None`` for all of them in their order.
        trained: which of ``positions`` those are, ``[N]`` bool; ``None`` for all.
        count: how many those are.
    """

    positions: Tensor
    ids: Tensor | None
    trained: Tensor | None
    count: int

    @classmethod
    def of(cls, data: Examples, train_ids: Sequence[int] | Tensor | None) -> Columns:
        """Columns for some positions in the dataset, for all of them by default.

        Raises:
            MisconfigurationException: there are no such positions.
        """
        asked = None if train_ids is None else _positions(train_ids, data.positions_in_all)
        positions = torch.arange(data.positions_in_all) if asked is None else asked
        if len(data) == data.positions_in_all:
            return cls(positions, asked, None, len(positions))
        ids = torch.full((data.positions_in_all,), -1)
        ids[data.positions] = torch.arange(len(data))
        trained = ids[positions] >= 0
        return cls(positions, None if asked is None else ids[positions][trained], trained, int(trained.sum()))

    def spread(self, values: Tensor, untrained: float = 0.0) -> Tensor:
        """Computed columns ``[..., count]`` in their places of ``[..., N]``; removing the others changes nothing."""
        if self.trained is None:
            return values
        spread = values.new_full((*values.shape[:-1], len(self.positions)), untrained)
        spread[..., self.trained] = values
        return spread


def _positions(ids: Sequence[int] | Tensor, total: int) -> Tensor:
    chosen = torch.as_tensor(ids, dtype=torch.int64)
    if chosen.dim() != 1 or not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= total:
        raise MisconfigurationException(
            f"`train_ids` must name some of the {total} training examples, 0 to {total - 1}."
        )
    return chosen
