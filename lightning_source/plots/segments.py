"""When in training, and where in the model, each query's scores arose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_source.plots.canvas import axes_for, in_percent, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_MOST_BARS, _MOST_NAMES = 60, 12  # with gaps between them; in the legend


class _QueryScores(Protocol):
    @property
    def query_ids(self) -> Tensor: ...
    @property
    def metadata(self) -> Mapping[str, object]: ...


@runtime_checkable
class SegmentScores(_QueryScores, Protocol):
    """What the picture of segments takes from scores; see ``InfluenceScores``."""

    def segment_shares(self) -> Tensor: ...  # noqa: D102


@runtime_checkable
class LayerScores(_QueryScores, Protocol):
    """What the picture of layers takes from scores; see ``InfluenceScores``."""

    def layer_shares(self) -> Tensor: ...  # noqa: D102


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
    return _stacked(shares, [_segment(index, steps) for index in range(len(shares))], ids, ax)


def plot_layer_shares(scores: LayerScores | ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Each layer's share of every query's absolute score, as stacked bars, the model's first layer at the bottom.

    Args:
        scores: an ``InfluenceScores`` that was computed with ``per_layer=True``, or shares ``[L, Q]`` as its
            ``layer_shares()`` gives them.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes; of many layers, the legend names every so many.

    Raises:
        MisconfigurationException: the scores have no layers, the shares have another shape, or matplotlib is missing.
    """
    given: object = scores
    ids, names = None, None
    if isinstance(scores, LayerScores):
        given, ids, names = scores.layer_shares(), scores.query_ids.tolist(), scores.metadata.get("layers")
    shares = numbers(given, "shares", "layers", "queries").clamp_min(0)
    known = names if isinstance(names, list) and len(names) == len(shares) else range(len(shares))
    return _stacked(shares, [f"layer {name}" for name in known], ids, ax)


def _stacked(shares: Tensor, names: Sequence[str], ids: Sequence[int] | None, ax: Axes | None) -> Axes:
    """Bars of shares ``[parts, queries]``, of which every so many have their name in the legend."""
    parts, queries = shares.shape
    axes = axes_for(ax, width=min(12.0, 4.5 + 0.15 * queries))
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    colours = matplotlib.colormaps["cividis"](torch.linspace(0.05, 0.95, parts).numpy())
    named = range(0, parts, math.ceil(parts / _MOST_NAMES))
    bottoms = shares.cumsum(0) - shares
    for part in range(parts):
        axes.bar(
            range(queries),
            shares[part].numpy(),
            width=0.85 if queries <= _MOST_BARS else 1.0,
            bottom=bottoms[part].numpy(),
            color=colours[part],
            label=names[part].replace("$", r"\$") if part in named else None,  # which would begin a formula
        )
    shown: dict[float, str] = {row: str(row if ids is None else ids[row]) for row in range(queries)}
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # as many as there is room for
    axes.xaxis.set_major_formatter(lambda place, _: shown.get(place, ""))
    axes.set(xlabel="query", ylabel="share of the absolute score", xlim=(-0.6, queries - 0.4))
    in_percent(axes, "y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), reverse=True, fontsize="small", frameon=False)
    return axes


def _segment(segment: int, steps: object) -> str:
    entry: Any = steps[segment] if isinstance(steps, list) and segment < len(steps) else None
    known = isinstance(entry, Mapping) and "first" in entry and "last" in entry
    return f"segment {segment}" + (f": steps {entry['first']} to {entry['last']}" if known else "")
