"""Subset removal: are queries misclassified once the examples that helped them most are gone?

Source: Bae et al. 2024, section 5.2.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_source.evaluation import statistics
from lightning_source.evaluation._inputs import Scores, finite
from lightning_source.scores import InfluenceScores


def without_proponents(
    scores: Scores, sizes: Sequence[int], *, examples: int | None = None, lower_is_better: bool | None = None
) -> Tensor:
    """What to keep when each query's top-``k`` proponents are removed, for growing ``k``.

    Args:
        scores: ``[Q, N]``, or an :class:`~lightning_source.InfluenceScores`. Positive = removing raises the
            measurement.
        sizes: the numbers ``k`` of examples to remove, ascending.
        examples: ``N`` of the training set; only needed where an ``InfluenceScores`` covers a part of it.
        lower_is_better: whether a low measurement is good, as for a loss: then proponents have the most positive
            scores, else (margin, log-probability) the most negative. Default: what an ``InfluenceScores`` says of
            itself; ``True`` for arrays.

    Returns:
        Bool ``[K, Q, N]``, true = keep. ``masks.flatten(0, 1)`` is what :func:`retrain` takes.

    Raises:
        ValueError: sizes that do not ascend or do not leave an example, or scores of the wrong shape or not finite.
    """
    values = finite(scores.values if isinstance(scores, InfluenceScores) else scores, "scores").cpu()
    if values.ndim != 2:
        raise ValueError(f"`scores` has shape {tuple(values.shape)}; expected [queries, examples].")
    _check_sizes(sizes, values.shape[1])
    if not isinstance(scores, InfluenceScores):
        order = values.argsort(dim=1, descending=lower_is_better is not False, stable=True)
        return _keep(order, sizes, values.shape[1])
    if examples is None and not torch.equal(scores.train_ids.cpu(), torch.arange(values.shape[1])):
        raise ValueError("`scores` cover a part of the training set. HINT: pass its length as `examples`.")
    if lower_is_better is None:
        order = scores.proponents(sizes[-1])[1]
    else:
        order = scores.topk(sizes[-1], largest=lower_is_better)[1]
    return _keep(order.cpu(), sizes, examples or values.shape[1])


def without_random_same_label(
    labels: ArrayLike, query_labels: ArrayLike, sizes: Sequence[int], *, seed: int = 0
) -> Tensor:
    """The baseline of :func:`without_proponents`: remove ``k`` random examples of the query's own label.

    The removed sets are nested: a larger one holds the smaller. Where a label has fewer than ``k`` examples, all of
    them go and others, at random, make up the number.

    Args:
        labels: ``[N]``, of the training examples.
        query_labels: ``[Q]``.
        sizes: as in :func:`without_proponents`.
        seed: of the draws.

    Returns:
        Bool ``[K, Q, N]``, true = keep.

    Raises:
        ValueError: sizes that do not ascend or do not leave an example, or labels that are no vectors.
    """
    own, wanted = torch.as_tensor(labels).cpu(), torch.as_tensor(query_labels).cpu()
    if own.ndim != 1 or wanted.ndim != 1:
        raise ValueError(
            f"`labels` and `query_labels` must be vectors, got shapes {tuple(own.shape)} and {tuple(wanted.shape)}."
        )
    _check_sizes(sizes, len(own))
    draws = torch.rand(len(wanted), len(own), generator=torch.Generator().manual_seed(seed))
    return _keep((draws + (own != wanted[:, None])).argsort(1), sizes, len(own))


def own_query(measurements: ArrayLike, sizes: int) -> Tensor:
    """From retrainings of ``[K, Q, N]`` masks, each query's outcome on its own masks.

    Args:
        measurements: ``[R, K·Q, Q]``, as :func:`retrain` gives them for ``masks.flatten(0, 1)``.
        sizes: ``K``.

    Returns:
        ``[R, K, Q]``.

    Raises:
        ValueError: another shape.
    """
    values = torch.as_tensor(measurements)
    if values.ndim != 3 or values.shape[1] != sizes * values.shape[2]:
        raise ValueError(
            f"`measurements` has shape {tuple(values.shape)}; expected [retrainings, {sizes} sizes x queries, queries]."
        )
    return values.unflatten(1, (sizes, values.shape[2])).diagonal(dim1=2, dim2=3)


class SubsetRemovalResult(NamedTuple):
    """What :class:`SubsetRemoval` finds; intervals are 95 % with queries drawn anew, ``[..., low, high]``."""

    sizes: Tensor  # [K], examples removed
    flipped: Tensor  # [K], share of queries flipped
    interval: Tensor  # [K, 2]
    random: Tensor  # [K], share flipped by removing random examples of the same label
    random_interval: Tensor  # [K, 2]
    gain: Tensor  # mean over sizes of flipped - random
    gain_interval: Tensor  # [2], queries paired
    reliability: Tensor | None  # of the outcomes; None without repeated retrainings


class SubsetRemoval(Metric):
    """Share of queries that flip from right to wrong when their top-``k`` proponents are removed, by growing ``k``.

    Queries are ones that the full model classifies correctly. Beside the curve stands the control, the removal of
    random examples of the query's label, and the gain over it.

    Args:
        sizes: the numbers ``k`` of removed examples, ascending.
        count: ``"mean"``: a query counts by the share of its retrainings that got it wrong. ``"at-most"``: it counts as
            flipped at ``k`` once most of its retrainings got it wrong at ``k`` **or any smaller size**.
        resamples: bootstrap samples behind each interval.
        seed: of the bootstrap.
        kwargs: :class:`torchmetrics.Metric`'s own.

    Raises:
        ValueError: sizes that do not ascend, or an unknown ``count``.

    Example::

        masks = without_proponents(scores, sizes)
        random = without_random_same_label(labels, query_labels, sizes)
        removal = SubsetRemoval(sizes)
        correct, baseline = (
            own_query(retrain(build, m.flatten(0, 1), seeds, is_correct, path), len(sizes))
            for m, path in ((masks, "top"), (random, "random"))
        )
        removal.update(correct, baseline)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    flips: list[Tensor]  # [Q, R, K] each
    random_flips: list[Tensor]  # [Q, R, K] each

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        count: Literal["mean", "at-most"] = "mean",
        resamples: int = statistics.RESAMPLES,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_sizes(sizes, None)
        if count not in ("mean", "at-most"):
            raise ValueError(f"`count` must be 'mean' or 'at-most', got {count!r}.")
        self.sizes, self.count = list(sizes), count
        self.resamples, self.seed = resamples, seed
        self.add_state("flips", default=[], dist_reduce_fx="cat")
        self.add_state("random_flips", default=[], dist_reduce_fx="cat")

    def update(self, correct: ArrayLike, random_correct: ArrayLike) -> None:
        """Add queries.

        Args:
            correct: ``[K, Q]`` or ``[R, K, Q]`` of 0 and 1: whether each query was still right after its top-``k``
                proponents were removed. A margin becomes this by ``> 0``.
            random_correct: the same after random examples of its label were removed.

        Raises:
            ValueError: another shape, other values than 0 and 1, or outcomes of other queries.
        """
        own, random = self._outcomes(correct, "correct"), self._outcomes(random_correct, "random_correct")
        if len(own) != len(random):
            raise ValueError(f"`correct` holds {len(own)} queries, `random_correct` {len(random)}.")
        for before, new in ((self.flips, own), (self.random_flips, random)):
            if before and before[0].shape[1] != new.shape[1]:
                raise ValueError(f"an update of {new.shape[1]} retrainings follows one of {before[0].shape[1]}.")
        self.flips.append(1 - own)
        self.random_flips.append(1 - random)

    def compute(self) -> SubsetRemovalResult:
        """The curves over all queries seen so far."""
        own, random = (dim_zero_cat(state).cpu() for state in (self.flips, self.random_flips))
        flipped, control = self._counted(own), self._counted(random)
        gains = (flipped - control).mean(1)
        return SubsetRemovalResult(
            sizes=torch.tensor(self.sizes),
            flipped=flipped.mean(0),
            interval=self._interval(flipped.T),
            random=control.mean(0),
            random_interval=self._interval(control.T),
            gain=gains.mean(),
            gain_interval=self._interval(gains),
            # Queries and sizes in one row: do repeated retrainings agree on what flips?
            reliability=statistics.split_half_reliability(
                own.transpose(0, 1).flatten(1)[None], statistics.pearson, torch.Generator().manual_seed(self.seed)
            ),
        )

    def _outcomes(self, correct: ArrayLike, name: str) -> Tensor:
        values = finite(correct, name, self.device)
        if values.ndim == 2:
            values = values[None]
        if values.ndim != 3 or not len(values) or values.shape[1] != len(self.sizes):
            raise ValueError(
                f"`{name}` has shape {tuple(torch.as_tensor(correct).shape)}; expected [{len(self.sizes)}, queries] or"
                f" [retrainings, {len(self.sizes)}, queries]."
            )
        if not bool(((values == 0) | (values == 1)).all()):
            raise ValueError(
                f"`{name}` must hold 0 (wrong) and 1 (right). HINT: a margin becomes that by `margin > 0`."
            )
        return values.permute(2, 0, 1)

    def _counted(self, flips: Tensor) -> Tensor:
        """``[Q, K]`` of shares in 0 to 1."""
        if self.count == "mean":
            return flips.mean(1)
        return (flips.mean(1) > 0.5).to(flips.dtype).cummax(1).values

    def _interval(self, values: Tensor) -> Tensor:
        return statistics.mean_interval(values, torch.Generator().manual_seed(self.seed), self.resamples)


def _check_sizes(sizes: Sequence[int], examples: int | None) -> None:
    ascending = all(a < b for a, b in pairwise(sizes))
    if not len(sizes) or not ascending or sizes[0] < 0:
        raise ValueError(f"`sizes` must ascend from 0 or more, got {list(sizes)}.")
    if examples is not None and sizes[-1] >= examples:
        raise ValueError(f"removing {sizes[-1]} of {examples} examples leaves nothing to train on.")


def _keep(order: Tensor, sizes: Sequence[int], examples: int) -> Tensor:
    """Masks without the first ``k`` of each row of ids ``[Q, n]``, for every ``k``."""
    masks = torch.ones(len(sizes), len(order), examples, dtype=torch.bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask.scatter_(1, order[:, :size], False)
    return masks
