"""Cosine over the amount of further training: numbers by epoch, a table on disk, a plot."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_source.plots import plot_further_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class CosineCurve:
    """Cosine to further training, by epoch.

    Attributes:
        epochs: ``[E]``, epochs of further training, from 1.
        mean: ``[E]``, mean over queries.
        sem: ``[E]``, its standard error.
    """

    epochs: list[int]
    mean: Tensor
    sem: Tensor


COLUMNS = ("method", "epoch", "cosine", "sem")


def curve_rows(curves: Mapping[str, CosineCurve], digits: int = 4) -> list[dict[str, str | int | float]]:
    """One row for each method and epoch, with the keys ``method``, ``epoch``, ``cosine`` and ``sem``."""
    return [
        {"method": name, "epoch": epoch, "cosine": round(float(mean), digits), "sem": round(float(sem), digits)}
        for name, curve in curves.items()
        for epoch, mean, sem in zip(curve.epochs, curve.mean, curve.sem, strict=True)
    ]


def write_curves(
    path: str | os.PathLike[str], curves: Mapping[str, CosineCurve], metadata: Mapping[str, object] | None = None
) -> None:
    """Write curves to a ``.csv`` (rows only) or ``.json`` file (rows under ``"curves"``, beside ``metadata``).

    Raises:
        ValueError: another suffix.
    """
    rows, target = curve_rows(curves), Path(path)
    if target.suffix == ".csv":
        with open(target, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    elif target.suffix == ".json":
        target.write_text(json.dumps({**(metadata or {}), "curves": rows}, indent=1) + "\n")
    else:
        raise ValueError(f"`{target}` must end in .csv or .json")


def plot_curves(
    x: Sequence[float],
    means: Mapping[str, ArrayLike],
    errors: Mapping[str, ArrayLike],
    ax: Axes | None = None,
) -> Axes:
    """:func:`~lightning_source.plots.plot_further_training` of numbers in place of curves.

    Args:
        x: ``[E]``, epochs (or ``Λ``) of further training.
        means: ``[E]`` by method.
        errors: ``[E]`` by method; a method may be missing.
        ax: matplotlib axes to draw on; those of a new figure by default.

    Returns:
        The axes.

    Raises:
        MisconfigurationException: lengths differ, or matplotlib is missing.
    """
    curves = {name: SimpleNamespace(epochs=x, mean=mean, sem=errors.get(name)) for name, mean in means.items()}
    return plot_further_training(curves, ax=ax)
