"""Records what a model is trained on, stage by stage, whoever trains it: a Trainer, Fabric, or a loop of one's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_source._files import DirectoryError
from lightning_source._lightning import LightningModule, MisconfigurationException, rank_zero_info, rank_zero_warn
from lightning_source._provenance import versions
from lightning_source.capture.batch_sizes import BatchSizes
from lightning_source.capture.coverage import find_trained_blocks
from lightning_source.capture.data import Examples
from lightning_source.capture.objective import Objective
from lightning_source.names import named_modules
from lightning_source.recording.claim import ClaimedError
from lightning_source.recording.drawn import write_drawn
from lightning_source.recording.epochs import EpochMark, with_end, with_mark
from lightning_source.recording.footprint import foretold
from lightning_source.recording.manifest import ResumePoint, Seen, Settings, StageRecord
from lightning_source.recording.optimizer_hooks import OptimizerObserver, TrainingLoop
from lightning_source.recording.recorder import Recorder
from lightning_source.recording.replaced import without_replaced
from lightning_source.recording.resume_points import unused_files
from lightning_source.recording.resuming import (
    SessionState,
    give_up_points,
    new_run,
    new_stage,
    resume_point,
    run_to_go_on_with,
)
from lightning_source.recording.snapshots import assemble, replace_final
from lightning_source.recording.store import RunStore, holds_run
from lightning_source.wording import error_in_words

# Bins kept while training, per snapshot: enough to cut a run of any length into nearly equal snapshots.
BINS_PER_SNAPSHOT = 2  # at most, while training lasts; where its length is unknown they merge


class RecordingSession:
    """One run directory, and what is being recorded into it.

    For each stage call :meth:`prepare`, :meth:`open` before the first, and :meth:`begin`; then, for each batch,
    :meth:`on_batch_start` and :meth:`on_batch_end`, and between them whatever happens of :meth:`on_zero_grad`,
    :meth:`on_after_backward` and :meth:`on_before_step`; :meth:`close` at the end. Training is not disturbed. All but
    :meth:`prepare` is for the one process that writes.

    Args:
        settings: how the run is cut into segments and snapshots.
        include: glob patterns of module names to attribute; all by default.
        exclude: glob patterns of module names not to attribute.
        optimizer: index of the optimizer whose parameters are attributed.

    Example::

        session = RecordingSession(Settings())
        session.prepare(model, PlainLoop([optimizer]))
        session.open("source-run")
        session.begin(examples_of(loader), loader=loader)
        for index, batch in enumerate(loader):
            session.on_batch_start(batch, index)
            optimizer.zero_grad()
            session.on_zero_grad()
            model.training_step(batch, index).backward()
            session.on_after_backward()
            session.on_before_step(optimizer)
            optimizer.step()
            session.on_batch_end()
        session.close("finished")
    """

    def __init__(
        self,
        settings: Settings,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        optimizer: int = 0,
    ) -> None:
        settings.check()
        self.settings = settings
        self.include = include
        self.exclude = exclude
        self.optimizer = optimizer
        self.seconds = 0.0  # spent on recording
        self.restored: SessionState | None = None  # what a checkpoint said of its recording
        self.offered: list[SessionState] = []  # what it said of all recordings, whatever their directories' names were
        self.store: RunStore | None = None
        self._bins = BINS_PER_SNAPSHOT * settings.segment_count * settings.snapshots_per_segment
        self._recorder: Recorder | None = None
        self._begun = False
        self._observer: OptimizerObserver | None = None
        self._seen = Seen(0, 0)
        self._first_batch = True
        self._sizes = BatchSizes(None)

    @property
    def active(self) -> bool:
        """Whether this process records, or has recorded, and the disk has not failed it."""
        return self._recorder is not None

    @property
    def _stage(self) -> StageRecord:
        assert self.store is not None
        return self.store.manifest.stages[-1]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever fails inside, training goes on without its record; what is on disk stays valid."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self._stop(error)
        finally:
            self.seconds += time.perf_counter() - start

    def _stop(self, error: Exception) -> None:
        """End the recording in the middle of training, with one word on what happened and what is left."""
        self.detach()
        self.release()
        self._recorder = None
        rank_zero_warn(_why_stopped(error, None if self.store is None else self.store.path))

    # ---------------------------------------------------------------- a stage begins

    def prepare(self, module: LightningModule, loop: TrainingLoop) -> None:
        """Look at the model and what trains it, on every process; nothing is written.

        Raises:
            MisconfigurationException: the optimizer is not understood.
            ValueError: the training step hides its batches.
        """
        Objective(module)
        self._module, self._loop = module, loop
        self._observer = OptimizerObserver(loop, module, self.optimizer, self.guarded)

    def open(self, path: str | Path, overwrite: bool = False, anywhere: bool = False) -> Path | None:
        """The directory of a new run, or that of the run which the checkpoint belongs to; gives back its path.

        ``None`` if it cannot be read or written, which a warning has said: training goes on without a record.

        Args:
            path: the directory of a new run. An existing run is refused now; nothing is written until training starts.
            overwrite: replace the run that ``path`` holds.
            anywhere: a run to go on with is looked for where the checkpoint says, not in ``path``.

        Raises:
            MisconfigurationException: ``path`` holds another run, or another process writes to it.
        """
        try:
            found = run_to_go_on_with(Path(path), anywhere, self.restored, self.offered)
            self.store, self.restored = found or (new_run(Path(path), overwrite), self.restored)
        except ClaimedError:
            raise
        except DirectoryError as error:
            self._stop(error)
            return None
        return self.store.path

    def claim(self) -> None:
        """Become the directory's writer again, for a further stage."""
        if self.store is not None:
            with self.guarded():
                self.store.claim.take()

    def release(self) -> None:
        """Let others write to the directory."""
        if self.store is not None:
            self.store.claim.release()

    def begin(
        self, examples: Examples | None, name: str | None = None, loader: DataLoader[object] | None = None
    ) -> int | None:
        """Start to record a stage, or go on with the one that the checkpoint was taken in; gives back its index.

        ``None`` if that failed, which a warning has said: training goes on without a record.

        Args:
            examples: the training examples; ``None`` if they have no ids.
            name: the stage's name; made up by default.
            loader: what makes its batches, which tells their sizes; by default their tensors do.

        Raises:
            MisconfigurationException: the run has a stage of this name already, or nothing can be attributed.
        """
        if self.store is None:
            return None
        try:
            return self._begin(examples, name, loader)
        except DirectoryError as error:
            self._stop(error)
        except MisconfigurationException:
            self.release()
            raise
        except Exception as error:
            self._stop(error)
        return None

    def _begin(self, examples: Examples | None, name: str | None, loader: DataLoader[object] | None) -> int:
        assert self.store is not None
        assert self._observer is not None
        if self._begun and holds_run(self.store.path):
            self._reload()  # scorers may have added to it
        self._begun = True
        manifest = self.store.manifest
        point = self._resume_point()
        if point is None:
            give_up_points(self.store, self.settings)
            manifest.versions, manifest.settings = versions(), self.settings
            manifest.flags.history_incomplete |= bool(self._loop.steps and not manifest.stages)
            maximize = any(rule.maximize for rule in self._observer.rules)
            manifest.stages.append(
                new_stage(self.store, self._module, self._loop, self.optimizer, examples, name, maximize)
            )
            if examples is not None and examples.keys is not None:
                self._stage.drawn = write_drawn(self.store, len(manifest.stages) - 1, examples)
        index = len(manifest.stages) - 1
        manifest.status = "running"
        self._observer.refresh()  # a checkpoint may have come between
        remaining, done = self._loop.remaining_steps, 0 if point is None else point.steps - point.start
        self._recorder = Recorder(
            self.store,
            self._module,
            self._bins,
            self.settings.bin_ends(done + remaining) if remaining else [],
            self.settings.snapshots == "point",
            self.settings.boundaries,
            self._observer.preconditioners,
            index,
            point,
        )
        self._seen = self._stage.seen or Seen(0, 0)
        self._first_batch = True
        self.load_from(loader)
        self._begin_phase()
        rank_zero_info(f"SourceCallback: {foretold(self.store, self._module, self._observer.rules)}")
        return index

    def _reload(self) -> None:
        """Read the run anew."""
        assert self.store is not None
        claim = self.store.claim
        self.store = RunStore.open(self.store.path)
        self.store.claim = claim

    def load_from(self, loader: DataLoader[object] | None) -> None:
        """Batches come from this loader now, which may be another in each epoch."""
        self._sizes = BatchSizes(loader)

    def _resume_point(self) -> ResumePoint | None:
        """Where the recording goes on after a checkpoint was loaded; says so if there is no such point."""
        if not self._loop.steps or (self._recorder is not None and self.restored is None):
            return None
        assert self.store is not None
        point = None
        if self.restored is not None:
            point = resume_point(self.store, self.restored, self._bins, self.settings.boundaries)
        if point is None:
            rank_zero_warn(
                f"Training resumes at step {self._loop.steps}, of which `{self.store.path}` keeps no record to go on"
                " from: scores attribute the steps from here on, as a stage of their own."
            )
        elif point.steps != self.store.manifest.steps or self.store.manifest.status != "finished":
            self.store.manifest.flags.resumed_mid_epoch |= self._loop.within_epoch
        return point

    def _begin_phase(self) -> None:
        """Record the optimizer's steps from now on, under the groups that it has now."""
        assert self._recorder is not None
        assert self._observer is not None
        phases = self._stage.phases
        phase = self._observer.phase(phases[-1] if phases else None, self._recorder.steps)
        self._observer.attach(self._recorder, phase)
        if phases and replace(phases[-1], first=phase.first) == phase:  # a resumed run as it was
            return
        if phases:
            self._recorder.flush(force=True)
            trained = [name for group in phase.columns for name in group]
            self._recorder.regroup(phases[-1].parents(phase.columns), trained)
        # A phase without a step leaves its columns to the next one, and nothing else.
        self._stage.phases = (*(earlier for earlier in phases if earlier.first < phase.first), phase)
        self._find_blocks()

    def _find_blocks(self) -> None:
        """What can be attributed by the kinds of layers alone; real examples tell the rest when training has ended."""
        coverage = find_trained_blocks(self._module, self._stage.phases[-1].columns, self.include, self.exclude)
        rank_zero_info(f"SourceCallback: {coverage.summary()}")
        self._stage.coverage, self._stage.objective = coverage, None

    # ---------------------------------------------------------------- a batch

    def on_batch_start(self, batch: object, batch_idx: int) -> None:
        """A batch is about to be trained on."""
        if self._recorder is None or self._observer is None:
            return
        with self.guarded():
            size = self._sizes.of(batch_idx, batch)
            if size is not None:
                self._seen = Seen(self._seen.batches + 1, self._seen.examples + size)
            if self._stage.manual is not None and self._loop.by_hand and self._recorder.steps == self._recorder.start:
                self._stage.manual.batch_idx = batch_idx  # until the first step: the index at which it comes
            self._mark_epoch()
            if self._first_batch:
                self._first_batch = False
                modules = named_modules(self._module).items()
                self._stage.evaluating = tuple(name for name, child in modules if not child.training)
            self._observer.on_batch_start()
            if self._observer.changed():
                self._recorder.flush(force=True)  # while the old optimizer's moments can be read
                self._observer.refresh()
                self._begin_phase()
            replaced, columns = self._recorder.replaced, self._stage.phases[-1].columns
            self._stage.coverage = without_replaced(self._stage.coverage, replaced, columns, self._recorder.steps)

    def _mark_epoch(self) -> None:
        """Remember when an epoch began: steps that read the Trainer see its counters again in passes."""
        assert self._recorder is not None
        stage, loop = self._stage, self._loop
        if stage.trainer is not None and (not stage.epochs or stage.epochs[-1].epoch != loop.epoch):
            stage.epochs = with_mark(stage.epochs, EpochMark(self._recorder.steps, loop.epoch, loop.steps))

    def on_zero_grad(self) -> None:
        """Gradients were zeroed: a window of micro-batches begins."""
        if self._recorder is not None and self._observer is not None:
            with self.guarded():
                self._observer.on_zero_grad()

    def on_after_backward(self) -> None:
        """A micro-batch's gradients were added."""
        if self._recorder is not None and self._observer is not None:
            with self.guarded():
                self._observer.on_after_backward()

    def on_before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, its gradients not clipped yet."""
        if self._recorder is not None and self._observer is not None:
            with self.guarded():
                self._observer.on_before_step(optimizer)

    def on_batch_end(self) -> None:
        """A batch was trained on."""
        if self._recorder is None:
            return
        with self.guarded():
            if self._seen.batches:
                self._stage.examples_per_batch = self._seen.examples / self._seen.batches
                self._stage.seen = self._seen
            self._recorder.flush()

    def flush(self) -> None:
        """Write down all steps so far, because the parameters may be replaced before the next call."""
        if self._recorder is not None:
            with self.guarded():
                self._recorder.flush(force=True)

    # ---------------------------------------------------------------- checkpoints and the end

    def state(self) -> SessionState | None:
        """For a checkpoint of this moment: a few primitives; what they stand for is kept in the run directory."""
        if self.store is None or self._recorder is None:
            return self.restored
        if self.store.manifest.status == "running":  # the end needs no point: its snapshots can be taken up again
            with self.guarded():
                self._recorder.save_point()
        if self._recorder is None:
            return None
        return SessionState(
            schema=1,
            run_id=self.store.manifest.run_id,
            dirpath=str(self.store.path),
            stage=self._recorder.stage,
            steps=self._recorder.steps,
        )

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        # Its hooks go first; what is made of their observations after that must not end training.
        if self._observer is not None:
            with suppress(Exception):
                self._observer.detach()

    def close(self, status: Literal["finished", "interrupted"], factors: bool = False) -> bool:
        """End the recording; gives back whether there is anything to score.

        Args:
            status: ``"finished"``, or ``"interrupted"``: such a run may be resumed, which needs its bins.
            factors: whether factors are made now. Until :meth:`factors_made` says that they are on disk, and that the
                claim to the directory may go, the run can be resumed from its checkpoints as if it had been killed.
        """
        self.detach()
        if self._recorder is None or self.store is None:
            self.release()
            return False
        manifest = self.store.manifest
        with self.guarded():
            if self._observer is not None:
                self._observer.report()
            manifest.status = status
            if status == "finished" and (size := self._sizes.settled()) is not None:
                self._stage.examples_per_batch = size
            self.load_from(None)
            self._stage.epochs = with_end(self._stage.epochs, self._recorder.steps, self._loop.steps)
            self._recorder.finish()
            if self._recorder.steps > self._recorder.start:
                self.store.commit()
            if status == "finished":
                self._assemble(keep_points=factors)
        if not factors:
            self.release()
        return self._recorder is not None and bool(manifest.segments)

    def factors_made(self) -> None:
        """Whatever comes now, nobody has to train again for these snapshots: the points of checkpoints go."""
        assert self.store is not None
        with self.guarded():
            self._reload()
            if self.store.manifest.resume:
                self.store.manifest.resume = {}
                self.store.commit(remove=unused_files(self.store.manifest, self.store.manifest.bins))
        self.release()

    def _assemble(self, keep_points: bool = False) -> None:
        assert self.store is not None
        assemble(self.store, self.settings.segments, self.settings.snapshots_per_segment, keep_points)

    def replace_final(self, module: nn.Module) -> None:
        """Queries are asked of the model that the user ends up with, which may be an average of the trained weights."""
        if self._recorder is not None and self.store is not None and self.store.manifest.segments:
            with self.guarded():
                replace_final(self.store, module)


def _why_stopped(error: Exception, path: Path | None) -> str:
    """One word to the user on what ended the recording and what is left of it."""
    if isinstance(error, DirectoryError):
        return f"SourceCallback stops recording. {error} Training goes on as it would without it."
    reason = f"since it cannot write to `{path}`: {error}" if isinstance(error, OSError) else error_in_words(error)
    return (
        f"SourceCallback stops recording, {reason} Training goes on as it would without it. Scores can be had for the"
        f" steps that are on disk in `{path}`."
    )
