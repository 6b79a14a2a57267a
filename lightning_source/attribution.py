"""What a callback that recorded a run can be asked: ``trainer.attribute``, and a scorer in the training process."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsIndex, cast

import torch
from typing_extensions import Self

from lightning_source._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    in_all_namespaces,
    rank_zero_warn,
)
from lightning_source._trainer import progress_of, ranks_of, scoring_device
from lightning_source.capture.data import Examples
from lightning_source.capture.objective import Measurement
from lightning_source.recording.earlier import At
from lightning_source.recording.scoring_store import ScoringStore, SharedStore, open_to_score
from lightning_source.recording.store import RunStore, holds_run
from lightning_source.runs.opening import at_moment
from lightning_source.runs.run import Run
from lightning_source.scorer import SourceScorer
from lightning_source.scores import InfluenceScores

Weights = Literal["record", "module"]


class AttributingCallback(Callback):
    """A callback whose run can be scored.

    Args:
        dirpath: the run directory, if the user named one.
        measurement: what a query is measured by where the question does not say.

    Attributes:
        trainer: the Trainer that last used the callback, where a library makes it and keeps it to itself:
            ``source.trainer.attribute(query)``. A copy of the callback has none.
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """An instance that Trainers of either of Lightning's names take for a callback of theirs."""
        return super().__new__(in_all_namespaces(cls))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Pickled as an instance of the class under its own name; the process that reads it has its own namespaces."""
        kind = next(
            kind for kind in type(self).__mro__ if sys.modules[kind.__module__].__dict__.get(kind.__name__) is kind
        )
        return copyreg.__newobj__, (kind,), {**self.__dict__, "trainer": None}  # type: ignore[attr-defined]

    def __init__(self, dirpath: str | None, measurement: str | Measurement) -> None:
        super().__init__()
        self.dirpath = dirpath
        self.measurement = measurement
        self.trainer: Trainer | None = None
        self._path: Path | None = None  # of the run that was recorded here
        self._in_memory: ScoringStore | None = None  # the run, where the disk does not take what is made of it
        self._stage_data: dict[int, tuple[LightningModule, Examples | None]] = {}  # by stage

    def _bind(self, trainer: Trainer) -> None:
        """Make it ``trainer.attribute``."""
        self.trainer = trainer
        if getattr(trainer, "attribute", None) is None:
            trainer.attribute = _Attribute(trainer, self)  # type: ignore[attr-defined]

    def _open(
        self, trainer: Trainer, pl_module: LightningModule, stage: int | str | None = None, at: At | None = None
    ) -> Run:
        # Where child processes trained (ddp_spawn, notebooks), this one knows only where the run must be.
        path = self._path or (Path(self.dirpath).resolve() if self.dirpath else None)
        ranks = ranks_of(trainer)
        if path is None or not ranks.on_rank_zero(lambda: holds_run(path)):
            raise MisconfigurationException(
                "there is no finished segment: no optimizer step was recorded. HINT: call `fit` first, for at least one"
                " step."
            )
        store: RunStore
        if ranks.world_size > 1:
            store = SharedStore(lambda: at_moment(open_to_score(path), at, stage), ranks)
        elif at is not None:
            store = at_moment(open_to_score(path), at, stage)
        elif self._in_memory is not None and self._in_memory.fails:
            store = self._in_memory
        else:
            store = self._in_memory = open_to_score(path)
        count = len(store.manifest.stages)
        modules = [self._stage_data.get(index, (pl_module, None))[0] for index in range(count)]
        data = {index: examples for index, (_, examples) in self._stage_data.items()}
        run = Run(store, modules, data, getattr(trainer, "datamodule", None), stage, ranks)
        run.show(progress_of(trainer))
        return run

    def attribute(
        self,
        trainer: Trainer,
        query: object,
        *,
        train: object = None,
        measurement: str | Measurement | None = None,
        method: str = "source",
        stage: int | str | None = None,
        weights: Weights | None = None,
        at: At | None = None,
        **options: Any,
    ) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""
        with self.scorer(trainer, measurement, stage, weights, at) as scorer:
            return scorer.score(query, train, method=method, **options)

    @contextmanager
    def scorer(
        self,
        trainer: Trainer,
        measurement: str | Measurement | None = None,
        stage: int | str | None = None,
        weights: Weights | None = None,
        at: At | None = None,
    ) -> Iterator[SourceScorer]:
        """A scorer of this run, on the device that training ran on while the ``with`` lasts.

        Args:
            trainer: the Trainer that ``fit``.
            measurement: what a query is measured by; the callback's own by default.
            stage: the stage whose examples are asked about, by index or name; the last by default.
            weights: see :func:`lightning_source.attribute`.
            at: see :func:`lightning_source.attribute`.
        """
        if weights not in (None, "record", "module"):
            raise MisconfigurationException(f'`weights="{weights}"` is not known. HINT: "record" or "module".')
        module = trainer.lightning_module
        if module is None:
            raise MisconfigurationException("there is nothing to attribute before `fit`.")
        with torch.inference_mode(False):  # else what is read and moved here could not be differentiated
            run = self._open(trainer, module, stage, at)
            if weights == "module":
                run.ask_at(module)
            elif weights is None and at is None and (differing := run.differing(module)):
                names = ", ".join(f"`{name}`" for name in differing[:3]) + (" …" if len(differing) > 3 else "")
                rank_zero_warn(
                    f"{len(differing)} of {len(list(module.parameters()))} parameters of `{type(module).__name__}`"
                    f" ({names}) are not what the record of its training ends with, at step {run.snapshots[-1].last}:"
                    ' scores are those of the recorded model. HINT: `weights="module"` asks about the model as it is'
                    ' now, a checkpoint that was put back say; `weights="record"` says that this is meant.'
                )
            home = module.device
            module.to(scoring_device(trainer))
            try:
                yield SourceScorer(run, measurement or self.measurement)
            finally:
                module.to(home)


class _Attribute:
    """``trainer.attribute``; a class of its own so that a Trainer that carries it can be pickled and copied."""

    def __init__(self, trainer: Trainer, callback: AttributingCallback) -> None:
        self.trainer = trainer
        self.callback = callback

    def __call__(self, query: object, **kwargs: Any) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""
        return self.callback.attribute(self.trainer, query, **kwargs)


def attribute(
    trainer: Trainer,
    query: object,
    *,
    train: object = None,
    measurement: str | Measurement | None = None,
    method: str = "source",
    stage: int | str | None = None,
    weights: Weights | None = None,
    at: At | None = None,
    **options: Any,
) -> InfluenceScores:
    """Which training examples made the model do this? Also bound as ``trainer.attribute``.

    After a fit on several ranks all of them must call it; they share the work, and each gets the scores.

    Args:
        trainer: a Trainer that has ``fit`` with a :class:`SourceCallback`.
        query: one batch (what ``training_step`` takes), a ``Dataset`` or a ``DataLoader``.
        train: the training dataset; by default the fit's own, unshuffled.
        measurement: ``"loss"``, ``"margin"``, ``"log-prob"`` or a callable ``(module, batch) -> Tensor[B]``; by default
            the callback's.
        method: ``"source"``, ``"fast-source"``, ``"astra-source"``, ``"influence"``, ``"influence-cg"``,
            ``"influence-lissa"``, ``"astra"``, ``"datainf"``, ``"trak"``, ``"tracin"``, ``"grad-dot"``, ``"grad-cos"``
            or ``"repsim"``.
        stage: the stage (``fit``) whose examples are asked about, by index or name; the last by default.
        weights: at which weights queries are asked: ``"record"``, those that training ended with, or ``"module"``, the
            module's present ones, of the best checkpoint put back say. By default the first, with a warning where the
            two differ.
        at: the moment of training that is asked about, as if it had ended there: optimizer steps since the run began,
            a share of them as a float, or ``"epoch 3"`` for what three epochs of the stage had made. The run is known
            where its snapshots end, and the nearest of these is taken, with a warning where that is another step. The
            end of training by default.
        **options: further arguments of :meth:`SourceScorer.score`, such as ``per_segment=True`` or ``damping=``.

    Returns:
        Scores ``[queries, training examples]``; positive = removing the example raises the measurement.

    Raises:
        MisconfigurationException: no SourceCallback, nothing recorded, or wrong input.
    """
    callbacks = [c for c in trainer.callbacks if isinstance(c, AttributingCallback)]  # type: ignore[attr-defined]
    if not callbacks:
        raise MisconfigurationException(
            "the Trainer has no SourceCallback. HINT: `Trainer(callbacks=[SourceCallback()])`."
        )
    return callbacks[0].attribute(
        trainer,
        query,
        train=train,
        measurement=measurement,
        method=method,
        stage=stage,
        weights=weights,
        at=at,
        **options,
    )


class AttributingTrainer(Protocol):
    """What type checkers are told of a Trainer that has ``fit`` with a :class:`SourceCallback`.

    Example::

        scores = cast(AttributingTrainer, trainer).attribute(query)  # InfluenceScores to a type checker
    """

    def attribute(
        self,
        query: object,
        *,
        train: object = None,
        measurement: str | Measurement | None = None,
        method: str = "source",
        stage: int | str | None = None,
        weights: Weights | None = None,
        at: At | None = None,
        **options: Any,
    ) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""


class AttributionTrainerMixin:
    """Gives a Trainer class the method ``attribute``, so that type checkers and editors know it.

    It works as the one that a :class:`SourceCallback` binds to Trainers without it, and so needs the callback as well.

    Example::

        class MyTrainer(AttributionTrainerMixin, L.Trainer): ...


        trainer = MyTrainer(callbacks=[SourceCallback()])
    """

    def attribute(
        self,
        query: object,
        *,
        train: object = None,
        measurement: str | Measurement | None = None,
        method: str = "source",
        stage: int | str | None = None,
        weights: Weights | None = None,
        at: At | None = None,
        **options: Any,
    ) -> InfluenceScores:
        """See :func:`lightning_source.attribute`."""
        return attribute(
            cast(Trainer, self),
            query,
            train=train,
            measurement=measurement,
            method=method,
            stage=stage,
            weights=weights,
            at=at,
            **options,
        )
