"""How many examples each micro-batch of training holds, told by its loader rather than by the batch's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_source._lightning import rank_zero_warn
from lightning_source.capture.samplers import batches_drawn_by, copied, is_plain, yields_of


class BatchSizes:
    """The sizes of a loader's batches.

    Args:
        loader: the training loader; ``None`` where there is not one, and batches are counted by their tensors.
    """

    def __init__(self, loader: DataLoader[object] | None) -> None:
        self._loader = loader
        iterable = loader is None or isinstance(loader.dataset, IterableDataset)
        self._batches: Any = None if loader is None or iterable else batches_drawn_by(loader)

    def of(self, index: int, batch: object) -> int | None:
        """Number of examples in a batch.

        Args:
            index: its place in the epoch.
            batch: the batch.

        Returns:
            The number; ``None`` where neither the loader nor a tensor tells.
        """
        batches = self._batches
        if is_plain(batches):
            try:
                return min(batches.batch_size, len(batches.sampler) - index % len(batches) * batches.batch_size)
            except (TypeError, NotImplementedError):  # a sampler without a length
                return _at_most(batches.batch_size, leading_lengths(batch))
        if isinstance(batches, Sequence):
            return len(batches[index % len(batches)])
        lengths = leading_lengths(batch)
        if batches is None:
            largest = None if self._loader is None else self._loader.batch_size
            return most_common(lengths) if largest is None else _at_most(largest, lengths)
        return most_common(lengths) or self._estimate()

    def _estimate(self) -> int | None:
        """What a batch sampler of the user's own says of itself, or its mean if it visits every example once."""
        assert self._loader is not None
        size = getattr(self._batches, "batch_size", None)
        if isinstance(size, int):
            return size
        try:
            return max(1, round(len(self._loader.dataset) / len(self._batches)))  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def settled(self) -> float | None:
        """The mean size where it takes an epoch of a batch sampler of the user's own to know; else ``None``.

        Call it after training: a copy of the sampler is iterated. Says so if it does not visit all examples alike.
        """
        batches, loader = self._batches, self._loader
        if loader is None or batches is None or is_plain(batches) or isinstance(batches, Sequence):
            return None
        try:
            epoch = [list(batch) for batch in cast("list[Sequence[object]]", yields_of(copied(batches, loader)))]
            visits = Counter(key for batch in epoch for key in batch)
        except Exception:  # whatever the user's code raises on a copy: what was counted stays
            return None
        if not visits:
            return None
        total = len(loader.dataset)  # type: ignore[arg-type]
        if max(visits.values()) > 1 or total - len(visits) > max(map(len, epoch)):
            rank_zero_warn(
                f"Training does not visit all examples alike (an epoch of `{type(batches).__name__}` holds"
                f" {len(visits)} of {total}, up to {max(visits.values())} times): scores assume that it does."
            )
        return visits.total() / len(epoch)


def leading_lengths(batch: object) -> list[int]:
    """The first sizes of a batch's tensors, in their order; where none has a dimension, 1 for each."""
    tensors = list(_tensors(batch))
    return [len(tensor) for tensor in tensors if tensor.dim()] or [1 for _ in tensors]


def _tensors(batch: object) -> Iterator[Tensor]:
    """The tensors of nested containers, which are only looked at."""
    if isinstance(batch, Tensor):
        yield batch
        return
    values: Iterable[object] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    elif is_dataclass(batch):
        values = (getattr(batch, field.name, None) for field in fields(batch))
    for value in values:
        yield from _tensors(value)


def most_common(lengths: Sequence[int]) -> int | None:
    """The length that most tensors agree on, the first of those that come equally often."""
    return Counter(lengths).most_common(1)[0][0] if lengths else None


def _at_most(batch_size: int, lengths: Sequence[int]) -> int:
    """The size of a batch that can be smaller than ``batch_size`` only as the last of its epoch."""
    if batch_size in lengths:
        return batch_size
    return most_common([length for length in lengths if length < batch_size]) or batch_size
