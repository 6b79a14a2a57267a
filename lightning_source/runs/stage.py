"""One stage of an opened run, and its segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_source._lightning import (
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_source.capture.coverage import Coverage
from lightning_source.capture.data import Examples
from lightning_source.capture.modes import PassMode
from lightning_source.capture.objective import NoLoss
from lightning_source.capture.precision import full_precision
from lightning_source.distributed import SINGLE_PROCESS, Ranks
from lightning_source.layers.contract import forms_by_name
from lightning_source.names import named_modules
from lightning_source.passes.calibration import first_with_loss
from lightning_source.passes.preparation import Preparation, prepare
from lightning_source.passes.workspace import State, Workspace
from lightning_source.recording.drawn import DatasetPart
from lightning_source.recording.intervals import StepInterval, normalized_weights
from lightning_source.recording.manifest import StageRecord
from lightning_source.recording.parameter_groups import phase_at


@dataclass(frozen=True)
class Segment:
    """A segment of training and the snapshots that gradients and curvature are averaged over in it."""

    stretch: StepInterval
    snapshots: tuple[StepInterval, ...]

    @property
    def stage(self) -> int:
        """Index of the stage that it belongs to."""
        return self.stretch.stage

    @property
    def weights(self) -> list[float]:
        """The snapshots' weights, which sum to 1."""
        return normalized_weights(self.snapshots)

    def name(self, which: str) -> str:
        """Under which name what is made of its snapshots is kept, at their ``"mean"`` or their ``"point"``."""
        return f"{which}-" + "+".join(f"{s.last:06d}" for s in self.snapshots)


class Stage:
    """One ``fit``: its model, objective, blocks and examples.

    Args:
        index: its place in the run.
        record: its entry in the manifest.
        seed: seeds the passes over its examples.
        module: the LightningModule, with this stage's parameters.
        data: its training examples; ``None`` until something needs them.
        hooks: the LightningDataModule, if its batch-transfer hooks are part of the data.
        ranks: the processes that work on it together.
        drawn: the part of the dataset that a sampler drew from; ``None`` for all of it.

    Raises:
        MisconfigurationException: the model does not match.
    """

    def __init__(
        self,
        index: int,
        record: StageRecord,
        seed: int,
        module: LightningModule,
        data: Examples | None = None,
        hooks: LightningDataModule | None = None,
        ranks: Ranks = SINGLE_PROCESS,
        drawn: DatasetPart | None = None,
    ) -> None:
        record.module.check(module)
        if record.coverage is None:
            raise MisconfigurationException(
                f'stage "{record.name}" cannot be attributed: `training_step` gave no loss for any batch of it.'
            )
        known = named_modules(module)
        for block in record.coverage.blocks:
            if block.module not in known or block.form not in forms_by_name:
                raise MisconfigurationException(
                    f'stage "{record.name}" attributes `{block.name}`, a layer of the form `{block.form}` at'
                    f" `{block.module}`, which this process or `{type(module).__name__}` does not have. HINT: import"
                    " the file that registers the form (`lightning_source.layers.register_layer`) first."
                )
        self.index = index
        self.record = record
        self.name = record.name
        self.coverage = record.coverage
        self.phases = record.phases
        objective = record.objective_of(module)
        self.workspace = Workspace(
            module,
            self.coverage.blocks,
            objective,
            record.objective,
            seed,
            hooks,
            ranks,
            facts=record.trainer,
            mode=PassMode(record.mode, record.evaluating),
        )
        self.drawn = drawn
        self.examples: Examples | None = None
        self.use(data)

    def use(self, data: Examples | None) -> None:
        """Take these as the training examples, if they can be the ones that the stage was trained on."""
        if data is None:
            return
        count = self.record.examples
        if self.drawn is not None and len(data.dataset) == self.drawn.of:
            data = data.among(self.drawn.positions)
        if count is None:
            self.record.examples = len(data)
        elif len(data) != count:
            raise MisconfigurationException(
                f"the training set holds {len(data)} examples but the run was trained on {count}: scores would name the"
                " wrong examples. HINT: pass the dataset of the run as `train=`; to score some of its examples, pass"
                " `train_ids=`."
            )
        self.examples = data

    @property
    def data(self) -> Examples:
        """The training examples."""
        if self.examples is None:
            raise MisconfigurationException(
                f'the training examples of stage "{self.name}" are needed and not at hand. HINT: pass `train=` the'
                " run's training dataset; those of another stage than the one that is asked about,"
                f' `SourceScorer.from_run(…, stage_data={{"{self.name}": its training dataset}})`.'
            )
        spec = self.workspace.spec
        return self.examples if spec is None or spec.one_at_a_time is None else self.examples.one_at_a_time()

    def prepare(self, state: State) -> Preparation:
        """Learn from the training examples what passes need to know; see :func:`prepare`."""
        per_batch = self.record.examples_per_batch or self.data.batch_size
        with self.workspace.at(state), full_precision():
            return prepare(self.workspace, self.coverage, self.data, per_batch, self.record.maximize)

    def loss_at(self, state: State) -> float | None:
        """The loss on the first training examples as the step gives it, NaN or not; ``None`` if it gives none."""
        with self.workspace.at(state):
            try:
                count = min(len(self.data), self.data.batch_size)
                return float(first_with_loss(self.workspace, self.data, count)[1].loss.detach())
            except FloatingPointError:
                return math.nan
            except NoLoss:
                return None

    def enter(self, preparation: Preparation) -> None:
        """Keep what was learnt, in the stage's record as well."""
        self.coverage = self.record.coverage = preparation.coverage
        self.workspace.blocks = preparation.coverage.blocks
        self.workspace.spec = self.record.objective = preparation.spec

    def moved(self, stretch: StepInterval) -> dict[str, float]:
        """How far training moved each block in some steps, ``Λ`` over the largest one: 0 where it stood still."""
        rates = [stretch.rates[block.group] for block in self.coverage.blocks]
        largest = max(map(abs, rates), default=0.0) or 1.0
        return {block.name: rate / largest for block, rate in zip(self.coverage.blocks, rates, strict=True)}

    def decoupled(self, step: int, column: int) -> bool:
        """Whether a column's weight decay was not preconditioned at that step."""
        phase = phase_at(self.phases, step)
        parent = phase.parents(self.phases[-1].columns)[column]
        return parent is not None and phase.decoupled[parent]


