"""Which run a recording goes into and where in it, by what a loaded checkpoint said of it; else a new stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from lightning_source._files import DirectoryError
from lightning_source._lightning import LightningModule, MisconfigurationException, rank_zero_warn
from lightning_source.capture.data import Examples
from lightning_source.capture.inert_optimizers import kind_of, numbers_of
from lightning_source.capture.trainer_view import TrainerFacts
from lightning_source.recording.claim import Claim
from lightning_source.recording.manifest import ManualRecord, ResumePoint, Settings, StageRecord
from lightning_source.recording.optimizer_hooks import TrainingLoop
from lightning_source.recording.resume_points import damage_of, reopen
from lightning_source.recording.snapshots import assemble, changed_between_stages
from lightning_source.recording.store import RunStore, holds_run


class SessionState(TypedDict):
    """What a checkpoint keeps of a session, in primitives; it stands for a resume point in the run directory."""

    schema: int
    run_id: str
    dirpath: str
    stage: int
    steps: int


def run_to_go_on_with(
    path: Path, anywhere: bool, restored: SessionState | None, offered: Sequence[SessionState] = ()
) -> tuple[RunStore, SessionState] | None:
    """The claimed run that a loaded checkpoint belongs to, and what the checkpoint says of it.

    A run is known by its id, however its directory is spelled and wherever it is by now.

    Args:
        path: where the run is looked for.
        anywhere: look where the checkpoint says instead.
        restored: what the checkpoint said of this recording.
        offered: what it said of others, or of this one under another name.

    Raises:
        DirectoryError: what ``path`` holds cannot be read, or another process writes to it.
    """
    states = [*([] if restored is None else [restored]), *offered]
    for folder in [Path(state["dirpath"]) for state in states] if anywhere else [path] * bool(states):
        if not holds_run(folder):
            continue
        claim = Claim(folder)
        claim.take()
        try:
            store = RunStore.open(folder)
            state = next((state for state in states if state["run_id"] == store.manifest.run_id), None)
        except DirectoryError:
            claim.release()
            if anywhere:  # a new run has a directory of its own
                continue
            raise
        if state is not None:
            store.claim = claim
            store.sweep()
            return store, state
        claim.release()
    return None


def new_run(path: Path, overwrite: bool) -> RunStore:
    """A claimed directory for a new run; see :meth:`RunStore.create`.

    Raises:
        MisconfigurationException: it holds a run, or another process writes to it.
    """
    store = RunStore.create(path, overwrite)
    store.claim.take()
    if holds_run(path) and not overwrite:  # since the first look at it, while another process had the claim
        store.claim.release()
        return RunStore.create(path)  # which refuses it
    return store


def resume_point(store: RunStore, state: SessionState, bins: int, boundaries: Sequence[int]) -> ResumePoint | None:
    """The point of a run at which a checkpoint was taken; ``None``, with a word where it is damaged, if there is none.

    Args:
        store: the run.
        state: what the checkpoint said of it.
        bins: the most bins kept, where a finished run goes on.
        boundaries: steps of the stage at which a segment begins, likewise.
    """
    manifest = store.manifest
    if manifest.run_id != state["run_id"]:
        return None
    point = manifest.resume.get(state["steps"])
    try:
        if point is None and _is_the_end(store, state):
            return reopen(store, bins, boundaries)
    except DirectoryError as error:
        rank_zero_warn(str(error))
        return None
    damage = None if point is None else damage_of(store, point)
    if damage is not None:
        rank_zero_warn(damage)
        return None
    return point


def _is_the_end(store: RunStore, state: SessionState) -> bool:
    """Whether a checkpoint's recording is the whole of a finished run."""
    manifest = store.manifest
    finished = not manifest.bins and manifest.stages[-1].final is not None
    return finished and (state["stage"], state["steps"]) == (len(manifest.stages) - 1, manifest.steps)


def give_up_points(store: RunStore, settings: Settings) -> None:
    """Before a new stage: the bins of one that was interrupted become its snapshots.

    What cannot be read of it is dropped with a warning, as is a stage without a step.
    """
    manifest = store.manifest
    manifest.resume = {}
    try:
        assemble(store, settings.segments, settings.snapshots_per_segment)
    except DirectoryError as error:
        rank_zero_warn(f"{error} What was recorded of the stage that it belongs to is given up.")
        manifest.bins, manifest.flags.history_incomplete = [], True
        manifest.steps = manifest.snapshots[-1].last if manifest.snapshots else 0
    while manifest.stages and manifest.stages[-1].final is None:
        del manifest.stages[-1]


def new_stage(
    store: RunStore,
    module: LightningModule,
    loop: TrainingLoop,
    attributed: int,
    examples: Examples | None,
    name: str | None,
    maximize: bool,
) -> StageRecord:
    """The record of a stage that is about to begin.

    Args:
        store: the run.
        module: the model that is trained.
        loop: what trains it.
        attributed: index of the optimizer whose parameters are attributed.
        examples: the training examples; ``None`` if they have no ids.
        name: the stage's name; made up by default.
        maximize: whether steps go up the loss.

    Raises:
        MisconfigurationException: the run has a stage of this name already.
    """
    stages, optimizers = store.manifest.stages, loop.optimizers
    name = name or (f"fit-{len(stages)}" if stages else "fit")
    if name in {stage.name for stage in stages}:
        raise MisconfigurationException(f'the run has a stage "{name}" already. HINT: name the next one otherwise.')
    manual = ManualRecord(
        optimizers=len(optimizers),
        schedulers=loop.schedulers,
        attributed=attributed,
        groups=[numbers_of(optimizer) for optimizer in optimizers],
        kinds=[kind_of(optimizer) for optimizer in optimizers],
    )
    return StageRecord.begin(
        name,
        module,
        examples,
        maximize=maximize,
        manual=manual,
        reset=changed_between_stages(store, module) if stages else [],
        trainer=None if loop.facts is None else TrainerFacts(**loop.facts),
    )
