"""Records what a model is trained on, stage by stage, whoever trains it: a Trainer, Fabric, or a loop of one's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_source._lightning import LightningModule, MisconfigurationException, rank_zero_info, rank_zero_warn
from lightning_source._provenance import versions
from lightning_source.capture.batch_sizes import BatchSizes
from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.data import Examples
from lightning_source.capture.inert_optimizers import kind_of, numbers_of
from lightning_source.capture.isolation import thawed
from lightning_source.capture.objective import Objective
from lightning_source.capture.trainer_view import TrainerFacts
from lightning_source.names import named_modules, named_parameters
from lightning_source.recording.drawn import write_drawn
from lightning_source.recording.epochs import EpochMark, moment_at, with_mark
from lightning_source.recording.manifest import ManualRecord, ResumePoint, Seen, Settings, StageRecord
from lightning_source.recording.optimizer_hooks import OptimizerObserver, TrainingLoop
from lightning_source.recording.recorder import Recorder
from lightning_source.recording.snapshots import assemble, changed_between_stages, reopen, replace_final
from lightning_source.recording.store import RunStore, holds_run

# Bins kept while training, per snapshot: enough to cut a run of any length into nearly equal snapshots.
BINS_PER_SNAPSHOT = 2  # at most, while training lasts; where its length is unknown they merge


class SessionState(TypedDict):
    """What a checkpoint keeps of a session, in primitives; it stands for a resume point in the run directory."""

    schema: int
    run_id: str
    dirpath: str
    stage: int
    steps: int


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
        self.store: RunStore | None = None
        self._bins = BINS_PER_SNAPSHOT * settings.segment_count * settings.snapshots_per_segment
        self._recorder: Recorder | None = None
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
        self._recorder = None
        path = None if self.store is None else self.store.path
        disk = isinstance(error, (OSError, SafetensorError))
        reason = f"since it cannot write to `{path}`: {error}" if disk else f"{type(error).__name__}: {error}"
        rank_zero_warn(
            f"SourceCallback stops recording, {reason} Training goes on as it would without it. Scores can be had for"
            f" the steps that are on disk in `{path}`."
        )

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

    def open(self, path: str | Path, overwrite: bool = False, anywhere: bool = False) -> Path:
        """The directory of a new run, or that of the run which the checkpoint belongs to; gives back its path.

        Args:
            path: the directory of a new run. An existing run is refused now; nothing is written until training starts.
            overwrite: replace the run that ``path`` holds.
            anywhere: a run to go on with is looked for where the checkpoint says, not in ``path``.
        """
        if self.restored is not None:
            earlier = Path(self.restored["dirpath"] if anywhere else path)
            if holds_run(earlier):
                store = RunStore.open(earlier)
                if store.manifest.run_id == self.restored["run_id"]:
                    self.store = store
                    return earlier
        self.store = RunStore.create(path, overwrite)
        return self.store.path

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
        try:
            return self._begin(examples, name, loader)
        except MisconfigurationException:
            raise
        except Exception as error:
            self._stop(error)
            return None

    def _begin(self, examples: Examples | None, name: str | None, loader: DataLoader[object] | None) -> int:
        assert self.store is not None
        assert self._observer is not None
        if self._recorder is not None and holds_run(self.store.path):
            self.store = RunStore.open(self.store.path)  # scorers may have added to it
        manifest = self.store.manifest
        point = self._resume_point()
        if point is None:
            self._assemble()  # if the stage before was interrupted
            while manifest.stages and self._stage.final is None:  # a fit that failed before its first step
                del manifest.stages[-1]
            manifest.versions, manifest.settings = versions(), self.settings
            manifest.flags.history_incomplete |= bool(self._loop.steps and not manifest.stages)
            manifest.stages.append(self._new_stage(examples, name))
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
        return index

    def load_from(self, loader: DataLoader[object] | None) -> None:
        """Batches come from this loader now, which may be another in each epoch."""
        self._sizes = BatchSizes(loader)

    def _new_stage(self, examples: Examples | None, name: str | None) -> StageRecord:
        assert self.store is not None
        assert self._observer is not None
        stages, optimizers = self.store.manifest.stages, self._loop.optimizers
        name = name or (f"fit-{len(stages)}" if stages else "fit")
        if name in {stage.name for stage in stages}:
            raise MisconfigurationException(f'the run has a stage "{name}" already. HINT: name the next one otherwise.')
        manual = ManualRecord(
            optimizers=len(optimizers),
            schedulers=self._loop.schedulers,
            attributed=self.optimizer,
            groups=[numbers_of(optimizer) for optimizer in optimizers],
            kinds=[kind_of(optimizer) for optimizer in optimizers],
        )
        return StageRecord.begin(
            name,
            self._module,
            examples,
            maximize=any(rule.maximize for rule in self._observer.rules),
            manual=manual,
            reset=changed_between_stages(self.store, self._module) if stages else [],
            trainer=None if self._loop.facts is None else TrainerFacts(**self._loop.facts),
        )

    def _resume_point(self) -> ResumePoint | None:
        """Where the recording goes on after a checkpoint was loaded; says so if there is no such point."""
        if not self._loop.steps or (self._recorder is not None and self.restored is None):
            return None
        assert self.store is not None
        manifest = self.store.manifest
        if self.restored is not None and manifest.run_id == self.restored["run_id"]:
            point = manifest.resume.get(self.restored["steps"])
            if point is None and self._is_the_end(self.restored):
                return reopen(self.store, self._bins, self.settings.boundaries)
            if point is not None:
                manifest.flags.resumed_mid_epoch |= self._loop.within_epoch
                return point
        rank_zero_warn(
            f"Training resumes at step {self._loop.steps}, of which `{self.store.path}` keeps no record to go on"
            " from: scores attribute the steps from here on, as a stage of their own."
        )
        return None

    def _is_the_end(self, state: SessionState) -> bool:
        """Whether a checkpoint's recording is the whole of a finished run."""
        assert self.store is not None
        manifest = self.store.manifest
        finished = not manifest.bins and self._stage.final is not None
        return finished and (state["stage"], state["steps"]) == (len(manifest.stages) - 1, manifest.steps)

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
        """What can be attributed by the kinds of layers alone; real examples tell the rest when training has ended.

        Raises:
            MisconfigurationException: there is nothing, whatever the examples are.
        """
        own = named_parameters(self._module)
        groups = [[own[name] for name in column] for column in self._stage.phases[-1].columns]
        with thawed(p for group in groups for p in group):  # those that are frozen again by now, too
            coverage = find_blocks(self._module, groups, self.include, self.exclude)
        if not coverage.blocks:
            name = type(self._module).__name__
            raise MisconfigurationException(
                f"`{name}` has no layer whose gradients can be attributed.\n  {coverage.summary()}"
            )
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
                own = named_modules(self._module)
                self._stage.evaluating = tuple(name for name, child in own.items() if not child.training)
            self._observer.on_batch_start()
            if self._observer.changed():
                self._recorder.flush(force=True)  # while the old optimizer's moments can be read
                self._observer.refresh()
                self._begin_phase()

    def _mark_epoch(self) -> None:
        """Remember when an epoch began: steps that read the Trainer see its counters again in passes."""
        assert self._recorder is not None
        stage, loop = self._stage, self._loop
        if stage.trainer is not None and (not stage.epochs or stage.epochs[-1].epoch != loop.epoch):
            stage.epochs = with_mark(stage.epochs, EpochMark(self._recorder.steps, loop.epoch, loop.steps))

    def _mark_end(self) -> None:
        """The same at the end of training, where the Trainer's steps cannot be told from those that were recorded."""
        assert self._recorder is not None
        steps, epochs = self._recorder.steps, self._stage.epochs
        moment = moment_at(epochs, steps)
        if moment is not None and moment.global_step != self._loop.steps:
            self._stage.epochs = (*epochs, EpochMark(steps, moment.current_epoch, self._loop.steps))

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

    def close(self, status: Literal["finished", "interrupted"]) -> bool:
        """End the recording; gives back whether there is anything to score.

        Args:
            status: ``"finished"``, or ``"interrupted"``: such a run may be resumed, which needs its bins.
        """
        self.detach()
        if self._recorder is None or self.store is None:
            return False
        manifest = self.store.manifest
        with self.guarded():
            if self._observer is not None:
                self._observer.report()
            manifest.status = status
            if status == "finished" and (size := self._sizes.settled()) is not None:
                self._stage.examples_per_batch = size
            self.load_from(None)
            self._mark_end()
            self._recorder.finish()
            if self._recorder.steps > self._recorder.start:
                self.store.commit()
            if status == "finished":
                self._assemble()
        return self._recorder is not None and bool(manifest.segments)

    def _assemble(self) -> None:
        assert self.store is not None
        assemble(self.store, self.settings.segments, self.settings.snapshots_per_segment)

    def replace_final(self, module: nn.Module) -> None:
        """Queries are asked of the model that the user ends up with, which may be an average of the trained weights."""
        if self._recorder is not None and self.store is not None and self.store.manifest.segments:
            with self.guarded():
                replace_final(self.store, module)
