"""``lightning-source diff A B``: how two files of scores, or two runs, differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.recording.store import RunStore
from lightning_source.scores import InfluenceScores


def compare_scores(one: InfluenceScores, other: InfluenceScores, k: int) -> dict[str, object]:
    """Correlations of the values and the overlap of each query's ``k`` highest, as JSON; means over queries.

    Raises:
        MisconfigurationException: they are not of the same queries and training examples.
    """
    for name in ("query_ids", "train_ids"):
        if not torch.equal(getattr(one, name), getattr(other, name)):
            raise MisconfigurationException(f"the two files have other `{name}`, so their scores cannot be compared.")
    k = min(k, one.values.shape[1])
    tops = [scores.values.topk(k, 1).indices for scores in (one, other)]
    shared = torch.tensor([len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(*tops, strict=True)])
    keys = sorted(one.metadata.keys() | other.metadata.keys())
    return {
        "queries": len(one.query_ids),
        "examples": len(one.train_ids),
        "pearson": float(_correlation(one.values, other.values).mean()),
        "spearman": float(_correlation(_ranks(one.values), _ranks(other.values)).mean()),
        f"top_{k}_overlap": float(shared.mean()),
        "relative_difference": float((one.values - other.values).norm() / one.values.norm().clamp_min(1e-30)),
        "metadata": {
            key: [one.metadata.get(key), other.metadata.get(key)]
            for key in keys
            if one.metadata.get(key) != other.metadata.get(key)
        },
    }


def compare_runs(one: Path, other: Path) -> dict[str, object]:
    """What differs between the records of two runs, as JSON: ``[of the first, of the second]`` by name."""
    facts = [_facts(RunStore.open(path)) for path in (one, other)]
    keys = sorted(facts[0].keys() | facts[1].keys())
    return {key: [fact.get(key) for fact in facts] for key in keys if facts[0].get(key) != facts[1].get(key)}


def _facts(store: RunStore) -> dict[str, object]:
    manifest = store.manifest
    facts: dict[str, object] = {f"settings.{key}": value for key, value in asdict(manifest.settings).items()}
    facts |= {f"versions.{key}": value for key, value in manifest.versions.items()}
    facts |= {f"flags.{key}": value for key, value in asdict(manifest.flags).items()}
    facts |= {"steps": manifest.steps, "status": manifest.status, "stages": [stage.name for stage in manifest.stages]}
    for index, stage in enumerate(manifest.stages):
        facts[f"stages.{index}.model"] = stage.module.class_name
        facts[f"stages.{index}.examples"] = stage.examples
        facts[f"stages.{index}.optimizer"] = stage.phases[-1].optimizer if stage.phases else None
        facts[f"stages.{index}.coverage"] = None if stage.coverage is None else stage.coverage.share
    for index, segment in enumerate(manifest.segments):
        facts[f"segments.{index}.steps"] = [segment.first, segment.last]
        facts[f"segments.{index}.rates"] = list(segment.rates)
    return facts


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's by row; 0 where one of them is constant."""
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks by row, ties sharing theirs."""
    rows = []
    for row in values:
        _, where, counts = row.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        rows.append((last - (counts.double() - 1) / 2)[where])
    return torch.stack(rows)
