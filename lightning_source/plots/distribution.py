"""How large scores are, and how few examples hold most of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_source.plots.canvas import HARMED, HELPED, NEUTRAL, axes_for, in_percent, line_with_band, score_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_BINS, _MOST_POINTS = 41, 400


class Matrix(Protocol):
    """What the pictures take from scores; see ``InfluenceScores``."""

    @property
    def values(self) -> Tensor: ...  # noqa: D102


def plot_histogram(scores: Matrix | ArrayLike, *, ax: Axes | None = None) -> Axes:
    """How many scores, all queries together, have which size, on a logarithmic axis of counts.

    Scores of examples that helped and of ones that harmed differ in colour; the grey bar is around 0.

    Args:
        scores: an ``InfluenceScores``, or values ``[Q, N]``, which are taken for scores of a loss: positive = helped.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: another shape, values that are not finite, or matplotlib is missing.
    """
    values = score_matrix(scores)
    axes = axes_for(ax)
    limit = float(values.abs().max()) or 1.0
    counts = torch.histc(values, _BINS, -limit, limit)
    edges = torch.linspace(-limit, limit, _BINS + 1, dtype=torch.float64)
    half, width = _BINS // 2, 2 * limit / _BINS
    sides = [("harmed", HARMED), ("helped", HELPED)]
    left, right = sides if getattr(scores, "_lower_is_better", True) else sides[::-1]
    parts = ((slice(0, half), *left), (slice(half, half + 1), None, NEUTRAL), (slice(half + 1, None), *right))
    for part, label, colour in parts:
        places, heights = edges[:-1][part].numpy(), counts[part].numpy()
        axes.bar(places, heights, width=width, align="edge", color=colour, label=label)
    axes.set(xlabel="score (positive: removal raises the measurement)", ylabel="number of scores", yscale="log")
    axes.set(ylim=(0.5, 2 * float(counts.max())), xlim=(float(values.min()) - width, float(values.max()) + width))
    axes.legend(fontsize="small", frameon=False)
    return axes


def plot_concentration(scores: Matrix | ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Which share of each query's absolute score the training examples with the largest scores hold together.

    The line is the mean over queries, the band holds the middle 80 % of them, and the dotted diagonal is where all
    examples have scores of one size.

    Args:
        scores: an ``InfluenceScores``, or values ``[Q, N]``.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: another shape, values that are not finite, or matplotlib is missing.
    """
    sizes = score_matrix(scores).abs().sort(1, descending=True).values
    axes = axes_for(ax, width=4.5)
    queries, examples = sizes.shape
    held = torch.cat([sizes.new_zeros(queries, 1), sizes.cumsum(1)], 1)
    at = torch.linspace(0, examples, min(examples, _MOST_POINTS) + 1).round().long()
    shares = held[:, at] / held[:, -1:].clamp_min(torch.finfo(held.dtype).tiny)
    low, high = (shares.quantile(q, dim=0) for q in (0.1, 0.9)) if queries > 1 else (None, None)
    label = "mean over queries" if queries > 1 else "scores"
    line_with_band(axes, at / examples, shares.mean(0), low, high, label, color=HELPED)
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="all of one size")
    axes.set(xlabel="training examples, largest scores first", ylabel="share of the absolute score")
    in_percent(axes, "x", "y")
    axes.legend(loc="lower right", fontsize="small", frameon=False)
    return axes
