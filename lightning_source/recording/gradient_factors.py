"""From gradient norms before and after to the factor of each column, and to finer columns where factors differ.

The step log of a bin has the columns of its phase. Where parameters of one column were given unequal factors (one layer
was clipped), the bin also keeps *parts*, sets of parameters with equal factors, and the effective rates of each. When
the stage ends, its columns are split as all bins together ask for, and everything is told by the finer columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_source._files import DirectoryError
from lightning_source.capture.coverage import Coverage
from lightning_source.layers import Block
from lightning_source.recording.intervals import StepInterval
from lightning_source.recording.parameter_groups import Phase, phase_at
from lightning_source.recording.step_log import StepLog

EQUAL = 1e-3  # relative difference of factors up to which parameters share a column


def factors_of(norms: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """What multiplied the gradients of sets of parameters, ``[steps, sets]``.

    Args:
        norms: before and after, ``[steps, 2, parameters]``.
        members: indices of the parameters of each set.
    """
    squares = norms.double().square()
    totals = torch.stack([squares[:, :, list(indices)].sum(2) for indices in members], 2).sqrt()
    return _ratio(totals[:, 0], totals[:, 1])


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """After over before; where that is not finite, 0 for what was dropped and 1 where there was nothing to scale."""
    ratio = after / before
    dropped = (after == 0) & (before != 0)
    return torch.where(ratio.isfinite(), ratio, torch.where(dropped, 0.0, 1.0))


def parts_of(norms: Tensor, columns: Sequence[int], by_column: Tensor) -> list[int] | None:
    """For each parameter the part that it belongs to; ``None`` where the columns are fine as they are.

    Args:
        norms: before and after, ``[steps, 2, parameters]``.
        columns: the column of each parameter.
        by_column: the columns' own factors, ``[steps, columns]``.
    """
    known = (norms[:, 0] > 0) & norms.isfinite().all(1)  # without a gradient there is no factor to tell apart
    factors = torch.where(known, _ratio(norms[:, 0], norms[:, 1]).double(), torch.nan)
    own = by_column[:, list(columns)]
    if not ((factors - own).abs() > EQUAL * own.abs().clamp_min(1e-30)).any():
        return None
    parts: list[int] = []
    examples: list[tuple[int, Tensor]] = []  # of each part, its column and its factors as far as they are known
    for parameter, column in enumerate(columns):
        mine = factors[:, parameter]
        for part, (at, theirs) in enumerate(examples):
            if at == column and not ((mine - theirs).abs() > EQUAL * torch.maximum(mine.abs(), theirs.abs())).any():
                examples[part] = (at, torch.where(theirs.isnan(), mine, theirs))
                break
        else:
            part = len(examples)
            examples.append((column, mine))
        parts.append(part)
    return parts


@dataclass(frozen=True)
class BinLog:
    """What a bin keeps of its steps.

    Attributes:
        log: the steps by the columns of their phase.
        parts: the part of each parameter, in the order of the phase's columns; ``None`` where no column is split.
        rates: effective rates by part, ``[steps, parts]``.
    """

    log: StepLog
    parts: tuple[int, ...] | None = None
    rates: Tensor | None = None

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> BinLog:
        """From a bin's file.

        Raises:
            DirectoryError: its tables are missing or of another form; the message says which, and not the path.
        """
        steps, rates, given = tensors.get("steps"), tensors.get("part_rates"), tensors.get("parts")
        if not StepLog.is_table(steps):
            raise DirectoryError("`steps` is missing, or no table of steps")
        if (rates is None) != (given is None) or (rates is not None and not _fit(steps, rates, given)):
            raise DirectoryError("`parts` and `part_rates` are not those of its steps")
        parts = tuple(tensors["parts"].tolist()) if "parts" in tensors else None
        return cls(StepLog(tensors["steps"]), parts, rates)

    def tensors(self) -> dict[str, Tensor]:
        """For a bin's file."""
        if self.parts is None or self.rates is None:
            return {"steps": self.log.table}
        return {"steps": self.log.table, "parts": torch.tensor(self.parts), "part_rates": self.rates}

    @classmethod
    def concatenated(cls, logs: Sequence[BinLog], columns: Sequence[Sequence[str]]) -> BinLog:
        """One log of bins that follow each other in one phase.

        Args:
            logs: of the bins.
            columns: the phase's.
        """
        whole = StepLog.concatenated([entry.log for entry in logs])
        if all(entry.parts is None for entry in logs):
            return cls(whole)
        places = [entry.parts or column_of_each(columns) for entry in logs]
        numbers: dict[tuple[int, ...], int] = {}
        parts = tuple(numbers.setdefault(places_of_one, len(numbers)) for places_of_one in zip(*places, strict=True))
        pieces = [entry.rates_of([key[i] for key in numbers]) for i, entry in enumerate(logs)]
        return cls(whole, parts, torch.cat(pieces))

    def rates_of(self, parts: Sequence[int | None]) -> Tensor:
        """Effective rates of some parts (columns, where none is split), ``[steps, parts]``; 0 for ``None``."""
        source = self.log.effective_rate if self.rates is None else self.rates
        wide = torch.cat([source, source.new_zeros(len(source), 1)], 1)
        return wide[:, [source.shape[1] if part is None else part for part in parts]]


