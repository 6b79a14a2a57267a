"""The finished runs of further training, on disk as they come: ``manifest.json`` and one file for each block of runs.

The manifest says what was asked for and which runs a file holds. It is written after the file, so that a sweep killed
at any moment leaves whole blocks only.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor

from lightning_source._files import sha256_of, write_tensors, write_text
from lightning_source.evaluation._same_sweep import require_same_sweep
from lightning_source.evaluation.further_runs.recipe import Pair, Trace

MANIFEST = "manifest.json"
SCHEMA = 1


class FinishedRun(NamedTuple):
    """One run's measurements and distances, as in :class:`Trace`."""

    measurements: Tensor  # [E, Q]
    distances: Tensor  # [E]


class _Block(TypedDict):
    file: str
    pairs: list[Pair]


class _Manifest(TypedDict):
    schema: int
    run_id: str
    files: dict[str, str]  # sha256 by name
    further_training: dict[str, object]  # what was asked for
    blocks: list[_Block]


class FurtherTrainingDirectory:
    """The finished runs of one sweep.

    Args:
        dirpath: made if absent; ``None`` keeps runs in memory only.
        asked: what tells the sweep from others, as JSON.

    Attributes:
        runs: the finished runs by left-out example and seed.

    Raises:
        MisconfigurationException: the directory belongs to another sweep, or a file of it is missing or damaged.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None, asked: dict[str, object]) -> None:
        self.runs: dict[Pair, FinishedRun] = {}
        self._path = None if dirpath is None else Path(dirpath)
        self._manifest = _Manifest(schema=SCHEMA, run_id=uuid.uuid4().hex, files={}, further_training=asked, blocks=[])
        if self._path is None:
            return
        if not (self._path / MANIFEST).exists():
            (self._path / "blocks").mkdir(parents=True, exist_ok=True)
            self._commit()
            return
        manifest = json.loads((self._path / MANIFEST).read_text())
        require_same_sweep(self._path, manifest.get("further_training", {}), asked)
        self._manifest = manifest
        for block in self._manifest["blocks"]:
            tensors = self._read(self._path / block["file"], self._manifest["files"][block["file"]])
            self._enter([(point, seed) for point, seed in block["pairs"]], Trace(**tensors))

    def add(self, pairs: Sequence[Pair], trace: Trace) -> None:
        """Keep a block of finished runs."""
        self._enter(pairs, trace)
        if self._path is not None:
            name = f"blocks/{len(self._manifest['blocks']):06d}.safetensors"
            tensors = {"measurements": trace.measurements, "distances": trace.distances}
            self._manifest["files"][name] = write_tensors(self._path / name, tensors)
            self._manifest["blocks"].append({"file": name, "pairs": list(pairs)})
            self._commit()

    def _enter(self, pairs: Sequence[Pair], trace: Trace) -> None:
        for index, pair in enumerate(pairs):
            self.runs[pair] = FinishedRun(trace.measurements[:, :, index], trace.distances[:, index])

    def _commit(self) -> None:
        assert self._path is not None
        write_text(self._path / MANIFEST, json.dumps(self._manifest, indent=1))

    @staticmethod
    def _read(path: Path, digest: str) -> dict[str, Tensor]:
        if not path.exists() or sha256_of(path) != digest:
            raise MisconfigurationException(
                f"`{path}` is missing, or not what `{MANIFEST}` says. HINT: delete the directory to repeat its runs."
            )
        return load_file(path)
