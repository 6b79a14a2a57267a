"""Mislabel detection: how early does inspection in the order of suspicion meet the wrong labels?"""

from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_source.evaluation import statistics
from lightning_source.evaluation._inputs import finite

_FLOATS_AT_ONCE = 1 << 22  # of bootstrap weights: 32 MiB of float64


class MislabelResult(NamedTuple):
    """What :class:`MislabelDetection` finds; intervals are 95 % with examples drawn anew, ``[low, high]``."""

    auc: Tensor  # probability that a planted error is more suspect than a clean example; ties count half
    auc_interval: Tensor  # [2]
    inspected: Tensor  # [N + 1], share of the examples inspected, most suspect first, from 0 to 1
    found: Tensor  # [N + 1], share of the planted errors among them: the cost curve
    area: Tensor  # under the cost curve; 1/2 for random order
    area_interval: Tensor  # [2]
    best_area: Tensor  # what a perfect order would reach
    control: Tensor  # mean AUC of the same suspicions dealt to other examples
    control_interval: Tensor  # [2], of single deals


class MislabelDetection(Metric):
    """AUC and cost curve of planted label errors under a suspicion, for example self-influence.

    Tied examples are inspected in random order, on average: the curve is straight across them. With a share ``p`` of
    errors the area is ``p / 2 + (1 - p) · AUC``, so both say the same at one ``p``; the area is what inspection costs.

    Args:
        resamples: bootstrap samples behind each interval.
        controls: random deals of the suspicions for the control.
        seed: of the bootstrap and of the deals.
        kwargs: :class:`torchmetrics.Metric`'s own.

    Example::

        detection = MislabelDetection()
        detection.update(SourceScorer.from_run("run", model).self_influence(train), planted)
        print(detection.compute().auc)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    suspicion: list[Tensor]  # [n] each
    mislabelled: list[Tensor]  # [n] each

    def __init__(
        self,
        *,
        resamples: int = statistics.RESAMPLES,
        controls: int = statistics.CONTROLS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.resamples, self.controls, self.seed = resamples, controls, seed
        self.add_state("suspicion", default=[], dist_reduce_fx="cat")
        self.add_state("mislabelled", default=[], dist_reduce_fx="cat")

    def update(self, suspicion: ArrayLike, mislabelled: ArrayLike) -> None:
        """Add training examples.

        Args:
            suspicion: ``[n]``; higher = more likely mislabelled.
            mislabelled: ``[n]`` of 0 and 1 (or bool), 1 = the label was changed.

        Raises:
            ValueError: shapes that differ, values other than 0 and 1, or a suspicion that is NaN or infinite.
        """
        values, planted = finite(suspicion, "suspicion", self.device), finite(mislabelled, "mislabelled", self.device)
        if values.ndim != 1 or values.shape != planted.shape:
            raise ValueError(
                f"`suspicion` and `mislabelled` must be vectors of one length, got shapes {tuple(values.shape)} and"
                f" {tuple(planted.shape)}. HINT: of a score matrix pass the diagonal, or `self_influence`."
            )
        if not bool(((planted == 0) | (planted == 1)).all()):
            raise ValueError("`mislabelled` must hold 0 (clean) and 1 (label changed).")
        self.suspicion.append(values)
        self.mislabelled.append(planted)

    def compute(self) -> MislabelResult:
        """The figures over all examples seen so far.

        Raises:
            ValueError: every example is clean, or every one mislabelled.
        """
        suspicion, planted = (dim_zero_cat(state).cpu() for state in (self.suspicion, self.mislabelled))
        errors = int(planted.sum())
        if errors in (0, len(planted)):
            raise ValueError(
                f"{errors} of {len(planted)} examples are mislabelled; the AUC needs both kinds. HINT: plant errors"
                " before training and pass which."
            )
        generator = torch.Generator().manual_seed(self.seed)
        whole = torch.ones_like(planted)[None]
        auc, area = weighted_auc(suspicion, planted, whole)
        auc_samples, area_samples = self._resampled(suspicion, planted, generator)
        drawn = auc_samples.isfinite()  # a resample without one of the kinds has no AUC
        dealt = torch.cat(
            [
                weighted_auc(suspicion[torch.randperm(len(planted), generator=generator)], planted, whole)[0]
                for _ in range(self.controls)
            ]
        )
        return MislabelResult(
            auc=auc[0],
            auc_interval=statistics.interval_of(auc_samples[drawn]),
            inspected=torch.linspace(0, 1, len(planted) + 1, dtype=planted.dtype),
            found=cost_curve(suspicion, planted),
            area=area[0],
            area_interval=statistics.interval_of(area_samples[drawn]),
            best_area=1 - planted.mean() / 2,
            control=dealt.mean(),
            control_interval=statistics.interval_of(dealt),
        )

    def _resampled(self, suspicion: Tensor, planted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """AUC and area of every bootstrap sample, ``[resamples]`` each, a bounded number of samples at a time."""
        at_once = max(1, _FLOATS_AT_ONCE // len(planted))
        parts = []
        for done in range(0, self.resamples, at_once):
            weights = statistics.draw_weights(len(planted), min(at_once, self.resamples - done), generator)
            parts.append(weighted_auc(suspicion, planted, weights))
        auc, area = (torch.cat(part) for part in zip(*parts, strict=True))
        return auc, area


def cost_curve(suspicion: Tensor, mislabelled: Tensor) -> Tensor:
    """Share of the errors found after each inspection, ties averaged over their orders.

    Args:
        suspicion: ``[N]``.
        mislabelled: ``[N]`` of 0 and 1.

    Returns:
        ``[N + 1]``, from 0 to 1.
    """
    order = suspicion.argsort(descending=True)
    group, sizes = torch.unique_consecutive(suspicion[order], return_inverse=True, return_counts=True)[1:]
    errors = mislabelled.new_zeros(len(sizes)).index_add_(0, group, mislabelled[order])
    each = (errors / sizes)[group]  # expected errors at each inspection
    return torch.cat([each.new_zeros(1), each.cumsum(0)]) / errors.sum()


def weighted_auc(suspicion: Tensor, mislabelled: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """AUC and area under the cost curve of bootstrap samples.

    Args:
        suspicion: ``[N]``.
        mislabelled: ``[N]`` of 0 and 1.
        weights: ``[resamples, N]``, how often each example was drawn.

    Returns:
        ``[resamples]`` each; NaN where a sample drew only one kind.
    """
    order = suspicion.argsort()
    group = torch.unique_consecutive(suspicion[order], return_inverse=True)[1]
    weights, planted = weights[:, order], mislabelled[order]
    groups = int(group[-1]) + 1
    errors = weights.new_zeros(len(weights), groups).index_add_(1, group, weights * planted)
    clean = weights.new_zeros(len(weights), groups).index_add_(1, group, weights * (1 - planted))
    below = clean.cumsum(1) - clean / 2
    all_errors, all_clean = errors.sum(1), clean.sum(1)
    auc = (errors * below).sum(1) / (all_errors * all_clean)
    share = all_errors / (all_errors + all_clean)
    return auc, share / 2 + (1 - share) * auc
