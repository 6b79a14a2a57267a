"""Records one training as it runs: step log, running means of the parameters, bins on disk. Knows no Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_source.layers import clean_name
from lightning_source.phases import Phase, phase_at
from lightning_source.segments import Stretch, cut, cut_evenly, merge_all, normalized_weights, pairs_to_merge
from lightning_source.store import RunStore

STEPS = "steps.safetensors"
RESUME_POINTS = 3  # how many of the last checkpoints can be resumed from without a gap
FROZEN = "frozen.safetensors"
FINAL = "final.safetensors"
AVERAGED = "averaged.safetensors"


class _Step(NamedTuple):
    """One optimizer update, each of the lists by column (see :mod:`lightning_source.phases`)."""

    rates: list[float]
    multipliers: list[float]
    decays: list[float]
    weight: float
    coefficient: Tensor | None  # on its device, so that recording a step does not wait for it


class Recorder:
    """Keeps a run directory up to date while somebody else trains.

    Call :meth:`before_step` before each optimizer update and :meth:`after_step` after it, :meth:`flush` whenever the
    parameters may be read and files written, and :meth:`finish` at the end. No call synchronises a device except when
    a bin is closed.

    Args:
        store: the run directory.
        module: the model that is trained; a parameter that does not require gradients is frozen until
            :meth:`regroup`.
        bins: the most bins kept; when there are more, neighbours merge and bins double in length.
        boundaries: steps at which a bin must end, because a segment begins there.
        preconditioners: reads the optimizer's diagonal preconditioner by parameter name; none for plain gradient steps.
        stage: index of the stage, whose entry in the manifest exists.
        point: a point of :meth:`save_point` to go on from.
    """

    def __init__(
        self,
        store: RunStore,
        module: nn.Module,
        bins: int,
        boundaries: Sequence[int] = (),
        preconditioners: Callable[[], Mapping[str, Tensor]] = dict,
        stage: int = 0,
        point: Mapping[str, Any] | None = None,
    ) -> None:
        self.store = store
        self._module = module
        self.bins: list[Stretch] = []
        self.limit = max(2, bins)
        self.bin_steps = 1
        self.stage = stage
        self.start = store.manifest.get("steps", 0)  # steps of the stages before
        self.steps = self.start
        self.boundaries = sorted(self.start + boundary for boundary in boundaries)
        self._preconditioners = preconditioners
        persistent = set(module.state_dict())
        owners = {name: child for name, child in module.named_modules()}
        self._buffer_owners = {
            clean_name(name): (owners[name.rpartition(".")[0]], name.rpartition(".")[2])
            for name, _ in module.named_buffers()
            if name in persistent
        }
        parameters = {clean_name(name): p for name, p in module.named_parameters()}
        self._average([name for name, p in parameters.items() if p.requires_grad])
        self._sums: list[Tensor] = []
        self._summed = 0
        self._open: list[_Step] = []
        self._frozen_sums: dict[str, float] = {}  # before the first step
        if point is not None:
            self._resume(point)
            return
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._frozen_sums = {name: _sum(p) for name, p in frozen.items()}
        store.manifest["stages"][stage]["frozen"] = store.write(_in_stage(stage, FROZEN), frozen) if frozen else None

    @torch.no_grad()
    def before_step(self) -> None:
        """The parameters as they are now are those that this step's gradient was taken at: add them to the mean."""
        self._add_parameters(1)

    def _add_parameters(self, sign: int) -> None:
        values = [t.detach() for t in self._averaged.values()]
        if not self._sums:
            self._sums = [v.to(torch.promote_types(v.dtype, torch.float32), copy=True) for v in values]
        else:
            wide = [v.to(s.dtype) for v, s in zip(values, self._sums, strict=True)]
            torch._foreach_add_(self._sums, wide, alpha=sign)
        self._summed += sign

    def after_step(
        self,
        learning_rates: Sequence[float],
        multipliers: Sequence[float],
        weight_decays: Sequence[float],
        loss_weight: float,
        coefficient: Tensor | None,
    ) -> None:
        """Log one optimizer update.

        Args:
            learning_rates: the rate really used, by column.
            multipliers: effective rate over learning rate (momentum), by column.
            weight_decays: coupled decay, by column.
            loss_weight: what the step's loss was multiplied by beside its mean over micro-batches: 1, less in a short
                last accumulation window, 0 in a step without a loss.
            coefficient: what the gradient was multiplied by on its way into the step, 0-dim on its device: its norm
                after clipping over that before, 0 for a step that the loss scaler skipped; ``None`` for 1.
        """
        rates, multiples, decays = map(list, (learning_rates, multipliers, weight_decays))
        self._open.append(_Step(rates, multiples, decays, loss_weight, coefficient))
        self.steps += 1

    def flush(self, force: bool = False) -> None:
        """Close the open bin if it is long enough, reaches a boundary, or is forced to."""
        first = self.bins[-1].last if self.bins else self.start
        crossed = any(first < boundary <= self.steps for boundary in self.boundaries)
        if not self._open or not (force or crossed or self.steps - first >= self.bin_steps):
            return
        if self._summed > len(self._open):  # the step that broke off left the parameters as they are
            with torch.no_grad():
                self._add_parameters(-1)
        rows, decay = zip(*map(_row, self._open), strict=True)
        steps = torch.stack(rows)
        columns = len(self._open[0].rates)
        mean = {
            name: (total / self._summed).to(value.dtype)
            for (name, value), total in zip(self._averaged.items(), self._sums, strict=True)
        }
        totals = (tuple(steps[:, columns : 2 * columns].sum(0).tolist()), tuple(map(sum, zip(*decay, strict=True))))
        stretch = Stretch(first, self.steps, *totals, stage=self.stage)
        scales = {name: 1 / value for name, value in self._preconditioners().items()}
        self._add_bin(stretch, steps, mean, self._trained | self._buffers, scales)
        self._open, self._sums, self._summed = [], [], 0  # not before they are on disk
        if len(self.bins) > self.limit:
            self._halve()
        self._enter_bins()
        self._follow_what_moves()
        self.store.commit(remove=self._unused())

    def _follow_what_moves(self) -> None:
        """A parameter without gradients that the user moves, a teacher's say, is recorded as the trained ones are."""
        if self._frozen_sums:
            parameters = {clean_name(name): p for name, p in self._module.named_parameters()}
            moved = [name for name, total in self._frozen_sums.items() if _sum(parameters[name]) != total]
            self._average([*dict.fromkeys([*self._trained, *moved])])
            self._frozen_sums = {}  # what stands still in the first bin is taken to stand still

    def _enter_bins(self) -> None:
        self.store.manifest |= {"bins": [b.to_json() for b in self.bins], "steps": self.steps}

    def regroup(self, parents: Sequence[int | None], trained: Sequence[str]) -> None:
        """What is trained changes between two steps: the open bin has ended, and no bin will reach across.

        Args:
            parents: for each new column, the old one that it was part of; ``None`` if it was not trained.
            trained: names of the parameters trained from now on.
        """
        if self._open:
            raise RuntimeError("groups change in an open bin")
        self.boundaries = sorted({*self.boundaries, self.steps})
        self.bins = [b.regrouped(parents) for b in self.bins]
        self._average([*dict.fromkeys([*self._trained, *trained])])
        if self.bins:
            self._enter_bins()

    def _average(self, trained: Sequence[str]) -> None:
        """Whose running mean is kept: these parameters' and the buffers'."""
        parameters = {clean_name(name): p for name, p in self._module.named_parameters()}
        self._trained: dict[str, Tensor] = {name: parameters[name] for name in trained}

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The buffers as they are now: a module may put another tensor in place of one."""
        found = {name: owner._buffers[leaf] for name, (owner, leaf) in self._buffer_owners.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    @property
    def _averaged(self) -> dict[str, Tensor]:
        return self._trained | {n: b for n, b in self._buffers.items() if b.is_floating_point()}

    # ---------------------------------------------------------------- resume

    def save_point(self) -> None:
        """Keep what is needed to go on from here if a checkpoint of this moment is loaded; the last few are kept.

        Local files only, no collective: checkpoints are also taken on one rank, and in the middle of a step.
        """
        points = self.store.manifest.setdefault("resume", {})
        devices = {f"sum/{i}": total for i, total in enumerate(self._sums)}
        clips = [torch.tensor(1.0) if step.coefficient is None else step.coefficient for step in self._open]
        tensors = devices | {f"clip/{i}": clip for i, clip in enumerate(clips)}
        stage = self.store.manifest["stages"][self.stage]
        name = f"resume/step={self.steps:06d}.safetensors"
        points.pop(str(self.steps), None)  # the newest comes last
        points[str(self.steps)] = {
            "file": self.store.write(name, tensors) if tensors else None,
            "bins": [b.to_json() for b in self.bins],
            "open": [list(step[:4]) for step in self._open],
            "summed": self._summed,
            "bin_steps": self.bin_steps,
            "limit": self.limit,
            "start": self.start,
            "steps": self.steps,
            "boundaries": self.boundaries,
            "trained": list(self._trained),
            "stage": {key: stage[key] for key in ("phases", "coverage", "seen") if key in stage},
        }
        for old in list(points)[:-RESUME_POINTS]:
            del points[old]
        self.store.commit(remove=self._unused())

    def _resume(self, point: Mapping[str, Any]) -> None:
        """Drop what was recorded after the point and go on from it."""
        tensors = self.store.read(point["file"]) if point["file"] else {}
        self._average(point["trained"])
        devices = [value.device for value in self._averaged.values()]
        self._sums = [tensors[f"sum/{i}"].to(d) for i, d in enumerate(devices)] if point["summed"] else []
        self._summed = point["summed"]
        self._open = [
            _Step(step[0], step[1], step[2], step[3], tensors[f"clip/{i}"]) for i, step in enumerate(point["open"])
        ]
        self.bins = [Stretch.from_json(b) for b in point["bins"]]
        self.bin_steps, self.limit, self.start = point["bin_steps"], point["limit"], point["start"]
        self.boundaries, self.steps = point["boundaries"], point["steps"]
        points = self.store.manifest["resume"]
        self.store.manifest["resume"] = {key: value for key, value in points.items() if int(key) <= self.steps}
        stage = self.store.manifest["stages"][self.stage]
        stage.pop("coverage", None)
        stage |= point["stage"]
        self._enter_bins()
        if self._summed > len(self._open):  # saved in the middle of a step, which begins anew
            with torch.no_grad():
                self._add_parameters(-1)
        self.store.commit(remove=self._unused())

    def _unused(self) -> tuple[str, ...]:
        """Bin and resume files that neither the present bins nor a resume point refer to."""
        points = self.store.manifest.get("resume", {}).values()
        used = {b.file for b in self.bins} | {b["file"] for point in points for b in point["bins"]}
        used |= {point["file"] for point in points}
        return tuple(n for n in self.store.manifest["files"] if n.startswith(("bins/", "resume/")) and n not in used)

    def _add_bin(
        self,
        stretch: Stretch,
        steps: Tensor,
        mean: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
    ) -> None:
        name = _bin_name(stretch)
        tensors = _prefixed("mean", mean) | _prefixed("end", end) | _prefixed("scale", scales)
        self.store.write(name, tensors | {"steps": steps})
        self.bins.append(stretch.at(name))

    def _halve(self) -> None:
        """Merge neighbouring bins."""
        old, self.bins = self.bins, []
        for group in pairs_to_merge(old, self.boundaries):
            members = [old[i] for i in group]
            if len(members) == 1:
                self.bins.append(members[0])
                continue
            files = [self.store.read(m.file) for m in members]
            mean, scale = (_mean_of(key, files, members) for key in ("mean", "scale"))
            steps = torch.cat([f["steps"] for f in files])
            self._add_bin(merge_all(members), steps, mean, _under("end", files[-1]), scale)
        if len(self.bins) == len(old):  # boundaries alone keep them apart
            self.limit = 2 * len(old)
        self.bin_steps *= 2

    def finish(self) -> None:
        """Close the last bin."""
        self.flush(force=True)


def _sum(parameter: Tensor) -> float:
    """Tells a parameter that changed from one that did not, without a copy of it."""
    return float(parameter.detach().sum(dtype=torch.float64))


def _row(step: _Step) -> tuple[Tensor, list[float]]:
    """``[learning rates, effective rates, decays, loss weight, coefficient]`` in float64, and the effective decay.

    Neither a short window nor clipping scales the decay; a step without a loss or a skipped one has none.
    """
    coefficient = 1.0 if step.coefficient is None else float(step.coefficient)
    full = [r * m for r, m in zip(step.rates, step.multipliers, strict=True)]
    effective = [rate * step.weight * coefficient for rate in full]
    row = torch.tensor([*step.rates, *effective, *step.decays, step.weight, coefficient], dtype=torch.float64)
    taken = step.weight * coefficient > 0
    return row, [rate * decay * taken for rate, decay in zip(full, step.decays, strict=True)]


def assemble(store: RunStore, segments: int | Sequence[int], snapshots_per_segment: int) -> None:
    """Turn the last stage's bins into snapshots and segments on disk. Works on a finished run and on a killed one.

    A snapshot holds ``mean/…``, the running mean of the parameters over its steps, ``point/…``, the parameters at the
    bin end nearest to its middle, and ``scale/…``, the inverse of the optimizer's diagonal preconditioner averaged over
    its bins.
    """
    bins = [Stretch.from_json(b) for b in store.manifest.get("bins", [])]
    if not bins:
        return
    stage = bins[0].stage
    snapshots = [Stretch.from_json(s) for s in store.manifest.get("snapshots", [])]
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
    named = [*module.named_parameters(), *module.named_buffers()]
    own = {clean_name(name): value for name, value in named}
    if all(torch.equal(value, own[name].cpu()) for name, value in trained.items()):
        return
    # Under another name, so that a kill before the manifest is written leaves the trained weights.
    before, record["final"] = record["final"], _in_stage(len(store.manifest["stages"]) - 1, AVERAGED)
    store.write(record["final"], {name: own[name] for name in trained})
    store.commit(remove=(before,))


def _log(phases: Sequence[Phase], stretch: Stretch, file: Mapping[str, Tensor]) -> Tensor:
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
    snapshots = [Stretch.from_json(s) for s in manifest["snapshots"]]
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
    own = {clean_name(name): p for name, p in module.named_parameters()}
    return [
        name
        for name, value in own.items()
        if name in before and (before[name].shape != value.shape or not torch.equal(before[name], value.cpu()))
    ]


def _write_snapshot(store: RunStore, bins: Sequence[Stretch]) -> Stretch:
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


def _mean_of(key: str, files: Sequence[Mapping[str, Tensor]], stretches: Sequence[Stretch]) -> dict[str, Tensor]:
    return _weighted_mean([_under(key, f) for f in files], [float(s.steps) for s in stretches])


def snapshot_parameters(store: RunStore, snapshot: Stretch, which: str) -> dict[str, Tensor]:
    """A snapshot's full set of tensors by name; ``which`` is ``"mean"`` or ``"point"``."""
    return _frozen(store, snapshot.stage) | _under(which, store.read(snapshot.file))


def mean_parameters(store: RunStore, snapshots: Sequence[Stretch]) -> dict[str, Tensor]:
    """The running mean over several snapshots."""
    states = [snapshot_parameters(store, s, "mean") for s in snapshots]
    return states[-1] | _weighted_mean(states, normalized_weights(snapshots))


def mean_preconditioner(store: RunStore, snapshots: Sequence[Stretch]) -> dict[str, Tensor]:
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


def _bin_name(stretch: Stretch) -> str:
    return f"bins/steps={stretch.first:06d}-{stretch.last:06d}.safetensors"


def _in_stage(stage: int, name: str) -> str:
    return f"stage={stage}/{name}" if stage else name


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + "/")}


def _weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of each floating-point tensor over the states that hold it, in float32 or better."""
    result = {}
    for name, like in {name: value for state in states for name, value in state.items()}.items():
        if like.is_floating_point():
            held = [(state[name], weight) for state, weight in zip(states, weights, strict=True) if name in state]
            whole = sum(weight for _, weight in held)
            total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
            for value, weight in held:
                total += value * (weight / whole)
            result[name] = total.to(like.dtype)
    return result
