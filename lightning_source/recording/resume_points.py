"""Points of checkpoints at which an interrupted recording goes on: what they need, and how a run goes back to one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_source._files import DirectoryError
from lightning_source.recording.bins import bin_name, end_name, prefixed, under
from lightning_source.recording.intervals import StepInterval
from lightning_source.recording.manifest import Manifest, ResumePoint
from lightning_source.recording.parameter_groups import phase_at
from lightning_source.recording.step_log import StepLog, StepRecord
from lightning_source.recording.store import RunStore


def table_of(steps: Sequence[StepRecord]) -> Tensor:
    """The steps of an open bin as one tensor, ``[steps, 3 · columns + 1]`` in float64; see :func:`steps_of`."""
    rows = [(*s.learning_rates, *s.multipliers, *s.weight_decays, s.weight) for s in steps]
    return torch.tensor(rows, dtype=torch.float64)


def steps_of(point: ResumePoint, tensors: Mapping[str, Tensor]) -> list[StepRecord]:
    """The steps of a point's open bin. The first version kept them in the manifest."""
    if "open" not in tensors:
        return list(point.open)
    columns = (tensors["open"].shape[1] - 1) // 3
    rows: list[list[float]] = tensors["open"].tolist()
    cut = [(row[:columns], row[columns : 2 * columns], row[2 * columns : -1], row[-1]) for row in rows]
    return [StepRecord(tuple(rates), tuple(factors), tuple(decays), weight) for rates, factors, decays, weight in cut]


def unused_files(manifest: Manifest, bins: Sequence[StepInterval]) -> tuple[str, ...]:
    """Files of bins and points that neither the present bins nor a point refer to."""
    points = manifest.resume.values()
    used = {b.file for b in bins}.union(*(files_of(point) for point in points))
    used |= {end_name(bins[-1].last)} if bins else set()
    return tuple(n for n in manifest.files if n.startswith(("bins/", "resume/")) and n not in used)


def files_of(point: ResumePoint) -> set[str]:
    """The files that a point needs, if all of them are there."""
    own = {b.file for b in point.bins} | {point.file} | {end_name(b.last) for b in point.bins[-1:]}
    return {name for name in own if name is not None}


def damage_of(store: RunStore, point: ResumePoint) -> str | None:
    """Why a recording cannot go on from a point; ``None`` if it can."""
    try:
        for name in files_of(point):
            if name in store.manifest.files or not name.startswith("bins/end="):  # points are in the bins themselves
                store.read(name)
    except DirectoryError as error:
        return str(error)
    return None


def rewind(store: RunStore, stage: int, first: int) -> tuple[str, ...]:
    """Take back the snapshots and segments of the last stage, which begins at step ``first``.

    Gives back the names of their files, which the next commit may remove.
    """
    manifest, record = store.manifest, store.manifest.stages[stage]
    manifest.snapshots = [s for s in manifest.snapshots if s.stage != stage]
    manifest.segments = [s for s in manifest.segments if s.stage != stage]
    manifest.couplings = {}
    made = [name for name in manifest.files if _belongs_to_end(name, len(manifest.segments), first)]
    ended = [name for name in (record.final, record.log) if name is not None]
    record.log = record.final = None
    return (*ended, *made)


def reopen(store: RunStore, limit: int, boundaries: Sequence[int]) -> ResumePoint:
    """Take the last stage's snapshots for bins again, so that a finished run can go on; gives the point at its end.

    Bins are then as long as the snapshots were, and a point snapshot made of several has its parameters from the middle
    of one of them.

    Args:
        store: the run.
        limit: the most bins kept.
        boundaries: steps of the stage at which a segment begins.
    """
    manifest, record = store.manifest, store.manifest.stages[-1]
    stage = len(manifest.stages) - 1
    assert record.final is not None
    assert record.log is not None
    own = [s for s in manifest.snapshots if s.stage == stage]
    start, final, log = own[0].first, store.read(record.final), StepLog(store.read(record.log)["steps"])
    bins = []
    for snapshot in own:
        file = store.read(snapshot.file)
        tensors = {name: value for name, value in file.items() if not name.startswith("point/")}
        end = under("point", file) if manifest.settings.snapshots == "point" else {}
        if snapshot is own[-1]:
            store.write(end_name(snapshot.last), final)
            end = final if end else {}
        phase = phase_at(record.phases, snapshot.first)
        parents = phase.parents(record.phases[-1].columns)
        rows = log.between(snapshot.first - start, snapshot.last - start)
        steps = rows.with_columns([parents.index(column) for column in range(len(phase.columns))])
        name = bin_name(snapshot)
        store.write(name, tensors | prefixed("end", end) | {"steps": steps.table})
        bins.append(snapshot.at(name))
    manifest.bins = bins
    point = ResumePoint(
        file=None,
        bins=list(bins),
        summed=0,
        bin_steps=max(s.steps for s in own),
        limit=limit,
        start=start,
        steps=own[-1].last,
        boundaries=sorted({*(start + b for b in boundaries), *(phase.first for phase in record.phases)}),
        trained=[name for name in final if name in record.module.parameters],
        stage=record.progress(),
    )
    manifest.resume = {point.steps: point}
    store.commit(remove=rewind(store, stage, start))
    return point


def _belongs_to_end(name: str, segments: int, start: int) -> bool:
    """Whether a file was made of the snapshots after a step, or of the segments from a number on."""
    folder, _, rest = name.partition("/")
    if folder == "snapshots":
        return int(rest[5:11]) > start
    if folder != "segments":
        return False
    stem = rest.split(".")[0]
    if stem.isdigit():
        return int(stem) >= segments
    return stem.startswith("final") or max(map(int, re.findall(r"\d+", stem))) > start
