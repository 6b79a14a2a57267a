"""The callback: translates Trainer events into calls of the recorder, and finishes the run when training ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_source._guards import parameters_kept, undisturbed
from lightning_source._trainer import (
    check_trainer,
    clips_gradients,
    other_callbacks,
    run_directory,
    scoring_device,
    training_examples,
)
from lightning_source.data import Examples, count_examples
from lightning_source.layers import clean_name
from lightning_source.objective import Measurement, Objective
from lightning_source.optimizers import Rule, preconditioners, rule_for
from lightning_source.recorder import Recorder, assemble, changed_between_stages
from lightning_source.run import Run, fingerprint
from lightning_source.scorer import MEASUREMENTS, SourceScorer
from lightning_source.scores import InfluenceScores
from lightning_source.store import MANIFEST, RunStore
from lightning_source.tracking import find_blocks, probe

# Bins kept while training, per snapshot: enough to cut a run of any length into nearly equal snapshots.
BINS_PER_SNAPSHOT = 4


class SourceCallback(Callback):
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
        overwrite: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
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
        self.dirpath = dirpath
        self.measurement = measurement
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
        self._taught: dict[int, tuple[LightningModule, Examples | None]] = {}  # by stage
        self._handles: list[RemovableHandle] = []
        self._rule: Rule | None = None
        self._clips = False
        self._norm: Tensor | None = None
        self._probed = False
        self._micro_batches = 0  # that contributed to the step's gradient
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

    # ---------------------------------------------------------------- before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(trainer, "attribute", None) is None:
            trainer.attribute = _Attribute(trainer, self)  # type: ignore[attr-defined]
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
        self._recorder.save_point()
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
        check_trainer(trainer, pl_module)
        self._rule = rule_for(trainer.optimizers[0])
        for group in trainer.optimizers[0].param_groups:
            self._rule(group)
        Objective(pl_module)
        if self._recorder is None:
            self._store = self._open_store(trainer)

    def _open_store(self, trainer: Trainer) -> RunStore:
        """The directory of a new run, or that of the run which the checkpoint belongs to."""
        if self._restored is not None:
            path = run_directory(trainer, self.dirpath) if self.dirpath else Path(self._restored["dirpath"])
            if (path / MANIFEST).exists():
                store = RunStore.open(path)
                if store.manifest["run_id"] == self._restored["run_id"]:
                    return store
        path = run_directory(trainer, self.dirpath)
        for other in other_callbacks(trainer, self):
            if other.dirpath is not None and run_directory(trainer, other.dirpath) == path:
                raise MisconfigurationException(f"two SourceCallbacks write to `{path}`. HINT: give each its own.")
        # An existing run is refused before the first step; nothing is written until training starts.
        return RunStore.create(path, self.overwrite)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._store is not None
        assert self._rule is not None
        optimizer = trainer.optimizers[0]
        examples = training_examples(trainer)
        self._clips = clips_gradients(trainer, pl_module)
        names = {id(p): clean_name(name) for name, p in pl_module.named_parameters()}
        scales = partial(preconditioners, optimizer, self._rule, names)
        manifest = self._store.manifest
        point = self._resume_point(trainer)
        if point is None:
            if manifest.get("bins"):  # the stage before was interrupted
                assemble(self._store, self.settings["segments"], self.settings["snapshots_per_segment"])
            self._begin_stage(trainer, pl_module, examples, names)
        index = len(manifest["stages"]) - 1
        manifest["status"] = "running"
        boundaries = self.settings["segments"] if isinstance(self.settings["segments"], list) else []
        self._recorder = Recorder(self._store, pl_module, self._bins, boundaries, scales, index, point)
        self._batches, self._batch_examples = self._stage.get("seen", [0, 0])
        self._micro_batches = 0
        self._probed = "coverage" in self._stage
        self._taught[index] = (pl_module, examples)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step(trainer)),
        ]

    def _resume_point(self, trainer: Trainer) -> dict[str, Any] | None:
        """Where the recording goes on after a checkpoint was loaded; says so if there is no such point."""
        if not trainer.global_step or (self._recorder is not None and self._restored is None):
            return None
        assert self._store is not None
        if self._restored is not None and self._store.manifest["run_id"] == self._restored["run_id"]:
            point = self._store.manifest.get("resume", {}).get(str(self._restored["steps"]))
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

    def _begin_stage(
        self, trainer: Trainer, pl_module: LightningModule, examples: Examples | None, names: dict[int, str]
    ) -> None:
        assert self._store is not None
        assert self._rule is not None
        optimizer = trainer.optimizers[0]
        manifest = self._store.manifest
        stages = manifest.setdefault("stages", [])
        manifest |= {
            "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
            "settings": self.settings,
            "flags": {"history_incomplete": bool(trainer.global_step and not stages)},
        }
        taken = {stage["name"] for stage in stages}
        name = self._next_name or (f"fit-{len(stages)}" if stages else "fit")
        if name in taken:
            raise MisconfigurationException(f'the run has a stage "{name}" already. HINT: name the next one otherwise.')
        self._next_name = None
        stages.append(
            {
                "name": name,
                "examples": len(examples) if examples else None,
                "batch_size": examples.batch_size if examples else None,
                "examples_per_batch": None,
                "objective": None,
                "module": {"class": type(pl_module).__name__, "parameters": fingerprint(pl_module)},
                "optimizer": {
                    "class": type(optimizer).__name__,
                    "groups": [[names[id(p)] for p in g["params"] if id(p) in names] for g in optimizer.param_groups],
                    "decoupled": [self._rule(group).decoupled for group in optimizer.param_groups],
                },
                "reset": changed_between_stages(self._store, pl_module) if stages else [],
            }
        )

    # ---------------------------------------------------------------- during training

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        with self._timed("recording"):
            size = count_examples(batch)
            self._batches += 1
            self._batch_examples += size
            if not self._probed:
                self._probe(trainer, pl_module, batch, size)

    def _probe(self, trainer: Trainer, pl_module: LightningModule, batch: Any, size: int) -> None:
        """Find out on a real batch what can be attributed, and say so once."""
        assert self._store is not None
        groups = [group["params"] for group in trainer.optimizers[0].param_groups]
        coverage = find_blocks(pl_module, groups, self.include, self.exclude)
        objective = Objective(pl_module)
        with undisturbed(pl_module, self.settings["seed"]), parameters_kept(pl_module):
            try:
                losses = objective.evaluate(batch, size)
            except ValueError:
                return  # no loss for this batch; ask the next one
            if not torch.isfinite(losses.loss):  # nothing can be told apart by comparing with it
                self._stage.setdefault("coverage", coverage.to_json())
                return
            coverage = probe(pl_module, objective, coverage, batch, size)
        self._probed = True
        self._stage["coverage"] = coverage.to_json()
        rank_zero_info(f"SourceCallback: {coverage.summary()}")
        if not losses.calls:
            rank_zero_warn(
                f"No loss in `{type(pl_module).__name__}.training_step` was recognised: the empirical Fisher stands in"
                " for the true one, margins are unknown, and the loss is taken to be additive over examples. HINT: use"
                " torch's losses, or define `attribution_distribution(batch)` on the module."
            )

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._micro_batches = 0

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._micro_batches += 1

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._clips:
            self._norm = _gradient_norm(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self._recorder is not None
        with self._timed("recording"):
            self._recorder.before_step()

    def _after_step(self, trainer: Trainer) -> Any:
        def log(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            assert self._recorder is not None
            assert self._rule is not None
            with self._timed("recording"):
                clip = None
                if self._norm is not None:
                    clip = torch.where(self._norm > 0, _gradient_norm(optimizer) / self._norm, 1.0)
                rules = [self._rule(group) for group in optimizer.param_groups]
                # A short last window is still divided by the full number of micro-batches.
                weight = self._micro_batches / max(1, trainer.accumulate_grad_batches)
                self._recorder.after_step(
                    [float(group["lr"]) for group in optimizer.param_groups],
                    [rule.rate_multiplier for rule in rules],
                    [rule.weight_decay for rule in rules],
                    weight,
                    clip,
                )
                self._micro_batches, self._norm = 0, None

        return log

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._recorder is not None
        with self._timed("recording"):
            self._stage["examples_per_batch"] = self._batch_examples / self._batches
            self._stage["seen"] = [self._batches, self._batch_examples]
            self._recorder.flush()

    @property
    def _stage(self) -> dict[str, Any]:
        assert self._store is not None
        return self._store.manifest["stages"][-1]

    # ---------------------------------------------------------------- after training

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close("finished")
        if self._recorder is None or self._store is None or self._store.manifest.get("segments") is None:
            return
        if self.mode == "deferred" or self._taught[self._recorder.stage][1] is None:
            return
        try:
            with self._timed("factors"):
                run = self._open(trainer, pl_module)
                for segment in run.segments():
                    run.snapshot_factors(segment, self.settings["snapshots"])
        except Exception as error:  # training has succeeded, and nothing of ours may take that away
            rank_zero_warn(
                f"SourceCallback could not fit its factors: {error} Training and its snapshots are safe in"
                f" `{self._store and self._store.path}`; the factors are tried again when scores are asked for."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close("interrupted")

    def _close(self, status: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recorder is None or self._store is None:
            return
        with self._timed("recording"):
            self._store.manifest["status"] = status
            self._recorder.finish()
            if self._recorder.steps > self._recorder.start:
                self._store.commit()
            if status == "finished":  # an interrupted run may be resumed, which needs its bins
                assemble(self._store, self.settings["segments"], self.settings["snapshots_per_segment"])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---------------------------------------------------------------- scores

    def _open(self, trainer: Trainer, pl_module: LightningModule, stage: int | str | None = None) -> Run:
        store = self._store
        if store is not None and not self._handles and (store.path / MANIFEST).exists():
            store = self._store = RunStore.open(store.path)  # a scorer may have completed an interrupted run meanwhile
        if store is None or not store.manifest.get("steps"):
            raise MisconfigurationException(
                "there is no finished segment: no optimizer step was recorded. HINT: call `fit` first, for at least one"
                " step."
            )
        count = len(store.manifest["stages"])
        modules = [self._taught.get(index, (pl_module, None))[0] for index in range(count)]
        data = {index: examples for index, (_, examples) in self._taught.items()}
        return Run(store, modules, data, getattr(trainer, "datamodule", None), stage)

    def attribute(
        self,
        trainer: Trainer,
        query: Any,
        *,
        train: Any = None,
        measurement: str | Measurement | None = None,
        method: str = "source",
        stage: int | str | None = None,
        **options: Any,
    ) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""
        with self.scorer(trainer, measurement, stage) as scorer:
            return scorer.score(query, train, method=method, **options)

    @contextmanager
    def scorer(
        self, trainer: Trainer, measurement: str | Measurement | None = None, stage: int | str | None = None
    ) -> Iterator[SourceScorer]:
        """A scorer of this run, on the device that training ran on while the ``with`` lasts.

        Args:
            trainer: the Trainer that ``fit``.
            measurement: what a query is measured by; the callback's own by default.
            stage: the stage whose examples are asked about, by index or name; the last by default.
        """
        module = trainer.lightning_module
        if module is None:
            raise MisconfigurationException("there is nothing to attribute before `fit`.")
        run = self._open(trainer, module, stage)
        home = module.device
        module.to(scoring_device(trainer))
        try:
            yield SourceScorer(run, measurement or self.measurement)
        finally:
            module.to(home)


class _Attribute:
    """``trainer.attribute``; a class of its own so that a Trainer that carries it can be pickled and copied."""

    def __init__(self, trainer: Trainer, callback: SourceCallback) -> None:
        self.trainer = trainer
        self.callback = callback

    def __call__(self, query: Any, **kwargs: Any) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""
        return self.callback.attribute(self.trainer, query, **kwargs)


def _gradient_norm(optimizer: Optimizer) -> Tensor:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def attribute(
    trainer: Trainer,
    query: Any,
    *,
    train: Any = None,
    measurement: str | Measurement | None = None,
    method: str = "source",
    stage: int | str | None = None,
    **options: Any,
) -> InfluenceScores:
    """Which training examples made the model do this? Also bound as ``trainer.attribute``.

    Args:
        trainer: a Trainer that has ``fit`` with a :class:`SourceCallback`.
        query: one batch (what ``training_step`` takes), a ``Dataset`` or a ``DataLoader``.
        train: the training dataset; by default the fit's own, unshuffled.
        measurement: ``"loss"``, ``"margin"``, ``"log-prob"`` or a callable ``(module, batch) -> Tensor[B]``; by default
            the callback's.
        method: ``"source"``, ``"fast-source"``, ``"influence"``, ``"tracin"``, ``"grad-dot"`` or ``"grad-cos"``.
        stage: the stage (``fit``) whose examples are asked about, by index or name; the last by default.
        **options: further arguments of :meth:`SourceScorer.score`, such as ``per_segment=True`` or ``damping=``.

    Returns:
        Scores ``[queries, training examples]``; positive = removing the example raises the measurement.

    Raises:
        MisconfigurationException: no SourceCallback, nothing recorded, or wrong input.
    """
    callbacks = [c for c in trainer.callbacks if isinstance(c, SourceCallback)]  # type: ignore[attr-defined]
    if not callbacks:
        raise MisconfigurationException(
            "the Trainer has no SourceCallback. HINT: `Trainer(callbacks=[SourceCallback()])`."
        )
    return callbacks[0].attribute(
        trainer, query, train=train, measurement=measurement, method=method, stage=stage, **options
    )
