"""What is made of a recording when training has ended: snapshots and segments, and the parameters that they hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_source._files import DirectoryError
from lightning_source._lightning import MisconfigurationException
from lightning_source.names import named_parameters, named_tensors
from lightning_source.recording.bins import (
    AVERAGED,
    FINAL,
    STEPS,
    end_name,
    in_stage,
    inverse,
    mean_of,
    prefixed,
    under,
    weighted_mean,
)
from lightning_source.recording.gradient_factors import BinLog, FinerColumns
from lightning_source.recording.intervals import StepInterval, cut, cut_evenly, merge_all, normalized_weights
from lightning_source.recording.manifest import SegmentRecord
from lightning_source.recording.parameter_groups import Phase, phase_at
from lightning_source.recording.resume_points import unused_files
from lightning_source.recording.step_log import StepLog
from lightning_source.recording.store import RunStore


def assemble(
    store: RunStore, segments: int | Sequence[int], snapshots_per_segment: int, keep_points: bool = False
) -> None:
    """Turn the last stage's bins into snapshots and segments on disk. Works on a finished run and on a killed one.

    A snapshot holds ``mean/…``, the running mean of the parameters over its steps, and ``scale/…``, the inverse of the
    optimizer's diagonal preconditioner averaged over its bins; in a run of points also ``point/…``, the parameters at
    the bin end nearest to its middle.

    Args:
        store: the run.
        segments: how many, or the steps at which inner ones begin.
        snapshots_per_segment: how many snapshots each has.
        keep_points: whether the points of checkpoints stay, and with them the bins that they need, so that the run can
            still be resumed from any of them.
    """
    manifest = store.manifest
    bins = manifest.bins
    if not bins:
        return
    record, snapshots, cuts = manifest.stages[bins[0].stage], list(manifest.snapshots), []
    phases, coverage = record.phases, record.coverage
    bin_logs = [bin_log(store, b) for b in bins]
    last = bins[-1]
    logs = [_in_final_columns(entry.log, record.phases, b) for b, entry in zip(bins, bin_logs, strict=True)]
    if any(entry.parts is not None for entry in bin_logs):
        finer = FinerColumns.of(record.phases, bins, bin_logs, record.coverage)
        phases, coverage, bins, logs = finer.phases, finer.coverage, finer.bins, finer.logs
    starts = segments if isinstance(segments, int) else [bins[0].first + step for step in segments]
    for indices in cut(bins, starts, [phase.first for phase in record.phases]):
        own = [bins[i] for i in indices]
        groups = cut_evenly(own, snapshots_per_segment)
        members = [_write_snapshot(store, [own[i] for i in group]) for group in groups]
        numbers = range(len(snapshots), len(snapshots) + len(members))
        cuts.append(SegmentRecord.over(merge_all(members), numbers))
        snapshots += members
    record.log = store.write(in_stage(bins[0].stage, STEPS), {"steps": StepLog.concatenated(logs).table})
    record.final = store.write(in_stage(bins[0].stage, FINAL), _end_of(store, last))
    record.phases, record.coverage = phases, coverage
    manifest.snapshots, manifest.segments = snapshots, [*manifest.segments, *cuts]
    manifest.bins, manifest.resume = [], manifest.resume if keep_points else {}
    store.commit(remove=unused_files(manifest, []))


@torch.no_grad()
def replace_final(store: RunStore, module: nn.Module) -> None:
    """Where training ended with other parameters than it trained, an average of them say, queries see those."""
    record = store.manifest.stages[-1]
    assert record.final is not None
    before, own = record.final, named_tensors(module)
    trained = store.read(before)
    if all(torch.equal(value, own[name].cpu()) for name, value in trained.items()):
        return
    # Under another name, so that a kill before the manifest is written leaves the trained weights.
    record.final = in_stage(len(store.manifest.stages) - 1, AVERAGED)
    store.write(record.final, {name: own[name] for name in trained})
    store.commit(remove=(before,))


def bin_log(store: RunStore, interval: StepInterval) -> BinLog:
    """The steps of a bin.

    Raises:
        DirectoryError: its file does not hold as many, or something else.
    """
    try:
        log = BinLog.read(store.read(interval.file))
        if len(log.log) != interval.steps:
            raise DirectoryError(f"`steps` has {len(log.log)} rows, and the bin {interval.steps}")
    except DirectoryError as error:
        place = f"{store.path / str(interval.file)}"
        raise error if place in str(error) else DirectoryError(f"`{place}`: {error}.") from None
    return log


def _in_final_columns(log: StepLog, phases: Sequence[Phase], interval: StepInterval) -> StepLog:
    """A bin's steps with one column for each that there is in the end."""
    return log.with_columns(phase_at(phases, interval.first).parents(phases[-1].columns))


@torch.no_grad()
def changed_between_stages(store: RunStore, module: nn.Module) -> list[str]:
    """Names of parameters that are not what the last stage ended with: drawn anew, replaced or loaded."""
    before = final_parameters(store)
    own = named_parameters(module)
    return [
        name
        for name, value in own.items()
        if name in before and (before[name].shape != value.shape or not torch.equal(before[name], value.cpu()))
    ]


