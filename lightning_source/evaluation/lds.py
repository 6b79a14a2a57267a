"""The linear datamodeling score: do summed scores order subsets as retraining on them does?

Source: Park et al. 2023 (TRAK), Definition 2.4; Bae et al. 2024, section 5.1.
"""

from typing import Any, NamedTuple

from numpy.typing import ArrayLike
from torch import Tensor

from lightning_source.evaluation import statistics
from lightning_source.evaluation._inputs import Scores
from lightning_source.evaluation._subsets_metric import SubsetsMetric, defined, mean_and_spread


class DatamodelingResult(NamedTuple):
    """What :class:`LinearDatamodelingScore` finds; intervals are 95 %, ``[low, high]``."""

    lds: Tensor  # mean over queries of the Spearman correlation over subsets
    interval: Tensor  # [2], queries drawn anew: how far other queries would move it
    subset_interval: Tensor  # [2], subsets drawn anew: how far other subsets would move it
    per_query: Tensor  # [Q] (a scalar where Q is 1: torchmetrics squeezes results)
    control: Tensor  # the mean LDS of the same scores dealt to other examples
    control_interval: Tensor  # [2], of single deals
    reliability: Tensor | None  # of the ground truth; None without repeated retrainings


class LinearDatamodelingScore(SubsetsMetric):
    r"""Spearman correlation over random subsets between measured outcomes and those that the scores predict.

    For query ``q`` and subset ``m`` the prediction is the sum of ``scores[q, n]`` over the examples that the subset
    *leaves out*; up to a constant that is minus the sum over those it keeps (method of Park et al. 2023, "TRAK",
    Definition 2.4; as in Bae et al. 2024, section 5.1). The correlation is averaged over queries, and outcomes over
    retrainings.

    Args:
        subsets: ``[M, N]`` of 0 and 1 (or bool), 1 = kept in training; usually half of the examples in each.
        resamples: bootstrap samples behind each interval.
        controls: random deals of the scores for the control.
        seed: of the bootstrap and of the deals.
        kwargs: :class:`torchmetrics.Metric`'s own.

    Raises:
        ValueError: ``subsets`` is not a matrix of 0 and 1, has under 3 rows, or a row keeps everything or nothing.

    Example::

        lds = LinearDatamodelingScore(subsets)
        lds.update(trainer.attribute(query, measurement="margin"), measurements)
        result = lds.compute()
        print(result.lds, result.interval, result.control)

    ``compute`` gives a :class:`DatamodelingResult`. Its ``reliability`` is the correlation to expect between two ground
    truths of that many retrainings, so about its square root is the highest LDS that any score can reach.
    """

    def compute(self) -> DatamodelingResult:
        """The score over all queries seen so far."""
        predicted, measured, control = self._cpu_states()
        outcome = measured.mean(1)
        per_query = defined(statistics.spearman(predicted, outcome), "LinearDatamodelingScore")
        dealt = statistics.spearman(control, outcome[:, None].expand_as(control)).nan_to_num(0.0).mean(0)
        chance, chance_interval = mean_and_spread(dealt)
        return DatamodelingResult(
            lds=per_query.mean(),
            interval=statistics.mean_interval(per_query, self._generator(), self.resamples),
            subset_interval=statistics.interval_of(self._by_resample(predicted, outcome, statistics.weighted_spearman)),
            per_query=per_query,
            control=chance,
            control_interval=chance_interval,
            reliability=statistics.split_half_reliability(measured, statistics.spearman, self._generator()),
        )


def linear_datamodeling_score(
    scores: Scores, subsets: ArrayLike, measurements: ArrayLike, **options: Any
) -> DatamodelingResult:
    """:class:`LinearDatamodelingScore` of one set of arrays: its arguments, then those of its ``update``.

    Example:
        >>> import torch
        >>> from lightning_source.evaluation import random_subsets
        >>> subsets = random_subsets(50, 8)
        >>> scores = torch.arange(8.0)[None]  # one query
        >>> measurements = -(subsets.float() @ scores.T)  # [subsets, queries], what a perfect score predicts
        >>> round(float(linear_datamodeling_score(scores, subsets, measurements).lds), 4)
        1.0
    """
    metric = LinearDatamodelingScore(subsets, **options)
    metric.update(scores, measurements)
    return metric.compute()
