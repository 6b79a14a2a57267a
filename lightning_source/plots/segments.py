"""When in training each query's scores arose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_source.plots.canvas import axes_for, in_percent, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_MOST_BARS, _MOST_NAMES = 60, 12  # with gaps between them; in the legend


@runtime_checkable
class SegmentScores(Protocol):
    """What the picture takes from scores; see ``InfluenceScores``."""

    @property
    def query_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, object]: ...  # noqa: D102
    def segment_shares(self) -> Tensor: ...  # noqa: D102


def plot_segment_shares(scores: SegmentScores | ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Each segment's share of every query's absolute score, as stacked bars, the first segment at the bottom.

    Args:
        scores: an ``InfluenceScores`` that was computed with ``per_segment=True``, or shares ``[S, Q]`` as its
            ``segment_shares()`` gives them.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: the scores have no segments, the shares have another shape or are negative, or
            matplotlib is missing.
    """
    given: object = scores
    ids, steps = None, None
    if isinstance(scores, SegmentScores):
        given, ids, steps = scores.segment_shares(), scores.query_ids.tolist(), scores.metadata.get("segments")
    shares = numbers(given, "shares", "segments", "queries").clamp_min(0)
    segments, queries = shares.shape
    axes = axes_for(ax, width=min(12.0, 4.5 + 0.15 * queries))
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    colours = matplotlib.colormaps["cividis"](torch.linspace(0.05, 0.95, segments).numpy())
    named = range(0, segments, math.ceil(segments / _MOST_NAMES))
    bottoms = shares.cumsum(0) - shares
    for segment in range(segments):
        axes.bar(
            range(queries),
            shares[segment].numpy(),
            width=0.85 if queries <= _MOST_BARS else 1.0,
            bottom=bottoms[segment].numpy(),
            color=colours[segment],
            label=_name(segment, steps) if segment in named else None,
        )
    names: dict[float, str] = {row: str(row if ids is None else ids[row]) for row in range(queries)}
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # as many as there is room for
    axes.xaxis.set_major_formatter(lambda place, _: names.get(place, ""))
    axes.set(xlabel="query", ylabel="share of the absolute score", xlim=(-0.6, queries - 0.4))
    in_percent(axes, "y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), reverse=True, fontsize="small", frameon=False)
    return axes


def _name(segment: int, steps: object) -> str:
    entry: Any = steps[segment] if isinstance(steps, list) and segment < len(steps) else None
    known = isinstance(entry, Mapping) and "first" in entry and "last" in entry
    return f"segment {segment}" + (f": steps {entry['first']} to {entry['last']}" if known else "")
