"""Queries beside the training examples that helped and harmed them most, as pictures or texts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.plots.canvas import HARMED, HELPED, NEUTRAL, axes_for
from lightning_source.report import Scores
from lightning_source.report.examples import Render, picture_or_text, query_example, training_example

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches: a cell with a picture, one with a text, the lines above a cell, and between cells and groups of these.
_PICTURE, _TEXT, _TITLE, _GAP, _HEADING = 1.0, 1.7, 0.36, 0.14, 0.3
_MOST_QUERIES, _MOST_LINES = 8, 7
_LETTER = 0.06  # width of a letter at 7 points

Cell = tuple[Tensor | str, str, str]  # what is shown, the lines above it, their colour


class RankedScores(Scores, Protocol):
    """What the picture takes from scores; see ``InfluenceScores``."""

    def rows(self, k: int) -> Iterator[Any]: ...  # noqa: D102


def plot_examples(
    scores: RankedScores,
    *,
    train: object,
    query: object,
    k: int = 5,
    rows: Sequence[int] | None = None,
    render: Render | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A row for each query: the query, then the ``k`` examples that helped it most and the ``k`` that harmed it most.

    Above each training example are its id, its label and its score, with its standard error where the scores have one.
    Frames and scores are blue where the example helped and orange where it harmed, whatever column it is in.

    Args:
        scores: an ``InfluenceScores``.
        train: the training dataset that was scored, read at the ids shown.
        query: the queries: the batch, dataset or loader that was scored.
        k: examples shown on each side; at most all.
        rows: which rows of the scores are shown; by default the first eight.
        render: takes what the dataset gives at an index and gives back a text or a picture (a tensor ``[H, W]`` or
            ``[C, H, W]``). ``None`` guesses: pictures, texts, numbers.
        ax: matplotlib axes that the grid is drawn into; those of a new figure, as large as the grid needs, by default.

    Returns:
        The axes that hold the grid; its cells are their ``child_axes``, row by row.

    Raises:
        MisconfigurationException: ``k`` or a row is out of range, ``train`` cannot be indexed, or matplotlib is
            missing.
    """
    count = len(scores.query_ids)
    chosen = list(range(min(count, _MOST_QUERIES)) if rows is None else rows)
    if k < 1 or not chosen or not all(0 <= row < count for row in chosen):
        raise MisconfigurationException(
            f"`k={k}` must be at least 1, and `rows={chosen}` at least one of the {count} queries' rows, from 0."
        )
    k = min(k, scores.values.shape[1])
    grid = _cells(scores, train, query, k, chosen, render)
    width = _PICTURE if all(isinstance(cell[0], Tensor) for row in grid for cell in row) else _TEXT
    step, line = width + _GAP, width * (1 if width == _PICTURE else 0.6) + _TITLE + _GAP
    wide, high = step * (1 + 2 * k) + 3 * _GAP, line * len(grid) + _HEADING  # a further gap around and between groups
    starts = [_GAP + step * i + _GAP * ((i > 0) + (i > k)) for i in range(1 + 2 * k)]
    axes = axes_for(ax, wide, high, whole=True)
    axes.set_axis_off()
    room, inch = axes.get_window_extent(), axes.figure.dpi
    scale = min(room.width / inch / wide, room.height / inch / high)
    wide, high = room.width / inch / scale, room.height / inch / scale  # other axes leave room at the right or below
    cut = rows is None and len(chosen) < count
    for start, text, colour in (
        (starts[0], f"{len(chosen)} of {count} queries" if cut else "query", "black"),
        (starts[1], "helped most", HELPED),
        (starts[1 + k], "harmed most", HARMED),
    ):
        axes.text(
            start / wide, 1 - 0.2 / high, text, color=colour, weight="bold", size=9 * scale, transform=axes.transAxes
        )
    for row, cells in enumerate(grid):
        bottom = high - _HEADING - line * (row + 1) + _GAP
        for start, cell in zip(starts, cells, strict=True):
            place = (start / wide, bottom / high, width / wide, (line - _TITLE - _GAP) / high)
            _draw(axes.inset_axes(place), cell, int(width / _LETTER), scale)
    return axes


def _cells(
    scores: RankedScores, train: object, query: object, k: int, chosen: Sequence[int], render: Render | None
) -> list[list[Cell]]:
    ranked = list(scores.rows(k))
    grid = []
    for row in chosen:
        content, label = picture_or_text(query_example(query, scores.query_ids, row), render)
        cells: list[Cell] = [(content, _lines(int(scores.query_ids[row]), label, ""), "black")]
        for entry in ranked[2 * k * row : 2 * k * (row + 1)]:
            content, label = picture_or_text(training_example(train, entry.train), render)
            score = f"{entry.score:+#.3g}".rstrip(".") + ("" if entry.stderr is None else f" ± {entry.stderr:.1g}")
            helped = (entry.score > 0) == scores._lower_is_better
            colour = NEUTRAL if entry.score == 0 else HELPED if helped else HARMED
            cells.append((content, _lines(entry.train, label, score), colour))
        grid.append(cells)
    return grid


def _lines(example: int, label: str | None, score: str) -> str:
    named = f"#{example}"
    if label is not None:
        named += ", label " if label.isdigit() else ", "
        named += " ".join((label if len(label) <= 12 else label[:11] + "…").split())
    return f"{named}\n{score}" if score else named


def _draw(axes: Axes, cell: Cell, letters: int, scale: float) -> None:
    content, title, colour = cell
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, color=colour, size=7.5 * scale, pad=3 * scale, parse_math=False)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=(1 if colour == "black" else 2) * scale)
    if isinstance(content, Tensor):
        axes.imshow(content.numpy(), cmap="gray", vmin=0, vmax=1)
        return
    wrapped = [part for line in content.splitlines() for part in textwrap.wrap(line, letters)]
    shown = "\n".join(wrapped if len(wrapped) <= _MOST_LINES else [*wrapped[: _MOST_LINES - 1], "…"])
    axes.text(0.03, 0.95, shown, size=7 * scale, va="top", transform=axes.transAxes, clip_on=True, parse_math=False)
