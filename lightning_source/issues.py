"""Training labels that look wrong, with what their opponents say instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_source._lightning import MisconfigurationException
from lightning_source.report.examples import labels_of
from lightning_source.scorer import SourceScorer


class LabelIssue(NamedTuple):
    """One training example whose label may be wrong."""

    rank: int  # from 1, the most suspicious
    train: int  # position in the training dataset
    label: int  # as given
    self_influence: float  # of the loss, in its unit
    suggested: int | None  # the other label whose examples oppose the given one most; None if none do
    support: float  # the share of the opposition of all other labels that is that label's, in [0, 1]


def label_issues(
    scorer: SourceScorer, train: object, labels: Tensor | Sequence[int] | None = None, *, k: int = 100
) -> list[LabelIssue]:
    """The training examples whose labels to look at first, with the label that the others suggest.

    Examples are ranked by self-influence: a wrong label can only be memorised, since nothing else supports it (method
    §7). What is suggested is the label of those who object: for a suspect's loss under its given label, the scores of
    its opponents, the training examples whose removal lowers that loss, are added up by their labels, and the largest
    sum of another label wins. The list is one to look through, not a verdict: rare and difficult examples are in it,
    too, as a rule with less ``support``.

    Args:
        scorer: of the run; its loss is asked for, whatever its measurement.
        train: the training dataset, or a loader over it.
        labels: ``[N]``, the classes by position in the dataset; by default the last of a ``TensorDataset``'s tensors,
            or the dataset's ``targets``.
        k: how many, which are scored as queries; at most ``N``.

    Returns:
        The most suspicious first; ``pandas.DataFrame(label_issues(...))`` is a table.

    Raises:
        MisconfigurationException: labels are not known, or not one integer for each training example.

    Example::

        for issue in label_issues(SourceScorer.from_run("source-run", model), dataset, k=20):
            print(issue.train, issue.label, "->", issue.suggested, f"{issue.support:.0%}")
    """
    dataset = train.dataset if isinstance(train, DataLoader) else train
    given = labels_of(dataset) if labels is None else torch.as_tensor(labels)
    count = len(cast("Any", dataset))
    if given is None or given.shape != (count,) or given.is_floating_point():
        found = "not known" if given is None else f"{given.dtype} of the shape {list(given.shape)}"
        raise MisconfigurationException(
            f"the labels are {found}, and must be one integer for each of {count} training examples. HINT: `labels=`."
        )
    if k < 1:
        raise MisconfigurationException(f"`k={k}` must be at least 1.")
    scorer = SourceScorer(scorer.run, "loss", scorer.memory)
    suspicion, ids = scorer.self_influence(train).topk(min(k, count))
    scores = scorer.score(Subset(cast("Dataset[object]", dataset), ids.tolist()), train)
    kinds, kind = given.cpu().unique(return_inverse=True)
    opposition = scores.values.new_zeros(len(ids), len(kinds))
    opposition.index_add_(1, kind[scores.train_ids], (-scores.values).clamp_min(0))
    opposition.scatter_(1, kind[ids][:, None], 0.0)  # examples of the same label compete, and suggest no other
    strongest, best = opposition.max(1)
    shares = strongest / opposition.sum(1).clamp_min(torch.finfo(opposition.dtype).tiny)
    rows = zip(ids.tolist(), suspicion.tolist(), kinds[best].tolist(), shares.tolist(), strict=True)
    return [
        LabelIssue(rank, n, int(given[n]), value, label if share > 0 else None, share)
        for rank, (n, value, label, share) in enumerate(rows, 1)
    ]
