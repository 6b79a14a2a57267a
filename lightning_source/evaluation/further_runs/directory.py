"""The finished runs of further training, on disk as they come: a manifest and one file for each block of runs.

The manifest says what was asked for and which runs a file holds. It is written after the file, so that a sweep killed
at any moment leaves whole blocks only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightning_source._files import DirectoryError
from lightning_source._lightning import MisconfigurationException, rank_zero_warn
from lightning_source.evaluation._same_sweep import require_same_sweep
from lightning_source.evaluation.further_runs.recipe import Pair, Trace
from lightning_source.recording.claim import Claim
from lightning_source.recording.manifest import Record
from lightning_source.recording.store import TensorStore, holds_run


class FinishedRun(NamedTuple):
    """One run's measurements and distances, as in :class:`Trace`."""

    measurements: Tensor  # [E, Q]
    distances: Tensor  # [E]


@dataclass(kw_only=True)
class _Block:
    """Runs that were trained at once, and the file of their results."""

    file: str
    pairs: list[Pair]


@dataclass(kw_only=True)
class _SweepRecord(Record):
    """The manifest of a sweep: what was asked for, and which runs are finished."""

    further_training: dict[str, object] = field(default_factory=dict)
    blocks: list[_Block] = field(default_factory=list)


class _SweepStore(TensorStore[_SweepRecord]):
    record = _SweepRecord


class FurtherTrainingDirectory:
    """The finished runs of one sweep.

    Args:
        dirpath: made if absent; ``None`` keeps runs in memory only.
        asked: what tells the sweep from others, as JSON.

    Attributes:
        runs: the finished runs by left-out example and seed.

    Raises:
        MisconfigurationException: the directory belongs to another sweep, another process writes to it, it cannot be
            written, or a file of it is missing or damaged.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None, asked: dict[str, object]) -> None:
        self.runs: dict[Pair, FinishedRun] = {}
        self._store: _SweepStore | None = None
        self._claim: Claim | None = None
        if dirpath is None:
            return
        path = Path(dirpath)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(path)
            self._claim.take()
            self._open(path, asked)
        except OSError as error:
            raise MisconfigurationException(f"finished runs cannot be kept in `{path}`: {error}") from error

    def _open(self, path: Path, asked: dict[str, object]) -> None:
        if not holds_run(path):
            self._store = _SweepStore.create(path)
            self._store.manifest.further_training = asked
            self._store.commit()
            return
        self._store = _SweepStore.open(path)
        require_same_sweep(path, self._store.manifest.further_training, asked)
        for block in self._store.manifest.blocks:
            self._enter(block.pairs, _trace_of(path / block.file, self._store.read(block.file), len(block.pairs)))

    def __enter__(self) -> FurtherTrainingDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._claim is not None:
            self._claim.release()

    def add(self, pairs: Sequence[Pair], trace: Trace) -> None:
        """Keep a block of finished runs."""
        self._enter(pairs, trace)
        if self._store is None:
            return
        name = f"blocks/{len(self._store.manifest.blocks):06d}.safetensors"
        try:
            self._store.write(name, {"measurements": trace.measurements, "distances": trace.distances})
            self._store.manifest.blocks.append(_Block(file=name, pairs=list(pairs)))
            self._store.commit()
        except (OSError, DirectoryError) as error:
            rank_zero_warn(f"{error} Runs that finish from now on are kept in memory alone.")
            self._store = None

    def _enter(self, pairs: Sequence[Pair], trace: Trace) -> None:
        for index, pair in enumerate(pairs):
            self.runs[pair] = FinishedRun(trace.measurements[:, :, index], trace.distances[:, index])


def _trace_of(path: Path, tensors: Mapping[str, Tensor], runs: int) -> Trace:
    """A block's results, which must be those of its runs and finite."""
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    shapes = [found.get("measurements", []), found.get("distances", [])]
    if found.keys() != {"measurements", "distances"} or len(shapes[0]) != 3 or shapes[1] != [shapes[0][0], runs]:
        raise DirectoryError(f"`{path}` holds {found}, which are not the measurements and distances of {runs} runs.")
    if shapes[0][2] != runs or not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
        raise DirectoryError(f"`{path}` does not hold finite results of {runs} runs.")
    return Trace(**tensors)
