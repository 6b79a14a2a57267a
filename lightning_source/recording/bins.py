"""The tensors of a bin or snapshot on disk: how files and the keys in them are named, and how they are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_source.recording.intervals import StepInterval

# Files of a stage; see :func:`in_stage`.
STEPS = "steps.safetensors"
FROZEN = "frozen.safetensors"
FINAL = "final.safetensors"
DRAWN = "drawn.safetensors"
AVERAGED = "averaged.safetensors"


def mean_of(key: str, files: Sequence[Mapping[str, Tensor]], intervals: Sequence[StepInterval]) -> dict[str, Tensor]:
    """The mean over intervals of the tensors that each one's file holds under a key, weighted by their steps."""
    return weighted_mean([under(key, f) for f in files], [float(s.steps) for s in intervals])


def bin_name(interval: StepInterval) -> str:
    """The file of a bin."""
    return f"bins/steps={interval.first:06d}-{interval.last:06d}.safetensors"


def end_name(step: int) -> str:
    """The file of the parameters after a bin's last step; that of the last bin alone is kept."""
    return f"bins/end={step:06d}.safetensors"


def in_stage(stage: int, name: str) -> str:
    """A stage's own file of that name."""
    return f"stage={stage}/{name}" if stage else name


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys ``prefix/name``."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`prefixed`."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + "/")}


def inverse(diagonal: Tensor) -> Tensor:
    """``1/x``, and 0 where there is 0: entries that carry nothing do so on disk and off it."""
    return torch.where(diagonal == 0, 0.0, 1 / diagonal)


def weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of each floating-point tensor over the states that hold it, in float32 or better."""
    result = {}
    for name, like in {name: value for state in states for name, value in state.items()}.items():
        if like.is_floating_point():
            present = [(state[name], weight) for state, weight in zip(states, weights, strict=True) if name in state]
            whole = sum(weight for _, weight in present)
            total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
            for value, weight in present:
                total += value * (weight / whole)
            result[name] = total.to(like.dtype)
    return result
