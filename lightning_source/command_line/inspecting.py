"""``lightning-source inspect RUN``: what a run directory holds and what of it is attributed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning_source.recording.manifest import Manifest, StageRecord
from lightning_source.recording.store import RunStore

KINDS = {"bins": "recording", "resume": "recording", "snapshots": "snapshots", "segments": "factors"}


def inspect(path: Path) -> dict[str, object]:
    """What there is to say of a run, as JSON.

    Raises:
        MisconfigurationException: there is no run, or it is damaged.
    """
    store = RunStore.open(path)
    manifest = store.manifest
    return {
        "path": str(path),
        "run_id": manifest.run_id,
        "status": manifest.status or "not begun",
        "steps": manifest.steps,
        "stages": [_stage(manifest, index, stage) for index, stage in enumerate(manifest.stages)],
        "segments": [
            {
                "stage": manifest.stages[segment.stage].name,
                "first_step": segment.first,
                "last_step": segment.last,
                "rates": list(segment.rates),
                "snapshots": len(segment.snapshots),
                "factors": f"segments/{index}.safetensors" in manifest.files,
            }
            for index, segment in enumerate(manifest.segments)
        ],
        "bytes": _sizes(store),
        "missing_files": [name for name in manifest.files if not (path / name).exists()],
        "remarks": _remarks(manifest),
        "versions": manifest.versions,
    }


def text_of(found: dict[str, object]) -> str:
    """The same for people."""
    lines = [f"{found['path']}: {found['status']}, {found['steps']:,} steps, run {str(found['run_id'])[:8]}"]
    for stage in _rows(found["stages"]):
        lines.append(
            f'stage "{stage["name"]}": {stage["model"]}, {stage["parameters"]:,} parameters, {stage["optimizer"]},'
            f" {stage['examples']} training examples"
        )
        lines.append(f"  attributed: {stage['coverage']:.2%} of the trained parameters in {stage['blocks']} blocks")
        lines += [f"  a backward for each example: {name}" for name in _rows(stage["without_form"])]
        lines += [f"  not attributed: {name} ({why})" for name, why in _rows(stage["left_out"])]
    for index, segment in enumerate(_rows(found["segments"])):
        rates = ", ".join(f"{rate:.4g}" for rate in segment["rates"])
        factors = "with factors" if segment["factors"] else "factors are made when it is asked"
        lines.append(
            f'segment {index} of "{segment["stage"]}": steps {segment["first_step"]} to {segment["last_step"]},'
            f" Λ = {rates}, {segment['snapshots']} snapshots, {factors}"
        )
    sizes = found["bytes"]
    assert isinstance(sizes, dict)
    lines.append("on disk: " + ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in sizes.items()))
    lines += [f"missing: {name}" for name in _rows(found["missing_files"])]
    lines += [f"note: {remark}" for remark in _rows(found["remarks"])]
    return "\n".join(lines)


def _rows(value: object) -> list[Any]:
    assert isinstance(value, list)
    return value


def _stage(manifest: Manifest, index: int, stage: StageRecord) -> dict[str, object]:
    coverage = stage.coverage
    steps = [s.steps for s in (*manifest.snapshots, *manifest.bins) if s.stage == index]
    sizes = [_product(shape) for shape in stage.module.parameters.values()]
    return {
        "name": stage.name,
        "model": stage.module.class_name,
        "parameters": sum(sizes),
        "examples": stage.examples,
        "steps": sum(steps),
        "optimizer": stage.phases[-1].optimizer if stage.phases else None,
        "coverage": 0.0 if coverage is None else coverage.share,
        "blocks": 0 if coverage is None else len(coverage.blocks),
        "without_form": [] if coverage is None else [block.name for block in coverage.blocks if block.free],
        "left_out": [] if coverage is None else [[name, reason] for name, _, reason in coverage.left_out],
    }


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _sizes(store: RunStore) -> dict[str, int]:
    """Bytes on disk by what they are for; a file under two names counts once."""
    sizes: dict[str, int] = defaultdict(int)
    seen = set()
    for name in store.manifest.files:
        path = store.path / name
        if not path.exists():
            continue
        stat = path.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folder = name.partition("/")[0] if "/" in name else ""
        kind = "factors" if "covariances" in name else KINDS.get(folder, "parameters and log")
        sizes[kind] += stat.st_size
    return {"all": sum(sizes.values()), **sizes}


def _remarks(manifest: Manifest) -> list[str]:
    flags, remarks = manifest.flags, []
    if manifest.status in ("running", "interrupted"):
        remarks.append("training has not ended: scores are those of the steps so far")
    if manifest.resume:
        remarks.append(f"can be resumed from checkpoints of the steps {', '.join(map(str, sorted(manifest.resume)))}")
    if flags.history_incomplete and not flags.final_model_only:
        remarks.append("training began before it was recorded")
    if flags.resumed_mid_epoch:
        remarks.append("training was resumed within an epoch")
    if flags.final_model_only:
        remarks.append("made of a trained model, without a history")
    if flags.diverged:
        remarks.append("training diverged: scores are refused")
    if any(stage.objective is not None and stage.objective.one_at_a_time for stage in manifest.stages):
        remarks.append("examples are run one at a time")
    return remarks
