"""The run directory: safetensors files and one JSON manifest, written so that a kill at any moment leaves a valid run.

A file is written under a temporary name, flushed to disk and moved into place; the manifest, which alone says what
belongs to the run, comes last. Reading checks the schema and each file's sha256.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor

from lightning_source._files import sha256_of, write_tensors, write_text
from lightning_source.distributed import Ranks

SCHEMA = 1
MANIFEST = "manifest.json"
PARTIAL = "partial"


class RunStore:
    """A run directory and its manifest.

    Attributes:
        path: the directory.
        manifest: the manifest's contents; :meth:`commit` writes it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._replaces = False

    @classmethod
    def create(cls, path: str | os.PathLike[str], overwrite: bool = False) -> RunStore:
        """A new run; nothing is on disk until the first :meth:`commit`.

        Args:
            path: the directory, made if absent.
            overwrite: instead of refusing, delete the run that is there when the first file is written.

        Raises:
            MisconfigurationException: the directory holds a run, or cannot be written.
        """
        path = Path(path)
        if (path / MANIFEST).exists() and not overwrite:
            raise MisconfigurationException(
                f"`{path}` already holds a run, which a new one would destroy. HINT: give another `dirpath`, delete the"
                " directory, or pass `overwrite=True`."
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(f"`{path}` cannot be a run directory: {error}.") from None
        store = cls(path, {"schema": SCHEMA, "run_id": uuid.uuid4().hex, "files": {}})
        store._replaces = True
        return store

    def _clear(self) -> None:
        """Before a new run's first write, what it replaces goes."""
        if self._replaces and (self.path / MANIFEST).exists():
            _delete_run(self.path)
        self._replaces = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunStore:
        """An existing run.

        Raises:
            MisconfigurationException: there is no run, or it was written under another schema.
        """
        path = Path(path)
        if not (path / MANIFEST).exists():
            raise MisconfigurationException(
                f"`{path}` holds no run: `{MANIFEST}` is missing. HINT: pass the `dirpath` of the SourceCallback that"
                " trained it."
            )
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except json.JSONDecodeError as error:
            raise MisconfigurationException(f"`{path / MANIFEST}` is not valid JSON: {error}.") from None
        if manifest.get("schema") != SCHEMA:
            raise MisconfigurationException(
                f"`{path / MANIFEST}` has schema {manifest.get('schema')}; this version reads schema {SCHEMA}."
            )
        return cls(path, manifest)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors under a name relative to the directory and enter them in the manifest; gives back the name."""
        self._clear()
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.manifest["files"][name] = write_tensors(target, tensors)
        return name

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of a file of this run.

        Raises:
            MisconfigurationException: the file is missing or not what the manifest says.
        """
        path = self.path / name
        if name not in self.manifest["files"] or not path.exists():
            raise MisconfigurationException(f"`{path}` is missing from the run.")
        if sha256_of(path) != self.manifest["files"][name]:
            raise MisconfigurationException(
                f"`{path}` does not match the sha256 in `{MANIFEST}`: it is damaged or from another run."
            )
        return load_file(path, device=str(device))

    def commit(self, remove: tuple[str, ...] = ()) -> None:
        """Write the manifest; then delete the files in ``remove``, which it no longer names."""
        self._clear()
        for name in remove:
            self.manifest["files"].pop(name, None)
        write_text(self.path / MANIFEST, json.dumps(self.manifest, indent=1))
        for name in remove:
            (self.path / name).unlink(missing_ok=True)


class PartialStore(RunStore):
    """A run that has not ended, as a scorer may complete it: what is made of it goes into a folder of its own.

    Whoever records the run, or resumes it one day, finds it as it was.

    Args:
        base: the run.
    """

    def __init__(self, base: RunStore) -> None:
        manifest = copy.deepcopy(base.manifest)
        manifest["partial_of"] = {"run_id": manifest["run_id"], "bins": manifest["bins"]}
        super().__init__(base.path / PARTIAL, manifest)
        self.base = base.path
        if (self.path / MANIFEST).exists():
            earlier = json.loads((self.path / MANIFEST).read_text())
            if earlier.get("partial_of") == manifest["partial_of"]:
                self.manifest = earlier
            else:
                _delete_run(self.path)
        self.path.mkdir(exist_ok=True)

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See :meth:`RunStore.read`."""
        if (self.path / name).exists():
            return super().read(name, device)
        return RunStore(self.base, self.manifest).read(name, device)


def open_to_score(path: str | os.PathLike[str]) -> RunStore:
    """An existing run, finished or not; see :meth:`RunStore.open`."""
    store = RunStore.open(path)
    return PartialStore(store) if store.manifest.get("bins") else store


class SharedStore(RunStore):
    """A run that several ranks work on together: rank 0 reads and writes, and all see the same. Calls are collective.

    Args:
        path: the directory as rank 0 sees it.
        ranks: who works together.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks) -> None:
        self._own: RunStore | None = None

        def open_it() -> tuple[Path, dict[str, Any]]:
            self._own = open_to_score(path)
            return self._own.path, self._own.manifest

        super().__init__(*ranks.on_rank_zero(open_it))
        self.ranks = ranks

    @property
    def own(self) -> RunStore:
        """Rank 0's store, under the manifest that all share."""
        assert self._own is not None
        self._own.manifest = self.manifest
        return self._own

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """See :meth:`RunStore.write`."""

        def write() -> str:
            self.own.write(name, tensors)
            return self.manifest["files"][name]

        self.manifest["files"][name] = self.ranks.on_rank_zero(write)
        return name

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See :meth:`RunStore.read`."""
        tensors = self.ranks.on_rank_zero(lambda: self.own.read(name))
        return {key: value.to(device) for key, value in tensors.items()}

    def commit(self, remove: tuple[str, ...] = ()) -> None:
        """See :meth:`RunStore.commit`."""
        for name in remove:
            self.manifest["files"].pop(name, None)
        self.ranks.on_rank_zero(lambda: self.own.commit(remove))


def _delete_run(path: Path) -> None:
    """Delete a run's own files, and nothing else that lies in the directory."""
    try:
        names = list(json.loads((path / MANIFEST).read_text()).get("files", {}))
    except json.JSONDecodeError:
        names = []
    (path / MANIFEST).unlink()
    for name in names:
        (path / name).unlink(missing_ok=True)
