"""A run directory as a scorer uses it: a cache of what follows from the recording, without which scores come as well.

What cannot be written, because the disk is full or read-only or another process records into the directory, stays in
memory, and one warning says so.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_source._files import DirectoryError
from lightning_source._lightning import rank_zero_warn
from lightning_source.distributed import Ranks
from lightning_source.recording.manifest import MANIFEST, Manifest, PartialOf, read_manifest
from lightning_source.recording.store import RunStore, delete_run, holds_run

PARTIAL = "partial"
WAIT = 2.0  # seconds that a scorer waits for another process's write
IN_MEMORY = "in memory"  # in place of a file's sha256
_RECORDED = ("steps", "bins", "snapshots", "segments", "status")


class ScoringStore(RunStore):
    """A run that is asked. Writes that fail are kept in memory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path, manifest)
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._writes = True

    @property
    def fails(self) -> bool:
        """Whether a write has failed, so that this object alone has what was made since."""
        return not self._writes

    def _fail(self, error: Exception) -> None:
        """From now on everything stays in memory."""
        if self._writes:
            self._writes = False
            rank_zero_warn(
                f"`{self.path}` cannot be written: {error} Factors are kept in memory, and made again where the run is"
                " opened next."
            )
        self.claim.release()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """See :meth:`RunStore.write`; never fails for the disk's sake. The claim is held until the next commit."""
        if self._writes:
            try:
                self.claim.take(WAIT)
                return super().write(name, tensors)
            except (OSError, DirectoryError) as error:
                self._fail(error)
        self._kept[name] = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
        self.manifest.files[name] = IN_MEMORY
        return name

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See :meth:`RunStore.read`; a file that another scorer made anew is as good."""
        if name in self._kept:
            return {key: tensor.to(device) for key, tensor in self._kept[name].items()}
        try:
            return super().read(name, device)
        except DirectoryError:
            on_disk = self._read(self.path) if holds_run(self.path) else None
            if on_disk is None or on_disk.run_id != self.manifest.run_id or name not in on_disk.files:
                raise
            if on_disk.files[name] == self.manifest.files.get(name):
                raise
            self.manifest.files[name] = on_disk.files[name]
            return super().read(name, device)

    def _follow(self, on_disk: Manifest) -> None:
        if any(getattr(on_disk, name) != getattr(self.manifest, name) for name in _RECORDED):
            raise DirectoryError(f"`{self.path}` was recorded further since it was opened.")
        super()._follow(on_disk)

    def link(self, name: str, new: str) -> str:
        """See :meth:`RunStore.link`."""
        if self._writes:
            try:
                self.claim.take(WAIT)
                return super().link(name, new)
            except (OSError, DirectoryError) as error:
                self._fail(error)
        return self.write(new, self.read(name))

    def commit(self, remove: tuple[str, ...] = ()) -> None:
        """See :meth:`RunStore.commit`."""
        if self._writes:
            try:
                self.claim.take(WAIT)
                super().commit(remove)
            except (OSError, DirectoryError) as error:
                self._fail(error)
        for name in remove:
            self.manifest.files.pop(name, None)
            self._kept.pop(name, None)
        self.claim.release()


class ApartStore(ScoringStore):
    """What a scorer makes of a run as it was, or as it would be if it ended now: in a folder of its own inside the run.

    Whoever records the run, or resumes it one day, finds it as it was.

    Args:
        base: the run.
        folder: the place inside of it.
        manifest: what is asked in place of the run; ``partial_of`` says of which state it is.
    """

    def __init__(self, base: RunStore, folder: str, manifest: Manifest) -> None:
        super().__init__(base.path / folder, manifest)
        self.base = base
        try:
            self._take_up()
        except (OSError, DirectoryError) as error:
            self._fail(error)
        self.claim.release()

    def _take_up(self) -> None:
        """Go on with what an earlier scorer made of the same state of the run; what is of another one goes."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.claim.take(WAIT)
        if holds_run(self.path):
            earlier = read_manifest(Manifest, self.path / MANIFEST)
            if earlier.partial_of == self.manifest.partial_of:
                self.manifest = earlier
            else:
                delete_run(self.path)

    def read(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See :meth:`RunStore.read`."""
        if name in self._kept or (self.path / name).exists():
            return super().read(name, device)
        return self.base.read(name, device)

    def _place_of(self, name: str) -> Path:
        own = self.path / name
        return own if own.exists() else self.base._place_of(name)


def open_to_score(path: str | os.PathLike[str]) -> ScoringStore:
    """An existing run, finished or not; see :meth:`RunStore.open`."""
    store = ScoringStore.open(path)
    if not store.manifest.bins:
        return store
    manifest = copy.deepcopy(store.manifest)
    manifest.partial_of = PartialOf(run_id=manifest.run_id, bins=list(manifest.bins))
    return ApartStore(store, PARTIAL, manifest)


class SharedStore(RunStore):
    """A run that several ranks work on together: rank 0 reads and writes, and all see the same. Calls are collective.

    Args:
        opened: gives the run, on rank 0.
        ranks: who works together.
    """

    def __init__(self, opened: Callable[[], RunStore], ranks: Ranks) -> None:
        self._own: RunStore | None = None

        def open_it() -> tuple[Path, Manifest]:
            self._own = opened()
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
