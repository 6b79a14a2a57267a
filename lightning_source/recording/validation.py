"""What a manifest must say of a run to be one: its numbers are finite and fit together, whoever wrote the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_source.capture.attributes import is_reading
from lightning_source.recording.intervals import StepInterval, merge_all
from lightning_source.recording.manifest import Manifest, ManualRecord, StageRecord
from lightning_source.recording.typed_json import FieldError

MOST_SAMPLES = 10_000  # label draws for each example; beyond that a typing error is likelier than a wish
MOST_SCHEDULERS = 1000
TOLERANCE = 1e-6  # relative, of sums that were added in another order


def validate(manifest: Manifest) -> None:
    """Refuse a manifest of which scores would come out wrong, or never.

    Raises:
        FieldError: names the field.
    """
    for name, problem in _problems(manifest):
        raise FieldError(f"`{name}` {problem}")


def _problems(manifest: Manifest) -> Iterator[tuple[str, str]]:
    try:
        manifest.settings.check()
    except ValueError as error:
        yield "settings", f"cannot be those of a run: {error}"
    if manifest.settings.label_samples > MOST_SAMPLES:
        yield "settings.label_samples", f"is {manifest.settings.label_samples}, more than {MOST_SAMPLES}"
    if manifest.steps < 0:
        yield "steps", f"is {manifest.steps}"
    for index, stage in enumerate(manifest.stages):
        name = f"stages.{index}"
        if stage.examples is not None and stage.examples < 0:
            yield f"{name}.examples", f"is {stage.examples}"
        if stage.examples_per_batch is not None and not 0 < stage.examples_per_batch < math.inf:
            yield f"{name}.examples_per_batch", f"is {stage.examples_per_batch}"
        for file in ("frozen", "drawn", "log", "final"):
            yield from _known(manifest, f"{name}.{file}", getattr(stage, file))
        yield from _of_stage(manifest, name, index)
    for coupling, value in manifest.couplings.items():
        if not 0 < value < math.inf:
            yield f"couplings.{coupling}", f"is {value}"
    yield from _of_intervals(manifest, "bins", manifest.bins)
    yield from _of_intervals(manifest, "snapshots", manifest.snapshots)
    yield from _of_segments(manifest)
    for step, point in manifest.resume.items():
        yield from _known(manifest, f"resume.{step}.file", point.file)


def _of_stage(manifest: Manifest, name: str, index: int) -> Iterator[tuple[str, str]]:
    """What a stage says of its model and of how it was trained."""
    stage = manifest.stages[index]
    if stage.batch_size is not None and stage.batch_size < 1:
        yield f"{name}.batch_size", f"is {stage.batch_size}"
    if stage.manual is not None:
        yield from _of_manual(f"{name}.manual", stage.manual)
    for reading in stage.attributes:
        for place, text in reading.values.items():
            if not is_reading(text):
                yield f"{name}.attributes", f"gives `{place}` the value {text[:40]!r}, which is none"
    steps = [one.first for one in (*manifest.snapshots, *manifest.bins) if one.stage == index]
    if any(one.stage == index for one in manifest.snapshots) and (stage.final is None or stage.log is None):
        yield name, "has ended without its last parameters or the log of its steps"
    yield from _of_phases(f"{name}.phases", stage, min(steps, default=None))
    if stage.coverage is not None:
        yield from _of_blocks(f"{name}.coverage.blocks", stage)


def _of_manual(name: str, manual: ManualRecord) -> Iterator[tuple[str, str]]:
    if manual.optimizers != len(manual.groups) or len(manual.kinds) not in (0, manual.optimizers):
        yield f"{name}.optimizers", f"is {manual.optimizers}, of which there are {len(manual.groups)}"
    if not 0 <= manual.attributed < max(1, manual.optimizers):
        yield f"{name}.attributed", f"is {manual.attributed}, of {manual.optimizers} optimizers"
    if not 0 <= manual.schedulers <= MOST_SCHEDULERS:
        yield f"{name}.schedulers", f"is {manual.schedulers}"


def _of_phases(name: str, stage: StageRecord, start: int | None) -> Iterator[tuple[str, str]]:
    """Phases in order, each with its columns of parameters."""
    if start is not None and (not stage.phases or stage.phases[0].first > start):
        yield name, f"do not begin with the stage, at step {start}"
    for index, phase in enumerate(stage.phases):
        if not len(phase.columns) == len(phase.groups) == len(phase.decoupled) or not all(phase.columns):
            yield f"{name}.{index}", "does not have one group and one kind of decay for each of its columns"
        if index and phase.first < stage.phases[index - 1].first:
            yield f"{name}.{index}.first", f"is {phase.first}, before the phase before it"


def _of_blocks(name: str, stage: StageRecord) -> Iterator[tuple[str, str]]:
    """Blocks of the stage's parameters, each in a column of its last phase."""
    assert stage.coverage is not None
    if not stage.coverage.blocks:
        yield name, "are none"
    sizes = {parameter: math.prod(shape) for parameter, shape in stage.module.parameters.items()}
    columns = len(stage.phases[-1].columns) if stage.phases else 0
    for index, block in enumerate(stage.coverage.blocks):
        unknown = [parameter for parameter in block.parameters if parameter not in sizes]
        if unknown or not block.parameters:
            yield f"{name}.{index}", f"is of the parameters {block.parameters}, not those of the model"
        elif tuple(sizes[parameter] for parameter in block.parameters) != tuple(block.sizes):
            yield f"{name}.{index}.sizes", f"are {list(block.sizes)}, and its parameters have other numbers of scalars"
        elif min(block.shape) < 1 or block.layout not in (0, 1):
            yield f"{name}.{index}.shape", f"is {list(block.shape)}, with examples along dimension {block.layout}"
        if not 0 <= block.group < max(1, columns):
            yield f"{name}.{index}.group", f"is {block.group}, of {columns} columns"


