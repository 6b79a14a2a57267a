"""What a loader's samplers tell: which examples they draw, in what batches. They are looked at, never wrapped.

A sampler of the user's own tells nothing before it is iterated, and to iterate it may change what it draws next; a copy
is iterated in its place, and only when training does not wait for it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, SupportsIndex, cast

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_source.capture.isolation import isolated_rng

# What an endless sampler is asked for.
MOST_YIELDS = 1_000_000


@dataclass(frozen=True)
class Drawn:
    """The examples that a loader draws.

    Attributes:
        keys: what the dataset is indexed by, in the sampler's own order where it has one; ``None`` for all examples in
            the dataset's order.
        unknown: the sampler that does not tell; ``None`` where it is known what is drawn.
    """

    keys: Sequence[object] | None = None
    unknown: object | None = None


def batches_drawn_by(loader: DataLoader[object]) -> Iterable[Sequence[object]] | None:
    """What yields a loader's lists of indices; ``None`` where the dataset itself yields whole batches."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    sampler: Any = loader.sampler
    return sampler if isinstance(getattr(sampler, "batch_size", None), int) else None


def fetches_batches(loader: DataLoader[object]) -> bool:
    """Whether the dataset is given a whole list of indices: ``sampler=BatchSampler(...), batch_size=None``."""
    return loader.batch_sampler is None and batches_drawn_by(loader) is not None


def is_plain(batches: object) -> bool:
    """Whether a batch sampler is torch's own, which cuts another sampler's indices into equal pieces."""
    return isinstance(batches, BatchSampler) and type(batches).__iter__ is BatchSampler.__iter__


def drawn_by(loader: DataLoader[object]) -> Drawn:
    """Which examples a loader over a map-style dataset draws, without iterating anything."""
    batches: Any = batches_drawn_by(loader)
    sampler = loader.sampler if batches is None else batches.sampler if is_plain(batches) else batches
    while isinstance(sampler, DistributedSampler) and hasattr(sampler.dataset, "_sampler"):
        sampler = sampler.dataset._sampler  # Lightning's wrapper of the user's own
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
        source = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
        total = len(source)  # type: ignore[arg-type]
        return Drawn() if total == size else Drawn(range(total))
    if isinstance(sampler, SubsetRandomSampler):
        return Drawn(_as_positions(list(sampler.indices), size))
    if isinstance(sampler, Sequence):
        return Drawn(_as_positions(_joined(sampler) if sampler is batches else list(sampler), size))
    return Drawn(unknown=sampler)


def iterated(loader: DataLoader[object]) -> Sequence[object]:
    """The keys of one epoch in their order; global generators are left alone, and a sampler that can be copied."""
    batches = batches_drawn_by(loader)
    sampler = loader.sampler if batches is None else batches
    with suppress(Exception):  # it may hold what has no copy
        sampler = copied(sampler, loader)
    keys = yields_of(sampler) if batches is None else _joined(cast("list[Sequence[object]]", yields_of(sampler)))
    return _as_positions(keys, len(loader.dataset))  # type: ignore[arg-type]


def copied(sampler: Iterable[object], loader: DataLoader[object]) -> Iterable[object]:
    """A copy of a loader's sampler, over the same dataset."""
    return copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})


def yields_of(sampler: Iterable[object]) -> list[object]:
    """What a sampler yields in one epoch."""
    try:
        limit = len(sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        limit = MOST_YIELDS
    with isolated_rng(0):
        return list(islice(sampler, limit))


def _joined(batches: Iterable[Sequence[object]]) -> list[object]:
    return [key for batch in batches for key in batch]


def _as_positions(keys: list[object], size: int) -> Sequence[object]:
    """The same as plain numbers from 0, if they are numbers."""
    try:
        numbers = [operator.index(cast(SupportsIndex, key)) for key in keys]
    except TypeError:
        return keys
    return [number + size if number < 0 else number for number in numbers]
