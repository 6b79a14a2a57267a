"""What ``manifest.json`` says of a run, as dataclasses: the one schema, read and written here and nowhere else."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from torch import nn

from lightning_source._files import require_regular
from lightning_source._lightning import LightningModule, MisconfigurationException, rank_zero_info
from lightning_source.capture.attributes import Reading, attributes_at
from lightning_source.capture.coverage import Coverage
from lightning_source.capture.data import Examples
from lightning_source.capture.modes import Mode
from lightning_source.capture.objective import Objective, ObjectiveSpec
from lightning_source.capture.trainer_view import Moment, TrainerFacts
from lightning_source.names import named_parameters
from lightning_source.recording.epochs import EpochMark, moment_at
from lightning_source.recording.intervals import StepInterval, planned_ends
from lightning_source.recording.parameter_groups import Phase
from lightning_source.recording.step_log import StepRecord
from lightning_source.recording.typed_json import FieldError, from_json, to_json

SCHEMA = 1
MANIFEST = "manifest.json"
SEAL = "sha256"  # of the rest of the manifest

Which = Literal["mean", "point"]  # the parameters that a snapshot stands for
Curvature = Literal["ekfac", "kfac", "diagonal"]
R = TypeVar("R", bound="Record")


@dataclass(kw_only=True)
class Record:
    """What every directory of tensors says of itself.

    Attributes:
        schema: of the manifest.
        run_id: tells a directory from another that was at the same place.
        files: sha256 by the name relative to the directory.
    """

    schema: int = SCHEMA
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is cut and what its factors are made of; see :class:`lightning_source.SourceCallback`."""

    segments: int | list[int] = 1  # how many, or the steps at which inner ones begin
    snapshots_per_segment: int = 6
    snapshots: Which = "mean"
    curvature: Curvature = "ekfac"
    factor_examples: int | None = 5000
    label_samples: int = 1
    seed: int = 0
    passes: Literal["auto", "eval", "train"] = "auto"  # the mode that passes call the module in
    keep: Literal["covariances"] | None = None  # of what factors are made of

    @property
    def segment_count(self) -> int:
        """Number of segments."""
        return self.segments if isinstance(self.segments, int) else len(self.segments) + 1

    @property
    def boundaries(self) -> list[int]:
        """The steps at which the user wants segments to begin."""
        return self.segments if isinstance(self.segments, list) else []

    def bin_ends(self, steps: int) -> list[int]:
        """Where bins end in a stage that is known to have so many steps: one for each snapshot.

        A point snapshot has the parameters in its middle, where a bin must end as well.
        """
        bins = self.snapshots_per_segment * (2 if self.snapshots == "point" else 1)
        return planned_ends(steps, self.segments, bins)

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises:
            ValueError: names the setting.
        """
        if any(step < 1 for step in self.boundaries):
            raise ValueError(f"`segments={self.segments}` must be steps after 0, at which inner segments begin")
        for name, value in (
            ("segments", self.segment_count),
            ("snapshots_per_segment", self.snapshots_per_segment),
            ("label_samples", self.label_samples),
            ("factor_examples", 1 if self.factor_examples is None else self.factor_examples),
        ):
            if value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1")
        check_choice("snapshots", self.snapshots, ("mean", "point"))
        check_choice("passes", self.passes, ("auto", "eval", "train"))
        check_choice("curvature", self.curvature, ("ekfac", "kfac", "diagonal"))
        if self.keep is not None:
            check_choice("keep", self.keep, ("covariances",))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse an argument that is none of its choices."""
    if value not in choices:
        raise ValueError(f'`{name}="{value}"` must be one of {", ".join(choices)}')


@dataclass(kw_only=True)
class Flags:
    """What one has to know of a run before its numbers are trusted."""

    history_incomplete: bool = False  # training went on before it was recorded
    resumed_mid_epoch: bool = False  # so that some examples were seen twice in that epoch, others never
    final_model_only: bool = False  # made of a trained model, without a history
    rate_unknown: bool = False  # and without an amount of further training
    diverged: bool = False  # its loss went beyond all bounds


