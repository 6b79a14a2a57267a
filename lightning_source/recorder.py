"""Records one training as it runs: step log, running means of the parameters, bins on disk. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_source.layers import clean_name
from lightning_source.segments import Stretch, cut, cut_evenly, merge_all, normalized_weights, pairs_to_merge
from lightning_source.store import RunStore

STEPS = "steps.safetensors"
FROZEN = "frozen.safetensors"


class Recorder:
    """Keeps a run directory up to date while somebody else trains.

    Call :meth:`before_step` before each optimizer update and :meth:`after_step` after it, :meth:`flush` whenever the
    parameters may be read and files written, and :meth:`finish` at the end. No call synchronises a device except when
    a bin is closed.

    Args:
        store: the run directory.
        module: the model that is trained.
        bins: the most bins kept; when there are more, neighbours merge and bins double in length.
        boundaries: steps at which a bin must end, because a segment begins there.
        preconditioners: reads the optimizer's diagonal preconditioner by parameter name; none for plain gradient steps.
    """

    def __init__(
        self,
        store: RunStore,
        module: nn.Module,
        bins: int,
        boundaries: Sequence[int] = (),
        preconditioners: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self.store = store
        self.bins: list[Stretch] = []
        self.limit = max(2, bins)
        self.bin_steps = 1
        self.boundaries = sorted(boundaries)
        self._preconditioners = preconditioners
        self.steps = 0
        persistent = set(module.state_dict())
        parameters = {clean_name(name): p for name, p in module.named_parameters()}
        self._trained: dict[str, Tensor] = {name: p for name, p in parameters.items() if p.requires_grad}
        self._buffers = {clean_name(n): b for n, b in module.named_buffers() if n in persistent}
        self._averaged = self._trained | {n: b for n, b in self._buffers.items() if b.is_floating_point()}
        self._sums: list[Tensor] = []
        self._summed = 0
        self._open: list[tuple[list[float], list[float], list[float], float, Tensor | None]] = []
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        store.manifest["frozen"] = store.write(FROZEN, frozen) if frozen else None

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
        clip: Tensor | None,
    ) -> None:
        """Log one optimizer update.

        Args:
            learning_rates: the rate really used, by parameter group.
            multipliers: effective rate over learning rate (momentum), by group.
            weight_decays: coupled decay, by group.
            loss_weight: what the step's loss was multiplied by beside its mean over micro-batches: 1, less in a short
                last accumulation window, 0 in a step without a loss.
            clip: the gradient's norm after clipping over that before, 0-dim on its device; ``None`` if unclipped.
        """
        self._open.append((list(learning_rates), list(multipliers), list(weight_decays), loss_weight, clip))
        self.steps += 1

    def flush(self, force: bool = False) -> None:
        """Close the open bin if it is long enough, reaches a boundary, or is forced to."""
        first = self.bins[-1].last if self.bins else 0
        crossed = any(first < boundary <= self.steps for boundary in self.boundaries)
        if not self._open or not (force or crossed or self.steps - first >= self.bin_steps):
            return
        if self._summed > len(self._open):  # the step that broke off left the parameters as they are
            with torch.no_grad():
                self._add_parameters(-1)
        rows = torch.stack([self._row(*step) for step in self._open])
        groups = len(self._open[0][0])
        effective = rows[:, groups : 2 * groups]
        # Neither a short window nor clipping scales the decay; a step without a loss has none.
        decay = [[r * m * w * (s[3] > 0) for r, m, w in zip(*s[:3], strict=True)] for s in self._open]
        mean = {
            name: (total / self._summed).to(value.dtype)
            for (name, value), total in zip(self._averaged.items(), self._sums, strict=True)
        }
        self._open, self._sums, self._summed = [], [], 0
        stretch = Stretch(
            first, self.steps, tuple(effective.sum(0).tolist()), tuple(map(sum, zip(*decay, strict=True)))
        )
        self._add_bin(stretch, rows, mean, self._trained | self._buffers, self._preconditioners())
        stale: tuple[str, ...] = ()
        if len(self.bins) > self.limit:
            stale = self._halve()
        self.store.manifest["bins"] = [b.to_json() for b in self.bins]
        self.store.manifest["steps"] = self.steps
        self.store.commit(remove=stale)

    @staticmethod
    def _row(
        rates: list[float], multipliers: list[float], decays: list[float], weight: float, clip: Tensor | None
    ) -> Tensor:
        """``[learning rates, effective rates, decays, loss weight, clip coefficient]`` in float64, three by group."""
        coefficient = 1.0 if clip is None else float(clip)
        effective = [r * m * weight * coefficient for r, m in zip(rates, multipliers, strict=True)]
        return torch.tensor([*rates, *effective, *decays, weight, coefficient], dtype=torch.float64)

    def _add_bin(
        self,
        stretch: Stretch,
        steps: Tensor,
        mean: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        preconditioners: Mapping[str, Tensor],
    ) -> None:
        name = f"bins/steps={stretch.first:06d}-{stretch.last:06d}.safetensors"
        tensors = _prefixed("mean", mean) | _prefixed("end", end) | _prefixed("scale", preconditioners)
        self.store.write(name, tensors | {"steps": steps})
        self.bins.append(stretch.at(name))

    def _halve(self) -> tuple[str, ...]:
        """Merge neighbouring bins; gives back the names of the files that are no longer needed."""
        old, self.bins = self.bins, []
        stale: list[str] = []
        for group in pairs_to_merge(old, self.boundaries):
            members = [old[i] for i in group]
            if len(members) == 1:
                self.bins.append(members[0])
                continue
            files = [self.store.read(m.file) for m in members]
            mean, scale = (_mean_of(key, files, members) for key in ("mean", "scale"))
            steps = torch.cat([f["steps"] for f in files])
            self._add_bin(merge_all(members), steps, mean, _under("end", files[-1]), scale)
            stale += [m.file for m in members]
        if len(self.bins) == len(old):  # boundaries alone keep them apart
            self.limit = 2 * len(old)
        self.bin_steps *= 2
        return tuple(stale)

    def finish(self) -> None:
        """Close the last bin."""
        self.flush(force=True)


def assemble(store: RunStore, segments: int | Sequence[int], snapshots_per_segment: int) -> None:
    """Turn a run's bins into snapshots and segments on disk. Works on a finished run and on a killed one.

    A snapshot holds ``mean/…``, the running mean of the parameters over its steps, ``point/…``, the parameters at the
    bin end nearest to its middle, and ``scale/…``, the optimizer's diagonal preconditioner averaged over its bins.
    """
    bins = [Stretch.from_json(b) for b in store.manifest.get("bins", [])]
    if not bins:
        return
    snapshots: list[Stretch] = []
    members: list[list[int]] = []
    for segment in cut(bins, segments):
        groups = cut_evenly([bins[i] for i in segment], snapshots_per_segment)
        members.append([])
        for group in groups:
            snapshots.append(_write_snapshot(store, [bins[segment[i]] for i in group]))
            members[-1].append(len(snapshots) - 1)
    files = [store.read(b.file) for b in bins]
    store.manifest |= {
        "log": store.write(STEPS, {"steps": torch.cat([f["steps"] for f in files])}),
        "final": store.write("final.safetensors", _under("end", files[-1])),
        "snapshots": [s.to_json() for s in snapshots],
        "segments": [merge_all([snapshots[i] for i in group]).to_json() | {"snapshots": group} for group in members],
        "bins": [],
    }
    store.commit(remove=tuple(b.file for b in bins))


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
    return _frozen(store) | _under(which, store.read(snapshot.file))


def mean_parameters(store: RunStore, snapshots: Sequence[Stretch]) -> dict[str, Tensor]:
    """The running mean over several snapshots."""
    states = [snapshot_parameters(store, s, "mean") for s in snapshots]
    return states[-1] | _weighted_mean(states, normalized_weights(snapshots))


def mean_preconditioner(store: RunStore, snapshots: Sequence[Stretch]) -> dict[str, Tensor]:
    """The optimizer's diagonal preconditioner ``P̄`` by parameter, averaged over snapshots; empty for gradient steps."""
    return _weighted_mean([_under("scale", store.read(s.file)) for s in snapshots], normalized_weights(snapshots))


def final_parameters(store: RunStore) -> dict[str, Tensor]:
    """The parameters that training ended with."""
    return _frozen(store) | store.read(store.manifest["final"])


def _frozen(store: RunStore) -> dict[str, Tensor]:
    return store.read(store.manifest["frozen"]) if store.manifest.get("frozen") else {}


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + "/")}


def _weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of the floating-point tensors that all states hold, in float32 or better."""
    result = {}
    for name, like in states[0].items():
        if like.is_floating_point():
            total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
            for state, weight in zip(states, weights, strict=True):
                total += state[name] * (weight / sum(weights))
            result[name] = total.to(like.dtype)
    return result
