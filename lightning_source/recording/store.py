"""The run directory: safetensors files and one JSON manifest, written so that a kill at any moment leaves a valid run.

A file is written under a temporary name, flushed to disk and moved into place; the manifest, which alone says what
belongs to the run, comes last. Reading checks the schema and each file's sha256.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Self

from lightning_source._files import inside, sha256_of, write_tensors, write_text
from lightning_source._lightning import MisconfigurationException
from lightning_source.distributed import Ranks
from lightning_source.recording.manifest import (
    MANIFEST,
    Manifest,
    PartialOf,
    Record,
    files_named_by,
    manifest_text,
    read_manifest,
)
from lightning_source.recording.typed_json import FieldError
from lightning_source.recording.validation import validate

PARTIAL = "partial"
# What recordings, runs and sweeps of further training call their files.
OWN_NAMES = re.compile(r"(stage=\d+/)?([a-z]+|(bins|blocks|resume|snapshots|segments)/[\w=+-]+|[\w=-]+)\.safetensors")
R = TypeVar("R", bound=Record)


class TensorStore(Generic[R]):
    """A directory of safetensors files and the manifest that names them; a subclass says what else that holds.

    Attributes:
        record: the class of the manifest.
        path: the directory.
        manifest: what the directory says of itself; :meth:`commit` writes it.
    """

    record: type[R]

    def __init__(self, path: Path, manifest: R) -> None:
        self.path = path
        self.manifest = manifest
        self._replaces = False

    @classmethod
    def create(cls, path: str | os.PathLike[str], overwrite: bool = False) -> Self:
        """A new directory; no file is on disk until the first :meth:`commit`.

        Args:
            path: the directory, made if absent.
            overwrite: instead of refusing, delete the run that is there when the first file is written.

        Raises:
            MisconfigurationException: the directory holds a run, or cannot be written.
        """
        path = Path(path)
        if holds_run(path) and not overwrite:
            raise MisconfigurationException(
                f"`{path}` already holds a run, which a new one would destroy. HINT: give another `dirpath`, delete the"
                " directory, or pass `overwrite=True`."
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(f"`{path}` cannot be a run directory: {error}.") from None
        store = cls(path, cls.record())
        store._replaces = True
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """What is on disk.

        Raises:
            MisconfigurationException: there is no run, it was written under another schema, or its manifest is damaged.
        """
        path = Path(path)
        if not holds_run(path):
            raise MisconfigurationException(
                f"`{path}` holds no run: `{MANIFEST}` is missing. HINT: pass the `dirpath` of the SourceCallback that"
                " trained it."
            )
        manifest = read_manifest(cls.record, path / MANIFEST)
        for name in manifest.files:
            inside(path, name)
        try:
            cls.check(manifest)
        except FieldError as error:
            raise MisconfigurationException(
                f"`{path / MANIFEST}`: {error}. The file is damaged or was changed."
            ) from None
        return cls(path, manifest)

    @classmethod
    def check(cls, manifest: R) -> None:
        """Refuse a manifest whose fields do not fit together.

        Raises:
            FieldError: names the field.
        """

    def _clear(self) -> None:
        """Before a new run's first write, what it replaces goes."""
        if self._replaces and holds_run(self.path):
            _delete_run(self.path)
        self._replaces = False

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors under a name relative to the directory and enter them in the manifest; gives back the name."""
        self._clear()
        target = inside(self.path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.manifest.files[name] = write_tensors(target, tensors)
        return name

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of a file of this run.

        Raises:
            MisconfigurationException: the file is missing or not what the manifest says.
        """
        path = inside(self.path, name)
        if name not in self.manifest.files or not path.exists():
            raise MisconfigurationException(f"`{path}` is missing from the run.")
        if sha256_of(path) != self.manifest.files[name]:
            raise MisconfigurationException(
                f"`{path}` does not match the sha256 in `{MANIFEST}`: it is damaged or from another run."
            )
        try:
            return load_file(path, device=str(device))
        except Exception as error:  # safetensors has no one class for what can be wrong with a file
            raise MisconfigurationException(f"`{path}` is no safetensors file: {error}.") from error

    def link(self, name: str, new: str) -> str:
        """Enter a file of the run under another name, too, without a copy where the disk can; gives back the name."""
        target = inside(self.path, new)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(self._place_of(name), target)
        except OSError:  # a disk without links
            shutil.copyfile(self._place_of(name), target)
        self.manifest.files[new] = self.manifest.files[name]
        return new

    def _place_of(self, name: str) -> Path:
        return self.path / name

    def commit(self, remove: tuple[str, ...] = ()) -> None:
        """Write the manifest; then delete the files in ``remove``, which it no longer names."""
        self._clear()
        for name in remove:
            self.manifest.files.pop(name, None)
        write_text(self.path / MANIFEST, manifest_text(self.manifest))
        for name in remove:
            _delete(self.path, name)


