"""Cosine over the amount of further training: numbers by epoch, a table on disk, a plot."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


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
    x: Sequence[float], means: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]], ax: Any = None
) -> Any:
    """Lines with bands of one standard error, over the amount of further training on a logarithmic axis.

    Args:
        x: ``[E]``, epochs (or ``Λ``) of further training.
        means: ``[E]`` by method.
        errors: ``[E]`` by method; a method may be missing.
        ax: matplotlib axes to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ModuleNotFoundError:
            raise ModuleNotFoundError('plots need matplotlib. HINT: pip install "lightning_source[plots]".') from None
        _, ax = plt.subplots()
    for name, mean in means.items():
        (line,) = ax.plot(x, mean, label=name)
        if name in errors:
            low, high = (
                [float(m) + sign * float(e) for m, e in zip(mean, errors[name], strict=True)] for sign in (-1, 1)
            )
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xscale="log", xlabel="epochs of further training", ylabel="cosine to further training")
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.legend()
    return ax