def column_of_each(columns: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """The column of each parameter, in the order of the columns.

    Example:
        >>> column_of_each([("a", "b"), ("c",)])
        (0, 0, 1)
    """
    return tuple(index for index, column in enumerate(columns) for _ in column)


# ---------------------------------------------------------------- when a stage ends


@dataclass(frozen=True)
class FinerColumns:
    """A stage told by columns that are split as its bins ask for."""

    phases: tuple[Phase, ...]
    bins: list[StepInterval]
    logs: list[StepLog]
    coverage: Coverage | None

    @classmethod
    def of(
        cls,
        phases: tuple[Phase, ...],
        bins: Sequence[StepInterval],
        logs: Sequence[BinLog],
        coverage: Coverage | None,
    ) -> FinerColumns:
        """Split the last phase's columns where parameters of one were given unequal factors in some bin.

        Args:
            phases: of the stage.
            bins: by the last phase's columns.
            logs: of the bins, each by its own phase's columns.
            coverage: by the last phase's columns.
        """
        here = [phase_at(phases, interval.first) for interval in bins]
        places = [_places(phase, entry) for phase, entry in zip(here, logs, strict=True)]
        columns: list[list[str]] = []
        for column in phases[-1].columns:
            sets: dict[tuple[int | None, ...], list[str]] = {}
            for name in column:
                sets.setdefault(tuple(place.get(name) for place in places), []).append(name)
            columns += sets.values()
        finer = [tuple(column) for column in columns]
        parents = [parent for parent in phases[-1].parents(finer) if parent is not None]
        told, tables = [], []
        for interval, phase, entry, place in zip(bins, here, logs, places, strict=True):
            rates = entry.rates_of([place.get(column[0]) for column in finer])
            table = entry.log.with_columns(phase.parents(finer))
            again = interval.regrouped(parents)  # the decay is scaled by nothing
            told.append(again if entry.parts is None else replace(again, rates=tuple(rates.sum(0).tolist())))
            tables.append(table.with_rates(rates))
        return cls(
            tuple(phase.split(finer) for phase in phases),
            told,
            tables,
            None if coverage is None else _by_columns(coverage, finer),
        )


def _places(phase: Phase, entry: BinLog) -> dict[str, int]:
    names = [name for column in phase.columns for name in column]
    return dict(zip(names, entry.parts or column_of_each(phase.columns), strict=True))


def _by_columns(coverage: Coverage, columns: Sequence[Sequence[str]]) -> Coverage:
    """The blocks by other columns; one whose weight and bias are in two of them becomes two blocks."""
    column_of = {name: index for index, column in enumerate(columns) for name in column}
    blocks: list[Block] = []
    for block in coverage.blocks:
        apart = len({column_of[name] for name in block.parameters}) > 1
        pieces = _separated(block) if apart else [block]
        blocks += [replace(piece, group=column_of[piece.parameters[0]]) for piece in pieces]
    return replace(coverage, blocks=tuple(blocks))


def _separated(block: Block) -> list[Block]:
    """Weight and bias as blocks of their own; together still if the layer's form has no such shapes."""
    (parts, outputs, inputs), sizes = block.shape, block.sizes
    if inputs > 1 and sizes == (parts * outputs * (inputs - 1), parts * outputs):  # the bias is the last input
        shapes = [(parts, outputs, inputs - 1), (parts, outputs, 1)]
    elif inputs == 1 and sum(sizes) == outputs:  # entries in a row
        shapes = [(1, size, 1) for size in sizes]
    else:
        return [block]
    weight = replace(block, name=str(block.weight), bias=None, shape=shapes[0], sizes=sizes[:1])
    return [weight, replace(block, name=str(block.bias), weight=None, shape=shapes[1], sizes=sizes[1:])]


def _fit(steps: Tensor | None, rates: Tensor, parts: Tensor | None) -> bool:
    """Whether the rates of parts are a table beside that of the steps, with a column for each part."""
    if steps is None or parts is None or parts.dtype != torch.int64 or parts.dim() != 1 or not len(parts):
        return False
    shape = [len(steps), 1 + int(parts.max())]
    return int(parts.min()) >= 0 and list(rates.shape) == shape and bool(rates.isfinite().all())
