"""Files that are whole or not there: written under a temporary name, flushed to disk and moved into place.

Names that come from a file, a manifest say, are turned into paths by :func:`inside`, which lets none lead elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors.torch import save_file
from torch import Tensor

from lightning_source._lightning import MisconfigurationException


def inside(folder: Path, name: object) -> Path:
    """The path of a file in a folder, by its name relative to the folder.

    Raises:
        MisconfigurationException: the name is no relative one, leads out of the folder, over a link or not, or stands
            for something else than a regular file.
    """
    text = name if isinstance(name, str) and "\0" not in name else ""
    if not text or any(system(text).is_absolute() or ".." in system(text).parts for system in _SYSTEMS):
        raise MisconfigurationException(f"`{folder}` names a file {name!r}, which is no name inside it.")
    path = folder / text
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MisconfigurationException(f"`{path}` leads out of `{folder}`.")
    require_regular(path)
    return path


def require_regular(path: Path) -> None:
    """Refuse what is there and no regular file, such as a pipe, which would be waited for.

    Raises:
        MisconfigurationException: it is something else.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise MisconfigurationException(f"`{path}` is not a regular file.")


_SYSTEMS = (PurePosixPath, PureWindowsPath)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write one safetensors file in place of what the path holds; gives back its sha256.

    Args:
        path: where it goes; the folder exists.
        tensors: on any device; they may share memory.
        metadata: what the file says besides.
    """
    temporary = _temporary(Path(path))
    # Clones, because safetensors refuses tensors that share memory, and contiguous ones, because it refuses others.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary, None if metadata is None else dict(metadata))
    digest = sha256_of(temporary)
    _into_place(temporary, Path(path))
    return digest


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write one text file in place of what the path holds."""
    temporary = _temporary(Path(path))
    temporary.write_text(text)
    _into_place(temporary, Path(path))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hexadecimal sha256 of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def _into_place(temporary: Path, target: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
