"""Examples with stable ids: a dataset in its own order, whatever the user's loader shuffles, drops or repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_source.capture.isolation import isolated_rng

_EMPTY_QUERY = "the query is empty: there is nothing to attribute."

Batch = object  # what the user's training_step takes
NumberedBatch = tuple[Tensor, Batch]  # with the ids of its examples


class MapDataset(Protocol):
    """A dataset that holds its examples in a fixed order; a list is one."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> object:
        """The example at a position."""
        ...


@dataclass(frozen=True)
class Examples:
    """A map-style dataset and how to make batches of it. An example's id is its position in the dataset."""

    dataset: MapDataset
    batch_size: int
    collate: Callable[[list[Any]], Batch] = default_collate
    workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def split(self, limit: int) -> list[Examples]:
        """In pieces of at most ``limit`` examples."""
        if len(self) <= limit:
            return [self]
        pieces = [range(start, min(len(self), start + limit)) for start in range(0, len(self), limit)]
        return [replace(self, dataset=self._subset(piece)) for piece in pieces]

    def _subset(self, ids: Sequence[int]) -> Subset[object]:
        return Subset(cast("Dataset[object]", self.dataset), ids)

    def batches(self, ids: Sequence[int] | Tensor | None = None) -> Iterator[NumberedBatch]:
        """Batches of the given examples (all by default), in the given order, none left out."""
        order = torch.arange(len(self)) if ids is None else torch.as_tensor(ids)
        if not len(order):  # more ranks than batches
            return
        loader = DataLoader(
            cast("Dataset[object]", self.dataset) if ids is None else self._subset(order.tolist()),
            batch_size=self.batch_size,
            shuffle=False,
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator(),  # else the loader draws its base seed from the global generator
        )
        yield from zip(order.split(self.batch_size), loader, strict=True)


@dataclass(frozen=True)
class GivenBatches:
    """Batches as the user gave them; ids count their examples in order."""

    given: Sequence[Batch]

    def __len__(self) -> int:
        return sum(map(count_examples, self.given))

    def split(self, limit: int) -> list[GivenBatches]:
        """In pieces of at most ``limit`` examples where the given batches allow it."""
        return [GivenBatches([batch]) for batch in self.given] if len(self) > limit else [self]

    def batches(self, ids: Sequence[int] | Tensor | None = None) -> Iterator[NumberedBatch]:
        """The batches, empty ones left out; some of their examples cannot be chosen."""
        assert ids is None
        start = 0
        for batch in self.given:
            if size := count_examples(batch):
                yield torch.arange(start, start + size), batch
            start += size


def examples_of(data: object, batch_size: int | None = None, like: Examples | None = None) -> Examples:
    """A ``Dataset`` or ``DataLoader`` as :class:`Examples`.

    Args:
        data: map-style dataset, or a loader over one (its sampler and ``drop_last`` are not used).
        batch_size: overrides the loader's.
        like: where a plain dataset takes its collate function and workers from.

    Raises:
        MisconfigurationException: the dataset is iterable, so its examples have no ids; or it is empty.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise MisconfigurationException(
            f"`{type(dataset).__name__}` is an iterable dataset: its examples have no stable ids to attribute to."
            " HINT: pass `train=` a map-style dataset that holds the examples in a fixed order."
        )
    if len(dataset) == 0:
        raise MisconfigurationException(f"`{type(dataset).__name__}` holds no examples.")
    if isinstance(data, DataLoader):
        return Examples(dataset, batch_size or loader_batch_size(data), data.collate_fn, data.num_workers)
    if like is None:
        return Examples(dataset, batch_size or 32)
    return Examples(dataset, batch_size or like.batch_size, like.collate, like.workers)


def loader_batch_size(loader: DataLoader) -> int:
    """Examples that a pass takes at once: the loader's or its batch sampler's ``batch_size``, if they have one."""
    if loader.batch_size is not None:
        return loader.batch_size
    sampler = loader.batch_sampler
    if sampler is None:
        raise MisconfigurationException(
            "the training DataLoader has `batch_size=None` (its dataset yields whole batches), so examples have no ids."
            " HINT: pass `train=` a dataset of single examples."
        )
    return int(getattr(sampler, "batch_size", None) or 32)  # to look at a batch would advance the sampler


def query_of(query: object, like: Examples | None, batch_size: int | None = None) -> Examples | GivenBatches:
    """One batch, a ``Dataset`` or a ``DataLoader`` of queries; a loader over a map-style dataset is not shuffled."""
    if isinstance(query, DataLoader) and isinstance(query.dataset, IterableDataset):
        with isolated_rng(0):  # an iterator draws its base seed, and the dataset what it likes
            examples: Examples | GivenBatches = GivenBatches(list(query))
    elif isinstance(query, (DataLoader, Dataset)):
        dataset: object = query.dataset if isinstance(query, DataLoader) else query
        if isinstance(dataset, Sized) and not len(dataset):
            raise MisconfigurationException(_EMPTY_QUERY)
        examples = examples_of(query, batch_size, like)
    else:
        examples = GivenBatches([query])
    if len(examples) == 0:
        raise MisconfigurationException(_EMPTY_QUERY)
    return examples


def count_examples(batch: Batch) -> int:
    """Number of examples in a batch: the first tensor's length, as Lightning infers it."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    if tensors:
        return extract_batch_size(cast(Any, batch))
    raise MisconfigurationException(
        f"a batch of type `{type(batch).__name__}` holds no tensor to count its examples by."
    )


def to_module(batch: Batch, module: LightningModule, hooks: LightningDataModule | None = None) -> Batch:
    """Through the user's three batch-transfer hooks onto the module's device.

    Args:
        batch: a batch from a loader.
        module: the LightningModule.
        hooks: the LightningDataModule, whose hooks take precedence as they do in ``fit``.
    """
    device = module.device
    for name, arguments in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        owner = hooks if hooks is not None and _overrides(hooks, name) else module
        batch = getattr(owner, name)(batch, *arguments)
    # What the Trainer's precision plugin does in "bf16-true", "16-true" and "64-true".
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if dtype == torch.float32:
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _overrides(instance: object, name: str) -> bool:
    return getattr(type(instance), name, None) is not getattr(DataHooks, name)
