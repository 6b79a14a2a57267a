"""Files that are whole or not there: written under a temporary name, flushed to disk and moved into place.

Names that come from a file, a manifest say, are turned into paths by :func:`inside`, which lets none lead elsewhere.
Temporary files of a directory lie in its folder :data:`SCRATCH`, which whoever writes there next empties.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_source._lightning import MisconfigurationException

SCRATCH = ".writing"  # the folder of a directory in which its files are made
ABANDONED = 3600.0  # seconds after which a temporary file beside its target is one that a kill left


class DirectoryError(MisconfigurationException):
    """A directory on disk is not what it should be: damaged, removed, unreadable, or another's."""


def inside(folder: Path, name: object) -> Path:
    """The path of a file in a folder, by its name relative to the folder.

    Raises:
        DirectoryError: the name is no relative one, leads out of the folder, over a link or not, or stands for
            something else than a regular file.
    """
    text = name if isinstance(name, str) and "\0" not in name else ""
    if not text or any(system(text).is_absolute() or ".." in system(text).parts for system in _SYSTEMS):
        raise DirectoryError(f"`{folder}` names a file {name!r}, which is no name inside it.")
    path = folder / text
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DirectoryError(f"`{path}` leads out of `{folder}`.")
    require_regular(path)
    return path


def require_regular(path: Path) -> None:
    """Refuse what is there and no regular file, such as a pipe, which would be waited for.

    Raises:
        DirectoryError: it is something else.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise DirectoryError(f"`{path}` is not a regular file.")


_SYSTEMS = (PurePosixPath, PureWindowsPath)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    scratch: Path | None = None,
) -> str:
    """Write one safetensors file in place of what the path holds; gives back its sha256.

    Args:
        path: where it goes; the folder exists.
        tensors: on any device; they may share memory.
        metadata: what the file says besides.
        scratch: folder on the same disk where the file is made; by default that of the path.

    Raises:
        OSError: the disk is full, or cannot be written; what the path held is there still.
    """
    # Clones, because safetensors refuses tensors that share memory, and contiguous ones, because it refuses others.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    said = None if metadata is None else dict(metadata)
    return _replace(Path(path), scratch, lambda temporary: save_file(whole, temporary, said))


def write_text(path: str | os.PathLike[str], text: str, scratch: Path | None = None) -> str:
    """Write one text file in place of what the path holds; gives back its sha256."""

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    return _replace(Path(path), scratch, write)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hexadecimal sha256 of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Delete the temporary files that a killed writer left in a directory; its owner alone may call this."""
    for path in (folder / SCRATCH).glob("*.new"):
        with suppress(OSError):
            path.unlink()


def _replace(target: Path, scratch: Path | None, write: Callable[[Path], None]) -> str:
    require_regular(target)
    if scratch is None:
        _sweep_beside(target)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    else:
        temporary = inside(scratch.parent, f"{scratch.name}/{uuid.uuid4().hex}.new")
        scratch.mkdir(exist_ok=True)
    try:
        write(temporary)
        digest = sha256_of(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"`{target}` cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return digest


def _sweep_beside(target: Path) -> None:
    """Delete what killed writers of this file left; what is new may be another writer's at work."""
    with suppress(OSError):
        for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
            if len(path.suffix) == 33 and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
