"""Examples with stable ids: a dataset in its own order, whatever the user's loader shuffles, drops or repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_source._lightning import (
    DataHooks,
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    rank_zero_warn,
)
from lightning_source.capture.batch_copies import copied
from lightning_source.capture.batch_sizes import leading_lengths, most_common
from lightning_source.capture.isolation import isolated_rng
from lightning_source.capture.samplers import batches_drawn_by, drawn_by, fetches_batches, iterated
from lightning_source.capture.splitting import split

Batch = object  # what the user's training_step takes
TRIED_PARTNERS = 8  # examples that a dropped one is looked for beside
NumberedBatch = tuple[Tensor, Batch]  # with the ids of its examples
NO_QUERY = "the query is empty: there is nothing to attribute."
SCORING_NEEDS_TRAIN = (
    "Parameters are recorded; factors and scores wait until `attribute(..., train=a map-style dataset of the same"
    " examples)`."
)


class MapDataset(Protocol):
    """A dataset that holds its examples in a fixed order; a list is one."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> object:
        """The example at a position."""
        ...


@dataclass(frozen=True)
class _OneOrNone:
    """A collate function for batches of one example, which may be one that the user's own leaves out."""

    collate: Callable[[list[object]], Batch]
    dataset: MapDataset
    keys: Sequence[Any]

    def __call__(self, items: list[object]) -> Batch:
        if items[0] is None:
            return None
        try:
            return self.collate(items)
        except Exception:
            if self._is_dropped(items[0]):
                return None
            raise

    def _is_dropped(self, item: object) -> bool:
        """Whether a batch that the item is added to is as it was without it."""
        for key in self.keys[:TRIED_PARTNERS]:
            try:
                partner = self.dataset[key]
                alone, together = (leading_lengths(self.collate(items)) for items in ([partner], [item, partner]))
            except Exception:  # the partner may be dropped as well
                continue
            return alone == together
        return False


@dataclass(frozen=True)
class Examples:
    """Examples of a map-style dataset and how to make batches of them. In a pass, an example's id is its place here.

    Attributes:
        dataset: the dataset.
        batch_size: examples that a pass takes at once.
        collate: makes a batch of a list of items, or of what the dataset gives for a list of indices.
        workers: processes that load.
        keys: what the dataset is indexed by, one for each example; ``None`` for all positions in their order.
        worker_init: what each worker begins with.
        context: how workers are started.
        fetches_batches: whether the dataset is given a whole list of indices.
    """

    dataset: MapDataset
    batch_size: int
    collate: Callable[[Any], Batch] = default_collate
    workers: int = 0
    keys: Sequence[object] | None = None
    worker_init: Callable[[int], None] | None = None
    context: Any = None
    fetches_batches: bool = False

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def _keys(self) -> Sequence[object]:
        return range(len(self.dataset)) if self.keys is None else self.keys

    @property
    def positions(self) -> Tensor:
        """Where each example stands in the dataset, ``[N]`` int64; in ``keys``, where those are no numbers."""
        return torch.tensor(self._keys if self.numbered else range(len(self)), dtype=torch.int64)

    @property
    def numbered(self) -> bool:
        """Whether the dataset is asked by position, not by keys of another kind."""
        return isinstance(self._keys, range) or all(isinstance(key, int) for key in self._keys)

    @property
    def positions_in_all(self) -> int:
        """How many positions there are, those of other examples of the dataset included."""
        return len(self.dataset) if self.numbered else len(self)

    def named(self, ids: Tensor) -> Tensor:
        """The positions of some examples, which is how messages name them."""
        return ids if self.keys is None else self.positions[ids]

    def among(self, keys: Sequence[object] | None) -> Examples:
        """Those of the dataset's examples that some keys name; all of them for ``None``."""
        whole = isinstance(keys, Sequence) and list(keys) == list(range(len(self.dataset)))
        return replace(self, keys=None if whole else keys)

    def in_batches_of(self, size: int) -> Examples:
        """For a few batches of another size; workers are started only where the dataset needs what they begin with."""
        workers = min(1, self.workers) if self.worker_init is not None else 0
        return replace(self, batch_size=size, workers=workers)

    def one_at_a_time(self) -> Examples:
        """The same examples in batches of one; an example that is ``None``, and so dropped, has no batch: ``None``."""
        wrapped = self.fetches_batches or isinstance(self.collate, _OneOrNone)
        collate = self.collate if wrapped else _OneOrNone(self.collate, self.dataset, self._keys)
        return replace(self, batch_size=1, collate=collate)

    def split(self, limit: int) -> list[Examples]:
        """In pieces of at most ``limit`` examples."""
        if len(self) <= limit:
            return [self]
        return [replace(self, keys=self._keys[start : start + limit]) for start in range(0, len(self), limit)]

    def batches(self, ids: Sequence[int] | Tensor | None = None) -> Iterator[NumberedBatch]:
        """Batches of the given examples (all by default), in the given order, none left out."""
        order = torch.arange(len(self)) if ids is None else torch.as_tensor(ids)
        if not len(order):  # more ranks than batches
            return
        pieces, keys = order.split(self.batch_size), self._keys
        indices = [[keys[place] for place in piece.tolist()] for piece in pieces]
        workers = min(self.workers, len(pieces))
        # The dataset itself, not a part of it: a worker's first call may look for what it is to open.
        loader: DataLoader[object] = DataLoader(
            cast("Dataset[object]", self.dataset),
            **({"sampler": indices, "batch_size": None} if self.fetches_batches else {"batch_sampler": indices}),
            collate_fn=self.collate,
            num_workers=workers,
            worker_init_fn=self.worker_init,
            multiprocessing_context=self.context if workers else None,
            generator=torch.Generator(),  # else the loader draws its base seed from the global generator
        )
        yield from zip(pieces, loader, strict=True)


