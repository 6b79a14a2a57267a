"""The callback: translates Trainer events into calls of the recorder, and finishes the run when training ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from torch.optim import Optimizer
from typing_extensions import override

from lightning_source._provenance import versions
from lightning_source._trainer import (
    averages_weights,
    check_trainer,
    other_callbacks,
    ranks_of,
    run_directory,
    training_examples,
)
from lightning_source.attribution import AttributingCallback
from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.data import Examples, count_examples
from lightning_source.capture.isolation import parameters_kept, thawed, undisturbed
from lightning_source.capture.manual_optimization import numbers_of
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.names import named_parameters
from lightning_source.recording.fingerprint import fingerprint
from lightning_source.recording.optimizer_hooks import OptimizerObserver
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.recorder import Recorder
from lightning_source.recording.snapshots import assemble, changed_between_stages, reopen, replace_final
from lightning_source.recording.store import MANIFEST, RunStore
from lightning_source.scorer import MEASUREMENTS

# How Lightning's learning rate and batch size finders name their checkpoints.
TUNERS = (".lr_find_", ".scale_batch_size_")
# Bins kept while training, per snapshot: enough to cut a run of any length into nearly equal snapshots.
BINS_PER_SNAPSHOT = 4


class SourceCallback(AttributingCallback):
    """Records a training run so that its result can be attributed to training examples.

    While ``fit`` runs, the callback logs every optimizer step and keeps running means of the parameters; when training
    ends it fits EK-FAC factors for each segment. Everything is on disk as it goes, and a run that was interrupted is
    completed when it is opened. Training itself is bit-identical with and without the callback.

    After ``fit``, ``trainer.attribute(query)`` gives the scores; :class:`SourceScorer` does so in another process.

    Args:
        dirpath: the run directory. By default a new ``source-run`` beside the logger's files.
        segments: into how many equal segments training is cut, or the optimizer steps at which inner segments begin;
            ``"auto"`` takes one.
        snapshots_per_segment: snapshots that a segment's gradients and curvature are averaged over.
        snapshots: what a snapshot stands for: ``"mean"``, the running mean of the parameters over its steps, or
            ``"point"``, the parameters at one step in its middle.
        curvature: ``"ekfac"``, ``"kfac"`` (cheaper, coarser eigenvalues) or ``"diagonal"`` (no eigenbasis).
        factor_examples: training examples that each factor pass visits; ``None`` for all.
        label_samples: label draws per example for the eigenvalues.
        measurement: default measurement of ``trainer.attribute``: ``"loss"``, ``"margin"`` or ``"log-prob"``.
        include: glob patterns of module names to attribute; all by default.
        exclude: glob patterns of module names not to attribute.
        mode: ``"fit"`` computes factors when training ends, ``"deferred"`` when scores are first asked for.
        optimizer: where the module has several optimizers, the index of the one whose parameters are attributed.
        overwrite: replace the run that ``dirpath`` holds.
        seed: seeds sampled labels and the choice of factor examples.

    Raises:
        MisconfigurationException: at the start of ``fit``, where the run could not be recorded rightly.

    Example::

        source = SourceCallback(dirpath="source-run")
        trainer = L.Trainer(callbacks=[source])
        trainer.fit(model, datamodule=dm)
        scores = trainer.attribute(query_batch)
    """

    def __init__(
        self,
        dirpath: str | None = None,
        segments: int | Literal["auto"] | list[int] = 1,
        snapshots_per_segment: int = 6,
        snapshots: Literal["mean", "point"] = "mean",
        curvature: Literal["ekfac", "kfac", "diagonal"] = "ekfac",
        factor_examples: int | None = 5000,
        label_samples: int = 1,
        measurement: str = "loss",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        mode: Literal["fit", "deferred"] = "fit",
        optimizer: int | None = None,
        overwrite: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dirpath, measurement)
        if isinstance(segments, list):
            if any(step < 1 for step in segments):
                raise ValueError(f"`segments={segments}` must be steps after 0, at which inner segments begin")
            count = len(segments) + 1
        elif isinstance(segments, str):
            if segments != "auto":
                raise ValueError(f'`segments="{segments}"` must be a number, a list of steps, or "auto"')
            count = 1
        else:
            count = segments
        for name, value in (
            ("segments", count),
            ("snapshots_per_segment", snapshots_per_segment),
            ("label_samples", label_samples),
            ("factor_examples", 1 if factor_examples is None else factor_examples),
        ):
            if value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1")
        for name, choice, choices in (
            ("snapshots", snapshots, ("mean", "point")),
            ("curvature", curvature, ("ekfac", "kfac", "diagonal")),
            ("mode", mode, ("fit", "deferred")),
            ("measurement", measurement, MEASUREMENTS),
        ):
            if choice not in choices:
                raise ValueError(f'`{name}="{choice}"` must be one of {", ".join(choices)}')
        self.optimizer = optimizer
        self.include = include
        self.exclude = exclude
        self.mode = mode
        self.overwrite = overwrite
        self.settings: dict[str, Any] = {
            "segments": segments if isinstance(segments, list) else count,
            "snapshots_per_segment": snapshots_per_segment,
            "snapshots": snapshots,
            "curvature": curvature,
            "factor_examples": factor_examples,
            "label_samples": label_samples,
            "seed": seed,
        }
        self._bins = BINS_PER_SNAPSHOT * count * snapshots_per_segment
        self._store: RunStore | None = None
        self._recorder: Recorder | None = None
        self._restored: dict[str, Any] | None = None  # what a checkpoint said of its recording
        self._next_name: str | None = None
        self._watch: OptimizerObserver | None = None
        self._probed = False
        self._trains = False
        self._batches = 0
        self._batch_examples = 0
        self.seconds = {"recording": 0.0, "factors": 0.0}  # time spent by the callback

    @property
    def state_key(self) -> str:
        """Two callbacks may watch one run if they write to different directories."""
        return self._generate_state_key(dirpath=self.dirpath)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Where the disk fails, training goes on without its record; what is on disk stays valid."""
        with self._timed("recording"):
            try:
                yield
            except (OSError, SafetensorError) as error:
                rank_zero_warn(
                    f"SourceCallback stops recording, since it cannot write to `{self._path}`: {error} Scores can be"
                    " had for the steps that are on disk."
                )
                self._recorder = None
                if self._watch is not None:
                    self._watch.detach()

    # ---------------------------------------------------------------- before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._bind(trainer)
        if stage == "fit":
            self._restored = None  # a state that `test(ckpt_path=…)` loaded says nothing about the next fit

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def state_dict(self) -> dict[str, Any]:
        """A few primitives; what they stand for is a resume point in the run directory."""
        if self._store is None or self._recorder is None:
            return self._restored or {}
        if self._store.manifest["status"] == "running":  # the end needs no point: its snapshots can be taken up again
            with self._recording():
                self._recorder.save_point()
        if self._recorder is None:
            return {}
        return {
            "schema": 1,
            "run_id": self._store.manifest["run_id"],
            "dirpath": str(self._store.path),
            "stage": self._recorder.stage,
            "steps": self._recorder.steps,
        }

    def stage(self, name: str) -> SourceCallback:
        """Name the next ``fit``: each is a stage with its own examples, ``N`` and segments. Gives back the callback."""
        self._next_name = name
        return self

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trainer(trainer, pl_module, self.optimizer)
        Objective(pl_module)
        if self._recorder is not None and Path(str(trainer.ckpt_path)).name.startswith(TUNERS):
            self._restored = None  # the tuner's own checkpoint, which it has put back
        self._watch = OptimizerObserver(trainer, pl_module, self.optimizer or 0, partial(self._timed, "recording"))
        path = run_directory(trainer, self.dirpath)
        if self._path is None:
            self._path = ranks_of(trainer).on_rank_zero(lambda: self._open_store(trainer, path))

    def _open_store(self, trainer: Trainer, path: Path) -> Path:
        """The directory of a new run, or that of the run which the checkpoint belongs to."""
        if self._restored is not None:
            earlier = path if self.dirpath else Path(self._restored["dirpath"])
            if (earlier / MANIFEST).exists():
                store = RunStore.open(earlier)
                if store.manifest["run_id"] == self._restored["run_id"]:
                    self._store = store
                    return earlier
        for other in other_callbacks(trainer, self):
            if other.dirpath is not None and Path(other.dirpath).resolve() == path:
                raise MisconfigurationException(f"two SourceCallbacks write to `{path}`. HINT: give each its own.")
        # An existing run is refused before the first step; nothing is written until training starts.
        self._store = RunStore.create(path, self.overwrite)
        return path

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        examples = training_examples(trainer)
        self._trains = True
        index = ranks_of(trainer).on_rank_zero(lambda: self._begin(trainer, pl_module, examples))
        self._stage_data[index] = (pl_module, examples)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, examples: Examples | None) -> int:
        """Start to record, on the rank that does; gives back the stage's index."""
        assert self._store is not None
        if self._recorder is not None and (self._store.path / MANIFEST).exists():
            self._store = RunStore.open(self._store.path)  # scorers may have added to it
        manifest = self._store.manifest
        point = self._resume_point(trainer)
        if point is None:
            if manifest.get("bins"):  # the stage before was interrupted
                assemble(self._store, self.settings["segments"], self.settings["snapshots_per_segment"])
            stages = manifest.setdefault("stages", [])
            while stages and "final" not in stages[-1]:  # a fit that failed before its first step
                del stages[-1]
            self._begin_stage(trainer, pl_module, examples)
        index = len(manifest["stages"]) - 1
        manifest["status"] = "running"
        assert self._watch is not None
        self._watch.find()  # a checkpoint may have come between
        scales = self._watch.preconditioners
        self._recorder = Recorder(self._store, pl_module, self._bins, self._boundaries, scales, index, point)
        self._batches, self._batch_examples = self._stage.get("seen", [0, 0])
        self._probed = "coverage" in self._stage
        self._begin_phase()
        return index

    def _resume_point(self, trainer: Trainer) -> dict[str, Any] | None:
        """Where the recording goes on after a checkpoint was loaded; says so if there is no such point."""
        if not trainer.global_step or (self._recorder is not None and self._restored is None):
            return None
        assert self._store is not None
        if self._restored is not None and self._store.manifest["run_id"] == self._restored["run_id"]:
            point = self._store.manifest.get("resume", {}).get(str(self._restored["steps"]))
            if point is None and self._is_the_end(self._restored):
                return reopen(self._store, self._bins, self._boundaries)
            if point is not None:
                done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
                if 0 < done < trainer.num_training_batches:  # the loader starts the epoch again, in another order
                    self._store.manifest["flags"]["resumed_mid_epoch"] = True
                return point
        rank_zero_warn(
            f"Training resumes at step {trainer.global_step}, of which `{self._store.path}` keeps no record to go on"
            " from: scores attribute the steps from here on, as a stage of their own."
        )
        return None

    def _is_the_end(self, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's recording is the whole of a finished run."""
        assert self._store is not None
        manifest = self._store.manifest
        finished = not manifest.get("bins") and "final" in manifest["stages"][-1]
        return finished and (state["stage"], state["steps"]) == (len(manifest["stages"]) - 1, manifest["steps"])

    @property
    def _boundaries(self) -> list[int]:
        """The steps at which the user wants segments to begin."""
        segments = self.settings["segments"]
        return segments if isinstance(segments, list) else []

    def _begin_stage(self, trainer: Trainer, pl_module: LightningModule, examples: Examples | None) -> None:
        assert self._store is not None
        assert self._watch is not None
        manifest = self._store.manifest
        stages = manifest.setdefault("stages", [])
        manifest |= {
            "versions": versions(),
            "settings": self.settings,
            "flags": {"history_incomplete": bool(trainer.global_step and not stages)},
        }
        taken = {stage["name"] for stage in stages}
        name = self._next_name or (f"fit-{len(stages)}" if stages else "fit")
        if name in taken:
            raise MisconfigurationException(f'the run has a stage "{name}" already. HINT: name the next one otherwise.')
        self._next_name = None
        by_hand = {
            "optimizers": len(trainer.optimizers),
            "schedulers": len(trainer.lr_scheduler_configs),
            "attributed": self.optimizer or 0,
            "groups": [numbers_of(optimizer) for optimizer in trainer.optimizers],
        }
        stages.append(
            {
                "name": name,
                "examples": len(examples) if examples else None,
                "batch_size": examples.batch_size if examples else None,
                "examples_per_batch": None,
                "objective": None,
                "module": {"class": type(pl_module).__name__, "parameters": fingerprint(pl_module)},
                "phases": [],
                "manual": None if pl_module.automatic_optimization else by_hand,
                "maximize": any(rule.maximize for rule in self._watch.rules),
                "reset": changed_between_stages(self._store, pl_module) if stages else [],
            }
        )

    def _begin_phase(self) -> None:
        """Record the optimizer's steps from now on, under the groups that it has now."""
        assert self._recorder is not None
        assert self._watch is not None
        phases = [Phase.from_json(phase) for phase in self._stage["phases"]]
        phase = self._watch.phase(phases[-1] if phases else None, self._recorder.steps)
        self._watch.attach(self._recorder, phase)
        if phases and replace(phases[-1], first=phase.first) == phase:  # a resumed run as it was
            return
        if phases:
            self._recorder.flush(force=True)
            trained = [name for group in phase.columns for name in group]
            self._recorder.regroup(phases[-1].parents(phase.columns), trained)
        # A phase without a step leaves its columns to the next one, and nothing else.
        self._stage["phases"] = [p.to_json() for p in [*(p for p in phases if p.first < phase.first), phase]]
        self._probed = False

    # ---------------------------------------------------------------- during training

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recorder is None:
            return
        with self._recording():
            size = count_examples(batch)
            self._batches += 1
            self._batch_examples += size
            assert self._watch is not None
            self._watch.on_batch_start()
            if self._watch.changed():
                self._recorder.flush(force=True)  # while the old optimizer's moments can be read
                self._watch.find()
                self._begin_phase()
            if not self._probed:
                self._probe(trainer, pl_module, batch, size, batch_idx)

    def _probe(self, trainer: Trainer, pl_module: LightningModule, batch: Any, size: int, batch_idx: int) -> None:
        """Find out on a real batch what can be attributed, and say so once."""
        assert self._store is not None
        assert self._watch is not None
        own = named_parameters(pl_module)
        groups = [[own[name] for name in column] for column in self._stage["phases"][-1]["columns"]]
        if (manual := self._stage["manual"]) is not None:
            manual["batch_idx"] = batch_idx
        objective = Objective(pl_module, **(manual or {}))
        everything = [p for group in groups for p in group]  # those that are frozen again by now, too
        with (
            self._watch.paused(),
            undisturbed(pl_module, self.settings["seed"]),
            parameters_kept(pl_module),
            thawed(everything),
        ):
            coverage = find_blocks(pl_module, groups, self.include, self.exclude)
            try:
                losses = objective.evaluate(batch, size)
            except ValueError:
                return  # no loss for this batch; ask the next one
            if not objective.stepped and trainer.current_epoch == 0 and not trainer.is_last_batch:
                return  # optimizers take turns; look for a batch on which the attributed one steps
            if not torch.isfinite(losses.loss):  # nothing can be told apart by comparing with it
                self._stage.setdefault("coverage", coverage.to_json())
                return
            coverage = probe(pl_module, objective, coverage, batch, size)
        self._probed = True
        known = self._stage.get("coverage")
        self._stage["coverage"] = coverage.to_json()
        rank_zero_info(f"SourceCallback: {coverage.summary()}")
        if not losses.calls and known is None:
            rank_zero_warn(
                f"No loss in `{type(pl_module).__name__}.training_step` was recognised: the empirical Fisher stands in"
                " for the true one, margins are unknown, and the loss is taken to be additive over examples. HINT: use"
                " torch's losses, or define `attribution_distribution(batch)` on the module."
            )

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._watch is not None:
            self._watch.on_zero_grad()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None and self._watch is not None:
            self._watch.on_after_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._recorder is not None and self._watch is not None:
            self._watch.on_before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is None:
            return
        with self._recording():
            self._stage["examples_per_batch"] = self._batch_examples / self._batches
            self._stage["seen"] = [self._batches, self._batch_examples]
            self._recorder.flush()

    @property
    def _stage(self) -> dict[str, Any]:
        assert self._store is not None
        return self._store.manifest["stages"][-1]

    # ---------------------------------------------------------------- after training

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None and averages_weights(trainer):
            # When training ends, the averaged weights may be in the module before this callback is asked.
            with self._recording():
                self._recorder.flush(force=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = ranks_of(trainer)
        recorded = ranks.on_rank_zero(lambda: self._close("finished"))
        index = max(self._stage_data, default=0)
        if not recorded or self.mode == "deferred" or self._stage_data[index][1] is None:
            return
        try:
            with self._timed("factors"):
                run = self._open(trainer, pl_module)
                for segment in run.segments():
                    run.snapshot_factors(segment, self.settings["snapshots"])
        except Exception as error:  # training has succeeded, and nothing of ours may take that away
            rank_zero_warn(
                f"SourceCallback could not fit its factors: {error} Training and its snapshots are safe in"
                f" `{self._path}`; the factors are tried again when scores are asked for."
            )
        if ranks.is_global_zero:
            self._store = RunStore.open(self._store.path) if self._store else None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Queries are asked of the model that the user ends up with, which may be an average of the trained weights."""
        trained, self._trains = self._trains, False
        if trained and self._store is not None and self._recorder is not None and self._store.manifest.get("segments"):
            with self._recording():
                replace_final(self._store, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close("interrupted")

    def _close(self, status: str) -> bool:
        """End the recording; gives back whether there is anything to score."""
        if self._watch is not None:
            self._watch.detach()
        if self._recorder is None or self._store is None:
            return False
        with self._recording():
            self._store.manifest["status"] = status
            self._recorder.finish()
            if self._recorder.steps > self._recorder.start:
                self._store.commit()
            if status == "finished":  # an interrupted run may be resumed, which needs its bins
                assemble(self._store, self.settings["segments"], self.settings["snapshots_per_segment"])
        if self._recorder is None:
            return False
        return self._store.manifest.get("segments") is not None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.detach()
