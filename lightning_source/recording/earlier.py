"""A run as it was at a step of its training: what came later is left out of it."""

from __future__ import annotations

import copy
import re
from bisect import bisect_left

from lightning_source._lightning import MisconfigurationException, rank_zero_warn
from lightning_source.recording.bins import under, weighted_mean
from lightning_source.recording.intervals import StepInterval, merge_all
from lightning_source.recording.manifest import Manifest, PartialOf, SegmentRecord
from lightning_source.recording.scoring_store import PARTIAL, ApartStore
from lightning_source.recording.snapshots import assemble
from lightning_source.recording.store import RunStore

At = int | float | str
_EPOCHS = re.compile(r"epoch (\d+)")
_PARAMETERS = "at.safetensors"


def as_of(base: RunStore, at: At, stage: int | None = None) -> RunStore:
    """The run as it was after the snapshot whose end is nearest to a point of its training.

    Its parameters there lie between the means of that snapshot and of the next one, and are taken from the line through
    both.

    Args:
        base: the run.
        at: optimizer steps since the run began, or the share of all its steps as a float, or ``"epoch 3"``, after three
            epochs of the stage.
        stage: index of the stage whose epochs are meant; the last by default.

    Raises:
        MisconfigurationException: the run has no such point, or no history.
    """
    manifest = base.manifest
    if manifest.flags.final_model_only:
        raise MisconfigurationException("`at` asks about a moment of training, of which a final model has no record.")
    if manifest.bins:
        assemble(base, manifest.settings.segments, manifest.settings.snapshots_per_segment)
    step = _step_of(manifest, at, len(manifest.stages) - 1 if stage is None else stage)
    nearest = min(range(len(manifest.snapshots)), key=lambda i: abs(manifest.snapshots[i].last - step))
    kept, later = manifest.snapshots[: nearest + 1], manifest.snapshots[nearest + 1 :]
    if kept[-1].last != step:
        ends = ", ".join(str(one.last) for one in manifest.snapshots)
        rank_zero_warn(
            f"`at={at!r}` is step {step}, and the run is known after the steps {ends}: it is asked as it was after step"
            f" {kept[-1].last}."
        )
    if not later:
        return base
    store = ApartStore(base, f"{PARTIAL}/at={kept[-1].last:06d}", _cut(manifest, kept))
    record = store.manifest.stages[-1]
    if later[0].stage == kept[-1].stage and record.final != _PARAMETERS:
        final = base.read(str(record.final))
        means = [under("mean", base.read(one.file)) for one in (kept[-1], later[0])]
        # A mean is over the parameters before each step: of the middle of these, half a step before the snapshot's own.
        between = weighted_mean(means, [later[0].steps - 1.0, kept[-1].steps + 1.0])
        record.final = store.write(_PARAMETERS, final | {n: x for n, x in (means[0] | between).items() if n in final})
        store.commit()
    return store


def _step_of(manifest: Manifest, at: At, stage: int) -> int:
    steps = manifest.snapshots[-1].last
    step: int | None = None
    if isinstance(at, float):
        step = round(at * steps)
    elif isinstance(at, int) and not isinstance(at, bool):
        step = at
    elif isinstance(at, str) and (said := _EPOCHS.fullmatch(at)):
        step = _end_of_epochs(manifest, stage, int(said[1]))
    if step is None or not 1 <= step <= steps:
        raise MisconfigurationException(
            f"`at={at!r}` is no point of this run, which has {steps} steps. HINT: a number of steps, a share of them"
            ' such as `at=0.5`, or `at="epoch 3"` for what three epochs had made.'
        )
    return step


def _end_of_epochs(manifest: Manifest, stage: int, epochs: int) -> int | None:
    """The step after which a stage had seen so many epochs; ``None`` if it never had."""
    own = [one for one in manifest.snapshots if one.stage == stage]
    steps = range(own[0].first, own[-1].last)

    def epoch(step: int) -> int:
        moment = manifest.stages[stage].moment_at(step)
        return -1 if moment is None else moment.current_epoch

    found = bisect_left(steps, epochs, key=epoch)
    if found < len(steps):
        return steps[found]
    return own[-1].last if epoch(steps[-1]) == epochs - 1 else None


def _cut(manifest: Manifest, kept: list[StepInterval]) -> Manifest:
    """The manifest of the run that ended with these snapshots."""
    earlier = copy.deepcopy(manifest)
    earlier.partial_of = PartialOf(run_id=manifest.run_id, bins=list(kept))
    earlier.stages = earlier.stages[: kept[-1].stage + 1]
    earlier.snapshots, earlier.steps, earlier.status, earlier.resume = list(kept), kept[-1].last, "finished", {}
    earlier.segments = []
    unchanged = 0
    for segment in manifest.segments:
        if own := [i for i in segment.snapshots if i < len(kept)]:
            earlier.segments.append(SegmentRecord.over(merge_all([kept[i] for i in own]), own))
            unchanged += len(own) == len(segment.snapshots)
    # Factors that are kept under a number belong to the segment of that number, and others to the model at the end.
    numbers = {f"segments/{index}.safetensors" for index in range(unchanged, len(manifest.segments))}
    earlier.files = {
        name: digest
        for name, digest in earlier.files.items()
        if name not in numbers and not name.startswith("segments/final-of-")
    }
    return earlier