@dataclass(frozen=True)
class GivenBatches:
    """Batches as the user gave them; ids count their examples in order.

    Attributes:
        given: the batches.
        counting: places among a batch's tensors of those that have a row for each example, where that is known.
    """

    given: Sequence[Batch]
    counting: Sequence[int] = ()

    def __len__(self) -> int:
        return sum(map(self._size, self.given))

    def _size(self, batch: Batch) -> int:
        return count_examples(batch, self.counting)

    @property
    def positions(self) -> Tensor:
        """Where each example stands in the batches, ``[N]`` int64."""
        return torch.arange(len(self))

    def named(self, ids: Tensor) -> Tensor:
        """The positions of some examples, which is how messages name them."""
        return ids

    def split(self, limit: int) -> list[GivenBatches]:
        """In pieces of at most ``limit`` examples where the given batches allow it."""
        return [replace(self, given=[batch]) for batch in self.given] if len(self) > limit else [self]

    def one_at_a_time(self) -> GivenBatches:
        """The same examples in batches of one.

        Raises:
            MisconfigurationException: a batch does not say how it is made of its examples.
        """
        singles: list[Batch] = []
        for batch in self.given:
            size = self._size(batch)
            pieces = split(batch, size)
            if pieces is None:
                raise MisconfigurationException(
                    f"the query, a `{type(batch).__name__}` of {size} examples, cannot be cut into these, which this"
                    " `training_step` must be given one at a time. HINT: pass a Dataset or a DataLoader as the query."
                )
            singles += pieces
        return replace(self, given=singles)

    def batches(self, ids: Sequence[int] | Tensor | None = None) -> Iterator[NumberedBatch]:
        """The batches, empty ones left out; some of their examples cannot be chosen."""
        assert ids is None
        start = 0
        for batch in self.given:
            if size := self._size(batch):
                yield torch.arange(start, start + size), batch
            start += size


def examples_of(data: object, batch_size: int | None = None, like: Examples | None = None) -> Examples:
    """All examples of a ``Dataset`` or ``DataLoader``.

    Args:
        data: map-style dataset, or a loader over one (its sampler and ``drop_last`` are not used).
        batch_size: overrides the loader's.
        like: where a plain dataset takes everything else from, as far as it is one of the same kind.

    Raises:
        MisconfigurationException: the dataset is iterable or its items are whole batches, so its examples have no ids;
            or it is empty.
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
        return Examples(
            dataset,
            batch_size or loader_batch_size(data),
            data.collate_fn,
            data.num_workers,
            worker_init=data.worker_init_fn,
            context=data.multiprocessing_context,
            fetches_batches=fetches_batches(data),
        )
    if like is None:
        return Examples(dataset, batch_size or 32)
    if type(dataset) is not type(like.dataset):  # what is done to the one need not fit the other
        like = replace(like, worker_init=None)
    if like.fetches_batches and type(_of_parts(dataset)) is not type(_of_parts(like.dataset)):
        like = replace(like, fetches_batches=False, collate=default_collate)
    return replace(like, dataset=dataset, batch_size=batch_size or like.batch_size, keys=None)


def _of_parts(dataset: object) -> object:
    """What a part of a part of a dataset is a part of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def loader_batch_size(loader: DataLoader) -> int:
    """Examples that a pass takes at once: the loader's or its batch sampler's ``batch_size``, if they have one."""
    if loader.batch_size is not None:
        return loader.batch_size
    batches = batches_drawn_by(loader)
    if batches is None:
        raise MisconfigurationException(
            "the DataLoader has `batch_size=None` (its dataset yields whole batches), so examples have no ids."
            " HINT: pass `train=` a dataset of single examples."
        )
    return int(getattr(batches, "batch_size", None) or 32)  # to look at a batch would advance the sampler


