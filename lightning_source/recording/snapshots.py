"""What is made of a recording when training has ended: snapshots and segments, and the parameters that they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_source.names import named_parameters, named_tensors
from lightning_source.recording.bins import (
    AVERAGED,
    FINAL,
    STEPS,
    _bin_name,
    _in_stage,
    _mean_of,
    _prefixed,
    _under,
    _weighted_mean,
)
from lightning_source.recording.intervals import StepInterval, cut, cut_evenly, merge_all, normalized_weights
from lightning_source.recording.parameter_groups import Phase, phase_at
from lightning_source.recording.store import RunStore


def assemble(store: RunStore, segments: int | Sequence[int], snapshots_per_segment: int) -> None:
    """Turn the last stage's bins into snapshots and segments on disk. Works on a finished run and on a killed one.

    A snapshot holds ``mean/…``, the running mean of the parameters over its steps, ``point/…``, the parameters at the
    bin end nearest to its middle, and ``scale/…``, the inverse of the optimizer's diagonal preconditioner averaged over
    its bins.
    """
    bins = [StepInterval.from_json(b) for b in store.manifest.get("bins", [])]
    if not bins:
        return
    stage = bins[0].stage
    snapshots = [StepInterval.from_json(s) for s in store.manifest.get("snapshots", [])]
    members: list[list[int]] = []
    starts = segments if isinstance(segments, int) else [bins[0].first + step for step in segments]
    phases = [Phase.from_json(phase) for phase in store.manifest["stages"][stage]["phases"]]
    for segment in cut(bins, starts, [phase.first for phase in phases]):
        groups = cut_evenly([bins[i] for i in segment], snapshots_per_segment)
        members.append([])
        for group in groups:
            snapshots.append(_write_snapshot(store, [bins[segment[i]] for i in group]))
            members[-1].append(len(snapshots) - 1)
    files = [store.read(b.file) for b in bins]
    log = torch.cat([_log(phases, stretch, file) for stretch, file in zip(bins, files, strict=True)])
    store.manifest["stages"][stage] |= {
        "log": store.write(_in_stage(stage, STEPS), {"steps": log}),
        "final": store.write(_in_stage(stage, FINAL), _under("end", files[-1])),
    }
    cuts = [merge_all([snapshots[i] for i in group]).to_json() | {"snapshots": group} for group in members]
    store.manifest |= {
        "snapshots": [s.to_json() for s in snapshots],
        "segments": store.manifest.get("segments", []) + cuts,
        "bins": [],
        "resume": {},
    }
    store.commit(remove=tuple(n for n in store.manifest["files"] if n.startswith(("bins/", "resume/"))))


@torch.no_grad()
def replace_final(store: RunStore, module: nn.Module) -> None:
    """Where training ended with other parameters than it trained, an average of them say, queries see those."""
    record = store.manifest["stages"][-1]
    trained = store.read(record["final"])
    own = named_tensors(module)
    if all(torch.equal(value, own[name].cpu()) for name, value in trained.items()):
        return
    # Under another name, so that a kill before the manifest is written leaves the trained weights.
    before, record["final"] = record["final"], _in_stage(len(store.manifest["stages"]) - 1, AVERAGED)
    store.write(record["final"], {name: own[name] for name in trained})
    store.commit(remove=(before,))


def _log(phases: Sequence[Phase], stretch: StepInterval, file: Mapping[str, Tensor]) -> Tensor:
    """A bin's steps with one column for each that there is in the end."""
    parents = phase_at(phases, stretch.first).parents(phases[-1].columns)
    steps = file["steps"]
    own = (steps.shape[1] - 2) // 3
    zeros = steps.new_zeros(len(steps), 1)
    chosen = [own if parent is None else parent for parent in parents]
    parts = [torch.cat([steps[:, k * own : (k + 1) * own], zeros], 1)[:, chosen] for k in range(3)]
    return torch.cat([*parts, steps[:, 3 * own :]], 1)


