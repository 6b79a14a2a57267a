"""Scores against the truth: what ``lightning_source.evaluation`` found, by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lightning_source.plots.canvas import (
    MANY_LINES,
    NEUTRAL,
    axes_for,
    in_percent,
    legend,
    line_with_band,
    numbers,
    some,
)
from lightning_source.report import LdsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_POINTS: dict[str, Any] = {"marker": "o", "markersize": 3}


class RemovalResult(Protocol):
    """What :func:`plot_removal` takes from a result of ``SubsetRemoval``; ``[K]`` and ``[K, 2]``."""

    @property
    def sizes(self) -> Tensor: ...  # noqa: D102
    @property
    def flipped(self) -> Tensor: ...  # noqa: D102
    @property
    def interval(self) -> Tensor: ...  # noqa: D102
    @property
    def random(self) -> Tensor: ...  # noqa: D102
    @property
    def random_interval(self) -> Tensor: ...  # noqa: D102


class Curve(Protocol):
    """What :func:`plot_further_training` takes from a ``CosineCurve``; each ``[E]``."""

    @property
    def epochs(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def mean(self) -> ArrayLike: ...  # noqa: D102
    @property
    def sem(self) -> ArrayLike | None: ...  # noqa: D102


def plot_lds(results: Mapping[str, LdsResult], *, ax: Axes | None = None) -> Axes:
    """Linear datamodeling scores of several methods, one below the other, with 95 % intervals over queries.

    The grey field of each row is where 95 % of the same scores lie when they are dealt to other examples. The dashed
    line is the ceiling, the square root of the ground truth's reliability: about the highest score to reach.

    Args:
        results: what ``linear_datamodeling_score`` gave, by method.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: there are no results, a value is not finite, or matplotlib is missing.

    Example::

        truth = retrain(build, subsets, seeds=range(5), measure=margins, dirpath="truth")
        methods = ("source", "influence", "tracin")
        scores = {name: trainer.attribute(query, method=name, measurement="margin") for name in methods}
        plot_lds({name: linear_datamodeling_score(s, subsets, truth) for name, s in scores.items()})
    """
    names = list(some(results, "results"))
    axes = axes_for(ax, height=1.3 + 0.35 * len(names))
    axes.axvline(0, color=NEUTRAL, linewidth=0.8)
    for row, name in enumerate(names):
        result = results[name]
        low, high = numbers(result.interval, "interval", "2").tolist()
        left, right = numbers(result.control_interval, "control_interval", "2").tolist()
        axes.barh(row, right - left, left=left, height=1.0, color="0.9", label="dealt at random (95 %)", zorder=0)
        axes.hlines(row, low, high, color="C0", linewidth=2)
        axes.plot(float(result.lds), row, "o", color="C0")
        if result.reliability is not None and result.reliability > 0:
            ceiling = float(result.reliability) ** 0.5
            axes.vlines(
                ceiling,
                row - 0.5,
                row + 0.5,
                color="black",
                linestyle="--",
                linewidth=1,
                label="ceiling (√reliability)",
            )
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="linear datamodeling score", ylim=(len(names) - 0.5, -0.5))
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # each row has its own
    axes.legend(
        once.values(), once.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", frameon=False
    )
    return axes


def plot_removal(results: Mapping[str, RemovalResult], *, ax: Axes | None = None) -> Axes:
    """Share of queries misclassified once their top proponents are removed, by their number, with 95 % intervals.

    The dotted grey line is the control, the removal of random examples of the query's label.

    Args:
        results: what ``SubsetRemoval`` computed, by method.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: there are no results, shapes do not fit, or matplotlib is missing.
    """
    some(results, "results")
    axes = axes_for(ax, width=6.0 if len(results) <= MANY_LINES else 8.0)
    for name, result in results.items():
        _draw_removal(axes, name, result.sizes, result.flipped, result.interval)
    controls: list[list[list[float]]] = []  # methods that were measured together have one
    for name, result in results.items():
        if (control := [list(map(float, values)) for values in (result.sizes, result.random)]) not in controls:
            label = f"random{f', beside {name}' if controls else ''}"
            style = {"color": NEUTRAL, "linestyle": ":"}
            _draw_removal(axes, label, result.sizes, result.random, result.random_interval, **style)
            controls.append(control)
    axes.set(xlabel="training examples removed for each query", ylabel="share of queries flipped")
    in_percent(axes, "y")
    axes.set_ylim(-0.02, None)
    legend(axes, len(results))
    return axes


def _draw_removal(axes: Axes, label: str, sizes: Tensor, shares: Tensor, interval: Tensor, **style: Any) -> None:
    x, middle = numbers(sizes, "sizes", "sizes"), numbers(shares, "shares", "sizes")
    ends = numbers(interval, "interval", "sizes", "2")
    line_with_band(axes, x, middle, ends[:, 0], ends[:, 1], label, **_POINTS, **style)


def plot_further_training(curves: Mapping[str, Curve], *, ax: Axes | None = None) -> Axes:
    """Cosine between scores and the effects of further training, by method, with bands of one standard error.

    Args:
        curves: what ``FurtherTraining.cosine`` gave, by method. The amount of further training, ``epochs``, is on a
            logarithmic axis; without ``sem`` there is no band.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: there are no curves, lengths differ, or matplotlib is missing.
    """
    some(curves, "curves")
    axes = axes_for(ax, width=6.0 if len(curves) <= MANY_LINES else 8.0)
    axes.set_xscale("log")
    for name, curve in curves.items():
        x, mean = numbers(curve.epochs, "epochs", "epochs"), numbers(curve.mean, "mean", "epochs")
        error = None if curve.sem is None else numbers(curve.sem, "sem", "epochs")
        low, high = (None, None) if error is None else (mean - error, mean + error)
        line_with_band(axes, x, mean, low, high, name, **_POINTS)
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="epochs of further training", ylabel="cosine to further training")
    legend(axes, len(curves))
    return axes
