"""Stretches add up, and cutting them covers everything once: checked on random trainings."""

import itertools
import json
import random

import pytest

from lightning_source.recording.intervals import (
    StepInterval,
    cut,
    cut_evenly,
    merge_all,
    normalized_weights,
    pairs_to_merge,
)
from lightning_source.recording.typed_json import from_json, to_json

SEEDS = range(100)


def training(lengths, groups=2, start=0, seed=0):
    """Consecutive stretches; their rates are small dyadic fractions, which add up exactly in any order."""
    draw = random.Random(seed)
    firsts = itertools.accumulate(lengths, initial=start)
    return [
        StepInterval(
            first,
            first + length,
            tuple(draw.randrange(1, 64) / 8 for _ in range(groups)),
            tuple(draw.randrange(64) / 16 for _ in range(groups)),
            f"bins/{first}",
        )
        for first, length in zip(firsts, lengths, strict=False)
    ]


def random_training(seed, shortest=1, most=14):
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, 9) for _ in range(draw.randint(1, most))]
    return training(lengths, start=draw.choice([0, 5]), seed=seed), draw


def assert_partition(groups, stretches):
    assert [i for group in groups for i in group] == list(range(len(stretches)))
    assert all(groups)  # never an empty one


# ---------------------------------------------------------------- stretches


def test_a_merge_sums_what_was_summed():
    a = StepInterval(0, 3, (1.0, 0.5), (0.25, 0.0), "a")
    b = StepInterval(3, 10, (2.0, 0.25), (0.5, 0.125), "b")
    assert a.merge(b) == StepInterval(0, 10, (3.0, 0.75), (0.75, 0.125), "")
    assert (a.steps, b.steps, a.merge(b).steps) == (3, 7, 10)
    assert a.merge(b).weight == (3.0 + 0.75) / 2
    assert a.merge(b).weight_decay(0) == 0.25
    assert a.merge(b).at("c").file == "c"


def test_merging_is_associative():
    for stretches, draw in map(random_training, SEEDS):
        total = merge_all(stretches)
        if len(stretches) > 1:
            split = draw.randrange(1, len(stretches))
            assert merge_all(stretches[:split]).merge(merge_all(stretches[split:])) == total
        assert (total.first, total.last) == (stretches[0].first, stretches[-1].last)
        assert total.rates == tuple(map(sum, zip(*(s.rates for s in stretches), strict=True)))
        assert total.decays == tuple(map(sum, zip(*(s.decays for s in stretches), strict=True)))


@pytest.mark.parametrize("first", [2, 4, 0])
def test_gaps_overlaps_and_wrong_order_are_refused(first):
    with pytest.raises(ValueError, match="do not follow steps 0-3"):
        StepInterval(0, 3, (1.0,), (0.0,)).merge(StepInterval(first, 9, (1.0,), (0.0,)))


def test_parameter_groups_must_match():
    with pytest.raises(ValueError, match="shorter"):
        StepInterval(0, 3, (1.0, 2.0), (0.0, 0.0)).merge(StepInterval(3, 4, (1.0,), (0.0,)))


def test_decay_without_a_rate_is_zero():
    assert StepInterval(0, 3, (0.0,), (0.0,)).weight_decay(0) == 0


def test_json_round_trip():
    for stretch in random_training(3)[0]:
        assert from_json(StepInterval, json.loads(json.dumps(to_json(stretch)))) == stretch


def test_weights_follow_the_distance_trained():
    stretches = [StepInterval(0, 5, (1.0, 3.0), (0.0, 0.0)), StepInterval(5, 6, (6.0, 0.0), (0.0, 0.0))]
    assert normalized_weights(stretches) == [0.4, 0.6]
    still = [StepInterval(0, 5, (0.0,), (0.0,)), StepInterval(5, 20, (0.0,), (0.0,))]
    assert normalized_weights(still) == [0.25, 0.75]


def test_weights_sum_to_one():
    for stretches, _ in map(random_training, SEEDS):
        assert sum(normalized_weights(stretches)) == pytest.approx(1)
        assert min(normalized_weights(stretches)) > 0


# ---------------------------------------------------------------- merging bins in pairs


def test_pairs_respect_boundaries():
    for stretches, draw in map(random_training, SEEDS):
        boundaries = draw.sample([s.first for s in stretches], draw.randint(0, min(4, len(stretches))))
        groups = pairs_to_merge(stretches, boundaries)
        assert_partition(groups, stretches)
        assert all(len(group) <= 2 for group in groups)
        assert all(stretches[i].first not in boundaries for group in groups for i in group[1:])
        for one, other in itertools.pairwise(groups):  # what stays alone could not go with its neighbour
            assert len(one) == 2 or stretches[other[0]].first in boundaries


def test_pairs_halve_their_number_without_boundaries():
    assert pairs_to_merge(training([1] * 5), []) == [(0, 1), (2, 3), (4,)]
    assert pairs_to_merge(training([1] * 5), [1]) == [(0,), (1, 2), (3, 4)]


# ---------------------------------------------------------------- cutting


def test_an_even_cut_covers_everything():
    for stretches, draw in map(random_training, SEEDS):
        count = draw.randint(1, len(stretches) + 3)
        groups = cut_evenly(stretches, count)
        assert_partition(groups, stretches)
        assert len(groups) == min(count, len(stretches))
        assert cut(stretches, count) == groups


@pytest.mark.parametrize("total", [1, 2, 7, 12, 24, 25])
def test_equal_stretches_are_cut_to_within_one(total):
    for count in range(1, total + 1):
        sizes = [len(group) for group in cut_evenly(training([4] * total), count)]
        assert max(sizes) - min(sizes) <= 1


def test_no_other_cut_is_more_even():
    """With two or more stretches a group, inner cuts lie as near to their even places as any choice allows."""
    for seed in SEEDS:
        stretches, draw = random_training(seed, shortest=4, most=12)
        count = draw.randint(1, max(1, len(stretches) // 2))
        start, total = stretches[0].first, stretches[-1].last - stretches[0].first

        def distance(cuts, first=start, even=total / count, stretches=stretches):
            return sum(abs(stretches[i].first - first - even * k) for k, i in enumerate(cuts, 1))

        best = min(map(distance, itertools.combinations(range(1, len(stretches)), count - 1)))
        assert distance([group[0] for group in cut_evenly(stretches, count)[1:]]) == pytest.approx(best)


@pytest.mark.parametrize(
    ("boundaries", "starts"),
    [
        ([10, 20], [0, 10, 20]),
        ([20, 10, 10], [0, 10, 20]),
        ([], [0]),
        ([0], [0]),
        ([3], [0]),  # inside a stretch: to its nearer end
        ([8], [0, 10]),
        ([9, 12], [0, 10]),  # both to one end: one segment begins there
        ([29], [0]),  # nearest to the end of training: no segment begins there
        ([10, 99], [0, 10]),  # a boundary that training never reached
    ],
)
def test_a_cut_at_steps(boundaries, starts):
    stretches = training([10, 10, 10])
    groups = cut(stretches, boundaries)
    assert_partition(groups, stretches)
    assert [stretches[group[0]].first for group in groups] == starts


def test_random_cuts_at_steps_cover_everything():
    for stretches, draw in map(random_training, SEEDS):
        exact = draw.sample([s.first for s in stretches], draw.randint(1, len(stretches)))
        groups = cut(stretches, exact)
        assert_partition(groups, stretches)
        assert [stretches[group[0]].first for group in groups] == sorted({stretches[0].first, *exact})
        assert_partition(cut(stretches, [draw.randint(0, 200) for _ in range(5)]), stretches)
