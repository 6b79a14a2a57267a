"""Disk events of a directory: counted, and made to fail, to find the disk full, or to kill the process."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_source import _files
from lightning_source.recording import store

WRITING = ("mkdir", "replace", "link", "unlink", "fsync", "save_file", "write_text")
READING = ("sha256_of", "load_file")
ERRORS = {"fail": errno.EIO, "full": errno.ENOSPC, "read-only": errno.EROFS}
KINDS = ("kill", *ERRORS, "gone", "lose", "damage")


class Faults:
    """Counts the disk events below a directory, and lets one of them go wrong.

    Args:
        root: the directory.
        kind: ``"kill"`` (a file that is being written is left torn), ``"fail"`` (this event alone), ``"full"`` and
            ``"read-only"`` (all writes from then on), ``"gone"`` (the directory is removed before the event), or
            ``"lose"`` and ``"damage"`` (one of its files is deleted, or a byte of it flipped).
        at: which event; none if it is ``None``.

    Attributes:
        count: how many there were.
    """

    def __init__(self, root: Path, kind: str = "fail", at: int | None = None) -> None:
        self.root = str(root)
        self.kind = kind
        self.at = at
        self.count = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Watch from now on."""
        for name in ("mkdir", "replace", "link", "unlink", "fsync"):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))
        patch.setattr(_files, "save_file", self._watched("save_file", _files.save_file, path=1))
        patch.setattr(Path, "write_text", self._watched("write_text", Path.write_text))
        patch.setattr(_files, "sha256_of", self._watched("sha256_of", _files.sha256_of))
        patch.setattr(store, "sha256_of", self._watched("sha256_of", store.sha256_of))
        patch.setattr(store, "load_file", self._watched("load_file", store.load_file))

    def _watched(self, name: str, original: Callable[..., Any], path: int = 0) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = args[path]
            target = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if str(target).startswith(self.root):
                self.count += 1
                self._act(name, str(target), partial(original, *args, **kwargs))
            return original(*args, **kwargs)

        # `Path.write_text` is looked up on the class and must bind.
        return (lambda self_, *args, **kwargs: call(self_, *args, **kwargs)) if name == "write_text" else call

    def _act(self, name: str, target: str, do: Callable[[], Any]) -> None:
        now = self.at is not None and self.count == self.at
        if now and self.kind == "kill":
            if name in ("save_file", "write_text"):
                do()
                os.truncate(target, os.path.getsize(target) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if now and self.kind == "gone":
            shutil.rmtree(self.root, ignore_errors=True)
        if now and self.kind in ("lose", "damage"):
            self._harm()
        if self.kind in ("full", "read-only"):
            now = self.at is not None and self.count >= self.at and name in WRITING
            now &= self.kind == "read-only" or name not in ("unlink", "replace")  # which need no room
        if self.kind in ERRORS and now:
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), target)

    def _harm(self) -> None:
        """Harm one of the files, another one at each event."""
        files = sorted(path for path in Path(self.root).rglob("*") if path.is_file() and path.name != "lock")
        if not files:
            return
        chosen = files[self.count % len(files)]
        if self.kind == "lose":
            chosen.unlink()
        else:
            content = bytearray(chosen.read_bytes() or b" ")
            content[self.count % len(content)] ^= 1
            chosen.write_bytes(content)
