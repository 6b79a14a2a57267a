"""Correlations, bootstrap intervals and reliability, as pure functions of tensors.

All work along the last axis and in the dtype that they are given; the metrics of this package pass float64. A bootstrap
resample is written as *weights*, how often it drew each item, so that resampling sorts and copies nothing.
"""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

RESAMPLES = 1000
CONTROLS = 20
_SPLITS = 50  # of the retrainings into halves, when there are more ways than this

Correlation = Callable[[Tensor, Tensor], Tensor]


def midranks(values: Tensor) -> Tensor:
    """Ranks 1 to n along the last axis, tied values sharing the mean of their ranks (as ``scipy.stats.rankdata``).

    Example:
        >>> midranks(torch.tensor([0.3, 7.0, 0.3]))
        tensor([1.5000, 3.0000, 1.5000])
    """
    ordered = values.contiguous().sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return ((below + up_to + 1).to(torch.float64) / 2).to(values.dtype)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation along the last axis; NaN where a side is constant.

    Args:
        x: ``[..., n]``.
        y: ``[..., n]``.

    Returns:
        ``[...]``.
    """
    return _correlation(x, y, torch.ones_like(x[..., :1]).expand_as(x))


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis, ties at their mean rank; NaN where a side is constant.

    Args:
        x: ``[..., n]``.
        y: ``[..., n]``.

    Returns:
        ``[...]``.
    """
    return pearson(midranks(x), midranks(y))


def slope(x: Tensor, y: Tensor) -> Tensor:
    """Least-squares slope of ``y`` on ``x``, rows of the last axis pooled after each is centred.

    Every row has an intercept of its own, so that a constant offset of a row counts for nothing. One row: the slope of
    ordinary simple regression.

    Args:
        x: ``[rows, n]``.
        y: ``[rows, n]``.

    Returns:
        A scalar; NaN if ``x`` is constant in every row.
    """
    x, y = _centred(x), _centred(y)
    return (x * y).sum() / (x * x).sum()


def draw_weights(items: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of ``resamples`` bootstrap samples drew each item, ``[resamples, items]``, float64."""
    drawn = torch.randint(items, (resamples, items), generator=generator)
    return torch.zeros(resamples, items, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )


def interval_of(samples: Tensor) -> Tensor:
    """The central 95 % of bootstrap samples, ``[..., 2]`` for ``[resamples, ...]``."""
    bounds = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype, device=samples.device), dim=0)
    return bounds.movedim(0, -1)


def mean_interval(values: Tensor, generator: torch.Generator, resamples: int = RESAMPLES) -> Tensor:
    """95 % interval of the mean over the last axis when its items (queries) are drawn anew: ``[..., 2]``."""
    weights = draw_weights(values.shape[-1], resamples, generator).to(values)
    items = values.movedim(-1, 0).reshape(values.shape[-1], -1)
    return interval_of(weights @ items / len(items)).reshape(*values.shape[:-1], 2)


def weighted_pearson(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Each resample's Pearson correlation.

    Args:
        x: ``[n]``.
        y: ``[n]``.
        weights: ``[resamples, n]`` of :func:`draw_weights`.

    Returns:
        ``[resamples]``; NaN where a resample drew a constant side.
    """
    return _correlation(x.expand_as(weights), y.expand_as(weights), weights)


def weighted_spearman(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Each resample's Spearman correlation; arguments and result as in :func:`weighted_pearson`."""
    return _correlation(_weighted_midranks(x, weights), _weighted_midranks(y, weights), weights)


def weighted_slope_terms(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of each resample's slope of ``y`` on ``x``, ``[resamples]`` each; rows add up."""
    total = weights.sum(-1)
    x, y = x - x.mean(), y - y.mean()  # moments of centred values lose no digits
    mean_x, mean_y = weights @ x / total, weights @ y / total
    return weights @ (x * y) - total * mean_x * mean_y, weights @ (x * x) - total * mean_x.square()


def spearman_brown(correlation: Tensor, factor: float) -> Tensor:
    """Reliability of a measurement ``factor`` times as long as the two whose correlation is given (Spearman 1910).

    Example:
        >>> spearman_brown(torch.tensor(0.5), factor=2)
        tensor(0.6667)
    """
    return factor * correlation / (1 + (factor - 1) * correlation)


def split_half_reliability(measurements: Tensor, correlation: Correlation, generator: torch.Generator) -> Tensor | None:
    """The correlation to expect between two independent ground truths of ``R`` retrainings each.

    The retrainings are split into halves in every way (50 random ones if there are more), the halves' means correlated
    over subsets, the result averaged over queries and splits and corrected by Spearman-Brown from a half to ``R``. A
    perfect predictor of the expectation correlates with the ground truth by about the square root of this.

    Args:
        measurements: ``[Q, R, M]``.
        correlation: of ``[Q, M]`` and ``[Q, M]``, giving ``[Q]``.
        generator: draws the splits.

    Returns:
        A scalar, or ``None`` for a single retraining.
    """
    retrainings = measurements.shape[1]
    half = retrainings // 2
    if not half:
        return None
    splits: list[tuple[list[int], list[int]]] = []
    if retrainings <= 10:
        for first in combinations(range(retrainings), half):
            rest = [r for r in range(retrainings) if r not in first]
            splits.extend((list(first), list(second)) for second in combinations(rest, half) if first < second)
    if not splits or len(splits) > _SPLITS:
        orders = [torch.randperm(retrainings, generator=generator).tolist() for _ in range(_SPLITS)]
        splits = [(order[:half], order[half : 2 * half]) for order in orders]
    correlations = [
        correlation(measurements[:, first].mean(1), measurements[:, second].mean(1)).nan_to_num(0.0)
        for first, second in splits
    ]
    return spearman_brown(torch.stack(correlations).mean(), retrainings / half)


def _centred(x: Tensor) -> Tensor:
    constant = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)).masked_fill(constant, 0.0)  # not the round-off of the mean


def _correlation(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Weighted Pearson correlation along the last axis."""
    total = weights.sum(-1, keepdim=True)
    x = x - (weights * x).sum(-1, keepdim=True) / total
    y = y - (weights * y).sum(-1, keepdim=True) / total
    spread = (weights * x * x).sum(-1).sqrt() * (weights * y * y).sum(-1).sqrt()
    correlation = (weights * x * y).sum(-1) / spread
    # A constant side leaves round-off of its mean, whose ratio could be any number.
    constant = (_range(x, weights) == 0) | (_range(y, weights) == 0)
    return correlation.clamp(-1, 1).masked_fill(constant, torch.nan)


def _range(x: Tensor, weights: Tensor) -> Tensor:
    drawn = weights > 0
    return x.masked_fill(~drawn, -torch.inf).amax(-1) - x.masked_fill(~drawn, torch.inf).amin(-1)


def _weighted_midranks(x: Tensor, weights: Tensor) -> Tensor:
    """Mean ranks within each resample, up to a constant, ``[resamples, n]``.

    The rank of an item is the number of items drawn below it and half of those drawn at its value.
    """
    order = x.argsort()
    group = torch.unique_consecutive(x[order], return_inverse=True)[1]
    sizes = weights.new_zeros(len(weights), int(group[-1]) + 1).index_add_(1, group, weights[:, order])
    ranks = sizes.cumsum(1) - sizes / 2
    return torch.empty_like(weights).index_copy_(1, order, ranks[:, group])