@dataclass(frozen=True, kw_only=True)
class ModuleRecord:
    """How a model is recognised as the one that a run was recorded of."""

    class_name: str = field(metadata={"key": "class"})
    parameters: dict[str, list[int]]  # shapes by clean name

    @classmethod
    def of(cls, module: nn.Module) -> ModuleRecord:
        """A module's own."""
        shapes = {name: list(parameter.shape) for name, parameter in named_parameters(module).items()}
        return cls(class_name=type(module).__name__, parameters=shapes)

    def check(self, module: nn.Module) -> None:
        """Refuse a model whose parameters are not those of the run.

        Raises:
            MisconfigurationException: names what is missing, added or of another shape.
        """
        own, run = ModuleRecord.of(module).parameters, self.parameters
        missing = sorted(run.keys() - own.keys())
        added = sorted(own.keys() - run.keys())
        shapes = [f"{n} {own[n]} for {run[n]}" for n in sorted(run.keys() & own.keys()) if own[n] != run[n]]
        problems = [
            f"{what} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("not in the run:", added), ("of another shape:", shapes))
            if names
        ]
        if problems:
            raise MisconfigurationException(
                f"`{type(module).__name__}` does not match the run of `{self.class_name}`: {'; '.join(problems)}."
            )


@dataclass(kw_only=True)
class ManualRecord:
    """What a step that asks for its optimizers is given in their place; see :class:`Objective`."""

    optimizers: int
    schedulers: int
    attributed: int
    groups: list[list[dict[str, int | float | str | bool]]]  # the plain values of each optimizer's parameter groups
    kinds: list[str] = field(default_factory=list)  # the optimizers' classes
    batch_idx: int = 0  # at which the attributed optimizer steps


class Seen(NamedTuple):
    """What a stage has trained on so far."""

    batches: int
    examples: int


@dataclass(kw_only=True)
class Progress:
    """What of a stage changes while it trains, apart from its files."""

    phases: tuple[Phase, ...] = ()
    coverage: Coverage | None = None
    seen: Seen | None = None
    epochs: tuple[EpochMark, ...] = ()


@dataclass(kw_only=True)
class StageRecord:
    """One stage: a ``fit``, or the further training of a final model."""

    name: str
    examples: int | None  # N; None: the training data have no ids
    batch_size: int | None
    examples_per_batch: float | None
    objective: ObjectiveSpec | None  # None: not calibrated yet
    module: ModuleRecord
    phases: tuple[Phase, ...] = ()
    manual: ManualRecord | None
    maximize: bool  # steps go up the loss
    reset: list[str]  # parameters that are not what the stage before ended with
    coverage: Coverage | None = None  # None: no batch has given a loss yet
    seen: Seen | None = None
    epochs: tuple[EpochMark, ...] = ()  # when they began
    attributes: tuple[Reading, ...] = ()  # what the module held outside its state_dict, and how it changed
    mode: Mode = "eval"  # that passes call the module in
    evaluating: tuple[str, ...] = ()  # modules that training itself keeps in eval mode
    trainer: TrainerFacts | None = None  # what a step may read off it; None: it had none
    frozen: str | None = None  # file of the parameters that the stage leaves alone
    drawn: str | None = None  # file of the dataset's positions that training draws from; None: all
    log: str | None = None  # file of the step log, once the stage has ended
    final: str | None = None  # file of the parameters that the stage ended with

    @classmethod
    def begin(
        cls,
        name: str,
        module: nn.Module,
        examples: Examples | None,
        *,
        maximize: bool,
        manual: ManualRecord | None = None,
        reset: Sequence[str] = (),
        trainer: TrainerFacts | None = None,
    ) -> StageRecord:
        """A stage before its first step.

        Args:
            name: the stage's name.
            module: the model that is trained.
            examples: the training examples; ``None`` if they have no ids.
            maximize: whether steps go up the loss.
            manual: what stands for the module's optimizers, in steps by hand and in others that look at them.
            reset: names of the parameters that are not what the stage before ended with.
            trainer: what a step may read off the Trainer.
        """
        return cls(
            name=name,
            examples=None if examples is None else len(examples),
            batch_size=None if examples is None else examples.batch_size,
            examples_per_batch=None,
            objective=None,
            module=ModuleRecord.of(module),
            manual=manual,
            maximize=maximize,
            reset=list(reset),
            trainer=trainer,
        )

    def objective_of(self, module: LightningModule) -> Objective:
        """The training step of the stage's module."""
        return Objective(module) if self.manual is None else Objective(module, **vars(self.manual))

    def moment_at(self, step: int) -> Moment | None:
        """What a training step that follows ``step`` recorded ones reads off the Trainer and its module."""
        moment = moment_at(self.epochs, step)
        return None if moment is None else replace(moment, attributes=attributes_at(self.attributes, step))

    def progress(self) -> Progress:
        """What is to come back when the stage goes on from here."""
        return Progress(phases=self.phases, coverage=self.coverage, seen=self.seen, epochs=self.epochs)

    def restore(self, progress: Progress) -> None:
        """Go back to an earlier state."""
        self.phases, self.coverage, self.seen = progress.phases, progress.coverage, progress.seen
        self.epochs = progress.epochs


