"""Scores averaged over independently trained runs (Bae et al., NeurIPS 2024, Section 4; Park et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_source._lightning import MisconfigurationException
from lightning_source.scores import InfluenceScores

_SHARED = ("method", "measurement", "sign", "unit", "examples")


def ensemble(scores: Sequence[InfluenceScores]) -> InfluenceScores:
    """The mean of the scores that one method gave on several runs, same queries and training examples in each.

    Scores of ``"trak"`` are averaged as the paper does: the mean of the kernels ``φ(q)ᵀ (ΦᵀΦ)⁻¹ φ(z_n)`` times the mean
    of the weights ``∂L/∂f(z_n)``. Segments' shares are averaged where every member has the same number of them,
    layers' shares where every member has the same layers.
    Of two members or more, except of ``"trak"``, the mean has an error bar: how far it may be from that over all seeds.

    Args:
        scores: one result for each run; at least one.

    Returns:
        The mean, with sign and unit of its members, and their run ids in ``metadata["members"]``.

    Raises:
        MisconfigurationException: nothing to average, or results that do not belong together; the message says why.

    Example:
        >>> ids, query = torch.arange(2), torch.arange(1)
        >>> first = InfluenceScores(torch.tensor([[1.0, 4.0]]), ids, query, metadata={"run_id": "a"})
        >>> second = InfluenceScores(torch.tensor([[3.0, 0.0]]), ids, query, metadata={"run_id": "b"})
        >>> both = ensemble([first, second])
        >>> both.values, both.metadata["members"]
        (tensor([[2., 2.]]), ['a', 'b'])
    """
    if not scores:
        raise MisconfigurationException("`ensemble` needs the scores of at least one run.")
    first = scores[0]
    for index, other in enumerate(scores[1:], start=1):
        for name in ("train_ids", "query_ids"):
            if not torch.equal(getattr(first, name), getattr(other, name)):
                raise MisconfigurationException(f"the scores of members 0 and {index} have other `{name}`.")
        for key in _SHARED:
            expected, actual = first.metadata.get(key), other.metadata.get(key)
            if actual != expected:
                raise MisconfigurationException(
                    f"the scores of members 0 and {index} do not belong together: {key} is {expected!r} and {actual!r}."
                )
    shares = [member.by_segment for member in scores if member.by_segment is not None]
    by_segment = None
    if len(shares) == len(scores) and len({len(share) for share in shares}) == 1:
        by_segment = _mean(shares)
    parts = [member.by_layer for member in scores if member.by_layer is not None]
    layers = first.metadata.get("layers")
    by_layer = None
    if len(parts) == len(scores) and layers and all(member.metadata.get("layers") == layers for member in scores):
        by_layer = _mean(parts)
    metadata = {key: first.metadata[key] for key in _SHARED if key in first.metadata}
    if by_layer is not None:
        metadata["layers"] = layers
    metadata["members"] = [member.metadata.get("run_id") for member in scores]
    metadata["options"] = [member.metadata.get("options") for member in scores]
    weights = [member.kernel_weights.double() for member in scores if member.kernel_weights is not None]
    if not weights and first.metadata.get("method") != "trak":
        stacked = torch.stack([member.values for member in scores])
        stderr = None
        if len(scores) > 1:
            stderr = stacked.std(0) / len(scores) ** 0.5
            metadata["error_bar"] = {"over": "runs", "degrees": len(scores) - 1}
        mean = stacked.mean(0)
        ids = first.train_ids, first.query_ids
        return InfluenceScores(mean, *ids, by_segment, metadata, stderr=stderr, by_layer=by_layer)
    if len(weights) != len(scores):
        lacking = ", ".join(str(index) for index, member in enumerate(scores) if member.kernel_weights is None)
        raise MisconfigurationException(
            f"members {lacking} have no `kernel_weights` to average apart from their kernels. HINT: score them anew."
        )
    kernels = [member.values.double() / weight for member, weight in zip(scores, weights, strict=True)]
    mean_weights = _mean(weights)
    values = (_mean(kernels) * mean_weights).float()
    return InfluenceScores(values, first.train_ids, first.query_ids, by_segment, metadata, mean_weights)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)
