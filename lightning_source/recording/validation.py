"""What a manifest must say of a run to be one: its numbers are finite and fit together, whoever wrote the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_source.recording.intervals import StepInterval, merge_all
from lightning_source.recording.manifest import Manifest
from lightning_source.recording.typed_json import FieldError

MOST_SAMPLES = 10_000  # label draws for each example; beyond that a typing error is likelier than a wish
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
    for coupling, value in manifest.couplings.items():
        if not 0 < value < math.inf:
            yield f"couplings.{coupling}", f"is {value}"
    yield from _of_intervals(manifest, "bins", manifest.bins)
    yield from _of_intervals(manifest, "snapshots", manifest.snapshots)
    yield from _of_segments(manifest)
    for step, point in manifest.resume.items():
        yield from _known(manifest, f"resume.{step}.file", point.file)


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
