"""Predicted against actual change when single examples or groups are left out, with the slope between them."""

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_source.evaluation import statistics
from lightning_source.evaluation._subsets_metric import SubsetsMetric, defined, mean_and_spread


class RemovalCorrelationResult(NamedTuple):
    """What :class:`RemovalCorrelation` finds; intervals are 95 %, ``[low, high]``."""

    pearson: Tensor  # mean over queries
    pearson_interval: Tensor  # [2], queries drawn anew
    pearson_group_interval: Tensor  # [2], groups drawn anew
    spearman: Tensor  # mean over queries
    spearman_interval: Tensor  # [2], queries drawn anew
    spearman_group_interval: Tensor  # [2], groups drawn anew
    slope: Tensor  # of actual on predicted change, each query with its own intercept
    slope_interval: Tensor  # [2], queries drawn anew
    slope_group_interval: Tensor  # [2], groups drawn anew
    pearson_per_query: Tensor  # [Q] (a scalar where Q is 1: torchmetrics squeezes results)
    spearman_per_query: Tensor  # [Q]
    control: Tensor  # mean Pearson correlation of the same scores dealt to other examples
    control_interval: Tensor  # [2], of single deals
    reliability: Tensor | None  # of the ground truth, by Pearson; None without repeated retrainings


class RemovalCorrelation(SubsetsMetric):
    """Pearson, Spearman and slope of actual on predicted change over left-out examples or groups.

    For query ``q`` and group ``m`` the prediction is the sum of ``scores[q, n]`` over the examples that the group
    leaves out. Correlations are taken per query and averaged. The slope says whether scores have the size of the
    changes that they predict (1 is calibrated); queries are pooled, each about its own mean, so a query whose scores
    hardly vary does not dominate. Noise in the retrainings lowers correlations but leaves the slope unbiased.

    Args:
        subsets: ``[M, N]`` of 0 and 1 (or bool), 1 = **kept** in training: for leave-one-out,
            :func:`leave_one_out_subsets`.
        resamples: bootstrap samples behind each interval.
        controls: random deals of the scores for the control.
        seed: of the bootstrap and of the deals.
        kwargs: :class:`torchmetrics.Metric`'s own.

    Raises:
        ValueError: ``subsets`` is not a matrix of 0 and 1, has under 3 rows, or a row keeps everything or nothing.

    ``update`` takes measurements after the removals, or their changes from the full run: the intercept absorbs a
    query's constant. Where the groups differ in size, a slope far from 1 may come from the sizes alone.

    Example::

        subsets = leave_one_out_subsets(range(50), examples=1000)
        metric = RemovalCorrelation(subsets)
        metric.update(scores, retrain(build, subsets, seeds, measure, "loo"))
        print(metric.compute().slope)
    """

    def compute(self) -> RemovalCorrelationResult:
        """The figures over all queries and groups seen so far."""
        predicted, measured, control = self._cpu_states()
        actual = measured.mean(1)
        linear = defined(statistics.pearson(predicted, actual), "RemovalCorrelation")
        ranked = statistics.spearman(predicted, actual).nan_to_num(0.0)
        chance, chance_interval = mean_and_spread(
            statistics.pearson(control, actual[:, None].expand_as(control)).nan_to_num(0.0).mean(0)
        )
        by_query, by_group = self._slope_samples(predicted, actual)
        return RemovalCorrelationResult(
            pearson=linear.mean(),
            pearson_interval=statistics.mean_interval(linear, self._generator(), self.resamples),
            pearson_group_interval=statistics.interval_of(
                self._by_resample(predicted, actual, statistics.weighted_pearson)
            ),
            spearman=ranked.mean(),
            spearman_interval=statistics.mean_interval(ranked, self._generator(), self.resamples),
            spearman_group_interval=statistics.interval_of(
                self._by_resample(predicted, actual, statistics.weighted_spearman)
            ),
            slope=statistics.slope(predicted, actual),
            slope_interval=statistics.interval_of(by_query),
            slope_group_interval=statistics.interval_of(by_group),
            pearson_per_query=linear,
            spearman_per_query=ranked,
            control=chance,
            control_interval=chance_interval,
            reliability=statistics.split_half_reliability(measured, statistics.pearson, self._generator()),
        )

    def _slope_samples(self, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled slope in each bootstrap sample of the queries, and of the groups, ``[resamples]`` each."""
        groups = statistics.draw_weights(predicted.shape[1], self.resamples, self._generator())
        queries = statistics.draw_weights(len(predicted), self.resamples, self._generator())
        pairs = list(zip(predicted, actual, strict=True))
        products, squares = (
            sum(terms) for terms in zip(*(statistics.weighted_slope_terms(x, y, groups) for x, y in pairs), strict=True)
        )
        whole = torch.ones_like(groups[:1])
        rows = [torch.cat(statistics.weighted_slope_terms(x, y, whole)) for x, y in pairs]
        sums = queries @ torch.stack(rows)
        return sums[:, 0] / sums[:, 1], products / squares


def leave_one_out_subsets(ids: ArrayLike, examples: int) -> Tensor:
    """Masks that keep all examples but one: bool ``[len(ids), examples]``, row ``i`` without ``ids[i]``.

    Example:
        >>> leave_one_out_subsets([2, 0], examples=3).int()
        tensor([[1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    chosen = torch.as_tensor(list(ids) if isinstance(ids, range) else ids)
    subsets = torch.ones(len(chosen), examples, dtype=torch.bool)
    subsets[torch.arange(len(chosen)), chosen] = False
    return subsets
