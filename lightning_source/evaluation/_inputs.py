"""What the metrics accept: arrays, tensors and results, checked before anything is computed."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_source.scores import InfluenceScores

Scores = InfluenceScores | ArrayLike  # tensors are array-like too


def finite(values: ArrayLike, name: str, device: torch.device | None = None) -> Tensor:
    """An array or tensor as float64.

    Args:
        values: anything that ``torch.as_tensor`` takes.
        name: how messages call it.
        device: where the result goes.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    tensor = torch.as_tensor(values).detach().to(device=device, dtype=torch.float64)
    if bad := int((~tensor.isfinite()).sum()):
        raise ValueError(
            f"`{name}` holds {bad} values of {tensor.numel()} that are NaN or infinite. HINT: find where they come from"
            " (a retraining that diverged, a score that overflowed) and leave those out before measuring."
        )
    return tensor


def score_matrix(scores: Scores, examples: int, device: torch.device | None = None) -> Tensor:
    """Scores as a ``[Q, N]`` float64 matrix over the whole training set.

    Args:
        scores: ``[Q, N]``, or an :class:`InfluenceScores`, whose ``train_ids`` say which examples were scored; the
            others get 0.
        examples: ``N``.
        device: where the result goes.

    Raises:
        ValueError: the shape does not fit, or a score is not finite.
    """
    if not isinstance(scores, InfluenceScores):
        values = finite(scores, "scores", device)
        if values.ndim != 2 or values.shape[1] != examples:
            raise ValueError(
                f"`scores` has shape {tuple(values.shape)}; expected [queries, {examples}], a column for each training"
                " example."
            )
        return values
    values = finite(scores.values, "scores", device)
    ids = scores.train_ids.to(values.device)
    if len(ids) and int(ids.max()) >= examples:
        raise ValueError(
            f"`scores` names training example {int(ids.max())}, but there are {examples} examples here. HINT: the"
            " scores and the subsets must come from the same training set."
        )
    return values.new_zeros(len(values), examples).index_copy_(1, ids, values)


def kept_masks(subsets: ArrayLike) -> Tensor:
    """Subsets as a bool ``[M, N]`` tensor, true where the example is kept in training.

    Raises:
        ValueError: not a matrix of zeros and ones, or a subset that keeps nothing.
    """
    tensor = torch.as_tensor(subsets).detach().cpu()
    if tensor.ndim != 2 or not len(tensor) or not bool(((tensor == 0) | (tensor == 1)).all()):
        raise ValueError(
            f"`subsets` must be a [subsets, examples] matrix of 0 and 1 (1 = kept in training); got shape"
            f" {tuple(tensor.shape)} of {tensor.dtype}. HINT: lists of indices become a mask by `mask[row, ids] = 1`."
        )
    masks = tensor.bool()
    if bool((empty := ~masks.any(1)).any()):
        raise ValueError(f"subset {int(empty.nonzero()[0])} keeps no example: there is nothing to train on.")
    return masks


def proper_masks(subsets: ArrayLike) -> Tensor:
    """:func:`kept_masks` that each leave something out.

    Raises:
        ValueError: as there, or a subset that keeps everything.
    """
    masks = kept_masks(subsets)
    if bool((whole := masks.all(1)).any()):
        raise ValueError(
            f"subset {int(whole.nonzero()[0])} keeps every example, so it tests no score. HINT: leave the row and its"
            " measurements out."
        )
    return masks


def outcomes(
    measurements: ArrayLike, groups: int, queries: int, name: str, device: torch.device | None = None
) -> Tensor:
    """Measured outcomes as ``[Q, R, M]`` float64.

    Args:
        measurements: ``[M, Q]`` or ``[R, M, Q]``.
        groups: ``M``.
        queries: ``Q``.
        name: how messages call it.
        device: where the result goes.

    Raises:
        ValueError: the shape does not fit, or a value is not finite.
    """
    values = finite(measurements, name, device)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or not len(values) or values.shape[1:] != (groups, queries):
        raise ValueError(
            f"`{name}` has shape {tuple(torch.as_tensor(measurements).shape)}; expected [{groups}, {queries}]"
            f" (subsets, queries) or [retrainings, {groups}, {queries}]."
        )
    return values.permute(2, 0, 1)
