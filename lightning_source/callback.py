"""The callback: translates the Trainer's events into calls of a recording session, and fits factors at the end."""

from __future__ import annotations

import shutil
import time
import weakref
from pathlib import Path
from typing import Any, Literal, cast

from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_source._lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_source._trainer import (
    TrainerLoop,
    averages_weights,
    check_trainer,
    loads_tuner_checkpoint,
    other_callbacks,
    present_loader,
    ranks_of,
    run_directory,
    training_loader,
)
from lightning_source.attribution import AttributingCallback
from lightning_source.capture.data import same_data, training_examples
from lightning_source.names import has_uninitialized
from lightning_source.recording.footprint import taken
from lightning_source.recording.manifest import Settings, check_choice
from lightning_source.recording.session import RecordingSession, SessionState
from lightning_source.recording.store import holds_run
from lightning_source.scorer import MEASUREMENTS
from lightning_source.wording import error_in_words


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
        factor_examples: training examples that the factor passes of a segment visit, dealt over its snapshots, each of
            which visits at least 512; ``None`` for all.
        label_samples: label draws per example for the eigenvalues.
        measurement: default measurement of ``trainer.attribute``: ``"loss"``, ``"margin"`` or ``"log-prob"``.
        include: glob patterns of module names to attribute; all by default.
        exclude: glob patterns of module names not to attribute.
        mode: ``"fit"`` computes factors when training ends, ``"deferred"`` when scores are first asked for.
        optimizer: where the module has several optimizers, the index of the one whose parameters are attributed.
        overwrite: replace the run that ``dirpath`` holds.
        passes: the mode that the module is called in after training: ``"eval"``, ``"train"`` (without dropout and
            statistics of the batch), or ``"auto"``: ``"eval"`` unless the module computes something else there.
        seed: seeds sampled labels and the choice of factor examples.
        keep: ``"covariances"`` keeps those of each snapshot on disk, so that cutting the run into other segments
            (``segments=`` of a question) needs no new pass for them; by default nothing but the factors is kept.

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
        measurement: Literal["loss", "margin", "log-prob"] = "loss",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        mode: Literal["fit", "deferred"] = "fit",
        optimizer: int | None = None,
        overwrite: bool = False,
        seed: int = 0,
        passes: Literal["auto", "eval", "train"] = "auto",
        keep: Literal["covariances"] | None = None,
    ) -> None:
        super().__init__(dirpath, measurement)
        if isinstance(segments, str):
            if segments != "auto":
                raise ValueError(f'`segments="{segments}"` must be a number, a list of steps, or "auto"')
            segments = 1
        check_choice("mode", mode, ("fit", "deferred"))
        check_choice("measurement", measurement, MEASUREMENTS)
        self.optimizer = optimizer
        self.mode = mode
        self.overwrite = overwrite
        self.settings = Settings(
            segments=segments,
            snapshots_per_segment=snapshots_per_segment,
            snapshots=snapshots,
            curvature=curvature,
            factor_examples=factor_examples,
            label_samples=label_samples,
            seed=seed,
            passes=passes,
            keep=keep,
        )
        self._session = RecordingSession(self.settings, include, exclude, optimizer or 0)
        self._next_name: str | None = None
        self._trains = False
        self._waits = False
        self._loader: DataLoader[object] | None = None  # of the present epoch
        self._reloaded = False
        self._factor_seconds = 0.0

    @property
    def state_key(self) -> str:
        """Two callbacks may watch one run if they write to different directories."""
        return self._generate_state_key(dirpath=self.dirpath)

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent by the callback, on ``"recording"`` and on ``"factors"``."""
        return {"recording": self._session.seconds, "factors": self._factor_seconds}

    # ---------------------------------------------------------------- before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._bind(trainer)
        if stage == "fit":
            # A state that `test(ckpt_path=…)` loaded says nothing about the next fit.
            self._session.restored, self._session.offered = None, []

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {}).values()
        own = [state for state in states if isinstance(state, dict) and {"run_id", "dirpath", "steps"} <= state.keys()]
        self._session.offered = [cast(SessionState, state) for state in own]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._session.restored = cast(SessionState, state_dict)

    @override
    def state_dict(self) -> dict[str, Any]:
        """A few primitives; what they stand for is a resume point in the run directory."""
        return {**(self._session.state() or {})}

    def stage(self, name: str) -> SourceCallback:
        """Name the next ``fit``: each is a stage with its own examples, ``N`` and segments. Gives back the callback."""
        self._next_name = name
        return self

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trainer(trainer, pl_module, self.optimizer)
        if self._session.active and loads_tuner_checkpoint(trainer):
            self._session.restored, self._session.offered = None, []
        self._session.prepare(pl_module, TrainerLoop(trainer, pl_module))
        self._in_memory = None
        if self._path is not None:
            ranks_of(trainer).on_rank_zero(self._session.claim)
            return
        path = run_directory(trainer, self.dirpath, holds_run)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        self._path = ranks_of(trainer).on_rank_zero(lambda: self._open_run(trainer, path))

    def _open_run(self, trainer: Trainer, path: Path) -> Path | None:
        for other in other_callbacks(trainer, self):
            if other.dirpath is not None and Path(other.dirpath).resolve() == path:
                raise MisconfigurationException(f"two SourceCallbacks write to `{path}`. HINT: give each its own.")
        return self._session.open(path, self.overwrite, anywhere=self.dirpath is None)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trains = True
        self._waits = has_uninitialized(pl_module)
        if not self._waits:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = training_loader(trainer)
        examples = None if loader is None else training_examples(loader)
        index = ranks_of(trainer).on_rank_zero(lambda: self._session.begin(examples, self._next_name, loader))
        self._loader, self._reloaded = loader, False
        self._next_name = None
        if index is not None:
            self._stage_data[index] = (pl_module, examples)

    # ---------------------------------------------------------------- during training

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader, earlier = present_loader(trainer), self._loader
        if loader is None or earlier is None or loader is earlier:
            return
        self._session.load_from(loader)
        self._loader = loader
        if not self._reloaded and not same_data(loader.dataset, earlier.dataset):
            self._reloaded = True
            rank_zero_warn(
                f"SourceCallback: the training data were loaded anew for epoch {trainer.current_epoch}"
                " (`reload_dataloaders_every_n_epochs`). Scores are those of the data of the first epoch, as if every"
                " epoch had trained on them; where later epochs' examples are others, nothing is known of these. HINT:"
                " call `fit` for each set of data, which makes it a stage of its own."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._session.on_batch_start(batch, batch_idx)

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._session.on_zero_grad()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.on_after_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._session.on_before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._session.on_batch_end()
        if self._waits:  # lazy layers: there are no parameters to record before the first batch
            self._waits = False
            with self._session.guarded():
                self._begin(trainer, pl_module)

    # ---------------------------------------------------------------- after training

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averages_weights(trainer):
            # When training ends, the averaged weights may be in the module before this callback is asked.
            self._session.flush()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = ranks_of(trainer)
        index = max(self._stage_data, default=0)
        waits = self.mode == "deferred" or self._stage_data.get(index, (None, None))[1] is None
        recorded = ranks.on_rank_zero(lambda: self._session.close("finished", factors=not waits))
        if recorded and not waits:
            self._make_factors(trainer, pl_module)
        if recorded and ranks.is_global_zero:
            self._report()

    def _report(self) -> None:
        store, seconds = self._session.store, self.seconds
        if store is not None:
            rank_zero_info(
                f"SourceCallback: {taken(store)}; recording took {seconds['recording']:.1f} s, factors"
                f" {seconds['factors']:.1f} s."
            )

    def _make_factors(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.perf_counter()
        try:
            run = self._open(trainer, pl_module)
            for segment in run.segments():
                run.cross_layer_factors(segment, self.settings.snapshots)  # and what they are made of
            ranks_of(trainer).on_rank_zero(self._session.factors_made)
        except Exception as error:  # training has succeeded, and nothing of ours may take that away
            rank_zero_warn(
                f"SourceCallback could not fit its factors: {error_in_words(error)} Training and its snapshots are safe"
                f" in `{self._path}`; the factors are tried again when scores are asked for."
            )
        self._factor_seconds += time.perf_counter() - start

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trains and self._session.restored is not None:
            # Resumed where nothing was left to train; what the checkpoint knows of the last steps is recorded all the
            # same, since the process that trained them may have died before it could.
            with self._session.guarded():
                self._begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        trained, self._trains = self._trains, False
        if trained:
            self._session.replace_final(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._session.close("interrupted")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._session.detach()
        self._session.release()
        self._loader = None
