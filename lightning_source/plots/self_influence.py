"""How much of each training example's fit is owed to itself, and whether that finds wrong labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.plots.canvas import NEUTRAL, axes_for, by_name, in_percent, legend, line_with_band, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def plot_self_influence(
    self_influence: ArrayLike | Mapping[str, ArrayLike],
    mislabelled: ArrayLike | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Self-influence in falling order; or, where the wrong labels are known, how many of them its top examples hold.

    With ``mislabelled`` the curve is the share of the wrong labels that is found when so many of the training examples
    are inspected, largest self-influence first. Beside it are chance, the order that is perfect, and in the legend the
    AUC: the probability that a wrong label has more self-influence than a right one. Tied examples are inspected in
    random order, on average.

    Args:
        self_influence: ``[N]``, as ``SourceScorer.self_influence`` gives it, or several of these by name.
        mislabelled: ``[N]`` of 0 and 1 (or bool), 1 = the label is wrong.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: lengths differ, values are not finite, ``mislabelled`` holds other values than 0 and
            1 or only one of them, or matplotlib is missing.
    """
    by_method = {
        name: numbers(values, "self_influence", "training examples")
        for name, values in by_name(self_influence, "self_influence", "self-influence").items()
    }
    if mislabelled is not None:
        wrong = _known_errors(mislabelled, by_method)
        axes = axes_for(ax, width=4.5)
        for name, values in by_method.items():
            inspected, found, auc = _detection(values, wrong)
            line_with_band(axes, inspected, found, None, None, f"{name}, AUC {auc:.3f}")
        share = float(wrong.mean())
        axes.plot([0, share, 1], [0, 1, 1], color=NEUTRAL, linestyle="--", linewidth=1, label="perfect order")
        axes.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", label="chance")
        axes.set(xlabel="training examples inspected", ylabel="wrong labels found")
        in_percent(axes, "x", "y")
        axes.set_ylim(0, 1.02)  # a line along 100 % stays visible
    else:
        axes = axes_for(ax)
        for name, values in by_method.items():
            rank = torch.arange(1, len(values) + 1)
            line_with_band(axes, rank / len(values), values.sort(descending=True).values, None, None, name)
        axes.set(xlabel="training examples, largest self-influence first", ylabel="self-influence")
        in_percent(axes, "x")
        axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    if mislabelled is not None or len(by_method) > 1:
        legend(axes, len(by_method))
    return axes


def _known_errors(mislabelled: ArrayLike, by_method: Mapping[str, Tensor]) -> Tensor:
    wrong = numbers(mislabelled, "mislabelled", "training examples")
    for name, values in by_method.items():
        if len(values) != len(wrong):
            raise MisconfigurationException(
                f"`mislabelled` has {len(wrong)} entries, but `{name}` is of {len(values)} training examples."
            )
    if set(wrong.unique().tolist()) != {0.0, 1.0}:
        raise MisconfigurationException(
            "`mislabelled` must hold 0 (right) and 1 (wrong), both of them. HINT: plant errors before training and pass"
            " which, or leave it out to see self-influence alone."
        )
    return wrong


def _detection(values: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, float]:
    """Shares inspected and found, with a point at the end of each group of ties, and the AUC."""
    group, sizes = torch.unique(-values, return_inverse=True, return_counts=True)[1:]
    errors = wrong.new_zeros(len(sizes)).index_add_(0, group, wrong)
    start = wrong.new_zeros(1)
    inspected, found, clean = (torch.cat([start, x.cumsum(0) / x.sum()]) for x in (sizes, errors, sizes - errors))
    return inspected, found, float(torch.trapezoid(found, clean))
