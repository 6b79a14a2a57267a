"""One writer a directory: who records into one holds a lock on it that ends with the process, however that ends.

The lock is a file lock of ``filelock``, which torch installs. It lies in the directory's folder for temporary files.
"""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_source._files import SCRATCH, DirectoryError, inside, sweep

# A killed process's data workers, which hold its lock with it, take up to five seconds to notice that it is gone.
PATIENCE = 15.0

_held: dict[tuple[int, Path], tuple[FileLock, int]] = {}  # by process and directory: the lock, and how often it is held


class ClaimedError(DirectoryError):
    """Another process writes to the directory."""


class Claim:
    """The right to write to a directory. Within a process it can be held more than once.

    Args:
        path: the directory, which exists.

    Example::

        with Claim(path):
            ...
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._key: tuple[int, Path] | None = None

    def take(self, patience: float | None = None) -> None:
        """Become the directory's writer, and delete the temporary files that an earlier one left.

        On a disk without locks this does nothing.

        Args:
            patience: seconds to wait for another process, by default :data:`PATIENCE`.

        Raises:
            ClaimedError: another process is the writer.
        """
        if self._key is not None:
            return
        key = (os.getpid(), self.path.resolve())
        lock, count = _held.get(key, (None, 0))
        if lock is None:
            lock = self._locked(PATIENCE if patience is None else patience)
        if lock is not None:
            _held[key] = (lock, count + 1)
            self._key = key

    def _locked(self, patience: float) -> FileLock | None:
        file = inside(self.path, f"{SCRATCH}/lock")
        try:
            file.parent.mkdir(exist_ok=True)
            lock = FileLock(file, timeout=patience, thread_local=False)
            lock.acquire()
        except Timeout:
            raise ClaimedError(
                f"another process is writing to `{self.path}`. HINT: give each run a directory of its own, or wait"
                " until the other has ended."
            ) from None
        except (OSError, NotImplementedError):  # no locks here, or no place for one: what cannot be written says so
            return None
        sweep(self.path)
        return lock

    def release(self) -> None:
        """Let others write."""
        if self._key is None:
            return
        key, self._key = self._key, None
        lock, count = _held.pop(key)
        if count > 1:
            _held[key] = (lock, count - 1)
        elif key[0] == os.getpid():  # a forked child's copy is its parent's
            lock.release()

    def __enter__(self) -> Claim:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
