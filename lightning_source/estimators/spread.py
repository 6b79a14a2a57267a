"""The standard error of scores that are sums over snapshots: a jackknife that leaves out one snapshot at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException


class Spread:
    """Takes the terms of a block of scores one by one, those of a segment together, and keeps three matrices.

    A segment's share of a score is the sum of ``C`` terms ``v_c``, one for each of its snapshots, which stand for about
    equally many steps. Leaving out one and scaling the rest by ``C / (C - 1)`` gives ``C`` repeats, whose jackknife
    variance is ``C / (C - 1) Σ (v_c - v̄)²``. Variances of segments add up.

    Attributes:
        degrees: degrees of freedom: terms less segments.
    """

    def __init__(self) -> None:
        self.degrees = 0
        self._variance = torch.zeros(())
        self._segment: int | None = None
        self._count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, values: Tensor, segment: int | None) -> None:
        """Take the next term, ``[Q, N]``."""
        if self._count and segment != self._segment:
            self._close()
        self._segment = segment
        self._count += 1
        # Welford's update, which does not subtract large sums from each other.
        distance = values - self._mean
        self._mean = self._mean + distance / self._count
        self._squares = self._squares + distance * (values - self._mean)

    def stderr(self) -> Tensor:
        """The standard errors of the terms' sum, ``[Q, N]``, once all terms are there.

        Raises:
            MisconfigurationException: a segment had one term only.
        """
        self._close()
        return self._variance.sqrt()

    def _close(self) -> None:
        if self._count < 2:
            raise MisconfigurationException(
                "`stderr=True`: a segment's share of the score is one term, which says nothing of its error. HINT: ask"
                ' `method="source"` or "tracin" of a run with at least two snapshots in each segment'
                " (`SourceCallback(snapshots_per_segment=)`), or `ensemble` the scores of several runs."
            )
        self._variance = self._variance + self._count / (self._count - 1) * self._squares
        self.degrees += self._count - 1
        self._count = 0
        self._mean = self._squares = torch.zeros(())
