"""Which tokens of a training text made which tokens of a query: one pair's score, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_source._lightning import MisconfigurationException
from lightning_source.plots.canvas import HARMED, HELPED, axes_for, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_MOST_NAMES, _LONGEST_NAME = 64, 16  # beyond, names could not be read


def plot_tokens(
    parts: ArrayLike,
    query: Sequence[str] | None = None,
    example: Sequence[str] | None = None,
    *,
    lower_is_better: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The parts of a pair's score as colours: blue where a token of the example helped one of the query, else orange.

    Args:
        parts: ``[query elements, example elements]``, as ``SourceScorer.tokens`` gives them.
        query: the text of each of the query's elements, for the rows; numbers by default. A loss on the next token
            predicts token ``t + 1`` by its element ``t``, so that these are the tokens from the second one on.
        example: the same of the training example, for the columns.
        lower_is_better: whether the measurement is, as a loss: then positive parts helped. ``False`` for a margin or
            log-probability.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: another shape, values that are not finite, another number of texts than elements, or
            matplotlib is missing.
    """
    values = numbers(parts, "parts", "query elements", "example elements")
    for name, given, count in (("query", query, len(values)), ("example", example, values.shape[1])):
        if given is not None and len(given) != count:
            raise MisconfigurationException(f"`{name}` has {len(given)} texts for {count} elements.")
    rows, columns = values.shape
    axes = axes_for(ax, 2.5 + 0.28 * min(columns, _MOST_NAMES), 1.5 + 0.24 * min(rows, _MOST_NAMES))
    from matplotlib.colors import LinearSegmentedColormap

    low, high = (HARMED, HELPED) if lower_is_better else (HELPED, HARMED)
    colours = LinearSegmentedColormap.from_list("helped and harmed", [low, "white", high])
    limit = float(values.abs().max()) or 1.0
    image = axes.imshow(values.numpy(), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for axis, names, count in ((axes.yaxis, query, rows), (axes.xaxis, example, columns)):
        if names is not None and count <= _MOST_NAMES:
            axis.set_ticks(range(count), [_shortened(name) for name in names], fontsize="small")
    axes.tick_params(axis="x", rotation=90 if example is not None else 0)
    axes.set(xlabel="tokens of the training example", ylabel="tokens of the query")
    shown = axes.figure.colorbar(image, ax=axes, label="part of the score")
    shown.outline.set_visible(False)
    return axes


def _shortened(name: str) -> str:
    text = name.replace("\n", "⏎").replace("$", r"\$")  # which would begin a formula
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