def report_preparation(stage: Stage, before: Coverage) -> None:
    """Say what preparation found that differs from what was taken for granted, or costs more."""
    spec, name = stage.workspace.spec, type(stage.workspace.module).__name__
    assert spec is not None
    if stage.coverage.left_out != before.left_out:
        rank_zero_info(f"SourceCallback: {stage.coverage.summary()}")
    if spec.one_at_a_time is not None:
        why = "A batch's rows are not its examples in" if spec.rest is None else "No batch tells an example's loss in"
        rank_zero_warn(
            f"{why} `{name}` ({spec.one_at_a_time}): examples are run one at a time, which is right for any code and"
            " slower, about a batch's forward and backward for each example."
            + (" HINT: `attribution_losses(batch)` on the module gives losses by example." if spec.rest else "")
        )
    if spec.origin == "whole":
        rank_zero_warn(
            f"No loss in `{name}.training_step` was recognised: the empirical Fisher stands in for the true one,"
            " margins are unknown, and the loss is taken to be additive over examples. HINT: use torch's losses, or"
            " define `attribution_distribution(batch)` on the module."
        )


def index_of(stage: int | str | None, names: Sequence[str]) -> int:
    """Which stage is meant by an index or a name; the last by default.

    Raises:
        MisconfigurationException: none, or more than one.
    """
    if stage is None:
        return len(names) - 1
    if isinstance(stage, int) and -len(names) <= stage < len(names):
        return stage % len(names)
    if isinstance(stage, str) and names.count(stage) == 1:
        return names.index(stage)
    known = ", ".join(f'{i} "{name}"' for i, name in enumerate(names))
    raise MisconfigurationException(f"`stage={stage!r}` is not one stage of this run. HINT: its stages are {known}.")