def _write_snapshot(store: RunStore, bins: Sequence[StepInterval]) -> StepInterval:
    total = merge_all(bins)
    name = f"snapshots/step={total.last:06d}.safetensors"
    if len(bins) == 1 and store.manifest.settings.snapshots == "mean" and not under("end", store.read(bins[0].file)):
        return total.at(store.link(str(bins[0].file), name))
    files = [store.read(b.file) for b in bins]
    shapes = store.manifest.stages[total.stage].module.parameters
    for one, file in zip(bins, files, strict=True):
        for key in ("mean", "scale", "end"):
            for parameter, value in under(key, file).items():
                if parameter in shapes and (list(value.shape) != shapes[parameter] or not value.is_floating_point()):
                    raise DirectoryError(
                        f"`{store.path / str(one.file)}` holds `{key}/{parameter}` as {value.dtype}"
                        f" {list(value.shape)}, and the model has it as {shapes[parameter]}."
                    )
    mean, scale = (mean_of(key, files, bins) for key in ("mean", "scale"))
    middle = min(range(len(bins)), key=lambda i: abs(bins[i].last - (total.first + total.last) / 2))
    # Buffers that have no mean (counters) come from the end.
    mean = under("end", files[-1]) | under("mean", files[-1]) | mean
    point = under("end", files[middle]) if store.manifest.settings.snapshots == "point" else {}
    store.write(name, prefixed("mean", mean) | prefixed("point", point) | prefixed("scale", scale))
    return total.at(name)


def _end_of(store: RunStore, last: StepInterval) -> dict[str, Tensor]:
    """The parameters after a bin, which is the last of its stage."""
    name = end_name(last.last)
    return store.read(name) if name in store.manifest.files else under("end", store.read(last.file))


def snapshot_parameters(store: RunStore, snapshot: StepInterval, which: str) -> dict[str, Tensor]:
    """A snapshot's full set of tensors by name; ``which`` is ``"mean"`` or ``"point"``.

    Raises:
        MisconfigurationException: the run keeps no points.
    """
    own = under(which, store.read(snapshot.file))
    if not own:
        raise MisconfigurationException(
            f'`{store.path}` keeps the means of its snapshots and no points. HINT: record with `snapshots="point"`.'
        )
    return _whole(store, snapshot.stage, f"{store.path / str(snapshot.file)}", _frozen(store, snapshot.stage) | own)


def _whole(store: RunStore, stage: int, source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, which must be those of the stage's model: none left to the passed one, none in another form.

    Raises:
        MisconfigurationException: a parameter is missing or of another shape, or is no floating-point tensor.
    """
    for name, shape in store.manifest.stages[stage].module.parameters.items():
        if name not in tensors:
            raise MisconfigurationException(f"`{source}` holds no `{name}`, a parameter of the model.")
        found = tensors[name]
        if list(found.shape) != shape or not (found.is_floating_point() or found.is_complex()):
            raise MisconfigurationException(
                f"`{source}` holds `{name}` as {found.dtype} {list(found.shape)}, and the model has it as {shape}."
            )
    return tensors


def mean_parameters(store: RunStore, snapshots: Sequence[StepInterval]) -> dict[str, Tensor]:
    """The running mean over several snapshots."""
    states = [snapshot_parameters(store, s, "mean") for s in snapshots]
    return states[-1] | weighted_mean(states, normalized_weights(snapshots))


def mean_preconditioner(store: RunStore, snapshots: Sequence[StepInterval]) -> dict[str, Tensor]:
    """The optimizer's diagonal preconditioner ``P̄`` by parameter over snapshots; empty for gradient steps.

    Its inverse is what is averaged, ``√v̂ + ε`` for Adam: in the mean of ``P`` itself a few moments near 0 outweigh all
    others. Where training never had a gradient the mean is 0, and so is ``P̄``: such entries carry nothing.
    """
    given = [under("scale", store.read(s.file)) for s in snapshots]
    for snapshot, scale in zip(snapshots, given, strict=True):
        shapes = store.manifest.stages[snapshot.stage].module.parameters
        for name, value in scale.items():
            if list(value.shape) != shapes.get(name) or not value.is_floating_point() or not value.isfinite().all():
                raise DirectoryError(
                    f"`{store.path / str(snapshot.file)}` holds a `scale/{name}` that is not the model's or not finite."
                )
    scales = weighted_mean(given, normalized_weights(snapshots))
    return {name: inverse(value) for name, value in scales.items()}


def final_parameters(store: RunStore, stage: int = -1) -> dict[str, Tensor]:
    """The parameters that a stage ended with, by default the last."""
    final = store.manifest.stages[stage].final
    assert final is not None
    return _whole(store, stage, f"{store.path / final}", _frozen(store, stage) | store.read(final))


def _frozen(store: RunStore, stage: int) -> dict[str, Tensor]:
    name = store.manifest.stages[stage].frozen
    return store.read(name) if name else {}
