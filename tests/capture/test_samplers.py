"""Which examples a loader draws, read off its samplers, and how many each of its batches holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import classes
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_source.capture.batch_sizes import BatchSizes, leading_lengths
from lightning_source.capture.data import count_examples, training_examples
from lightning_source.capture.samplers import drawn_by, iterated

DATA = classes(23)


class Shuffled(Sampler):
    """Draws as it likes, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return iter((torch.randperm(5) * 2 + self.asked - 1).tolist())


class Unequal(Shuffled):
    """Batches of 1, 2, 3, ... examples, which visit each once."""

    def __init__(self, drawn: list[list[int]] | None = None) -> None:
        super().__init__()
        self.drawn = drawn or [[0], [1, 2], [3, 4, 5], list(range(6, 23))]

    def __len__(self) -> int:
        return len(self.drawn)

    def __iter__(self) -> Iterator[Any]:
        self.asked += 1
        return iter(self.drawn)


DRAWN = {
    "in order": (lambda: {"batch_size": 4}, None),
    "shuffled": (lambda: {"batch_size": 4, "shuffle": True}, None),
    "sampled with replacement": (lambda: {"sampler": RandomSampler(DATA, replacement=True, num_samples=9)}, None),
    "a part, by Lightning on one rank of several": (
        lambda: {"sampler": DistributedSamplerWrapper(SubsetRandomSampler([7, 3, 5]), num_replicas=2, rank=1)},
        [7, 3, 5],
    ),
    "one rank of several": (lambda: {"sampler": DistributedSampler(DATA, 3, 1)}, None),
    "a part at random": (lambda: {"sampler": SubsetRandomSampler([7, 3, 5]), "batch_size": 2}, [7, 3, 5]),
    "a part given as tensors": (lambda: {"sampler": SubsetRandomSampler(torch.tensor([7, 3]))}, [7, 3]),
    "counted from the end": (lambda: {"sampler": SubsetRandomSampler([-1, 0])}, [22, 0]),
    "a list": (lambda: {"sampler": [4, 4, 2], "batch_size": 2}, [4, 4, 2]),
    "the first ones": (lambda: {"sampler": RandomSampler(range(6))}, range(6)),
    "in batches": (lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler([3, 1]), 4, True)}, [3, 1]),
    "a list of batches": (lambda: {"batch_sampler": [[1, 2], [3]]}, [1, 2, 3]),
    "fetched in batches": (
        lambda: {"sampler": BatchSampler(SubsetRandomSampler([3, 1]), 4, True), "batch_size": None},
        [3, 1],
    ),
    "keys": (lambda: {"sampler": SubsetRandomSampler(["a", "c"])}, ["a", "c"]),
}


@pytest.mark.parametrize("case", DRAWN)
def test_what_a_loader_draws_is_read_off_its_samplers(case):
    options, keys = DRAWN[case]
    drawn = drawn_by(DataLoader(DATA, **options()))
    assert drawn.unknown is None
    assert drawn.keys == keys


@pytest.mark.parametrize("how", ["sampler", "batch_sampler"])
def test_a_sampler_of_the_users_own_is_left_as_it_was(how):
    sampler = Shuffled() if how == "sampler" else Unequal([[3, 1], [7]])
    loader = DataLoader(DATA, **{how: sampler})
    state = torch.get_rng_state()
    assert drawn_by(loader).unknown is sampler
    keys = iterated(loader)
    assert keys == ([3, 1, 7] if how == "batch_sampler" else keys)
    assert sorted(keys) == ([1, 3, 7] if how == "batch_sampler" else [0, 2, 4, 6, 8])
    assert iterated(loader) == keys
    assert sampler.asked == 0
    assert torch.equal(torch.get_rng_state(), state)


def told(loader: DataLoader) -> list[int | None]:
    """Sizes by batch, where no tensor helps."""
    sizes = BatchSizes(loader)
    return [sizes.of(index, object()) for index in range(len(loader))]