def _known(manifest: Manifest, name: str, file: str | None) -> Iterator[tuple[str, str]]:
    if file is not None and file not in manifest.files:
        yield name, f"names {file!r}, which is not among the run's files"


def _of_intervals(manifest: Manifest, name: str, intervals: Sequence[StepInterval]) -> Iterator[tuple[str, str]]:
    """Consecutive intervals, each with its file and finite numbers."""
    for index, one in enumerate(intervals):
        here = f"{name}.{index}"
        if not 0 <= one.first < one.last:
            yield here, f"goes from step {one.first} to {one.last}"
        if not 0 <= one.stage < len(manifest.stages):
            yield f"{here}.stage", f"is {one.stage}, of {len(manifest.stages)} stages"
        if index and (one.first != intervals[index - 1].last or one.stage < intervals[index - 1].stage):
            yield here, f"begins at step {one.first}, where the one before ends at {intervals[index - 1].last}"
        if not all(0 <= rate < math.inf for rate in one.rates):
            yield f"{here}.rates", f"are {list(one.rates)}"
        if not all(math.isfinite(decay) for decay in one.decays) or len(one.decays) != len(one.rates):
            yield f"{here}.decays", f"are {list(one.decays)}"
        if one.file is None:
            yield f"{here}.file", "is missing"
        yield from _known(manifest, f"{here}.file", one.file)


def _of_segments(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Segments that are their snapshots', all of them in order and each once."""
    used = [index for segment in manifest.segments for index in segment.snapshots]
    if used != list(range(len(manifest.snapshots))):
        yield "segments", f"are made of the snapshots {used[:20]}, of {len(manifest.snapshots)} that there are"
        return
    for index, segment in enumerate(manifest.segments):
        whole = merge_all([manifest.snapshots[i] for i in segment.snapshots]) if segment.snapshots else None
        if whole is None:
            yield f"segments.{index}.snapshots", "are none"
        elif (segment.first, segment.last, segment.stage) != (whole.first, whole.last, whole.stage):
            yield f"segments.{index}", "does not cover the steps of its snapshots"
        elif not _alike(segment.rates, whole.rates) or not _alike(segment.decays, whole.decays):
            yield f"segments.{index}.rates", "are not the sums over its snapshots"


def _alike(values: Sequence[float], others: Sequence[float]) -> bool:
    return len(values) == len(others) and all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12) for a, b in zip(values, others, strict=True)
    )
