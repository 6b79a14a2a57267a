"""Which parameters share a learning rate, and since when: optimizers are replaced and layers thawed in mid-fit.

A *column* is a set of parameters that have always been in the same parameter group, so one ``Λ`` serves them all. When
groups change, columns split and never join; the steps before count for each part what they counted for the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """Steps of one fit through which the optimizer and its groups stayed the same."""

    first: int  # its first step
    optimizer: str  # class name
    columns: tuple[tuple[str, ...], ...]  # parameter names
    groups: tuple[int | None, ...]  # each column's group of the optimizer; None: not trained in this phase
    decoupled: tuple[bool, ...]  # whether each column's weight decay is not preconditioned

    @classmethod
    def after(
        cls,
        previous: Phase | None,
        first: int,
        optimizer: str,
        groups: Sequence[Sequence[str]],
        decoupled: Sequence[bool],
    ) -> Phase:
        """The phase that begins with other groups.

        Args:
            previous: the one before, whose columns are split where their parameters part.
            first: its first step.
            optimizer: class name.
            groups: names of the trained parameters by group.
            decoupled: by group, whether the decay is not preconditioned.

        Example:
            >>> first = Phase.after(None, 0, "SGD", [["a", "b"]], [False])
            >>> second = Phase.after(first, 10, "SGD", [["a"], ["b", "c"]], [False, False])  # b changes group, c thaws
            >>> second.columns, second.groups, first.parents(second.columns)
            ((('a',), ('b',), ('c',)), (0, 1, 1), [0, 0, None])
        """
        old = {name: i for i, column in enumerate(previous.columns if previous else ()) for name in column}
        new = {name: i for i, group in enumerate(groups) for name in group}
        columns: dict[tuple[int | None, int | None], list[str]] = {}
        for name in dict.fromkeys([*old, *new]):
            columns.setdefault((old.get(name), new.get(name)), []).append(name)
        owners = tuple(group for _, group in columns)
        flags = tuple(group is not None and bool(decoupled[group]) for group in owners)
        return cls(first, optimizer, tuple(map(tuple, columns.values())), owners, flags)

    def parents(self, columns: Sequence[Sequence[str]]) -> list[int | None]:
        """For each of some later columns, the one of this phase that held it; ``None`` where it was not trained yet."""
        held = {name: i for i, column in enumerate(self.columns) for name in column}
        return [held.get(column[0]) for column in columns]

    def split(self, columns: Sequence[tuple[str, ...]]) -> Phase:
        """The same phase by finer columns; those of parameters that it does not know are left out."""
        kept = [(c, parent) for c, parent in zip(columns, self.parents(columns), strict=True) if parent is not None]
        return replace(
            self,
            columns=tuple(column for column, _ in kept),
            groups=tuple(self.groups[parent] for _, parent in kept),
            decoupled=tuple(self.decoupled[parent] for _, parent in kept),
        )

    def per_column(self, values: Sequence[float]) -> list[float]:
        """Values of the optimizer's groups by column; 0 where nothing is trained."""
        return [0.0 if group is None else float(values[group]) for group in self.groups]


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase that a step belongs to."""
    return [phase for phase in phases if phase.first <= step][-1]