def reopen(store: RunStore, limit: int, boundaries: Sequence[int]) -> dict[str, Any]:
    """Take the last stage's snapshots for bins again, so that a finished run can go on; gives the point at its end.

    Bins are then as long as the snapshots were, and a point snapshot made of several has its parameters from the middle
    of one of them.

    Args:
        store: the run.
        limit: the most bins kept.
        boundaries: steps of the stage at which a segment begins.
    """
    manifest, record = store.manifest, store.manifest["stages"][-1]
    stage = len(manifest["stages"]) - 1
    phases = [Phase.from_json(phase) for phase in record["phases"]]
    snapshots = [StepInterval.from_json(s) for s in manifest["snapshots"]]
    own = [s for s in snapshots if s.stage == stage]
    start, final, log = own[0].first, store.read(record["final"]), store.read(record["log"])["steps"]
    bins = []
    for snapshot in own:
        file = store.read(snapshot.file)
        tensors = {name: value for name, value in file.items() if not name.startswith("point/")}
        end = final if snapshot is own[-1] else _under("point", file)
        phase = phase_at(phases, snapshot.first)
        parents = phase.parents(phases[-1].columns)
        chosen = [parents.index(column) for column in range(len(phase.columns))]
        rows, width = log[snapshot.first - start : snapshot.last - start], len(parents)
        parts = [rows[:, k * width : (k + 1) * width][:, chosen] for k in range(3)]
        name = _bin_name(snapshot)
        store.write(name, tensors | _prefixed("end", end) | {"steps": torch.cat([*parts, rows[:, 3 * width :]], 1)})
        bins.append(snapshot.at(name).to_json())
    manifest["snapshots"] = [s.to_json() for s in snapshots if s.stage != stage]
    manifest["segments"] = [s for s in manifest["segments"] if s["stage"] != stage]
    manifest["bins"] = bins
    manifest.pop("couplings", None)
    gone = [name for name in manifest["files"] if _belongs_to_end(name, len(manifest["segments"]), start)]
    point = {
        "file": None,
        "bins": bins,
        "open": [],
        "summed": 0,
        "bin_steps": max(s.steps for s in own),
        "limit": limit,
        "start": start,
        "steps": own[-1].last,
        "boundaries": sorted({*(start + b for b in boundaries), *(phase.first for phase in phases)}),
        "trained": [name for name in final if name in record["module"]["parameters"]],
        "stage": {key: record[key] for key in ("phases", "coverage", "seen") if key in record},
    }
    manifest["resume"] = {str(point["steps"]): point}
    store.commit(remove=(record.pop("final"), record.pop("log"), *gone))
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
    files = [store.read(b.file) for b in bins]
    mean, scale = (_mean_of(key, files, bins) for key in ("mean", "scale"))
    middle = min(range(len(bins)), key=lambda i: abs(bins[i].last - (total.first + total.last) / 2))
    name = f"snapshots/step={total.last:06d}.safetensors"
    # Buffers that have no mean (counters) come from the end.
    end = _under("end", files[-1])
    mean = end | mean
    point = _under("end", files[middle])
    store.write(name, _prefixed("mean", mean) | _prefixed("point", point) | _prefixed("scale", scale))
    return total.at(name)


def snapshot_parameters(store: RunStore, snapshot: StepInterval, which: str) -> dict[str, Tensor]:
    """A snapshot's full set of tensors by name; ``which`` is ``"mean"`` or ``"point"``."""
    return _frozen(store, snapshot.stage) | _under(which, store.read(snapshot.file))


def mean_parameters(store: RunStore, snapshots: Sequence[StepInterval]) -> dict[str, Tensor]:
    """The running mean over several snapshots."""
    states = [snapshot_parameters(store, s, "mean") for s in snapshots]
    return states[-1] | _weighted_mean(states, normalized_weights(snapshots))


def mean_preconditioner(store: RunStore, snapshots: Sequence[StepInterval]) -> dict[str, Tensor]:
    """The optimizer's diagonal preconditioner ``P̄`` by parameter over snapshots; empty for gradient steps.

    Its inverse is what is averaged, ``√v̂ + ε`` for Adam: in the mean of ``P`` itself a few moments near 0 outweigh all
    others.
    """
    inverse = _weighted_mean([_under("scale", store.read(s.file)) for s in snapshots], normalized_weights(snapshots))
    return {name: 1 / value for name, value in inverse.items()}


def final_parameters(store: RunStore, stage: int = -1) -> dict[str, Tensor]:
    """The parameters that a stage ended with, by default the last."""
    return _frozen(store, stage) | store.read(store.manifest["stages"][stage]["final"])


def _frozen(store: RunStore, stage: int) -> dict[str, Tensor]:
    name = store.manifest["stages"][stage].get("frozen")
    return store.read(name) if name else {}
