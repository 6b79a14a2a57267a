"""Opens a recorded run and gives back scores; needs no Trainer and no rerun of training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset, Subset

from lightning_source._lightning import LightningDataModule, LightningModule, MisconfigurationException, rank_zero_warn
from lightning_source._progress import progress_of_process
from lightning_source._provenance import name_of, versions
from lightning_source.capture.data import Examples, GivenBatches, examples_of, query_of
from lightning_source.capture.objective import Measurement
from lightning_source.diagnosis import Diagnosis, Finding, diagnose
from lightning_source.estimators import MatrixSink, Metadata, Query, estimator_for
from lightning_source.estimators.by_element import element_scores
from lightning_source.estimators.columns import Columns
from lightning_source.estimators.registry import Estimator, Options
from lightning_source.estimators.sinks import require_finite_scores
from lightning_source.estimators.source import self_influence
from lightning_source.estimators.spread import Spread
from lightning_source.recording.earlier import At
from lightning_source.recording.manifest import Curvature, Settings
from lightning_source.recording.scoring_store import open_to_score
from lightning_source.runs.final_model import FurtherTraining, open_final_model, set_rate
from lightning_source.runs.opening import at_moment
from lightning_source.runs.run import Run
from lightning_source.runs.stage import index_of
from lightning_source.scores import SIGN, InfluenceScores

MEASUREMENTS = ("loss", "margin", "log-prob")


class SourceScorer:
    """Scores queries against the training examples of one recorded run.

    Args:
        run: the opened run; see :meth:`from_run`.
        measurement: ``"loss"``, ``"margin"`` (log p/(1-p) of the target class), ``"log-prob"``, or a callable
            ``(module, batch) -> Tensor[B]``.
        memory: bytes that query vectors may take; more queries are scored block by block, with one set of train passes
            each.
    """

    def __init__(self, run: Run, measurement: str | Measurement = "loss", memory: float = 4e9) -> None:
        if not callable(measurement) and measurement not in MEASUREMENTS:
            raise MisconfigurationException(
                f"`measurement={measurement!r}` is not known. HINT: one of {', '.join(MEASUREMENTS)}, or a callable."
            )
        self.run = run
        self.measurement = measurement
        self.memory = memory

    @classmethod
    def from_run(
        cls,
        dirpath: str | os.PathLike[str],
        model: LightningModule,
        *,
        measurement: str | Measurement = "loss",
        datamodule: LightningDataModule | None = None,
        stage: int | str | None = None,
        stage_models: Sequence[LightningModule] | None = None,
        stage_data: Mapping[int | str, object] | None = None,
        at: At | None = None,
        memory: float = 4e9,
    ) -> SourceScorer:
        """Open a run in any process, on any day; scores are bit-equal to those of the training process.

        Args:
            dirpath: the run directory.
            model: the LightningModule that was trained; its weights are not used, they come from the run.
            measurement: what a query is measured by.
            datamodule: the LightningDataModule, if it transforms batches on their way to the device.
            stage: the stage (``fit``) whose examples are asked about, by index or name; the last by default.
            stage_models: the LightningModule of each stage, where stages had models of different shapes.
            stage_data: training datasets, or loaders over them, of stages by index or name; for an earlier stage, those
                of the later ones are needed where these have no factors yet.
            at: the moment of training that is asked about; see :func:`lightning_source.attribute`.
            memory: bytes that query vectors may take.

        Raises:
            MisconfigurationException: no run, a damaged file, no finished segment, or a model that does not match.
        """
        whole = open_to_score(dirpath)
        stages, store = whole.manifest.stages, at_moment(whole, at, stage)
        data: dict[int, Examples | None] = {}
        for key, train in (stage_data or {}).items():
            index = index_of(key, [record.name for record in stages])
            data[index] = examples_of(train, stages[index].batch_size)
        run = Run(store, stage_models or [model], data, hooks=datamodule, stage=stage)
        run.show(progress_of_process())
        if store.manifest.status != "finished":
            rank_zero_warn(
                f"`{dirpath}` has not ended: it is scored as the training of its first {store.manifest.steps} steps."
            )
        return cls(run, measurement, memory)

    @classmethod
    def from_model(
        cls,
        model: LightningModule,
        train: Any,
        *,
        rate: float | Sequence[float] | None = None,
        batch_size: int | None = None,
        optimizer: Optimizer | None = None,
        measurement: str | Measurement = "loss",
        dirpath: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        curvature: Curvature = "ekfac",
        factor_examples: int | None = 5000,
        label_samples: int = 1,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        datamodule: LightningDataModule | None = None,
        seed: int = 0,
        memory: float = 4e9,
    ) -> SourceScorer:
        """Attribute a trained model of which no history was recorded (final-model-only, Wei et al. 2412.03906).

        What is asked is the effect of an example on *further* training from the model as it is now: ``"influence"``
        (with ``damping=1/Λ`` where training further amounts to ``Λ``), ``"grad-dot"`` and ``"grad-cos"`` need the
        model alone; ``"source"``, with one segment whose snapshot is the model, needs ``rate`` as well. For a
        checkpoint pass ``MyModule.load_from_checkpoint(path)``. The model's weights are copied: it may be trained on.

        Args:
            model: the trained LightningModule.
            train: its training dataset, or a loader over it.
            rate: ``Λ``, the sum of the further training's effective learning rates (learning rate times steps; over
                ``1 - β`` with momentum), or one for each parameter group. ``None`` leaves it open: then ``"source"`` is
                refused, and ``"grad-dot"`` is the plain ``(1/N) ∇fᵀ g``.
            batch_size: of the further training; a DataLoader's own by default. It scales losses that are sums over a
                batch (method §4).
            optimizer: the further training's optimizer over the model's parameters: its groups, weight decay, and the
                moments of an adaptive one. By default SGD on all parameters without weight decay.
            measurement: what a query is measured by.
            dirpath: where the run is kept, for :meth:`from_run`; by default a directory that vanishes with the scorer.
            overwrite: replace the run that ``dirpath`` holds.
            curvature: ``"ekfac"``, ``"kfac"`` or ``"diagonal"``.
            factor_examples: training examples that the factor passes visit; ``None`` for all.
            label_samples: label draws per example for the eigenvalues.
            include: glob patterns of module names to attribute; all by default.
            exclude: glob patterns of module names not to attribute.
            datamodule: the LightningDataModule, if it transforms batches on their way to the device.
            seed: seeds sampled labels and the choice of factor examples.
            memory: bytes that query vectors may take.

        Raises:
            MisconfigurationException: no batch size, an optimizer that is not understood or holds no moments yet, or
                nothing to attribute.

        Example::

            scorer = SourceScorer.from_model(model, train_loader, rate=0.03 * 6 * 50)  # lr · steps an epoch · epochs
            scores = scorer.score(queries)
        """
        run = open_final_model(
            model,
            train,
            FurtherTraining(
                settings=Settings(
                    curvature=curvature, factor_examples=factor_examples, label_samples=label_samples, seed=seed
                ),
                rate=rate,
                batch_size=batch_size,
                optimizer=optimizer,
                include=include,
                exclude=exclude,
                datamodule=datamodule,
            ),
            dirpath,
            overwrite,
        )
        run.show(progress_of_process())
        return cls(run, measurement, memory)

    def set_rate(self, rate: float | Sequence[float]) -> SourceScorer:
        """Another amount of further training for a scorer of :meth:`from_model`; factors are kept. Gives back itself.

        Args:
            rate: ``Λ``, the sum of effective learning rates; one number, or one for each parameter group.

        Raises:
            MisconfigurationException: the run was recorded while training, which fixed its rates.
        """
        set_rate(self.run, rate)
        return self

    @torch.inference_mode(False)  # gradients are taken, whatever the mode that the question is asked in
    def score(
        self,
        query: object,
        train: object = None,
        *,
        method: str = "source",
        per_segment: bool = False,
        per_layer: bool = False,
        stderr: bool = False,
        train_ids: Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> InfluenceScores:
        """Attribute queries to training examples.

        Args:
            query: one batch (what ``training_step`` takes), a ``Dataset`` or a ``DataLoader``.
            train: the run's training dataset or a loader over it; only omitted where the scorer already has it.
            method: one of

                - ``"source"``, ``"fast-source"``, ``"astra-source"``: unrolled differentiation over segments, with
                  EK-FAC or (the last) the exact Gauss-Newton matrix;
                - ``"influence"``, ``"influence-cg"``, ``"influence-lissa"``, ``"astra"``, ``"datainf"``: influence
                  functions at the final model, with EK-FAC, three iterations on the exact Gauss-Newton matrix, or
                  DataInf's closed form;
                - ``"trak"``: a linear model in randomly projected gradients;
                - ``"tracin"``, ``"grad-dot"``, ``"grad-cos"``, ``"repsim"``: products of gradients, of representations.
            per_segment: keep each segment's share in ``by_segment``; refused where a method's scores have none.
            per_layer: keep each layer's share in ``by_layer``, one for each module whose parameters are attributed, at
                no further pass; refused where a method's scores are no sums over layers (``"trak"``, ``"repsim"``).
                A layer's share is as large in memory as the scores.
            stderr: give the scores an error bar, ``scores.stderr``: a jackknife over the snapshots of this run, for
                methods whose scores are sums over them (``"source"``, ``"tracin"``), at no further pass. What it covers
                and what not: method §7.6. The bar that covers other training seeds is that of an :func:`ensemble`.
            train_ids: score only these training examples.
            batch_size: examples a pass takes at once; scores do not depend on it.
            **options: the method's own, such as ``damping`` (``"influence"``), ``segments`` and ``snapshots``
                (``"source"``); see its function in :mod:`lightning_source.estimators`, which also states its cost.

        Returns:
            The scores; positive = removing the example raises the measurement.

        Raises:
            MisconfigurationException: wrong input; the message says what and the way out.
            FloatingPointError: a non-finite gradient or factor; the message names the block or the examples.
        """
        estimator = estimator_for(method, options)
        if per_segment:
            estimator.require_segments()
        if per_layer:
            estimator.require_layers()
        if batch_size is not None and batch_size < 1:
            raise MisconfigurationException(f"`batch_size={batch_size}` must be at least 1.")
        self._use(train)
        run = self.run
        queries = query_of(query, run.stage.examples, batch_size)
        run.calibrate()
        self._require_trained()
        queries, data = run.queries(queries), run.data
        if batch_size is not None and data.batch_size > 1:
            data = replace(data, batch_size=batch_size)
        columns = Columns.of(data, train_ids)
        segments = len(run.segments(options.get("segments"))) if per_segment else None
        layers = run.workspace.layers if per_layer else None
        sink = MatrixSink(len(queries), columns.count, segments, None if layers is None else len(layers))
        extra_metadata = Metadata()
        errors = torch.zeros(len(queries), columns.count) if stderr else None
        if columns.count:
            extra_metadata = self._compute(estimator, options, queries, data, columns.ids, sink, errors)
        require_finite_scores(sink.values, queries.positions, columns.positions)
        weights = extra_metadata.kernel_weights
        return InfluenceScores(
            columns.spread(sink.values),
            columns.positions,
            queries.positions,
            None if sink.by_segment is None else columns.spread(sink.by_segment),
            self._metadata(estimator, options) | extra_metadata.to_json() | ({"layers": layers} if layers else {}),
            None if weights is None else columns.spread(weights if columns.ids is None else weights[columns.ids], 1.0),
            None if errors is None else columns.spread(errors),
            None if sink.by_layer is None else columns.spread(sink.by_layer),
        )

    def _compute(
        self,
        estimator: Estimator,
        options: Options,
        queries: Examples | GivenBatches,
        data: Examples,
        ids: Tensor | None,
        sink: MatrixSink,
        errors: Tensor | None = None,
    ) -> Metadata:
        """Scores into ``sink``, block by block of queries and term by term; gives back the method's own metadata.

        Standard errors go into ``errors``, ``[Q, N]``, where they are wanted.
        """
        extra_metadata = Metadata()
        start = 0
        for block in queries.split(self._queries_at_once(estimator.floats_per_parameter(options))):
            rows = slice(start, start + len(block))
            spread = Spread()
            for item in estimator(Query(self.run, block, self.measurement), **options):
                if isinstance(item, Metadata):
                    extra_metadata = extra_metadata.merged(item)
                elif errors is None:
                    item.compute(self.run.workspace, data, ids, sink, rows)
                else:
                    term, everything = MatrixSink(len(block), errors.shape[1], layers=sink.layers), slice(None)
                    item.compute(self.run.workspace, data, ids, term, slice(0, len(block)))
                    sink.add(rows, everything, term.values, item.segment)
                    if term.by_layer is not None:
                        sink.add_layers(rows, everything, term.by_layer)
                    spread.add(term.values, item.segment)
            if errors is not None:
                errors[rows] = spread.stderr()
                bar = Metadata({"error_bar": {"over": "snapshots", "degrees": spread.degrees}})
                extra_metadata = extra_metadata.merged(bar)
            start = rows.stop
        return extra_metadata

    @torch.inference_mode(False)
    def self_influence(self, train: object = None, *, train_ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """Each training example's SOURCE score on its own loss: how much of its fit is owed to itself.

        High values mark examples that the model had to memorise, mislabelled ones among them (method §7).

        Args:
            train: the run's training dataset or a loader over it; only omitted where the scorer already has it.
            train_ids: only these training examples.

        Returns:
            ``[N]``, float32, in the order of the dataset or of ``train_ids``: the diagonal of :meth:`score`.
        """
        self._ready(train)
        columns = Columns.of(self.run.data, train_ids)
        ids = torch.arange(columns.count) if columns.ids is None else columns.ids
        values = self_influence(self.run, ids, self._queries_at_once()) if columns.count else torch.zeros(0)
        require_finite_scores(values[None], torch.arange(1), columns.positions)
        return columns.spread(values)

    @torch.inference_mode(False)
    def tokens(
        self, query: object, example: int, train: object = None, *, row: int = 0, method: str = "source", **options: Any
    ) -> Tensor:
        """Which elements of a training example's loss made which of a query's: for texts, which token which token.

        Args:
            query: as :meth:`score` takes it, and so the further arguments.
            example: position of the training example in its dataset.
            train: the run's training dataset; only omitted where the scorer already has it.
            row: which of the queries.
            method: one whose scores are sums over elements.
            **options: its own.

        Returns:
            ``[query elements, example elements]``, which sum to the pair's score, in the losses' order: of a loss on
            the next token, element ``t`` is the prediction of token ``t + 1``.

        Raises:
            MisconfigurationException: wrong input, or a loss or method without elements.
        """
        estimator = estimator_for(method, options)
        self._ready(train)
        ids = Columns.of(self.run.data, [example]).ids
        if ids is None or not len(ids):
            raise MisconfigurationException(f"example {example} is none of those that were trained on.")
        asked = self.run.queries(query_of(query, self.run.stage.examples)), row
        at_once = self._queries_at_once(estimator.floats_per_parameter(options))
        return element_scores(self.run, estimator, options, self.measurement, asked, int(ids), at_once)

    @torch.inference_mode(False)
    def diagnose(self, train: object = None) -> Diagnosis:
        """Look at whether this run's scores can be trusted.

        Says what the record lacks, whether training diverged, which share of the parameters is attributed, where the
        curvature has no rank, is zero or is saturated, and whether scores change with the size and order of batches, as
        they do where examples see each other. Costs the run's factors, if it has none yet, and a few passes over 16
        examples.

        Args:
            train: the run's training dataset or a loader over it; only omitted where the scorer already has it.

        Returns:
            The findings, which ``print`` shows; ``diagnosis.trustworthy`` is false where one of them is bad.
        """
        self._use(train)
        try:
            self.run.calibrate()
        except FloatingPointError as error:
            return Diagnosis((Finding("bad", f"{error}: training diverged, or an example is not finite."),), ())

        def compare(ids: Tensor, batch_size: int | None) -> Tensor:
            # What the gradients of single examples are is the same question for all methods, and here the cheapest.
            dataset = cast(Dataset[object], self.run.data.dataset)
            asked = Subset(dataset, self.run.data.positions[:4].tolist())
            return self.score(asked, method="grad-dot", train_ids=ids, batch_size=batch_size).values

        return diagnose(self.run, compare)

    def _require_trained(self) -> None:
        if self.run.store.manifest.flags.diverged:
            raise FloatingPointError(
                f"`{self.run.store.path}` is the record of a training that diverged: its loss ended more than a million"
                " times above that of its first snapshot. Scores of its examples would be of the size of the loss, and"
                " mean nothing. HINT: `scorer.diagnose()` shows the figures; train with a smaller learning rate."
            )

    def _ready(self, train: object) -> None:
        self._use(train)
        self.run.calibrate()
        self._require_trained()

    def _use(self, train: object) -> None:
        self.run.use(
            None if train is None else examples_of(train, self.run.stage.record.batch_size, self.run.stage.examples)
        )

    def _queries_at_once(self, floats_per_parameter: float = 3) -> int:  # gradients, responses and one temporary
        scalars = sum(block.numel for block in self.run.coverage.blocks)
        return max(1, int(self.memory / (4 * floats_per_parameter * scalars)))

    def _metadata(self, estimator: Estimator, options: Options) -> dict[str, object]:
        run = self.run
        return {
            "method": estimator.name,
            "options": {
                name: value if isinstance(value, (int, float, str, type(None))) else list(value)
                for name, value in options.items()
            },
            "measurement": self.measurement if isinstance(self.measurement, str) else name_of(self.measurement),
            "sign": SIGN,
            "unit": estimator.unit,
            "stage": run.stage.name,
            "step": run.snapshots[-1].last,
            "examples": run.examples,
            "segments": [
                {"first": s.stretch.first, "last": s.stretch.last, "rates": list(s.stretch.rates)}
                for s in run.segments(options.get("segments"))
            ],
            "coverage": run.coverage.share,
            "left_out": [[name, size / run.coverage.trainable, why] for name, size, why in run.coverage.left_out],
            "fisher": run.workspace.spec.fisher if run.workspace.spec else None,
            "run_id": run.store.manifest.run_id,
            "versions": versions(),
        }
