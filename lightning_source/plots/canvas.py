"""What all pictures share: axes to draw on, checked numbers, colours, lines with bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

# Two colours that every kind of colour vision tells apart (of the palette of Okabe and Ito), as in the report.
HELPED, HARMED, NEUTRAL = "#0072b2", "#d55e00", "#808080"
MANY_LINES = 6

_Named = TypeVar("_Named")


def axes_for(ax: Axes | None, width: float = 6.0, height: float = 3.6, *, whole: bool = False) -> Axes:
    """The axes given, or those of a new figure of that size in inches, all of which they take if ``whole``.

    Raises:
        MisconfigurationException: matplotlib is missing, or ``ax`` is something else.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    except ModuleNotFoundError:
        raise MisconfigurationException(
            'plots need matplotlib, which is not installed. HINT: pip install "lightning_source[plots]".'
        ) from None
    if ax is None:
        if whole:
            return plt.figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise MisconfigurationException(
            f"`ax` is of {type(ax)}, not matplotlib's Axes. HINT: pass one of `figure.axes`, or of those that"
            " `plt.subplots` gives."
        )
    return ax


def numbers(values: object, name: str, *shape: str) -> Tensor:
    """Anything array-like as float64 on the CPU.

    Args:
        values: an array, tensor or list.
        name: how messages call it.
        shape: what each dimension counts; without, any shape is taken and flattened.

    Raises:
        MisconfigurationException: these are no numbers, of another shape, empty, or not finite.
    """
    expected = f"[{', '.join(shape)}]" if shape else "of numbers"
    try:
        tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationException(f"`{name}` is of {type(values)}, not an array {expected} ({error}).") from None
    if not shape:
        tensor = tensor.flatten()
    if tensor.ndim != (len(shape) or 1) or not tensor.numel():
        raise MisconfigurationException(f"`{name}` has the shape {list(tensor.shape)}; expected {expected}, not empty.")
    if bad := int((~tensor.isfinite()).sum()):
        raise MisconfigurationException(f"`{name}` holds {bad} values of {tensor.numel()} that are NaN or infinite.")
    return tensor


def score_matrix(scores: object) -> Tensor:
    """``[Q, N]`` of scores or of their matrix."""
    values = scores if isinstance(scores, Tensor) else getattr(scores, "values", scores)
    return numbers(values, "scores", "queries", "training examples")


def by_name(values: ArrayLike | Mapping[str, ArrayLike], name: str, default: str) -> Mapping[str, ArrayLike]:
    """Several arrays by name, at least one; a single one gets the default."""
    return some(values, name) if isinstance(values, Mapping) else {default: values}


def some(results: Mapping[str, _Named], name: str) -> Mapping[str, _Named]:
    """Results by name, at least one.

    Raises:
        MisconfigurationException: it is empty or no mapping.
    """
    if not isinstance(results, Mapping) or not results:
        got = "an empty one" if isinstance(results, Mapping) else type(results)
        raise MisconfigurationException(
            f'`{name}` must be a mapping of names to results, got {got}. HINT: `{{"source": result}}`.'
        )
    return results


def line_with_band(
    ax: Axes, x: Tensor, middle: Tensor, low: Tensor | None, high: Tensor | None, label: str, **style: Any
) -> None:
    """A line and, where its ends are known, a pale band; all ``[E]``. The dashes change when colours are used up."""
    style.setdefault("linestyle", ("-", "--", "-.", ":")[len(ax.get_lines()) // 10 % 4])
    (line,) = ax.plot(x.numpy(), middle.numpy(), label=label, **style)
    if low is not None and high is not None:
        ax.fill_between(x.numpy(), low.numpy(), high.numpy(), color=line.get_color(), alpha=0.2, linewidth=0)


def legend(ax: Axes, lines: int) -> None:
    """The names of lines: among them if they are few, else beside the axes."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if lines > MANY_LINES else {}
    ax.legend(fontsize="small", frameon=False, **place)


def in_percent(ax: Axes, *directions: str) -> None:
    """Axes whose numbers are shares show per cent, from 0 to all."""
    from matplotlib.ticker import PercentFormatter

    for direction in directions:
        getattr(ax, f"{direction}axis").set_major_formatter(PercentFormatter(1.0, decimals=0))
        getattr(ax, f"set_{direction}lim")(0, 1)
