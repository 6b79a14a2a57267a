"""A run directory as it is asked: finished or not, at the end of its training or at an earlier moment."""

from __future__ import annotations

import os

from lightning_source.recording.earlier import At, as_of
from lightning_source.recording.scoring_store import open_to_score
from lightning_source.recording.store import RunStore
from lightning_source.runs.stage import index_of


def open_as_of(path: str | os.PathLike[str], at: At | None = None, stage: int | str | None = None) -> RunStore:
    """The run as of a moment of its training, by default the end.

    Args:
        path: the run directory.
        at: see :func:`lightning_source.attribute`.
        stage: the stage that is asked about, by index or name.
    """
    store = open_to_score(path)
    if at is None:
        return store
    return as_of(store, at, index_of(stage, [record.name for record in store.manifest.stages]))
