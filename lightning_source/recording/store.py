"""The run directory: safetensors files and one JSON manifest, written so that a kill at any moment leaves a valid run.

A file is written under a temporary name, flushed to disk and moved into place; the manifest, which alone says what
belongs to the run, comes last. Reading checks the schema and each file's sha256. One process writes at a time
(:mod:`claim`), and whoever writes makes sure that the manifest on disk is still the run's own.
"""

from __future__ import annotations

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

from lightning_source._files import SCRATCH, DirectoryError, inside, sha256_of, write_tensors, write_text
from lightning_source._lightning import MisconfigurationException
from lightning_source.recording.claim import Claim
from lightning_source.recording.manifest import (
    MANIFEST,
    Manifest,
    Record,
    files_named_by,
    manifest_text,
    read_manifest,
)
from lightning_source.recording.typed_json import FieldError
from lightning_source.recording.validation import validate

# What recordings, runs and sweeps of further training call their files.
OWN_NAMES = re.compile(r"(stage=\d+/)?([a-z]+|(bins|blocks|resume|snapshots|segments)/[\w=+-]+|[\w=-]+)\.safetensors")
# Files that whoever asks a run adds to it: they follow from the rest, so that several may make them.
DERIVED = re.compile(r"(segments|snapshots)/.*")
# Those whose names nobody else would choose.
_BY_NUMBER = re.compile(
    r"(bins/(steps|end)|resume/step|snapshots/step)=\d[\w-]*\.safetensors|segments/[\d+\w-]*\d\.safetensors"
)
R = TypeVar("R", bound=Record)


