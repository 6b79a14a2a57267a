"""A directory of finished runs goes on only with the sweep that began it."""

import reprlib
from collections.abc import Mapping
from pathlib import Path

from lightning_source._lightning import MisconfigurationException

_REPR = reprlib.Repr()  # lists of thousands of examples are cut
_REPR.maxstring = _REPR.maxother = 200


def require_same_sweep(path: Path, recorded: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Compare what a directory's manifest says was asked for with what is asked for now.

    Args:
        path: the directory.
        recorded: of its manifest.
        asked: now, as it would come back from JSON.

    Raises:
        MisconfigurationException: they differ; the message says in what.
    """
    differing = [key for key in sorted(recorded.keys() | asked.keys()) if recorded.get(key) != asked.get(key)]
    if differing:
        changes = (f"its {k} is {_REPR.repr(recorded.get(k))}, not {_REPR.repr(asked.get(k))}" for k in differing)
        raise MisconfigurationException(
            f"`{path}` holds another sweep: {'; '.join(changes)}. HINT: give another `dirpath`, or"
            " delete the directory."
        )
