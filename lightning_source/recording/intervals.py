"""Intervals of training and how they are cut into snapshots and segments: plain numbers, no tensors.

How long a run will be is unknown (early stopping, a time limit, Ctrl-C), so training is kept as many short *bins* that
merge in pairs whenever there are too many. Afterwards neighbouring bins are joined into snapshots, and snapshots into
segments. Everything here adds up, so any of these can be cut again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepInterval:
    """Consecutive optimizer steps ``first <= step < last`` and sums over them: a bin, snapshot or segment."""

    first: int
    last: int
    rates: tuple[float, ...]  # Λ of each parameter group: Σ effective learning rates
    decays: tuple[float, ...]  # Σ effective learning rate · weight decay of each group
    file: str = ""  # where its parameters are
    stage: int = 0  # the `fit` that it belongs to; steps count on from one stage to the next

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.last - self.first

    @property
    def weight(self) -> float:
        """How far training moved: Λ averaged over the groups. Snapshots are averaged with these weights (Eq. 20)."""
        return sum(self.rates) / len(self.rates)

    def weight_decay(self, group: int) -> float:
        """The group's weight decay, averaged with the learning rates that multiplied it."""
        return self.decays[group] / self.rates[group] if self.rates[group] else 0.0

    def merge(self, other: StepInterval) -> StepInterval:
        """The interval over both; ``other`` follows this one.

        Example:
            >>> StepInterval(0, 4, rates=(0.4,), decays=(0.0,)).merge(StepInterval(4, 6, rates=(0.1,), decays=(0.0,)))
            StepInterval(first=0, last=6, rates=(0.5,), decays=(0.0,), file='', stage=0)
        """
        if other.first != self.last or other.stage != self.stage:
            raise ValueError(f"steps {other.first}-{other.last} do not follow steps {self.first}-{self.last}")
        return StepInterval(
            self.first,
            other.last,
            tuple(a + b for a, b in zip(self.rates, other.rates, strict=True)),
            tuple(a + b for a, b in zip(self.decays, other.decays, strict=True)),
            stage=self.stage,
        )

    def regrouped(self, parents: Sequence[int | None]) -> StepInterval:
        """The same interval for groups that were made by splitting its own; a parent of ``None`` was not trained."""
        rates, decays = (
            tuple(0.0 if parent is None else values[parent] for parent in parents)
            for values in (self.rates, self.decays)
        )
        return replace(self, rates=rates, decays=decays)

    def at(self, file: str) -> StepInterval:
        """The same interval with its parameters in ``file``."""
        return replace(self, file=file)


def merge_all(intervals: Sequence[StepInterval]) -> StepInterval:
    """One interval over consecutive ones."""
    total = intervals[0]
    for interval in intervals[1:]:
        total = total.merge(interval)
    return total


def normalized_weights(intervals: Sequence[StepInterval]) -> list[float]:
    """Weights that sum to 1 by how far training moved; by steps where the learning rate was 0 throughout.

    Example:
        >>> normalized_weights([StepInterval(0, 4, (0.75,), (0.0,)), StepInterval(4, 8, (0.25,), (0.0,))])
        [0.75, 0.25]
    """
    weights = [s.weight for s in intervals]
    if not sum(weights) > 0:
        weights = [float(s.steps) for s in intervals]
    return [w / sum(weights) for w in weights]


def planned_ends(steps: int, segments: int | Sequence[int], bins: int) -> list[int]:
    """Where the bins of a run of known length end, so that none needs to be merged or cut.

    Args:
        steps: of the run.
        segments: how many equal segments, or the steps at which inner segments begin.
        bins: of each segment.

    Example:
        >>> planned_ends(12, segments=[8], bins=2)
        [4, 8, 10, 12]
    """
    if isinstance(segments, int):
        starts = [steps * k // segments for k in range(segments)]
    else:
        starts = [0, *(step for step in segments if step < steps)]
    ends = {
        a + (b - a) * k // bins for a, b in zip(starts, [*starts[1:], steps], strict=True) for k in range(1, bins + 1)
    }
    return sorted(ends - {0})


def pairs_to_merge(intervals: Sequence[StepInterval], boundaries: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of neighbours to merge, two by two, never across one of the user's boundaries.

    Example:
        >>> bins = [StepInterval(step, step + 1, (0.1,), (0.0,)) for step in range(5)]
        >>> pairs_to_merge(bins, boundaries=[3])
        [(0, 1), (2,), (3, 4)]
    """
    groups: list[tuple[int, ...]] = []
    for index, interval in enumerate(intervals):
        if groups and len(groups[-1]) == 1 and interval.first not in boundaries:
            groups[-1] = (groups[-1][0], index)
        else:
            groups.append((index,))
    return groups


def cut_evenly(intervals: Sequence[StepInterval], count: int) -> list[list[int]]:
    """Indices of ``intervals`` in at most ``count`` consecutive groups, as even in steps as can be.

    Example:
        >>> ends = [0, 4, 8, 9, 10, 12]
        >>> bins = [StepInterval(first, last, (0.1,), (0.0,)) for first, last in zip(ends, ends[1:])]
        >>> cut_evenly(bins, 3)
        [[0], [1], [2, 3, 4]]
    """
    count = min(count, len(intervals))
    start, total = intervals[0].first, intervals[-1].last - intervals[0].first
    cuts = [0]
    for k in range(1, count):
        target = start + total * k / count
        allowed = range(cuts[-1] + 1, len(intervals) - (count - k) + 1)
        cuts.append(min(allowed, key=lambda i: abs(intervals[i].first - target)))
    return [list(range(a, b)) for a, b in zip(cuts, [*cuts[1:], len(intervals)], strict=True)]


def cut(
    intervals: Sequence[StepInterval], segments: int | Sequence[int], breaks: Sequence[int] = ()
) -> list[list[int]]:
    """Indices of ``intervals`` by segment.

    Args:
        intervals: consecutive bins or snapshots.
        segments: how many equal segments, or the steps at which inner segments begin; a boundary inside an interval
            moves to its nearer end, one that training did not reach counts for nothing.
        breaks: steps at which an interval begins and a further segment must: what is trained changed there.
    """
    if isinstance(segments, int):
        starts = {group[0] for group in cut_evenly(intervals, segments)}
    else:
        ends = [*(s.first for s in intervals), intervals[-1].last]
        nearest = {min(range(len(ends)), key=lambda i: abs(ends[i] - boundary)) for boundary in segments}
        starts = {0} | nearest - {len(intervals)}  # where training ended, no segment begins
    ordered = sorted(starts | {i for i, interval in enumerate(intervals) if interval.first in breaks})
    return [list(range(a, b)) for a, b in zip(ordered, [*ordered[1:], len(intervals)], strict=True)]