class TensorStore(Generic[R]):
    """A directory of safetensors files and the manifest that names them; a subclass says what else that holds.

    Attributes:
        record: the class of the manifest.
        path: the directory.
        manifest: what the directory says of itself; :meth:`commit` writes it.
        claim: the right to write to the directory; whoever writes for long takes it.
    """

    record: type[R]

    def __init__(self, path: Path, manifest: R) -> None:
        self.path = path
        self.manifest = manifest
        self.claim = Claim(path)
        self._replaces = False
        self._seen: tuple[int, ...] | None = None  # the manifest on disk as it was read or written last

    @classmethod
    def create(cls, path: str | os.PathLike[str], overwrite: bool = False) -> Self:
        """A new directory; no file is on disk until the first :meth:`commit`.

        Args:
            path: the directory, made if absent.
            overwrite: instead of refusing, delete the run that is there when the first file is written.

        Raises:
            MisconfigurationException: the directory holds a run, or is a file.
            DirectoryError: it cannot be made.
        """
        path = Path(path)
        if holds_run(path) and not overwrite:
            raise MisconfigurationException(
                f"`{path}` already holds a run, which a new one would destroy. HINT: give another `dirpath`, delete the"
                " directory, or pass `overwrite=True`."
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise MisconfigurationException(f"`{path}` cannot be a run directory: {error}.") from None
        except OSError as error:
            raise DirectoryError(f"`{path}` cannot be a run directory: {error}.") from None
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
            raise DirectoryError(
                f"`{path}` holds no run: `{MANIFEST}` is missing. HINT: pass the `dirpath` of the SourceCallback that"
                " trained it."
            )
        seen = _signature(path)
        store = cls(path, cls._read(path))
        store._seen = seen
        return store

    @classmethod
    def _read(cls, path: Path) -> R:
        try:
            manifest = read_manifest(cls.record, path / MANIFEST)
            for name in manifest.files:
                inside(path, name)
            cls.check(manifest)
        except FieldError as error:
            raise DirectoryError(f"`{path / MANIFEST}`: {error}. The file is damaged or was changed.") from None
        except OSError as error:
            raise DirectoryError(f"`{path / MANIFEST}` cannot be read: {error}.") from None
        return manifest

    @classmethod
    def check(cls, manifest: R) -> None:
        """Refuse a manifest whose fields do not fit together.

        Raises:
            FieldError: names the field.
        """

    def _prepare(self) -> None:
        """Before a write: what a new run replaces goes, and what is on disk must be this one."""
        if self._replaces:
            if holds_run(self.path):
                delete_run(self.path)
            self._replaces = False
        elif self._seen is not None and (now := _signature(self.path)) != self._seen:
            if now is None:
                raise DirectoryError(f"`{self.path}` was removed while it was written to.")
            self._follow(self._read(self.path))
            self._seen = now

    def _follow(self, on_disk: R) -> None:
        """Somebody else wrote the manifest: take over what was added to this run.

        Raises:
            DirectoryError: another run is there now.
        """
        if on_disk.run_id != self.manifest.run_id:
            raise DirectoryError(f"`{self.path}` holds another run by now, which is left as it is.")
        for name, digest in on_disk.files.items():
            if DERIVED.fullmatch(name):
                self.manifest.files.setdefault(name, digest)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors under a name relative to the directory and enter them in the manifest; gives back the name.

        Raises:
            DirectoryError: the directory was removed or holds another run by now.
            OSError: the disk is full or cannot be written.
        """
        self._prepare()
        target = inside(self.path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.manifest.files[name] = write_tensors(target, tensors, scratch=self.path / SCRATCH)
        return name

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors of a file of this run.

        Raises:
            DirectoryError: the file is missing or not what the manifest says.
        """
        path = inside(self.path, name)
        if name not in self.manifest.files or not path.exists():
            raise DirectoryError(f"`{path}` is missing from the run.")
        try:
            if sha256_of(path) != self.manifest.files[name]:
                raise DirectoryError(
                    f"`{path}` does not match the sha256 in `{MANIFEST}`: it is damaged or from another run."
                )
            return load_file(path, device=str(device))
        except DirectoryError:
            raise
        except OSError as error:
            raise DirectoryError(f"`{path}` cannot be read: {error}.") from error
        except Exception as error:  # safetensors has no one class for what can be wrong with a file
            raise DirectoryError(f"`{path}` is no safetensors file: {error}.") from error

    def link(self, name: str, new: str) -> str:
        """Enter a file of the run under another name, too, without a copy where the disk can; gives back the name."""
        self._prepare()
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
        """Write the manifest; then delete the files in ``remove``, which it no longer names.

        Raises:
            DirectoryError: the directory was removed or holds another run by now.
            OSError: the disk is full or cannot be written.
        """
        self._prepare()
        for name in remove:
            self.manifest.files.pop(name, None)
        write_text(self.path / MANIFEST, manifest_text(self.manifest), self.path / SCRATCH)
        self._seen = _signature(self.path)
        for name in remove:
            _delete(self.path, name)

    def sweep(self) -> None:
        """Delete files that a killed recording wrote and no manifest came to name; for the holder of the claim."""
        for folder, _, files in os.walk(self.path):
            for file in files:
                name = (Path(folder) / file).relative_to(self.path).as_posix()
                if name not in self.manifest.files and _BY_NUMBER.fullmatch(name):
                    with suppress(OSError, DirectoryError):
                        _delete(self.path, name)


class RunStore(TensorStore[Manifest]):
    """A run directory."""

    record = Manifest

    @classmethod
    def check(cls, manifest: Manifest) -> None:
        """See :meth:`TensorStore.check`."""
        validate(manifest)

    def _follow(self, on_disk: Manifest) -> None:
        super()._follow(on_disk)
        self.manifest.couplings = on_disk.couplings | self.manifest.couplings


def holds_run(path: Path) -> bool:
    """Whether a directory has a manifest."""
    return (path / MANIFEST).exists()


def _signature(path: Path) -> tuple[int, ...] | None:
    """Tells a manifest on disk from one that replaced it; ``None`` if there is none."""
    try:
        stat = (path / MANIFEST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def delete_run(path: Path) -> None:
    """Delete a run's own files, and nothing else that lies in the directory."""
    names = files_named_by(path / MANIFEST)
    (path / MANIFEST).unlink()
    for name in names:
        with suppress(DirectoryError):  # a name that no recording gives stays where it is
            _delete(path, name)


def _delete(folder: Path, name: str) -> None:
    """Delete a file that a recording made; what has another name than these is left, whoever says that it was."""
    path = inside(folder, name)
    if OWN_NAMES.fullmatch(name):
        path.unlink(missing_ok=True)
