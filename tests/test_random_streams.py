"""Seeds of random streams: fixed for ever, since recorded runs draw their labels from them."""

import itertools

import pytest
import torch

from lightning_source.random_streams import stream_seed


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((0, 0, 0), 3010437511937009226),
        ((0, 1, 0), 7619408953831620358),
        ((1, 0, 0), 7839147235533974352),
        ((0, 0, 1), 7340735519819088668),
        ((7, 3, 1999), 817400338036684088),
        # Large and negative parts count by their remainder, so all of these have a value.
        ((2**61 - 1, 0, 0), 3010437511937009226),
        ((2**61, 0, 0), 7839147235533974352),
        ((2**64 + 5, 1, 2), 5941524961704984578),
        ((-1, 0, 0), 7801616804935910393),
        ((-2, 0, 0), 673258795057828466),
        ((-(2**61) - 1, 0, 0), 673258795057828466),
    ],
)
def test_seeds_never_change(parts: tuple[int, ...], seed: int) -> None:
    assert stream_seed(*parts) == seed


def test_neighbouring_streams_have_seeds_of_their_own() -> None:
    grid = list(itertools.product(range(-3, 20), range(12), range(0, 4000, 16)))
    assert len({stream_seed(*parts) for parts in grid}) == len(grid)
    assert stream_seed(1, 2, 3) != stream_seed(3, 2, 1)
    assert stream_seed(1, 2) != stream_seed(1, 2, 0)


def test_a_generator_takes_every_seed() -> None:
    seeds = [stream_seed(seed, 0, example) for seed in (-(2**70), -1, 0, 2**70) for example in range(50)]
    draws = {int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(draws) == len(seeds)
