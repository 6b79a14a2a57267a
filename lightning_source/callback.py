"""The callback: translates Trainer events into calls of the recorder, and finishes the run when training ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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

from lightning_source._guards import undisturbed
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
from lightning_source.recorder import Recorder, assemble
from lightning_source.run import Run, fingerprint
from lightning_source.scorer import MEASUREMENTS, SourceScorer
from lightning_source.scores import InfluenceScores
from lightning_source.store import RunStore
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
        self._examples: Examples | None = None
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
        own = getattr(trainer, "attribute", None)
        if own is None:
            trainer.attribute = self.attribute_with(trainer)  # type: ignore[attr-defined]
        if stage != "fit":
            return
        if self._recorder is not None:
            raise MisconfigurationException(
                "this SourceCallback has already recorded a `fit`. HINT: use a new SourceCallback for each."
            )
        if self.dirpath is not None:
            path = run_directory(trainer, self.dirpath)
            for other in other_callbacks(trainer, self):
                if other.dirpath is not None and run_directory(trainer, other.dirpath) == path:
                    raise MisconfigurationException(f"two SourceCallbacks write to `{path}`. HINT: give each its own.")
        # An existing run is refused before anything expensive happens; nothing is written until training starts.
        self._store = RunStore.create(run_directory(trainer, self.dirpath), self.overwrite)

    def attribute_with(self, trainer: Trainer) -> Any:
        """``trainer.attribute``: a bound method of a small picklable object."""
        return _Attribute(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trainer(trainer, pl_module)
        self._rule = rule_for(trainer.optimizers[0])
        for group in trainer.optimizers[0].param_groups:
            self._rule(group)
        Objective(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._store is not None
        assert self._rule is not None
        optimizer = trainer.optimizers[0]
        self._examples = training_examples(trainer)
        self._clips = clips_gradients(trainer, pl_module)
        if trainer.global_step:
            rank_zero_warn(
                f"Training resumes at step {trainer.global_step}; the history before it is not recorded, so scores"
                " attribute the resumed part only."
            )
        names = {id(p): clean_name(name) for name, p in pl_module.named_parameters()}
        groups = [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
        self._store.manifest |= {
            "status": "running",
            "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
            "settings": self.settings,
            "module": {"class": type(pl_module).__name__, "parameters": fingerprint(pl_module)},
            "stages": [
                {
                    "name": "fit",
                    "examples": len(self._examples) if self._examples else None,
                    "batch_size": self._examples.batch_size if self._examples else None,
                    "examples_per_batch": None,
                    "objective": None,
                    "optimizer": {
                        "class": type(optimizer).__name__,
                        "groups": groups,
                        "decoupled": [self._rule(group).decoupled for group in optimizer.param_groups],
                    },
                }
            ],
            "flags": {"history_incomplete": bool(trainer.global_step)},
        }
        boundaries = self.settings["segments"] if isinstance(self.settings["segments"], list) else []
        scales = partial(preconditioners, optimizer, self._rule, names)
        self._recorder = Recorder(self._store, pl_module, self._bins, boundaries, scales)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step(trainer)),
        ]

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
        with undisturbed(pl_module, self.settings["seed"]):
            try:
                losses = objective.evaluate(batch, size)
            except ValueError:
                return  # no loss for this batch; ask the next one
            coverage = probe(pl_module, objective, coverage, batch, size)
        self._probed = True
        self._store.manifest["coverage"] = coverage.to_json()
        rank_zero_info(f"SourceCallback: {coverage.summary()}")
        if not losses.calls:
            rank_zero_warn(
                f"No loss in `{type(pl_module).__name__}.training_step` was recognised: the empirical Fisher stands in"
                " for the true one (measured LDS on one task: 0.42 against 0.49), margins are unknown, and the loss is"
                " taken to be additive over examples. HINT: use torch's losses, or define"
                " `attribution_distribution(batch)` on the module."
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
            self._recorder.flush()

    @property
    def _stage(self) -> dict[str, Any]:
        assert self._store is not None
        return self._store.manifest["stages"][0]

    # ---------------------------------------------------------------- after training

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close("finished")
        if self.mode == "deferred" or self._examples is None or self._recorder is None or not self._recorder.steps:
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
        if self._recorder is None or self._store is None or not self._recorder.steps:
            return
        with self._timed("recording"):
            self._store.manifest["status"] = status
            self._recorder.finish()
            assemble(self._store, self.settings["segments"], self.settings["snapshots_per_segment"])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._store is None or self._recorder is None:
            return {}
        return {"schema": 1, "run_id": self._store.manifest["run_id"], "steps": self._recorder.steps}

    # ---------------------------------------------------------------- scores

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> Run:
        if self._store is None or self._recorder is None or not self._recorder.steps:
            raise MisconfigurationException(
                "there is no finished segment: no optimizer step was recorded. HINT: call `fit` first, for at least one"
                " step."
            )
        return Run(self._store, pl_module, self._examples, getattr(trainer, "datamodule", None))

    def attribute(
        self,
        trainer: Trainer,
        query: Any,
        *,
        train: Any = None,
        measurement: str | Measurement | None = None,
        method: str = "source",
        **options: Any,
    ) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""
        with self.scorer(trainer, measurement) as scorer:
            return scorer.score(query, train, method=method, **options)

    @contextmanager
    def scorer(self, trainer: Trainer, measurement: str | Measurement | None = None) -> Iterator[SourceScorer]:
        """A scorer of this run, on the device that training ran on while the ``with`` lasts.

        Args:
            trainer: the Trainer that ``fit``.
            measurement: what a query is measured by; the callback's own by default.
        """
        module = trainer.lightning_module
        if module is None:
            raise MisconfigurationException("there is nothing to attribute before `fit`.")
        run = self._open(trainer, module)
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
    return callbacks[0].attribute(trainer, query, train=train, measurement=measurement, method=method, **options)
