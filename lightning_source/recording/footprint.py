"""What a run takes on disk: foretold when training begins, measured when it has ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lightning_source.capture.coverage import Coverage
from lightning_source.curvature.ekfac import MAX_SIDE, MAX_VECTOR
from lightning_source.names import named_parameters
from lightning_source.optimizers import StepRule
from lightning_source.recording.manifest import Settings
from lightning_source.recording.store import RunStore

SIZES = ("B", "kB", "MB", "GB", "TB")


class Footprint(NamedTuple):
    """Bytes on disk.

    Attributes:
        snapshot: of one snapshot: the parameters' mean, with adaptive optimizers the mean scale of their steps as well.
        record: of all snapshots and the parameters at the end.
        factors: of the eigenbases and eigenvalues of all segments, with ``keep="covariances"`` also of those.
    """

    snapshot: int
    record: int
    factors: int


def expected_footprint(
    settings: Settings, module: nn.Module, trained: set[str], coverage: Coverage, adaptive: bool
) -> Footprint:
    """What one stage will take.

    Args:
        settings: how the run is cut.
        module: the model.
        trained: names of the parameters that are trained.
        coverage: the blocks that are attributed.
        adaptive: whether the optimizer has a diagonal preconditioner.
    """
    parameters = named_parameters(module)
    own = sum(p.numel() * p.element_size() for name, p in parameters.items() if name in trained)
    rest = sum(p.numel() * p.element_size() for name, p in parameters.items() if name not in trained)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    snapshot = own * (1 + adaptive + (settings.snapshots == "point")) + buffers
    count = settings.segment_count * settings.snapshots_per_segment
    width = 8 if any(p.element_size() == 8 for p in parameters.values()) else 4
    sides = values = variances = 0
    for block in coverage.blocks:
        parts, outputs, inputs = block.shape
        lengths = [(inputs, 0 if block.indexed else MAX_SIDE), (outputs, MAX_VECTOR if inputs == 1 else MAX_SIDE)]
        sides += sum(parts * n * n for n, limit in lengths if n <= limit)
        variances += sum(parts * n for n, limit in lengths if n > limit)
        values += parts * outputs * inputs
    bases = 0 if settings.curvature == "diagonal" else sides
    factors = settings.segment_count * (bases + values)
    if settings.keep == "covariances" and settings.curvature != "diagonal":
        factors += count * (sides + variances)
    return Footprint(snapshot, count * snapshot + own + buffers + rest, width * factors)


def size_on_disk(store: RunStore) -> int:
    """Bytes of a run's files; one that has two names counts once."""
    sizes = {}
    for name in store.manifest.files:
        try:
            stat = (store.path / name).stat()
        except OSError:
            continue
        sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def foretold(store: RunStore, module: nn.Module, rules: Iterable[StepRule]) -> str:
    """One line on what the last stage will take, when it begins."""
    stage = store.manifest.stages[-1]
    assert stage.coverage is not None
    trained = {name for column in stage.phases[-1].columns for name in column}
    adaptive = any(rule.preconditioner is not None for rule in rules)
    size = expected_footprint(store.manifest.settings, module, trained, stage.coverage, adaptive)
    return (
        f"`{store.path}` will take about {readable(size.record)} on disk, {readable(size.snapshot)} a snapshot, and"
        f" {readable(size.factors)} for factors"
    )


def taken(store: RunStore) -> str:
    """One line on what is there, when training has ended."""
    return f"`{store.path}` holds {store.manifest.steps} steps in {readable(size_on_disk(store))}"


def readable(size: float) -> str:
    """A number of bytes for people.

    Example:
        >>> readable(2_600_000)
        '2.6 MB'
    """
    for unit in SIZES:
        if size < 1000 or unit == SIZES[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == SIZES[0] else f"{size:.1f} {unit}"
