"""One safetensors file that says what its tensors are, under a digest of all of it: scores and results of sweeps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_source._files import DirectoryError, require_regular, write_tensors

SEAL = "sha256"


def write_sealed(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    key: str,
    record: object,
    scratch: Path | None = None,
) -> None:
    """Write tensors and what is said of them.

    Args:
        path: where they go; what is there is replaced once the new file is whole.
        tensors: by name.
        key: of the record; tells one kind of file from another.
        record: as JSON.
        scratch: see :func:`write_tensors`.

    Raises:
        OSError: it cannot be written; the earlier file is there still.
    """
    text = json.dumps(record)
    write_tensors(path, tensors, {key: text, SEAL: digest_of(tensors, text)}, scratch)


def read_sealed(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Tensor], Any]:
    """The inverse of :func:`write_sealed`: the tensors and the record. Files of before seals have none.

    Raises:
        FileNotFoundError: there is no such file.
        DirectoryError: it is damaged, or of another kind; the message says what, and not the path.
    """
    try:
        require_regular(Path(path))
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        text = said.get(key)
        record = None if text is None else json.loads(text)
    except (FileNotFoundError, PermissionError):
        raise
    except (DirectoryError, SafetensorError, OSError, TypeError, ValueError, RecursionError) as error:
        raise DirectoryError(f"it is damaged or no file of tensors ({error})") from error
    if record is None:
        raise DirectoryError(f"its metadata has no `{key}`")
    if SEAL in said and said[SEAL] != digest_of(tensors, str(text)):
        raise DirectoryError(f"it does not match its `{SEAL}`, so it was damaged or changed")
    return tensors, record


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The sha256 of a text and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