class RunStore(TensorStore[Manifest]):
    """A run directory."""

    record = Manifest

    @classmethod
    def check(cls, manifest: Manifest) -> None:
        """See :meth:`TensorStore.check`."""
        validate(manifest)


class PartialStore(RunStore):
    """A run that has not ended, as a scorer may complete it: what is made of it goes into a folder of its own.

    Whoever records the run, or resumes it one day, finds it as it was.

    Args:
        base: the run.
    """

    def __init__(self, base: RunStore) -> None:
        manifest = copy.deepcopy(base.manifest)
        manifest.partial_of = PartialOf(run_id=manifest.run_id, bins=list(manifest.bins))
        super().__init__(base.path / PARTIAL, manifest)
        self.base = base.path
        if holds_run(self.path):
            earlier = read_manifest(Manifest, self.path / MANIFEST)
            if earlier.partial_of == manifest.partial_of:
                self.manifest = earlier
            else:
                _delete_run(self.path)
        self.path.mkdir(exist_ok=True)

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See :meth:`RunStore.read`."""
        if (self.path / name).exists():
            return super().read(name, device)
        return RunStore(self.base, self.manifest).read(name, device)

    def _place_of(self, name: str) -> Path:
        own = self.path / name
        return own if own.exists() else self.base / name


def open_to_score(path: str | os.PathLike[str]) -> RunStore:
    """An existing run, finished or not; see :meth:`RunStore.open`."""
    store = RunStore.open(path)
    return PartialStore(store) if store.manifest.bins else store


class SharedStore(RunStore):
    """A run that several ranks work on together: rank 0 reads and writes, and all see the same. Calls are collective.

    Args:
        path: the directory as rank 0 sees it.
        ranks: who works together.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks) -> None:
        self._own: RunStore | None = None

        def open_it() -> tuple[Path, Manifest]:
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
            return self.manifest.files[name]

        self.manifest.files[name] = self.ranks.on_rank_zero(write)
        return name

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See :meth:`RunStore.read`."""
        tensors = self.ranks.on_rank_zero(lambda: self.own.read(name))
        return {key: value.to(device) for key, value in tensors.items()}

    def link(self, name: str, new: str) -> str:
        """See :meth:`RunStore.link`."""
        self.manifest.files[new] = self.manifest.files[name]
        return self.ranks.on_rank_zero(lambda: self.own.link(name, new))

    def commit(self, remove: tuple[str, ...] = ()) -> None:
        """See :meth:`RunStore.commit`."""
        for name in remove:
            self.manifest.files.pop(name, None)
        self.ranks.on_rank_zero(lambda: self.own.commit(remove))


def holds_run(path: Path) -> bool:
    """Whether a directory has a manifest."""
    return (path / MANIFEST).exists()


def _delete_run(path: Path) -> None:
    """Delete a run's own files, and nothing else that lies in the directory."""
    names = files_named_by(path / MANIFEST)
    (path / MANIFEST).unlink()
    for name in names:
        with suppress(MisconfigurationException):  # a name that no recording gives stays where it is
            _delete(path, name)


def _delete(folder: Path, name: str) -> None:
    """Delete a file that a recording made; what has another name than these is left, whoever says that it was."""
    path = inside(folder, name)
    if OWN_NAMES.fullmatch(name):
        path.unlink(missing_ok=True)
