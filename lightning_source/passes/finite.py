"""Errors on values that are NaN or infinite, which name the block and the examples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_source.curvature.block_gradients import BlockGradients


def require_finite(values: Tensor, name: str, what: str) -> None:
    """Raise ``FloatingPointError`` that names the block and the quantity where a value is NaN or infinite."""
    if not values.numel():
        return
    lowest, highest = values.aminmax()  # NaN comes through, and one pass is enough
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise FloatingPointError(f"non-finite {what} at `{name}`")


def require_finite_gradients(gradients: BlockGradients, name: str, ids: Tensor) -> None:
    """Raise ``FloatingPointError`` that names the block and the examples whose gradient there is NaN or infinite."""
    seen = [gradients.gradients] if gradients.vocabulary else [gradients.activations, gradients.gradients]
    bad = ~torch.stack([values.isfinite().transpose(0, 1).flatten(1).all(1) for values in seen]).all(0)
    if bad.any():
        raise FloatingPointError(f"non-finite gradients of examples {shorten(ids[bad.cpu()])} at `{name}`")


def shorten(ids: Tensor) -> str:
    """The first five ids and how many more there are, for a message."""
    listed = ", ".join(map(str, ids[:5].tolist()))
    return listed + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
