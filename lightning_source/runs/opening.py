"""A run as it is asked: at the end of its training or at an earlier moment."""

from __future__ import annotations

from lightning_source.recording.earlier import At, as_of
from lightning_source.recording.store import RunStore
from lightning_source.runs.stage import index_of


def at_moment(store: RunStore, at: At | None = None, stage: int | str | None = None) -> RunStore:
    """The run as of a moment of its training, by default the end.

    Args:
        store: the run.
        at: see :func:`lightning_source.attribute`.
        stage: the stage that is asked about, by index or name.
    """
    return store if at is None else as_of(store, at, index_of(stage, [one.name for one in store.manifest.stages]))
