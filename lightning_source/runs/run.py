"""An opened run: stages, segments, snapshots and factors beside the model and the training data they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_source._lightning import LightningDataModule, LightningModule, MisconfigurationException
from lightning_source._progress import Progress
from lightning_source._sealed import digest_of
from lightning_source.capture.coverage import Coverage
from lightning_source.capture.data import Examples, GivenBatches, to_module
from lightning_source.capture.modes import Mode
from lightning_source.capture.objective import NoLoss
from lightning_source.capture.trainer_view import Moment
from lightning_source.curvature.ekfac import BlockFactors, CovarianceSums, Factors
from lightning_source.curvature.unroll import SegmentCurvature
from lightning_source.distributed import SINGLE_PROCESS, Ranks
from lightning_source.layers import Block
from lightning_source.names import named_parameters, named_tensors
from lightning_source.passes.factors import (
    WeightedState,
    coupling_at,
    factor_ids,
    fit_factors,
)
from lightning_source.passes.preparation import Preparation
from lightning_source.passes.states import State, StateAt, moment_of
from lightning_source.passes.workspace import Workspace
from lightning_source.recording.drawn import read_drawn
from lightning_source.recording.intervals import StepInterval, cut, merge_all
from lightning_source.recording.snapshots import (
    assemble,
    final_parameters,
    mean_parameters,
    mean_preconditioner,
    snapshot_parameters,
)
from lightning_source.recording.store import RunStore
from lightning_source.runs.factor_files import covariance_tensors, covariances_of_file, factor_tensors, factors_of
from lightning_source.runs.stage import Segment, Stage, index_of, report_preparation

# Examples whose pairs are enough to tell one number.
COUPLING_EXAMPLES = 1024
DIVERGED = 1e6  # times the loss of the first snapshot


class Run:
    """One run directory, opened with the model that it trained.

    Args:
        store: the directory; bins that a killed run left are assembled into snapshots at once.
        modules: the LightningModule of each stage (weights are not used, and come back unchanged from every pass); one
            for all stages if there is only one.
        data: training examples by stage index, as far as they are at hand.
        hooks: the LightningDataModule, if its batch-transfer hooks are part of the data.
        stage: index or name of the stage whose examples are asked about; the last by default.
        ranks: the processes that work together; ``store`` is then a :class:`SharedStore`.

    Raises:
        MisconfigurationException: nothing was recorded, no such stage, or a model does not match.
    """

    def __init__(
        self,
        store: RunStore,
        modules: Sequence[LightningModule],
        data: Mapping[int, Examples | None] | None = None,
        hooks: LightningDataModule | None = None,
        stage: int | str | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.store = store
        self.ranks = ranks
        self.settings = store.manifest.settings
        if store.manifest.bins:
            assemble(store, self.settings.segments, self.settings.snapshots_per_segment)
        if not store.manifest.segments:
            raise MisconfigurationException(
                f"`{store.path}` holds no finished segment: no optimizer step was recorded. HINT: train for at least"
                " one step."
            )
        self.asked_at: State | None = None  # in place of the parameters that training ended with; see :meth:`ask_at`
        self.stages: list[Stage] = []
        for index, record in enumerate(r for r in store.manifest.stages if r.final is not None):
            module = modules[min(index, len(modules) - 1)]
            examples, drawn = (data or {}).get(index), read_drawn(store, index)
            self.stages.append(Stage(index, record, self.settings.seed, module, examples, hooks, ranks, drawn))
            last = max((s.last for s in self.snapshots if s.stage == index), default=0)
            self.stages[-1].workspace.end = record.moment_at(last)
        self.stage = self.stages[index_of(stage, [s.name for s in self.stages])]

    def show(self, progress: Progress) -> None:
        """Show how far passes are."""
        for stage in self.stages:
            stage.workspace.progress = progress

    @property
    def coverage(self) -> Coverage:
        """What of the asked stage's parameters is attributed."""
        return self.stage.coverage

    @property
    def snapshots(self) -> Sequence[StepInterval]:
        """The snapshots of all stages."""
        return self.store.manifest.snapshots

    @property
    def examples(self) -> int:
        """``N``, the number of the asked stage's training examples; 0 while it is not known."""
        return self.stage.record.examples or 0

    @property
    def workspace(self) -> Workspace:
        """The model as the asked stage trained it."""
        return self.stage.workspace

    @property
    def query_workspace(self) -> Workspace:
        """The model that training ended with: the last stage's objective, seen from the asked stage's blocks."""
        last = self.stages[-1].workspace
        if last is self.workspace:
            return last
        blocks = self.surviving_blocks()
        if not blocks:
            raise MisconfigurationException(
                f'no layer that stage "{self.stage.name}" trained was taken over as it was by the stages after it, so'
                " its examples have no effect on the final model."
            )
        return replace(last, blocks=blocks)

    def use(self, data: Examples | None) -> None:
        """Take these as the asked stage's training examples."""
        self.stage.use(data)

    @property
    def data(self) -> Examples:
        """The asked stage's training examples."""
        return self.stage.data

    def queries(self, queries: Examples | GivenBatches) -> Examples | GivenBatches:
        """Queries as passes take them: one at a time where a batch's rows are not its examples.

        Raises:
            MisconfigurationException: a given batch cannot be cut into its examples.
        """
        spec = self.stages[-1].workspace.spec
        if spec is None or spec.one_at_a_time is None:
            return queries
        singles = queries.one_at_a_time()
        if isinstance(singles, GivenBatches):
            self._require_runnable(singles)
        return singles

    def _require_runnable(self, singles: GivenBatches) -> None:
        """A batch may be cut into parts that are no examples: then the step cannot run on them."""
        workspace = self.stages[-1].workspace
        with workspace.at(self.final()):
            for index, batch in singles.batches():
                try:
                    workspace.losses(to_module(batch, workspace.module, workspace.hooks), len(index))
                except NoLoss:
                    continue
                except Exception as error:
                    raise MisconfigurationException(
                        "the query batch was cut into its examples, which this `training_step` must be given one at"
                        f" a time, and query {index.tolist()[0]} does not run: {type(error).__name__}: {error}. HINT:"
                        " pass a Dataset or a DataLoader as the query."
                    ) from error

    # ---------------------------------------------------------------- segments

    def segments(self, count: int | Sequence[int] | None = None, stage: int | None = None) -> list[Segment]:
        """A stage's segments, or its snapshots cut into others.

        Args:
            count: number of segments, or steps at which inner segments begin; the run's own by default.
            stage: index of the stage; the asked one by default.
        """
        index = self.stage.index if stage is None else stage
        snapshots = [s for s in self.snapshots if s.stage == index]
        if count is None:
            own = [s for s in self.store.manifest.segments if s.stage == index]
            members = [tuple(self.snapshots[i] for i in segment.snapshots) for segment in own]
        else:
            if isinstance(count, int) and not 1 <= count <= len(snapshots):
                raise MisconfigurationException(
                    f"`segments={count}`: the run has {len(snapshots)} snapshots, so 1 to {len(snapshots)} segments can"
                    " be cut."
                )
            starts = count if isinstance(count, int) else [snapshots[0].first + step for step in count]
            breaks = [phase.first for phase in self.stages[index].phases]
            members = [tuple(snapshots[i] for i in group) for group in cut(snapshots, starts, breaks)]
        return [Segment(merge_all(m), m) for m in members]

    def later_segments(self) -> list[Segment]:
        """The segments of the stages after the asked one, which carry its effect to the end of training."""
        return [s for stage in self.stages[self.stage.index + 1 :] for s in self.segments(stage=stage.index)]

    def curvatures(
        self,
        segments: Sequence[Segment],
        factors: Sequence[Factors],
        blocks: Sequence[Block],
        columns: Callable[[str, Tensor], Tensor] = lambda name, values: values,
        symmetric: bool = False,
    ) -> dict[str, list[SegmentCurvature]]:
        """What the walk needs to know of each block in each segment; ``columns`` takes what the walked vectors have.

        A block that a later stage did not train stood still there: that stage is left out of its chain.

        Raises:
            MisconfigurationException: the run is a final model's, opened without an amount of further training.
        """
        if self.store.manifest.flags.rate_unknown:
            raise MisconfigurationException(
                "SOURCE needs to know how far training moves the model. HINT: pass"
                " `SourceScorer.from_model(…, rate=Λ)`, the sum of the further training's learning rates."
            )
        curvatures: dict[str, list[SegmentCurvature]] = {block.name: [] for block in blocks}
        for segment, of_segment in zip(segments, factors, strict=True):
            stage = self.stages[segment.stage]
            here = {block.name: block for block in stage.coverage.blocks}
            scale = self.preconditioner(segment.snapshots)
            for block in blocks:
                if block.name not in here:
                    continue
                group, factor = here[block.name].group, of_segment[block.name]
                curvatures[block.name].append(
                    SegmentCurvature(
                        factor.basis,
                        columns(block.name, factor.eigenvalues),
                        segment.stretch.rates[group],
                        segment.stretch.weight_decay(group),
                        columns(block.name, scale[block.name]) if block.name in scale else None,
                        stage.decoupled(segment.stretch.first, group),
                        float(factor.eigenvalues.clamp_min(0).mean()) if block.name in scale else None,
                        symmetric,
                    )
                )
        return curvatures

    def preconditioner(self, snapshots: Sequence[StepInterval]) -> dict[str, Tensor]:
        """``P̄`` of each block averaged over snapshots, ``[P, O, I]``; empty where steps follow the plain gradient."""
        device = self.workspace.module.device
        scale = {name: value.to(device) for name, value in mean_preconditioner(self.store, snapshots).items()}
        blocks = self.stages[snapshots[0].stage].coverage.blocks
        return {b.name: b.matrix(scale) for b in blocks if all(n in scale for n in b.parameters)}

    def surviving_blocks(self) -> list[Block]:
        """The asked stage's blocks whose parameters each later stage took over as they were.

        A head that was replaced or drawn anew between stages carries nothing of the examples before.
        """
        later, changed = self.stages[self.stage.index + 1 :], self._changed()
        shapes = [{b.name: b.shape for b in stage.coverage.blocks} for stage in later]
        return [
            b
            for b in self.coverage.blocks
            if not changed.intersection(b.parameters) and all(s.get(b.name, b.shape) == b.shape for s in shapes)
        ]

    def _changed(self) -> set[str]:
        """The asked stage's parameters that a later stage does not have, or began with other values."""
        later = self.stages[self.stage.index + 1 :]
        own = set(self.stage.record.module.parameters)
        gone = {name for stage in later for name in own.difference(stage.record.module.parameters)}
        return gone | {name for stage in later for name in stage.record.reset}

    # ---------------------------------------------------------------- parameters and factors

    def final(self) -> State:
        """The parameters that training ended with, or those that queries are to be asked at instead."""
        if self.asked_at is not None:
            return self.asked_at
        return StateAt(final_parameters(self.store, self.stages[-1].index), None, "the end of training")

    def ask_at(self, module: LightningModule) -> None:
        """Ask queries at a model's present weights, and not at those of the end of training.

        Raises:
            MisconfigurationException: the model is not the last stage's.
        """
        self.stages[-1].record.module.check(module)
        present = {name: value.detach().cpu().clone() for name, value in named_tensors(module).items()}
        self.asked_at = {**final_parameters(self.store, self.stages[-1].index), **present}

    def differing(self, module: LightningModule) -> list[str]:
        """Names of the parameters of a model that are not what training ended with."""
        recorded, own = final_parameters(self.store, self.stages[-1].index), named_parameters(module)
        return [
            name
            for name, value in own.items()
            if name in recorded and not torch.equal(value.detach().cpu().to(recorded[name].dtype), recorded[name])
        ]

    def final_of_stage(self) -> State:
        """The same for the asked stage's model: what later stages did not take over keeps its last value there."""
        values = self._overlaid(final_parameters(self.store, self.stage.index), self.final())
        return StateAt(values, None, "the end of training")

    def for_query(self, state: State) -> State:
        """Parameters of the asked stage for the final model: what came only later has its final value."""
        moment = moment_of(state) if self.stage is self.stages[-1] else None  # the last stage does the asking
        return StateAt(self._overlaid(self.final(), state), moment, getattr(state, "label", ""))

    def _overlaid(self, base: State, over: State) -> State:
        changed = self._changed()
        shared = (n for n in over if n in base and n not in changed and over[n].shape == base[n].shape)
        return {**base, **{name: over[name] for name in shared}}

    def state(self, snapshot: StepInterval, which: str) -> State:
        """A snapshot's parameters: ``"mean"`` over its steps, or at the ``"point"`` in its middle."""
        values, label = snapshot_parameters(self.store, snapshot, which), _label("snapshot", snapshot)
        return StateAt(values, self._middle_of(snapshot), label)

    def mean_state(self, segment: Segment) -> State:
        """The parameters averaged over a whole segment (Fast-SOURCE)."""
        values, label = mean_parameters(self.store, segment.snapshots), _label("mean", segment.stretch)
        return StateAt(values, self._middle_of(segment.stretch), label)

    def _middle_of(self, interval: StepInterval) -> Moment | None:
        """What a step that reads the Trainer is shown at parameters that stand for an interval."""
        return self.stages[interval.stage].record.moment_at((interval.first + interval.last) // 2)

    def calibrate(self) -> None:
        """The objectives' scales, learnt from the training examples where the run does not hold them yet."""
        for stage in self.stages[self.stage.index :]:
            self._calibrate(stage)

    def _calibrate(self, stage: Stage) -> None:
        if stage.workspace.spec is None:
            state = final_parameters(self.store, stage.index)
            before, chosen = stage.coverage, self.settings.passes

            def learn() -> tuple[Mode, Preparation]:
                mode = stage.workspace.choose_mode(state, stage.data) if chosen == "auto" else chosen
                stage.workspace.mode = replace(stage.workspace.mode, kind=mode)
                return mode, stage.prepare(state)

            stage.record.mode, preparation = self.ranks.on_rank_zero(learn)
            stage.workspace.mode = replace(stage.workspace.mode, kind=stage.record.mode)
            stage.enter(preparation)
            first = next((s for s in self.snapshots if s.stage == stage.index), None)
            if first is not None:
                losses = [stage.loss_at(self.state(first, self.settings.snapshots)), stage.loss_at(state)]
                self.store.manifest.flags.diverged |= _diverged(*losses)
            self.store.commit()
            report_preparation(stage, before)

    def snapshot_factors(self, segment: Segment, which: str = "mean", coupled: bool = False) -> Factors:
        """A segment's factors, averaged over its snapshots; computed and kept on disk the first time.

        The same passes tell, if ``coupled``, how much curvature its layers have together, kept in the manifest.
        """
        if which not in ("mean", "point"):
            raise MisconfigurationException(f'`snapshots="{which}"` is not known. HINT: "mean" or "point".')
        own = [s for stage in self.stages for s in self.segments(stage=stage.index)]
        default = which == self.settings.snapshots and segment in own
        name = f"segments/{own.index(segment) if default else segment.name(which)}.safetensors"
        loads = [partial(self.state, s, which) for s in segment.snapshots]
        files = [s.file.replace(".safetensors", f"-{which}-covariances.safetensors") for s in segment.snapshots]
        coupling = (segment.name(which), segment.stretch) if coupled else None
        return self._factors(self.stages[segment.stage], name, loads, segment.weights, files, coupling)

    def cross_layer_factors(self, segment: Segment, which: str) -> Factors:
        """:meth:`snapshot_factors`, scaled by how much curvature the layers have together: EK-FAC keeps them apart.

        Where a direction of much curvature runs through several layers, each of them sees a part of it, and ``1/σ``
        responds too much in all. One number, ``tr (ΛH)² / Σ (Λλ)²``, gives the spectrum its size back.
        """
        factors = self.snapshot_factors(segment, which, coupled=True)
        known, stage, key = self.store.manifest.couplings, self.stages[segment.stage], segment.name(which)
        if key not in known:  # the factors were there without it, or come of no pass that tells it
            count = min(COUPLING_EXAMPLES, self.settings.factor_examples or COUPLING_EXAMPLES)
            ids = factor_ids(len(stage.data), count, self.settings.seed)
            snapshots = zip(segment.snapshots, segment.weights, strict=True)
            states = [WeightedState(partial(self.state, s, which), weight) for s, weight in snapshots]
            bases, moved = {name: f.basis for name, f in factors.items()}, stage.moved(segment.stretch)
            stage.workspace.doing = "factors"
            known[key] = coupling_at(stage.workspace, stage.data, ids, states, bases, moved)
            stage.workspace.doing = "scores"
            self.store.commit()
        return {name: BlockFactors(f.basis, known[key] * f.eigenvalues) for name, f in factors.items()}

    def mean_factors(self, segment: Segment) -> Factors:
        """A segment's factors at its averaged parameters (Fast-SOURCE)."""
        name = f"segments/fast-{segment.stretch.first:06d}-{segment.stretch.last:06d}.safetensors"
        return self._factors(self.stages[segment.stage], name, [partial(self.mean_state, segment)], [1.0], [None])

    def final_factors(self) -> Factors:
        """Factors of the asked stage's objective and examples at the final parameters (influence functions)."""
        name = f"segments/final-of-{self.stage.index}-at-{len(self.stages) - 1}.safetensors"
        if self.asked_at is not None:
            name = name.replace(".safetensors", f"-{digest_of(self.asked_at)[:16]}.safetensors")
        return self._factors(self.stage, name, [self.final_of_stage], [1.0], [None])

    def _factors(
        self,
        stage: Stage,
        name: str,
        loads: Sequence[Callable[[], State]],
        weights: Sequence[float],
        files: Sequence[str | None],
        coupling: tuple[str, StepInterval] | None = None,
    ) -> Factors:
        if name in self.store.manifest.files:
            tensors = self.store.read(name, stage.workspace.module.device)
            return factors_of(self.store.path / name, tensors, stage.coverage.blocks)
        self._calibrate(stage)
        stage.workspace.doing = "factors"
        known = [self._read_covariances(stage, file) if file else None for file in files]
        fitted = fit_factors(
            stage.workspace,
            stage.data,
            factor_ids(len(stage.data), self.settings.factor_examples, self.settings.seed),
            [WeightedState(*state) for state in zip(loads, weights, known, strict=True)],
            self.settings.curvature,
            self.settings.label_samples,
            moved=stage.moved(coupling[1]) if coupling else None,
        )
        if coupling and fitted.coupling is not None:
            self.store.manifest.couplings[coupling[0]] = fitted.coupling
        for file, before, after in zip(files, known, fitted.sums, strict=False):
            if file is not None and before is None and self.settings.keep == "covariances":
                self.store.write(file, covariance_tensors(after))
        stage.workspace.doing = "scores"
        self.store.write(name, factor_tensors(fitted.factors))
        self.store.commit()
        return fitted.factors

    def _read_covariances(self, stage: Stage, file: str) -> dict[str, CovarianceSums] | None:
        if file not in self.store.manifest.files:
            return None
        tensors = self.store.read(file, stage.workspace.module.device)
        return covariances_of_file(self.store.path / file, tensors, stage.coverage.blocks)


def _diverged(first: float | None, last: float | None) -> bool:
    """Whether a loss went beyond all bounds, whatever its unit."""
    return first is not None and last is not None and not last <= DIVERGED * max(abs(first), 1e-3)


def _label(what: str, interval: StepInterval) -> str:
    return f"the {what} of the steps {interval.first} to {interval.last}"