def training_examples(loader: DataLoader[object]) -> Examples | None:
    """The examples that a training loader draws; ``None`` where they have no ids. What follows is said in a warning."""
    try:
        examples = examples_of(loader)
    except MisconfigurationException as error:
        rank_zero_warn(f"SourceCallback: {error} {SCORING_NEEDS_TRAIN}")
        return None
    drawn = drawn_by(loader)
    reasons, more = [], ""
    if drawn.unknown is not None and drawn.unknown is not batches_drawn_by(loader):  # whose sizes are to be settled
        reasons.append(f"the sampler is `{type(drawn.unknown).__name__}`")
        if not isinstance(drawn.unknown, WeightedRandomSampler):
            more = " Where it draws other than positions, scoring needs `train=` a dataset of the examples by position."
    keys = None if drawn.keys is None else list(dict.fromkeys(drawn.keys))
    if keys is not None and drawn.keys is not None and len(keys) < len(drawn.keys):
        reasons.append("the sampler names some of them more than once")
    of_drawn = len(examples) if keys is None else len(keys)
    ordered = isinstance(loader.sampler, SequentialSampler) and loader.batch_size is not None
    if ordered and loader.drop_last and of_drawn % examples.batch_size:
        reasons.append("`drop_last` without shuffling never reaches the last examples")
    if reasons:
        rank_zero_warn(
            f"Training does not visit all examples alike ({'; '.join(reasons)}): scores assume that it does.{more}"
        )
    if keys is not None and all(isinstance(key, int) for key in keys):
        keys.sort()
    return examples.among(keys)


def query_of(query: object, like: Examples | None, batch_size: int | None = None) -> Examples | GivenBatches:
    """One batch, a ``Dataset`` or a ``DataLoader`` of queries.

    A loader over a map-style dataset is not shuffled; one that draws only some examples gives those.
    """
    dataset = query.dataset if isinstance(query, DataLoader) else query
    if isinstance(dataset, Dataset) and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise MisconfigurationException(NO_QUERY)
    if isinstance(query, DataLoader) and (isinstance(dataset, IterableDataset) or batches_drawn_by(query) is None):
        with isolated_rng(0):  # an iterator draws its base seed, and the dataset what it likes
            examples: Examples | GivenBatches = GivenBatches(list(query), _counting(like))
    elif isinstance(query, DataLoader):
        examples = _drawn_queries(query, batch_size)
    elif isinstance(query, Dataset):
        examples = examples_of(query, batch_size, like)
    else:
        examples = GivenBatches([query], _counting(like))
    if len(examples) == 0:
        raise MisconfigurationException(NO_QUERY)
    return examples


def _drawn_queries(loader: DataLoader[object], batch_size: int | None) -> Examples:
    examples, drawn = examples_of(loader, batch_size), drawn_by(loader)
    if drawn.unknown is None:
        return examples.among(drawn.keys)
    keys = iterated(loader)
    rank_zero_warn(
        f"The query loader's `{type(drawn.unknown).__name__}` draws as it likes: the {len(keys)} examples of one epoch"
        " are the queries, in its order, and `query_ids` says which they are. HINT: to choose them, pass a `Subset`."
    )
    return examples.among(keys)


def same_data(dataset: object, other: object) -> bool:
    """Whether two datasets are one, or the same part of one."""
    if isinstance(dataset, Subset) and isinstance(other, Subset):
        return same_data(dataset.dataset, other.dataset) and list(dataset.indices) == list(other.indices)
    return dataset is other


def _counting(like: Examples | None) -> list[int]:
    """Places among a training batch's tensors of those with a row for each example; none where that is not known.

    Graphs, bags and sequences that are joined have rows of parts, which would be counted for examples. Two batches of
    training examples tell them apart.
    """
    if like is None or len(like) < 3:
        return []
    try:
        with isolated_rng(0):
            batches = [next(iter(like.in_batches_of(size).batches(range(size))))[1] for size in (2, 3)]
            lengths = [leading_lengths(batch) for batch in batches]
    except Exception:  # what the user's data raise comes again where they are needed
        return []
    if len(lengths[0]) != len(lengths[1]):
        return []
    return [place for place, both in enumerate(zip(*lengths, strict=True)) if both == (2, 3)]


def count_examples(batch: Batch, counting: Sequence[int] = ()) -> int:
    """Number of examples in a batch that no loader made: the length that most of its tensors agree on.

    Args:
        batch: the batch.
        counting: places of the tensors to go by, where the batch has so many and they agree.
    """
    lengths = leading_lengths(batch)
    known = {lengths[place] for place in counting if place < len(lengths)}
    count = known.pop() if len(known) == 1 else most_common(lengths)
    if count is None:
        raise MisconfigurationException(
            f"a batch of type `{type(batch).__name__}` holds no tensor to count its examples by. HINT: pass queries as"
            " a `Dataset` or a `DataLoader`."
        )
    return count


def to_module(batch: Batch, module: LightningModule, hooks: LightningDataModule | None = None) -> Batch:
    """A copy of a batch through the user's three batch-transfer hooks onto the module's device.

    Args:
        batch: a batch from a loader, or the user's own; the hooks may write into what they get, so they get a copy.
        module: the LightningModule.
        hooks: the LightningDataModule, whose hooks take precedence as they do in ``fit``.
    """
    device = module.device
    batch = copied(batch)
    for name, arguments in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        owner = hooks if hooks is not None and _overrides(hooks, name) else module
        batch = getattr(owner, name)(batch, *arguments)
    # What the Trainer's precision plugin does in "bf16-true", "16-true" and "64-true".
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float32:
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _overrides(instance: object, name: str) -> bool:
    return getattr(type(instance), name, None) is not getattr(DataHooks, name)