SIZES = {
    "last one smaller": (lambda: {"batch_size": 4}, [4, 4, 4, 4, 4, 3]),
    "last one dropped": (lambda: {"batch_size": 4, "drop_last": True}, [4] * 5),
    "a part": (lambda: {"sampler": SubsetRandomSampler(range(6)), "batch_size": 4}, [4, 2]),
    "one rank of three": (lambda: {"sampler": DistributedSampler(DATA, 3, 1), "batch_size": 3}, [3, 3, 2]),
    "in batches": (lambda: {"batch_sampler": BatchSampler(SequentialSampler(DATA), 20, False)}, [20, 3]),
    "fetched in batches": (
        lambda: {"sampler": BatchSampler(SequentialSampler(DATA), 20, False), "batch_size": None},
        [20, 3],
    ),
    "a list of batches": (lambda: {"batch_sampler": [[1, 2], [3]]}, [2, 1]),
    "of the user's own": (lambda: {"batch_sampler": Unequal()}, [6, 6, 6, 6]),  # 23 in 4
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_read_off_the_loader(case):
    options, sizes = SIZES[case]
    loader = DataLoader(DATA, **options())
    assert told(loader) == sizes
    if case != "of the user's own":
        whole = leading_lengths(list(loader))[::2]
        assert whole == sizes
        assert BatchSizes(loader).settled() is None


def test_sizes_go_round_with_the_epochs():
    sizes = BatchSizes(DataLoader(DATA, 20))
    assert [sizes.of(index, object()) for index in range(4)] == [20, 3, 20, 3]


@pytest.mark.parametrize(
    ("drawn", "mean", "message"),
    [
        (None, 23 / 4, None),
        ([[0, 1], [0, 2], [0, 3], [0, 4]], 2, "5 of 23, up to 4 times"),
        ([[0, 1], [2, 3, 4]], 2.5, "5 of 23, up to 1 times"),
    ],
)
def test_an_own_batch_sampler_is_settled_by_a_copy(recwarn, drawn, mean, message):
    sampler = Unequal(drawn)
    assert BatchSizes(DataLoader(DATA, batch_sampler=sampler)).settled() == mean
    assert sampler.asked == 0
    warned = [str(w.message) for w in recwarn]
    assert len(warned) == (message is not None)
    assert message is None or message in warned[0]


class Uncopied(Unequal):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds an open file")


def test_a_batch_sampler_without_a_copy_is_counted_by_tensors():
    sizes = BatchSizes(DataLoader(DATA, batch_sampler=Uncopied()))
    assert sizes.of(2, [torch.zeros(3, 4)]) == 3
    assert sizes.settled() is None


def test_a_sampler_without_a_copy_is_iterated_itself():
    sampler = Uncopied([[3, 1], [7]])
    assert iterated(DataLoader(DATA, batch_sampler=sampler)) == [3, 1, 7]
    assert sampler.asked == 1


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


@dataclass(frozen=True)
class Frozen:
    weights: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor


def batch(size: int) -> Frozen:
    return Frozen(torch.ones(3), torch.zeros(size, 6), torch.zeros(size))


def test_batches_of_a_stream_and_of_no_loader_are_counted_by_most_of_their_tensors():
    sizes = BatchSizes(DataLoader(Stream(), 8))
    assert [sizes.of(index, batch(size)) for index, size in enumerate([8, 8, 5])] == [8, 8, 5]
    assert sizes.of(0, {"only": torch.ones(3), "whole": torch.zeros(8)}) == 8
    assert sizes.of(0, object()) == 8
    assert BatchSizes(None).of(0, batch(5)) == 5
    assert BatchSizes(None).of(0, object()) is None
    assert count_examples(batch(7)) == 7
    assert count_examples([torch.tensor(1.0)]) == 1


UNLIKE = {
    "weights": (lambda: {"sampler": WeightedRandomSampler([1.0] * 23, 23)}, "`WeightedRandomSampler`"),
    "weights, in batches": (
        lambda: {"batch_sampler": BatchSampler(WeightedRandomSampler([1.0] * 23, 23), 4, False)},
        "`WeightedRandomSampler`",
    ),
    "of the user's own": (lambda: {"sampler": Shuffled()}, "`Shuffled`"),
    "some twice": (lambda: {"sampler": SubsetRandomSampler([3, 1, 3])}, "more than once"),
    "never the last": (lambda: {"batch_size": 4, "drop_last": True}, "`drop_last` without shuffling"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_training_that_does_not_visit_all_alike_is_said(case):
    options, message = UNLIKE[case]
    with pytest.warns(UserWarning, match=f"does not visit all examples alike.*{message}"):
        examples = training_examples(DataLoader(DATA, **options()))
    assert examples is not None
    assert examples.positions.tolist() == ([1, 3] if case == "some twice" else list(range(23)))


def test_a_fixed_part_needs_no_word(recwarn):
    examples = training_examples(DataLoader(DATA, sampler=SubsetRandomSampler([5, 2, 9]), batch_size=2))
    assert examples is not None
    assert examples.positions.tolist() == [2, 5, 9]
    assert len(examples) == 3
    ids, given = next(examples.batches([2, 0]))
    assert ids.tolist() == [2, 0]
    assert torch.equal(given[0], DATA.tensors[0][[9, 2]])
    assert not recwarn.list
