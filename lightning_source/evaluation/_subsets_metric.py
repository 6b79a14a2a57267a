"""What the metrics over retrained subsets share: the states, their updates, and the intervals' randomness."""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

from lightning_source.evaluation import statistics
from lightning_source.evaluation._inputs import Scores, outcomes, proper_masks, score_matrix


class SubsetsMetric(Metric):
    """Holds, query by query, what the scores predict for each subset and what its retrainings measured.

    States are concatenated over updates and ranks, so that queries may come in batches.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    predicted: list[Tensor]  # [Q, M] each
    measured: list[Tensor]  # [Q, R, M] each
    control: list[Tensor]  # [Q, C, M] each

    def __init__(
        self,
        subsets: ArrayLike,
        *,
        resamples: int = statistics.RESAMPLES,
        controls: int = statistics.CONTROLS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        masks = proper_masks(subsets)
        if len(masks) < 3:
            raise ValueError(f"`subsets` has {len(masks)} rows; a correlation over subsets needs at least 3.")
        if resamples < 1 or controls < 1:
            raise ValueError(f"`resamples` and `controls` must be at least 1, got {resamples} and {controls}.")
        self.resamples, self.controls, self.seed = resamples, controls, seed
        self.register_buffer("subsets", masks, persistent=False)
        generator = self._generator()
        orders = torch.stack([torch.randperm(masks.shape[1], generator=generator) for _ in range(controls)])
        self.register_buffer("_orders", orders, persistent=False)
        for state in ("predicted", "measured", "control"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, scores: Scores, measurements: ArrayLike) -> None:
        """Add queries.

        Args:
            scores: ``[Q, N]``, or an :class:`~lightning_source.InfluenceScores`. Positive = removing the example raises
                the measurement.
            measurements: ``[M, Q]``, or ``[R, M, Q]`` with the retrainings apart, as :func:`retrain` gives them: the
                measurement of each query after training on each subset. As many retrainings in every update.

        Raises:
            ValueError: shapes that do not fit, or a value that is NaN or infinite.
        """
        masks = self.get_buffer("subsets")
        values = score_matrix(scores, masks.shape[1], self.device)
        measured = outcomes(measurements, len(masks), len(values), "measurements", self.device)
        if self.measured and self.measured[0].shape[1] != measured.shape[1]:
            raise ValueError(
                f"`measurements` holds {measured.shape[1]} retrainings, those before held {self.measured[0].shape[1]}."
            )
        removed = (~masks).to(values.dtype)
        self.predicted.append(values @ removed.T)
        self.measured.append(measured)
        # The same scores dealt to other examples, one deal for all queries: as spread and as alike as the real ones.
        dealt = [values[:, order] @ removed.T for order in self.get_buffer("_orders")]
        self.control.append(torch.stack(dealt, 1))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _cpu_states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted ``[Q, M]``, measured ``[Q, R, M]`` and control ``[Q, C, M]``."""
        predicted, measured, control = (
            dim_zero_cat(state).cpu() for state in (self.predicted, self.measured, self.control)
        )
        return predicted, measured, control

    def _by_resample(
        self, predicted: Tensor, measured: Tensor, weighted: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Mean over queries of a correlation in each bootstrap sample of the subsets, ``[resamples]``."""
        weights = statistics.draw_weights(predicted.shape[1], self.resamples, self._generator())
        return torch.stack(
            [weighted(p, m, weights).nan_to_num(0.0) for p, m in zip(predicted, measured, strict=True)]
        ).mean(0)


def defined(correlations: Tensor, name: str) -> Tensor:
    """Correlations with 0 in place of NaN: a constant prediction orders nothing. Warns of how many there are."""
    if undefined := int(correlations.isnan().sum()):
        rank_zero_warn(
            f"{name}: {undefined} queries of {len(correlations)} have predictions or measurements that are the same on"
            " every subset, which correlate with nothing; they count as 0."
        )
    return correlations.nan_to_num(0.0)


def mean_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and central 95 % ``[2]``, of the control's figures ``[C]``."""
    return values.mean(), statistics.interval_of(values)
