"""How well scores point where further training goes: the cosine of Wei et al. (arXiv 2412.03906), as a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_source.evaluation._inputs import Scores
from lightning_source.scores import InfluenceScores


def cosine_by_query(gold: Tensor, scores: Tensor) -> Tensor:
    """Cosine between the gold standard and an estimate over the left-out examples, for each query.

    A row of zeros names no direction, and its cosine is 0.

    Args:
        gold: ``[..., Q, M]``, measured changes of the queries' measurements on leaving examples out.
        scores: ``[..., Q, M]``, the estimates, in the same order; any scale.

    Returns:
        ``[..., Q]``, float64, in [-1, 1].

    Raises:
        ValueError: shapes that do not broadcast, or values that are not finite.
    """
    if gold.shape[-2:] != scores.shape[-2:]:
        raise ValueError(
            f"gold standard {tuple(gold.shape)} and scores {tuple(scores.shape)} do not hold the same queries and"
            " left-out examples"
        )
    if not (torch.isfinite(gold).all() and torch.isfinite(scores).all()):
        raise ValueError("the gold standard or the scores hold values that are not finite")
    gold, scores = (_unit(changes.to("cpu", torch.float64)) for changes in (gold, scores))
    return (gold * scores).sum(-1)


def _unit(rows: Tensor) -> Tensor:
    # By the largest entry first: squares of changes as small as 1e-200 would vanish.
    scaled = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last dimension and its standard error ``std / √Q`` (0 for a single value)."""
    count = values.shape[-1]
    error = values.std(-1) / count**0.5 if count > 1 else torch.zeros_like(values[..., 0])
    return values.mean(-1), error


class FinalModelCosine(Metric):
    """Mean over queries of the cosine between a gold standard and an estimate, with its error and a random control.

    Args:
        controls: random estimates (standard normal entries) a query, for the control.
        seed: seeds them.

    Example::

        metric = FinalModelCosine()
        metric.update(gold, scores)  # [Q, M] each
        metric.compute()  # {"cosine": …, "sem": …, "control": …, "control_sem": …}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    cosines: list[Tensor]
    random: list[Tensor]

    def __init__(self, controls: int = 100, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if controls < 1:
            raise ValueError(f"`controls={controls}` must be at least 1")
        self.controls = controls
        self.seed = seed
        self.add_state("cosines", default=[], dist_reduce_fx="cat")
        self.add_state("random", default=[], dist_reduce_fx="cat")

    def update(self, gold: Tensor, scores: Tensor) -> None:
        """Add queries.

        Args:
            gold: ``[Q, M]``.
            scores: ``[Q, M]``.
        """
        cosines = cosine_by_query(gold, scores)
        generator = torch.Generator().manual_seed(self.seed + sum(map(len, self.cosines)))
        noise = torch.randn(self.controls, *gold.shape, generator=generator, dtype=torch.float64)
        self.cosines.append(cosines.to(self.device))
        self.random.append(cosine_by_query(gold.expand(noise.shape), noise).mean(0).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """``cosine`` and ``sem`` over queries; ``control`` and ``control_sem``, those of random scores."""
        mean, error = mean_and_error(dim_zero_cat(self.cosines))
        control, control_error = mean_and_error(dim_zero_cat(self.random))
        return {"cosine": mean, "sem": error, "control": control, "control_sem": control_error}


def select(scores: Scores, leave_out: Sequence[int]) -> Tensor:
    """Columns of the left-out examples.

    Args:
        scores: an :class:`~lightning_source.InfluenceScores`; or an array ``[..., Q, M]`` whose columns are the
            left-out examples already.
        leave_out: positions in the training dataset.

    Raises:
        ValueError: a left-out example was not scored, or the array has other columns.
    """
    if not isinstance(scores, InfluenceScores):
        values = torch.as_tensor(scores)
        if values.shape[-1] != len(leave_out):
            raise ValueError(
                f"scores have {values.shape[-1]} columns for {len(leave_out)} left-out examples; pass `InfluenceScores`"
                " or the columns of the left-out examples"
            )
        return values
    column = {int(n): i for i, n in enumerate(scores.train_ids)}
    missing = [i for i in leave_out if i not in column]
    if missing:
        raise ValueError(f"left-out examples {missing[:5]} were not scored")
    return scores.values[:, [column[i] for i in leave_out]]
