"""Which examples of its dataset a stage was trained on, where a sampler drew from a fixed part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_source.capture.data import Examples
from lightning_source.recording.bins import DRAWN, in_stage
from lightning_source.recording.store import RunStore


class DatasetPart(NamedTuple):
    """A fixed part of a dataset."""

    positions: Sequence[int]
    of: int  # examples that the dataset holds


def write_drawn(store: RunStore, stage: int, examples: Examples) -> str | None:
    """Keep the positions of a stage's examples; gives back the file, ``None`` where the dataset has keys instead."""
    if not examples.numbered:
        return None
    tensors = {"positions": examples.positions, "of": torch.tensor(examples.positions_in_all)}
    return store.write(in_stage(stage, DRAWN), tensors)


def read_drawn(store: RunStore, stage: int) -> DatasetPart | None:
    """The inverse of :func:`write_drawn`; ``None`` for a stage that was trained on all examples."""
    name = store.manifest.stages[stage].drawn
    if name is None:
        return None
    tensors = store.read(name)
    return DatasetPart(tensors["positions"].tolist(), int(tensors["of"]))