@dataclass(frozen=True)
class SegmentRecord(StepInterval):
    """A segment, and which of the run's snapshots are its own."""

    snapshots: tuple[int, ...] = ()

    @classmethod
    def over(cls, interval: StepInterval, snapshots: Sequence[int]) -> SegmentRecord:
        """The segment over some snapshots, given by their indices, which make up the interval."""
        return cls(**vars(interval), snapshots=tuple(snapshots))


@dataclass(kw_only=True)
class ResumePoint:
    """What a recording needs to go on from a checkpoint; the numbers of :class:`Recorder` at that moment."""

    file: str | None  # of the sums, steps and gradient norms of the open bin
    bins: list[StepInterval]
    summed: int
    bin_steps: int
    limit: int
    start: int
    steps: int
    boundaries: list[int]
    trained: list[str]
    stage: Progress
    planned: list[int] = field(default_factory=list)  # steps at which bins are to end
    open: list[StepRecord] = field(default_factory=list)  # steps of the open bin, in directories of the first version
    unfinished: bool = False  # the sums hold the parameters of a step that was not made yet


@dataclass(frozen=True, kw_only=True)
class PartialOf:
    """Which state of an unfinished run was completed apart from it."""

    run_id: str
    bins: list[StepInterval]


@dataclass(kw_only=True)
class Manifest(Record):
    """A run.

    Attributes:
        stages: what was trained, in order; the last may not have ended.
        versions: of the libraries.
        settings: how the run is cut.
        flags: what one has to know of it.
        status: whether training goes on; ``None`` before it began.
        bins: intervals of the stage that has not ended.
        steps: optimizer steps in all.
        snapshots: of the stages that have ended.
        segments: of the stages that have ended.
        resume: points to go on from, by step.
        couplings: by snapshots, how much curvature their layers have together over what they have each.
        partial_of: the run that a scorer completed, if this is such a completion.
    """

    stages: list[StageRecord] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    flags: Flags = field(default_factory=Flags)
    status: Literal["running", "interrupted", "finished"] | None = None
    bins: list[StepInterval] = field(default_factory=list)
    steps: int = 0
    snapshots: list[StepInterval] = field(default_factory=list)
    segments: list[SegmentRecord] = field(default_factory=list)
    resume: dict[int, ResumePoint] = field(default_factory=dict)
    couplings: dict[str, float] = field(default_factory=dict)
    partial_of: PartialOf | None = None


def manifest_text(record: Record) -> str:
    """The contents of a manifest file."""
    values = json.loads(json.dumps(to_json(record)))  # as it is read: keys are text
    return json.dumps({**values, SEAL: _seal_of(values)}, indent=1)


def read_manifest(kind: type[R], path: Path) -> R:
    """A manifest file.

    Args:
        kind: what it holds, a :class:`Manifest` or another :class:`Record`.
        path: the file.

    Raises:
        MisconfigurationException: it is not JSON, has another schema, or a field is missing or wrong; the message names
            the file and the field.
    """
    require_regular(path)
    try:
        values: object = json.loads(path.read_text(), object_pairs_hook=_without_repeats, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise MisconfigurationException(f"`{path}` is not valid JSON: {error}.") from None
    seal = values.pop(SEAL, None) if isinstance(values, dict) else None
    schema = values.get("schema") if isinstance(values, Mapping) else None
    if schema != SCHEMA:
        raise MisconfigurationException(f"`{path}` has schema {schema}; this version reads schema {SCHEMA}.")
    try:
        record = from_json(kind, values)
    except FieldError as error:
        raise MisconfigurationException(f"`{path}`: {error}. The file is damaged or was changed.") from None
    if seal is None:
        rank_zero_info(
            f"`{path}` was written by an earlier version and carries no seal: its numbers must fit together, and damage"
            " that leaves them so is not seen. The next time that something is added to the directory it is sealed."
        )
    elif seal != _seal_of(values):
        raise MisconfigurationException(f"`{path}` does not match its `{SEAL}`: the file is damaged or was changed.")
    return record


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if repeated := {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else None:
        raise ValueError(f"{min(repeated)!r} is there twice")
    return dict(pairs)


def _not_a_number(name: str) -> object:
    raise ValueError(f"{name} is no number")


def _seal_of(values: object) -> str:
    """The sha256 of a manifest's contents, in whatever form they are written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def files_named_by(path: Path) -> list[str]:
    """Names of the files of a directory whose manifest need not be readable as a whole."""
    require_regular(path)
    try:
        values: object = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return []
    return list(values.get("files", {})) if isinstance(values, dict) else []
