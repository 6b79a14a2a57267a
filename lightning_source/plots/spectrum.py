"""A segment's curvature, and what SOURCE makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lightning_source._lightning import MisconfigurationException
from lightning_source.curvature.unroll import segment_decay, segment_response
from lightning_source.plots.canvas import axes_for, by_name, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_BINS, _DECADES, _MOST_NAMES = 60, 12, 12


def plot_spectrum(
    eigenvalues: ArrayLike | Mapping[str, ArrayLike],
    rate: float,
    weight_decay: float = 0.0,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Histogram of a segment's curvature eigenvalues ``σ``, and over it how SOURCE answers to each (method §2).

    On the right axis are ``F_r(σ) / Λ``, by how much less than a plain sum of gradients an example's effect counts
    there, and ``F_S(σ)``, how much of an earlier change of the parameters is left at the segment's end. Both fall
    around ``σ = 1/Λ``, the dotted line: where all eigenvalues lie left of it, SOURCE is a gradient dot product, and far
    to the right it is the influence function.

    Args:
        eigenvalues: ``σ``, of any shape, or several of these by block; under Adam those of ``P^½ H P^½`` (method §3).
            Round-off negatives count as 0, and the first bar also holds what is too small for the axis.
        rate: ``Λ``, the sum of effective learning rates over the segment's steps.
        weight_decay: ``w``, the L2 decay, which the functions add to every ``σ``.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes of the histogram; the functions' are a twin of them, ``ax.figure.axes[-1]``.

    Raises:
        MisconfigurationException: ``rate`` is not positive, the decay negative, an eigenvalue not finite, or matplotlib
            is missing.

    Example::

        run = SourceScorer.from_run("source-run", model).run
        segment = run.segments()[0]
        factors = run.snapshot_factors(segment)
        plot_spectrum({name: f.eigenvalues for name, f in factors.items()}, segment.stretch.rates[0])
    """
    if not (math.isfinite(rate) and rate > 0 and math.isfinite(weight_decay) and weight_decay >= 0):
        raise MisconfigurationException(
            f"`rate={rate}` must be positive and `weight_decay={weight_decay}` not negative, both finite."
        )
    blocks = {
        name: numbers(values, "eigenvalues").clamp_min(0)
        for name, values in by_name(eigenvalues, "eigenvalues", "eigenvalues").items()
    }
    axes = axes_for(ax, width=7.0)
    import matplotlib
    from matplotlib.transforms import ScaledTranslation

    whole = torch.cat([*blocks.values(), torch.tensor([0.1 / rate, 10 / rate], dtype=torch.float64)])
    high = math.log10(float(whole.max()))
    low = max(math.log10(float(whole[whole > 0].min())), high - _DECADES)
    edges = torch.logspace(low, high, _BINS + 1, dtype=torch.float64)
    colours = matplotlib.colormaps["viridis"](torch.linspace(0.0, 0.9, len(blocks)).numpy())  # first to last block
    named = range(0, len(blocks), math.ceil(len(blocks) / _MOST_NAMES))
    for index, (name, values) in enumerate(blocks.items()):
        places = torch.bucketize(values, edges[1:-1], right=True)
        shares = torch.bincount(places, minlength=_BINS).double() / len(values)
        alone = len(blocks) == 1
        colour, label = "0.75" if alone else colours[index], name if index in named else None
        axes.stairs(shares.numpy(), edges.numpy(), label=label, fill=alone, color=colour)
    axes.set(xscale="log", xlabel="eigenvalue σ", ylabel="share of the eigenvalues", xlim=(10**low, 10**high))
    twin = axes.twinx()
    sigma = torch.logspace(low, high, 400, dtype=torch.float64)
    for function, label, style in (
        (segment_response(sigma, rate, weight_decay) / rate, "$F_r(σ)\\,/\\,Λ$", "-"),
        (segment_decay(sigma, rate, weight_decay), "$F_S(σ)$", "--"),
    ):
        twin.plot(sigma.numpy(), function.numpy(), color="black", linestyle=style, label=label)
    twin.axvline(1 / rate, color="black", linestyle=":", linewidth=1, label="$σ = 1/Λ$")
    twin.set(ylim=(0, 1.02), ylabel="response")
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (axes, twin)), strict=True))
    beside = twin.transAxes + ScaledTranslation(
        45 / 72, 0, twin.figure.dpi_scale_trans
    )  # behind the right axis's label
    twin.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1, 1.03),
        bbox_transform=beside,
        fontsize="small",
        frameon=False,
    )
    return axes
