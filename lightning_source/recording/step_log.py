"""The step log: what each optimizer step did, one row a step, one column a set of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class StepRecord(NamedTuple):
    """One optimizer update; the tuples are by column (see :mod:`lightning_source.recording.parameter_groups`)."""

    learning_rates: tuple[float, ...]
    multipliers: tuple[float, ...]  # effective rate over learning rate
    weight_decays: tuple[float, ...]
    weight: float  # what multiplied the loss beside its mean over micro-batches

    def effective_rates(self, coefficients: Sequence[float]) -> list[float]:
        """How far the step moved along the gradient of the mean loss, by column, given what multiplied its gradient."""
        return [rate * self.weight * c for rate, c in zip(self._full_rates(), coefficients, strict=True)]

    def effective_decays(self, coefficient: float) -> list[float]:
        """Effective learning rate times weight decay, by column.

        Neither a short window nor clipping scales the decay; a step without a loss or a skipped one has none.
        """
        taken = self.weight * coefficient > 0
        return [r * decay * taken for r, decay in zip(self._full_rates(), self.weight_decays, strict=True)]

    def _full_rates(self) -> list[float]:
        return [rate * m for rate, m in zip(self.learning_rates, self.multipliers, strict=True)]


@dataclass(frozen=True)
class StepLog:
    """Consecutive steps.

    Attributes:
        table: ``[steps, 3 · columns + 2]`` in float64, as it is on disk: learning rates, effective rates and decays by
            column, then the loss weight and the coefficient.
    """

    table: Tensor

    @staticmethod
    def is_table(table: Tensor | None) -> bool:
        """Whether a tensor has the form of a log."""
        if table is None or table.dim() != 2 or table.dtype != torch.float64:
            return False
        return len(table) > 0 and table.shape[1] >= 5 and table.shape[1] % 3 == 2 and bool(table.isfinite().all())

    @classmethod
    def of(
        cls,
        steps: Sequence[StepRecord],
        coefficients: Sequence[float],
        by_column: Sequence[Sequence[float]] | None = None,
    ) -> StepLog:
        """The log of some steps.

        Args:
            steps: what is known of each.
            coefficients: what multiplied the gradient of each on its way into the step: clipping, 0 if skipped.
            by_column: the same for each step's columns; by default alike for all.
        """
        if by_column is None:
            by_column = [[c] * len(s.learning_rates) for s, c in zip(steps, coefficients, strict=True)]
        rows = [
            [*s.learning_rates, *s.effective_rates(own), *s.weight_decays, s.weight, c]
            for s, c, own in zip(steps, coefficients, by_column, strict=True)
        ]
        return cls(torch.tensor(rows, dtype=torch.float64))

    @classmethod
    def concatenated(cls, logs: Sequence[StepLog]) -> StepLog:
        """One log of steps that follow each other, all under the same columns."""
        return cls(torch.cat([log.table for log in logs]))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def columns(self) -> int:
        """Number of columns."""
        return (self.table.shape[1] - 2) // 3

    @property
    def learning_rate(self) -> Tensor:
        """``[steps, columns]``: the rate that the optimizer used."""
        return self.table[:, : self.columns]

    @property
    def effective_rate(self) -> Tensor:
        """``[steps, columns]``: how far the step moved along the gradient of the mean loss."""
        return self.table[:, self.columns : 2 * self.columns]

    @property
    def decay(self) -> Tensor:
        """``[steps, columns]``: the weight decay."""
        return self.table[:, 2 * self.columns : 3 * self.columns]

    @property
    def weight(self) -> Tensor:
        """``[steps]``: what multiplied the loss; less than 1 in a short window, 0 in a step without a loss."""
        return self.table[:, -2]

    @property
    def coefficient(self) -> Tensor:
        """``[steps]``: what multiplied the whole gradient: clipping, 0 for a step that the loss scaler skipped."""
        return self.table[:, -1]

    def with_rates(self, rates: Tensor) -> StepLog:
        """The same steps at other effective rates, ``[steps, columns]``."""
        return StepLog(torch.cat([self.learning_rate, rates, self.table[:, 2 * self.columns :]], 1))

    def between(self, first: int, last: int) -> StepLog:
        """Rows ``first <= row < last``."""
        return StepLog(self.table[first:last])

    def with_columns(self, chosen: Sequence[int | None]) -> StepLog:
        """The same steps under other columns, each one of these or, where nothing was trained, zeros."""
        zeros = self.table.new_zeros(len(self), 1)
        sources = [self.columns if column is None else column for column in chosen]
        parts = [
            torch.cat([part, zeros], 1)[:, sources] for part in (self.learning_rate, self.effective_rate, self.decay)
        ]
        return StepLog(torch.cat([*parts, self.table[:, -2:]], 1))
