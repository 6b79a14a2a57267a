"""A directory of retrainings: ``sweep.json`` with what was asked for, and a safetensors file for each finished run.

A sweep killed at any moment leaves whole runs only. Each names the sweep that it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_source._files import SCRATCH, DirectoryError, require_regular, write_text
from lightning_source._lightning import MisconfigurationException
from lightning_source._sealed import read_sealed, write_sealed
from lightning_source.evaluation._same_sweep import require_same_sweep

SCHEMA = 1
MANIFEST = "sweep.json"


@dataclass(frozen=True)
class RetrainingDirectory:
    """An open directory; it travels to the workers, which write their runs themselves.

    Attributes:
        path: the directory, absolute.
        id: what its files carry.
    """

    path: Path
    id: str

    @classmethod
    def open(
        cls, dirpath: str | os.PathLike[str], masks: Tensor, settings: Mapping[str, object]
    ) -> RetrainingDirectory:
        """The sweep that the directory holds, or a new one in an empty directory.

        Args:
            dirpath: the directory, which exists.
            masks: ``[M, N]``, bool: its subsets.
            settings: what else tells it from others, as JSON.

        Raises:
            MisconfigurationException: the directory holds another sweep, or something else.
        """
        path = Path(dirpath).absolute()
        digest = hashlib.sha256(masks.numpy().tobytes()).hexdigest()
        asked = {"schema": SCHEMA, "subsets": f"{tuple(masks.shape)}, sha256 {digest}", **settings}
        asked = json.loads(json.dumps(asked))  # as it comes back from the file
        manifest = path / MANIFEST
        try:
            if manifest.exists():
                recorded = _read(manifest)
                require_same_sweep(path, {k: value for k, value in recorded.items() if k != "sweep"}, asked)
                return cls(path, str(recorded["sweep"]))
            if path.exists() and any(path.glob("*.safetensors")):
                raise MisconfigurationException(
                    f"`{path}` holds safetensors files but no `{MANIFEST}`: it is not a sweep's directory."
                )
            directory = cls(path, uuid.uuid4().hex)
            write_text(manifest, json.dumps({"sweep": directory.id} | asked, indent=1) + "\n", path / SCRATCH)
        except OSError as error:
            raise MisconfigurationException(f"`{path}` cannot hold the sweep: {error}") from error
        return directory

    def holds(self, subset: int, seed: int) -> bool:
        """Whether the run is finished."""
        return self._file(subset, seed).exists()

    def save(self, subset: int, seed: int, measurements: Tensor) -> None:
        """Enter a finished run.

        Args:
            subset: its row.
            seed: its seed.
            measurements: ``[Q]``.

        Raises:
            OSError: the directory cannot be written, or does not exist where the run was.
        """
        if not self.path.exists():
            raise FileNotFoundError(
                f"`{self.path}` does not exist where a run finished. HINT: on a cluster `dirpath` must be on a file"
                " system that all workers share."
            )
        write_sealed(self._file(subset, seed), {"measurements": measurements}, "sweep", self.id, self.path / SCRATCH)

    def load(self, subset: int, seed: int) -> Tensor:
        """A finished run's measurements, ``[Q]``.

        Raises:
            MisconfigurationException: the file is damaged or of another sweep.
        """
        path = self._file(subset, seed)
        try:
            tensors, owner = read_sealed(path, "sweep")
            if tensors.keys() != {"measurements"} or tensors["measurements"].dim() != 1:
                raise DirectoryError("it does not hold one value for each query")
        except (OSError, DirectoryError) as error:
            raise MisconfigurationException(
                f"`{path}` is not a finished run: {error}. HINT: delete it to have the run repeated."
            ) from error
        if owner != self.id:
            raise MisconfigurationException(
                f"`{path}` belongs to another sweep. HINT: delete it to have the run repeated."
            )
        return tensors["measurements"]

    def _file(self, subset: int, seed: int) -> Path:
        return self.path / f"subset={subset:05d}-seed={seed}.safetensors"


def _read(manifest: Path) -> dict[str, object]:
    """What a sweep's manifest says.

    Raises:
        MisconfigurationException: it is damaged.
    """
    require_regular(manifest)
    try:
        recorded: object = json.loads(manifest.read_text())
    except (ValueError, RecursionError) as error:
        raise MisconfigurationException(f"`{manifest}` is not valid JSON: {error}.") from None
    if not isinstance(recorded, dict) or not isinstance(recorded.get("sweep"), str):
        raise MisconfigurationException(f"`{manifest}` does not say which sweep it is of: it is damaged.")
    return recorded
