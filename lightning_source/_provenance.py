"""What a record says of where it comes from."""

from __future__ import annotations

import torch

from lightning_source._lightning import version


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    return {"torch": torch.__version__, "lightning": version()}


def name_of(function: object) -> str:
    """The name of a callable, or of its class where it has none."""
    return str(getattr(function, "__qualname__", type(function).__name__))
