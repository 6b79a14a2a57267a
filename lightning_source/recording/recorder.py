"""Records one training as it runs: step log, running means of the parameters, bins on disk. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_source.capture.attributes import read_attributes, with_reading
from lightning_source.names import clean_name, named_parameters
from lightning_source.recording.bins import FROZEN, bin_name, end_name, in_stage, inverse, mean_of, prefixed, under
from lightning_source.recording.gradient_factors import BinLog, column_of_each, factors_of, parts_of
from lightning_source.recording.intervals import StepInterval, merge_all, pairs_to_merge
from lightning_source.recording.manifest import ResumePoint, StageRecord
from lightning_source.recording.parameter_groups import phase_at
from lightning_source.recording.replaced import Replaced, UsedParameters
from lightning_source.recording.resume_points import rewind, steps_of, table_of, unused_files
from lightning_source.recording.step_log import StepLog, StepRecord
from lightning_source.recording.store import RunStore

KEPT_ON_DEVICE = 1024  # steps whose gradient norms may wait on their device
SAMPLES = 32  # steps of a bin whose parameters make its mean
RESUME_POINTS = 3  # how many of the last checkpoints can be resumed from without a gap
WATCHED_FROZEN = 1 << 22  # scalars of parameters without gradients that are looked at whenever a bin ends


class Recorder:
    """Keeps a run directory up to date while somebody else trains.

    Call :meth:`before_step` before each optimizer update and :meth:`after_step` after it, :meth:`flush` whenever the
    parameters may be read and files written, and :meth:`finish` at the end. No call synchronises a device except when
    a bin is closed, or at every thousandth step of a long one.

    Args:
        store: the run directory.
        module: the model that is trained; a parameter that does not require gradients is frozen until
            :meth:`regroup`.
        bins: the most bins kept of a run of unknown length; when there are more, neighbours merge and bins double in
            length.
        planned: steps of the stage at which a bin ends, where the length of training is known; after the last of them,
            bins are as long as the longest.
        points: whether bins keep the parameters after their last step, beside the mean over their steps.
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
        planned: Sequence[int] = (),
        points: bool = False,
        boundaries: Sequence[int] = (),
        preconditioners: Callable[[], Mapping[str, Tensor]] = dict,
        stage: int = 0,
        point: ResumePoint | None = None,
    ) -> None:
        self.store = store
        self._module = module
        self.bins: list[StepInterval] = []
        self.limit = len(planned) + 1 if planned else max(2, bins)
        self.bin_steps = max((b - a for a, b in pairwise([0, *planned])), default=1)
        self.points = points
        self.stage = stage
        self.start = store.manifest.steps  # steps of the stages before
        self.steps = self.start
        self.boundaries = sorted(self.start + boundary for boundary in boundaries)
        self.planned = sorted(self.start + end for end in planned)
        self._preconditioners = preconditioners
        persistent = set(module.state_dict())
        owners = {name: child for name, child in module.named_modules()}
        self._buffer_owners = {
            clean_name(name): (owners[name.rpartition(".")[0]], name.rpartition(".")[2])
            for name, _ in module.named_buffers()
            if name in persistent
        }
        parameters = named_parameters(module)
        self._used = UsedParameters(module)
        self._average([name for name, p in parameters.items() if p.requires_grad])
        self._sums: list[Tensor] = []
        self._summed = 0
        self._unfinished = False  # the sums hold the parameters of a step that has not been made
        self._open: list[StepRecord] = []
        self._norms: list[Tensor | None] = []  # gradient norms of the open steps, on their devices; None: not seen
        self._frozen_sums: dict[str, float] = {}  # before the first step
        if point is not None:
            self._resume(point)
            return
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._frozen_sums = {name: _sum(p) for name, p in frozen.items()}
        self._record.frozen = store.write(in_stage(stage, FROZEN), frozen) if frozen else None
        self._record.attributes = (read_attributes(module, self.start),)

    @property
    def replaced(self) -> dict[str, Replaced]:
        """Parameters that layers no longer use as they are, by name."""
        return self._used.replaced

    @property
    def _record(self) -> StageRecord:
        return self.store.manifest.stages[self.stage]

    @torch.no_grad()
    def before_step(self) -> None:
        """The parameters as they are now are those that this step's gradient was taken at: add them to the mean.

        Of a long bin, evenly spread steps are enough: parameters next to each other hardly differ.
        """
        # After a step that broke off, the parameters are those that were added before it.
        if not self._unfinished and len(self._open) % self._every == 0:
            self._add_parameters(1)
            self._unfinished = True

    @property
    def _every(self) -> int:
        first = self.bins[-1].last if self.bins else self.start
        ends = [end for end in self._ends if end > first]
        return max(1, (ends[0] - first if ends else self.bin_steps) // SAMPLES)

    @property
    def _ends(self) -> list[int]:
        """Where a bin ends: at boundaries, as planned, and a few times before the first planned end.

        The early ones halve the way to the start each time, so that a training that is stopped long before its planned
        end can be cut into segments, too.
        """
        first = self.planned[0] - self.start if self.planned else 0
        early = {self.start + (first >> k) for k in range(1, first.bit_length())}
        return sorted({*self.boundaries, *self.planned, *early})

    def _without_unfinished(self) -> None:
        """Take the parameters of a step that broke off out of the sums."""
        if self._unfinished:
            with torch.no_grad():
                self._add_parameters(-1)
            self._unfinished = False

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
        gradient_norms: Tensor | None,
    ) -> None:
        """Log one optimizer update.

        Args:
            learning_rates: the rate really used, by column.
            multipliers: effective rate over learning rate (momentum), by column.
            weight_decays: coupled decay, by column.
            loss_weight: what the step's loss was multiplied by beside its mean over micro-batches: 1, less in a short
                last accumulation window, 0 in a step without a loss.
            gradient_norms: of each parameter's gradient, as backward left it and as the optimizer was given it, in the
                order of the columns, ``[2, parameters]`` on their device; ``None`` for no difference.
        """
        self._open.append(StepRecord(tuple(learning_rates), tuple(multipliers), tuple(weight_decays), loss_weight))
        self._norms.append(gradient_norms)
        if len(self._norms) % KEPT_ON_DEVICE == 0:
            self._norms = [None if norms is None else norms.cpu() for norms in self._norms]
        self.steps += 1
        self._unfinished = False

    def flush(self, force: bool = False) -> None:
        """Close the open bin if it is long enough, reaches a planned end or a boundary, or is forced to."""
        first = self.bins[-1].last if self.bins else self.start
        crossed = any(first < end <= self.steps for end in self._ends)
        if not self._open or not (force or crossed or self.steps - first >= self.bin_steps):
            return
        self._without_unfinished()
        bin_log = self._log_open_steps()
        log, coefficients = bin_log.log, bin_log.log.coefficient.tolist()
        decays = [step.effective_decays(c) for step, c in zip(self._open, coefficients, strict=True)]
        mean = {
            name: (total / self._summed).to(value.dtype)
            for (name, value), total in zip(self._averaged.items(), self._sums, strict=True)
        }
        totals = (tuple(log.effective_rate.sum(0).tolist()), tuple(map(sum, zip(*decays, strict=True))))
        interval = StepInterval(first, self.steps, *totals, stage=self.stage)
        scales = {name: inverse(value) for name, value in self._preconditioners().items()}
        end = self._used.values() | self._buffers
        counters = {name: buffer for name, buffer in end.items() if not buffer.is_floating_point()}  # have no mean
        self._add_bin(interval, bin_log, mean | counters, end if self.points else {}, scales)
        if not self.points:
            self.store.write(end_name(self.steps), end)
        self._open, self._norms, self._sums, self._summed = [], [], [], 0  # not before they are on disk
        if len(self.bins) > self.limit and not self._merge_early():
            self._halve()
        self._read_attributes()
        self._enter_bins()
        self._follow_what_moves()
        self.store.commit(remove=unused_files(self.store.manifest, self.bins))

    def _log_open_steps(self) -> BinLog:
        norms = self._stacked_norms()
        if norms is None:
            return BinLog(StepLog.of(self._open, [1.0] * len(self._open)))
        places = column_of_each(self._record.phases[-1].columns)
        members = [[i for i, place in enumerate(places) if place == column] for column in range(1 + max(places))]
        overall = factors_of(norms, [range(len(places))])[:, 0]
        own = factors_of(norms, members)
        log = StepLog.of(self._open, overall.tolist(), own.tolist())
        parts = parts_of(norms, places, own)
        if parts is None:
            return BinLog(log)
        members = [[i for i, part in enumerate(parts) if part == p] for p in range(1 + max(parts))]
        full = StepLog.of(self._open, overall.tolist(), torch.ones_like(own).tolist()).effective_rate
        columns = [places[indices[0]] for indices in members]
        return BinLog(log, tuple(parts), full[:, columns] * factors_of(norms, members))

    def _stacked_norms(self) -> Tensor | None:
        """Gradient norms of the open steps, ``[steps, 2, parameters]``; ``None`` where none was seen."""
        seen = [norms for norms in self._norms if norms is not None]
        if not seen:
            return None
        alike = torch.ones_like(seen[0])
        return torch.stack([alike if norms is None else norms.to(alike) for norms in self._norms]).cpu()

    def _follow_what_moves(self) -> None:
        """A parameter without gradients that the user moves, a teacher's say, is recorded as the trained ones are."""
        if self._frozen_sums:
            parameters = named_parameters(self._module)
            stood = {name: total for name, total in self._frozen_sums.items() if name in parameters}
            moved = [name for name, total in stood.items() if _sum(parameters[name]) != total]
            self._average([*dict.fromkeys([*self._trained, *moved])])
            # Moved late, a target network at the end of an epoch, say, it is recorded from then on. To look again at
            # a large frozen model takes time: what stands still in its first bin is taken to stand still.
            small = sum(p.numel() for name, p in parameters.items() if name in self._frozen_sums) <= WATCHED_FROZEN
            still = {name: total for name, total in self._frozen_sums.items() if name not in moved}
            self._frozen_sums = still if small else {}

    def _read_attributes(self) -> None:
        """What the module holds besides its ``state_dict``, at the end of a bin."""
        reading = read_attributes(self._module, self.steps)
        ends = [interval.last for interval in self.bins]
        self._record.attributes = with_reading(self._record.attributes, reading, ends)

    def _enter_bins(self) -> None:
        self.store.manifest.bins, self.store.manifest.steps = list(self.bins), self.steps

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
        self._trained = tuple(trained)
        self._used.follow(trained)

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The buffers as they are now: a module may put another tensor in place of one."""
        buffers = {name: owner._buffers[leaf] for name, (owner, leaf) in self._buffer_owners.items()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    @property
    def _averaged(self) -> dict[str, Tensor]:
        return self._used.values() | {n: b for n, b in self._buffers.items() if b.is_floating_point()}

    # ---------------------------------------------------------------- resume

    def save_point(self) -> None:
        """Keep what is needed to go on from here if a checkpoint of this moment is loaded; the last few are kept.

        Local files only, no collective: checkpoints are also taken on one rank, and in the middle of a step.
        """
        points = self.store.manifest.resume
        norms = self._stacked_norms()
        tensors = {f"sum/{i}": total for i, total in enumerate(self._sums)}
        tensors |= {"open": table_of(self._open)} if self._open else {}
        tensors |= {} if norms is None else {"norms": norms}
        name = f"resume/step={self.steps:06d}.safetensors"
        points.pop(self.steps, None)  # the newest comes last
        points[self.steps] = ResumePoint(
            file=self.store.write(name, tensors) if tensors else None,
            bins=list(self.bins),
            summed=self._summed,
            bin_steps=self.bin_steps,
            limit=self.limit,
            start=self.start,
            steps=self.steps,
            boundaries=list(self.boundaries),
            trained=list(self._trained),
            stage=self._record.progress(),
            planned=list(self.planned),
            unfinished=self._unfinished,
        )
        for old in list(points)[:-RESUME_POINTS]:
            del points[old]
        self.store.commit(remove=unused_files(self.store.manifest, self.bins))

    def _resume(self, point: ResumePoint) -> None:
        """Drop what was recorded after the point and go on from it."""
        tensors = self.store.read(point.file) if point.file else {}
        self._average(point.trained)
        devices = [value.device for value in self._averaged.values()]
        self._sums = [tensors[f"sum/{i}"].to(d) for i, d in enumerate(devices)] if point.summed else []
        self._summed = point.summed
        self._open = steps_of(point, tensors)
        self._unfinished = point.unfinished or point.summed > len(self._open)  # the first version took every step
        self._norms = self._kept_norms(tensors, point)
        self.bins = list(point.bins)
        planned = [end - self.start + point.start for end in self.planned]
        self.bin_steps, self.limit, self.start = point.bin_steps, point.limit, point.start
        self.boundaries, self.steps = list(point.boundaries), point.steps
        # The bins go on as they were planned, unless training is longer now than it was to be.
        longer = planned and planned[-1] > (point.planned or [self.start])[-1] + point.bin_steps
        self.planned = planned if longer else list(point.planned)
        manifest = self.store.manifest
        manifest.resume = {step: later for step, later in manifest.resume.items() if step <= self.steps}
        self._record.restore(point.stage)
        self._record.attributes = tuple(r for r in self._record.attributes if r.step <= self.steps)
        ended = rewind(self.store, self.stage, self.start)  # where training had ended, and was asked for again
        self._enter_bins()
        self._without_unfinished()  # saved in the middle of a step, which begins anew
        self.store.commit(remove=(*ended, *unused_files(manifest, self.bins)))

    def _kept_norms(self, tensors: Mapping[str, Tensor], point: ResumePoint) -> list[Tensor | None]:
        """Gradient norms of a point's open steps; the first version kept one coefficient for each."""
        if "norms" in tensors:
            return [*tensors["norms"]]
        if "clip/0" not in tensors:
            return [None] * len(self._open)
        alike = torch.ones(len(column_of_each(point.stage.phases[-1].columns)))
        return [torch.stack([alike, alike * tensors[f"clip/{i}"].cpu()]) for i in range(len(point.open))]

    def _add_bin(
        self,
        interval: StepInterval,
        log: BinLog,
        mean: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
    ) -> None:
        name = bin_name(interval)
        tensors = prefixed("mean", mean) | prefixed("end", end) | prefixed("scale", scales)
        self.store.write(name, tensors | log.tensors())
        self.bins.append(interval.at(name))

    def _merge_early(self) -> bool:
        """Merge bins before the first planned end: all, once it is reached, else two; gives back if there were any.

        Each of them is as long as those before it together, so that two are merged by the next step at the latest.
        """
        old = self.bins
        early = [i for i, one in enumerate(old) if self.planned and one.last <= self.planned[0]]
        reached = bool(early) and self.steps >= self.planned[0]
        groups: list[list[int]] = []
        for index in early:
            merges = groups and old[index].first not in self.boundaries and (reached or len(groups) == index)
            if merges:
                groups[-1].append(index)
            else:
                groups.append([index])
        if len(groups) == len(early):
            return False
        self._merge([*groups, *([index] for index in range(len(early), len(old)))])
        return True

    def _halve(self) -> None:
        """Merge neighbouring bins."""
        before = len(self.bins)
        self._merge(pairs_to_merge(self.bins, self.boundaries))
        if len(self.bins) == before:  # boundaries alone keep them apart
            self.limit = 2 * before
        self.bin_steps *= 2

    def _merge(self, groups: Sequence[Sequence[int]]) -> None:
        old, self.bins = self.bins, []
        for group in groups:
            members = [old[i] for i in group]
            if len(members) == 1:
                self.bins.append(members[0])
                continue
            files = [self.store.read(m.file) for m in members]
            mean, scale = (mean_of(key, files, members) for key in ("mean", "scale"))
            mean = under("mean", files[-1]) | mean  # counters
            columns = phase_at(self._record.phases, members[0].first).columns if self._record.phases else ()
            log = BinLog.concatenated([BinLog.read(file) for file in files], columns)
            self._add_bin(merge_all(members), log, mean, under("end", files[-1]), scale)

    def finish(self) -> None:
        """Close the last bin."""
        self.flush(force=True)


def _sum(parameter: Tensor) -> float:
    """Tells a parameter that changed from one that did not, without a copy of it."""
    return float(parameter.detach().sum(dtype=torch.float64))
