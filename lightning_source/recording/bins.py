"""The tensors of a bin or snapshot on disk: how files and the keys in them are named, and how they are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_source.recording.intervals import StepInterval

STEPS = "steps.safetensors"


FROZEN = "frozen.safetensors"


FINAL = "final.safetensors"


AVERAGED = "averaged.safetensors"


def _mean_of(key: str, files: Sequence[Mapping[str, Tensor]], stretches: Sequence[StepInterval]) -> dict[str, Tensor]:
    return _weighted_mean([_under(key, f) for f in files], [float(s.steps) for s in stretches])


def _bin_name(stretch: StepInterval) -> str:
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
