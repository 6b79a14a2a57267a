"""Metrics against scipy, scikit-learn and hand values; their states; what they refuse."""

import multiprocessing

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_source import InfluenceScores
from lightning_source.evaluation import (
    LinearDatamodelingScore,
    MislabelDetection,
    RemovalCorrelation,
    SubsetRemoval,
    leave_one_out_subsets,
    linear_datamodeling_score,
    own_query,
    statistics,
    without_proponents,
    without_random_same_label,
)

QUERIES, EXAMPLES, SUBSETS, RETRAININGS = 7, 30, 40, 4
# Everything is computed in float64, in another order than scipy does.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def half_subsets(generator: torch.Generator) -> Tensor:
    ranks = torch.rand(SUBSETS, EXAMPLES, generator=generator).argsort(1).argsort(1)
    return (ranks < EXAMPLES // 2).to(torch.uint8)


@pytest.fixture(scope="module")
def study() -> dict[str, Tensor]:
    """Scores that predict the measurements with noise; measurements rounded, so that some tie."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(QUERIES, EXAMPLES, generator=generator)
    subsets = half_subsets(generator)
    noise = 6 * torch.randn(RETRAININGS, SUBSETS, QUERIES, generator=generator)
    measurements = (10 + (1 - subsets.float()) @ scores.T * 1.5 + noise).round()
    return {"scores": scores, "subsets": subsets, "measurements": measurements}


def predictions(study: dict[str, Tensor]) -> np.ndarray:
    """As in the benchmark: minus the sum over the kept examples, in float64; ``[M, Q]``."""
    return -(study["subsets"].double() @ study["scores"].double().T).numpy()


def test_midranks_are_scipys():
    values = torch.randint(5, (3, 4, 17)).double()
    np.testing.assert_array_equal(statistics.midranks(values), stats.rankdata(values, axis=-1))


def test_lds_is_the_mean_of_scipys_spearman(study):
    result = linear_datamodeling_score(**study)
    predicted, measured = predictions(study), study["measurements"].mean(0).numpy()
    expected = [stats.spearmanr(predicted[:, q], measured[:, q]).statistic for q in range(QUERIES)]
    np.testing.assert_allclose(result.per_query, expected, **EXACT)
    np.testing.assert_allclose(result.lds, np.mean(expected), **EXACT)
    assert result.interval[0] < result.lds < result.interval[1]
    assert result.subset_interval[0] < result.lds < result.subset_interval[1]
    assert result.control_interval[0] < 0.3 < result.lds  # noise of 40 subsets and 7 queries: about 0.06


def test_scores_that_are_the_datamodel_score_one_and_their_negatives_minus_one(study):
    outcome = study["subsets"].double() @ -study["scores"].double().T
    assert linear_datamodeling_score(study["scores"], study["subsets"], outcome).lds == pytest.approx(1)
    assert linear_datamodeling_score(-study["scores"], study["subsets"], outcome).lds == pytest.approx(-1)


def test_query_interval_is_scipys_percentile_bootstrap(study):
    result = linear_datamodeling_score(**study, resamples=20_000)
    found = stats.bootstrap((result.per_query.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=1)
    width = found.confidence_interval.high - found.confidence_interval.low
    # The Monte Carlo error of a 2.5 % quantile of 20,000 draws is about 0.7 % of the interval's width.
    np.testing.assert_allclose(result.interval, found.confidence_interval, atol=0.03 * width)


@pytest.mark.parametrize("correlation", ["spearmanr", "pearsonr"])
def test_weighted_correlations_are_those_of_the_repeated_items(correlation):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(6, (2, 15), generator=generator).double()
    weights = statistics.draw_weights(15, 8, generator)
    weighted = {"spearmanr": statistics.weighted_spearman, "pearsonr": statistics.weighted_pearson}[correlation]
    expected = [
        getattr(stats, correlation)(
            np.repeat(x.numpy(), row.int().numpy()), np.repeat(y.numpy(), row.int().numpy())
        ).statistic
        for row in weights
    ]
    np.testing.assert_allclose(weighted(x, y, weights), expected, **EXACT)


def test_bootstrap_weights_draw_every_item_once_on_average():
    weights = statistics.draw_weights(10, 4000, torch.Generator().manual_seed(0))
    assert (weights.sum(1) == 10).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.07)  # 4 standard errors of a binomial count
    np.testing.assert_allclose(weights.var(0), 0.9, atol=0.1)


def test_split_half_reliability_by_hand():
    """Two retrainings: one split, then Spearman-Brown ``2r / (1 + r)``; three: halves of one, factor three."""
    measured = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(5)).double()
    measured += torch.linspace(0, 4, 12)
    pair = [[stats.spearmanr(measured[0, a], measured[0, b]).statistic for b in range(3)] for a in range(3)]
    generator = torch.Generator()
    two = statistics.split_half_reliability(measured[:, :2], statistics.spearman, generator)
    assert float(two) == pytest.approx(2 * pair[0][1] / (1 + pair[0][1]))
    r = (pair[0][1] + pair[0][2] + pair[1][2]) / 3
    three = statistics.split_half_reliability(measured, statistics.spearman, generator)
    assert float(three) == pytest.approx(3 * r / (1 + 2 * r))
    assert statistics.split_half_reliability(measured[:, :1], statistics.spearman, generator) is None


@pytest.mark.parametrize("retrainings", [2, 4, 5, 12])
def test_reliability_recovers_the_correlation_of_two_independent_ground_truths(retrainings):
    """Signal of variance 1, noise of variance 2 a retraining: the means correlate by ``1 / (1 + 2 / R)``."""
    generator = torch.Generator().manual_seed(2)
    signal = torch.randn(200, 1, 100, generator=generator)
    measured = (signal + 2**0.5 * torch.randn(200, retrainings, 100, generator=generator)).double()
    found = statistics.split_half_reliability(measured, statistics.pearson, generator)
    # 20,000 pairs: the standard error of a correlation is below 0.007; times Spearman-Brown's slope of at most 2.
    assert float(found) == pytest.approx(1 / (1 + 2 / retrainings), abs=0.03)


def test_control_of_a_perfect_score_is_chance(study):
    outcome = study["subsets"].double() @ -study["scores"].double().T
    result = linear_datamodeling_score(study["scores"], study["subsets"], outcome, controls=200)
    # 7 queries of 40 subsets: a mean of 7 correlations with standard deviation 0.16 each.
    assert abs(float(result.control)) < 0.05
    assert -0.25 < result.control_interval[0] < 0 < result.control_interval[1] < 0.25


def test_removal_correlation_is_scipys_pearson_and_linear_regression(study):
    one = study | {"scores": study["scores"][:1], "measurements": study["measurements"][..., :1]}
    metric = RemovalCorrelation(one["subsets"])
    metric.update(one["scores"], one["measurements"])
    result = metric.compute()
    predicted, actual = predictions(one)[:, 0], one["measurements"].mean(0)[:, 0].numpy()
    np.testing.assert_allclose(result.pearson, stats.pearsonr(predicted, actual).statistic, **EXACT)
    np.testing.assert_allclose(result.spearman, stats.spearmanr(predicted, actual).statistic, **EXACT)
    np.testing.assert_allclose(result.slope, stats.linregress(predicted, actual).slope, **EXACT)


def test_slope_pools_centred_queries_and_its_intervals_hold_it(study):
    metric = RemovalCorrelation(study["subsets"])
    metric.update(study["scores"], study["measurements"] + 100 * torch.arange(QUERIES))  # intercepts of their own
    result = metric.compute()
    predicted, actual = predictions(study), study["measurements"].double().mean(0).numpy()
    centred = [(x - x.mean(0)).T.ravel() for x in (predicted, actual)]
    np.testing.assert_allclose(result.slope, stats.linregress(*centred).slope, rtol=1e-9)
    pearsons = [stats.pearsonr(predicted[:, q], actual[:, q]).statistic for q in range(QUERIES)]
    np.testing.assert_allclose(result.pearson_per_query, pearsons, rtol=1e-9)
    for interval in (result.slope_interval, result.slope_group_interval):
        assert interval[0] < result.slope < interval[1]
        assert interval[0] < 1.5 < interval[1]  # what the data were made with


def test_resampled_slopes_are_those_of_the_repeated_items():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 15, generator=generator).double()
    weights = statistics.draw_weights(15, 6, generator)
    top, bottom = statistics.weighted_slope_terms(x, y, weights)
    expected = [
        stats.linregress(np.repeat(x.numpy(), row.int().numpy()), np.repeat(y.numpy(), row.int().numpy())).slope
        for row in weights
    ]
    np.testing.assert_allclose(top / bottom, expected, rtol=1e-9)


def test_leave_one_out_subsets_leave_out_one():
    subsets = leave_one_out_subsets([4, 0], examples=6)
    assert (~subsets).nonzero().tolist() == [[0, 4], [1, 0]]
    assert torch.equal(leave_one_out_subsets(range(3), 3), ~torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize("distinct", [3, 1000])
def test_mislabel_auc_is_sklearns_and_the_curve_has_its_area(distinct):
    generator = torch.Generator().manual_seed(1)
    planted = torch.rand(300, generator=generator) < 0.2
    suspicion = torch.randint(distinct, (300,), generator=generator) + planted * distinct / 3
    metric = MislabelDetection()
    metric.update(suspicion, planted)
    result = metric.compute()
    assert float(result.auc) == pytest.approx(roc_auc_score(planted, suspicion), rel=1e-12)
    assert result.auc_interval[0] < result.auc < result.auc_interval[1]
    assert float(torch.trapezoid(result.found, result.inspected)) == pytest.approx(float(result.area), rel=1e-12)
    assert result.area_interval[0] < result.area < result.area_interval[1] < result.best_area
    assert result.control_interval[0] < 0.5 < result.control_interval[1]


def test_cost_curve_by_hand():
    """Suspicions 9, 5, 5, 1: the tie's one error is found half by half."""
    metric = MislabelDetection()
    metric.update(torch.tensor([5.0, 9, 1, 5]), [1, 1, 0, 0])
    result = metric.compute()
    np.testing.assert_allclose(result.found, [0, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(result.inspected, [0, 0.25, 0.5, 0.75, 1])
    assert float(result.auc) == pytest.approx(7 / 8)
    assert float(result.best_area) == pytest.approx(0.75)


@pytest.mark.parametrize("resamples", [7, 5000])
def test_resampled_auc_is_that_of_the_repeated_items(resamples, monkeypatch):
    from lightning_source.evaluation import mislabel

    monkeypatch.setattr(mislabel, "_FLOATS_AT_ONCE", 60)  # three samples at a time
    suspicion = torch.tensor([3.0, 1, 2, 2, 5, 4, 0, 2, 3, 3, 1, 6, 2, 2, 8, 7, 1, 1, 3, 2])
    planted = (torch.arange(20) % 3 == 0).double()
    metric = MislabelDetection(resamples=resamples)
    found = metric._resampled(suspicion, planted, torch.Generator().manual_seed(4))[0]
    weights = statistics.draw_weights(20, resamples, torch.Generator().manual_seed(4))
    assert len(found) == resamples
    for value, row in list(zip(found, weights, strict=True))[-7:]:
        expected = roc_auc_score(planted.repeat_interleave(row.int()), suspicion.repeat_interleave(row.int()))
        assert float(value) == pytest.approx(expected, rel=1e-12)


def test_masks_without_proponents_by_hand():
    scores = torch.tensor([[0.1, 0.9, -0.5, 0.4], [2.0, 1.0, 0.0, 3.0]])
    masks = without_proponents(scores, [0, 1, 2])
    removed = [[row.logical_not().nonzero().flatten().tolist() for row in mask] for mask in masks]
    assert removed == [[[], []], [[1], [3]], [[1, 3], [0, 3]]]
    opposite = without_proponents(scores, [1], lower_is_better=False)
    assert (~opposite[0]).nonzero().tolist() == [[0, 2], [1, 2]]


def test_masks_of_results_follow_their_ids_and_measurement():
    ids = torch.tensor([5, 2])
    scores = InfluenceScores(torch.tensor([[1.0, -1.0]]), ids, torch.tensor([0]), metadata={"measurement": "margin"})
    with pytest.raises(ValueError, match="pass its length"):
        without_proponents(scores, [1])
    # For a margin the example whose removal would lower it is the proponent.
    assert (~without_proponents(scores, [1], examples=8)).nonzero().tolist() == [[0, 0, 2]]


def test_random_baseline_removes_nested_sets_of_the_querys_label():
    labels = torch.arange(40) % 4
    masks = without_random_same_label(labels, [1, 3], [2, 5, 10, 12], seed=1)
    for query, label in enumerate((1, 3)):
        assert (~masks[:, query]).sum(1).tolist() == [2, 5, 10, 12]
        assert (labels[~masks[1, query]] == label).all()
        assert (~masks[2, query] <= ~masks[3, query]).all()  # 10 have the label, then others make up the number
    assert not torch.equal(masks, without_random_same_label(labels, [1, 3], [2, 5, 10, 12], seed=2))


def test_flip_curve_by_hand():
    correct = torch.tensor([[[1, 1, 1], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [R, K, Q]
    random = torch.ones(2, 2, 3)
    metric = SubsetRemoval([5, 10])
    metric.update(correct, random)
    result = metric.compute()
    np.testing.assert_allclose(result.flipped, [1 / 6, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(result.random, [0, 0])
    assert float(result.gain) == pytest.approx(1 / 3)
    assert (result.interval[:, 0] <= result.flipped).all()
    assert (result.flipped <= result.interval[:, 1]).all()
    assert result.sizes.tolist() == [5, 10]


def test_at_most_counts_a_query_from_its_first_flip_on():
    correct = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 1]])  # [K, Q]: query 0 flips at the first size, and so on
    metric = SubsetRemoval([1, 2, 3], count="at-most")
    metric.update(correct, torch.ones(3, 3))
    np.testing.assert_allclose(metric.compute().flipped, [1 / 3, 2 / 3, 1])


def test_own_query_takes_the_diagonal():
    outcomes = torch.arange(2 * 6 * 3).reshape(2, 6, 3)  # two retrainings, two sizes, three queries
    assert own_query(outcomes, 2)[0].tolist() == [[0, 4, 8], [9, 13, 17]]
    with pytest.raises(ValueError, match="3 sizes x queries"):
        own_query(outcomes, 3)


def metrics_and_updates(study: dict[str, Tensor]) -> list[tuple]:
    """``(factory, whole update, its two parts)``."""
    scores, measured = study["scores"], study["measurements"]
    parts = [(scores[:3], measured[..., :3]), (scores[3:], measured[..., 3:])]
    correct, random = (measured > 10).float()[:, :2], (measured > 3).float()[:, :2]
    halves = [(correct[..., q], random[..., q]) for q in (slice(0, 3), slice(3, None))]
    planted = torch.arange(EXAMPLES) % 4 == 0
    examples = [(scores[0, :11], planted[:11]), (scores[0, 11:], planted[11:])]
    return [
        (lambda: LinearDatamodelingScore(study["subsets"]), (scores, measured), parts),
        (lambda: RemovalCorrelation(study["subsets"]), (scores, measured), parts),
        (lambda: SubsetRemoval([1, 2]), (correct, random), halves),
        (MislabelDetection, (scores[0], planted), examples),
    ]


def assert_same(found, expected):
    assert type(found) is type(expected)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        # Products of other batch shapes add up in another order.
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("index", range(4))
def test_states(study, index):
    """Two updates equal one; so do merged metrics, and a state that went through ``state_dict``; reset empties it."""
    make, whole, parts = metrics_and_updates(study)[index]
    expected = make()
    expected.update(*whole)
    result = expected.compute()

    twice, other = make(), make()
    twice.update(*parts[0])
    other.update(*parts[1])
    merged = make()
    merged.update(*parts[1])
    merged.merge_state(twice)  # torchmetrics puts what comes in first
    assert_same(merged.compute(), result)
    twice.persistent(True)
    restored = make()
    restored.persistent(True)
    restored.load_state_dict(twice.state_dict())
    for metric in (twice, restored):
        metric.update(*parts[1])
        assert_same(metric.compute(), result)

    twice.reset()
    twice.update(*whole)
    assert_same(twice.compute(), result)


def on_one_rank(
    rank: int, store: str, subsets: Tensor, part: tuple[Tensor, Tensor], expected: list[np.ndarray]
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metric = LinearDatamodelingScore(subsets)
    metric.update(*part)
    for found, value in zip(metric.compute()[:6], expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-12)
    torch.distributed.destroy_process_group()


def test_two_ranks_with_other_queries_find_what_one_finds(study, tmp_path):
    expected = [value.numpy() for value in linear_datamodeling_score(**study)[:6]]
    parts = metrics_and_updates(study)[0][2]  # three queries and four
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=on_one_rank, args=(rank, str(tmp_path / "store"), study["subsets"], part, expected))
        for rank, part in enumerate(parts)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def test_results_and_numpy_arrays_go_in(study):
    ids = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(0))
    result = InfluenceScores(study["scores"][:, ids], ids, torch.arange(QUERIES))
    expected = linear_datamodeling_score(**study).lds
    found = linear_datamodeling_score(result, study["subsets"].numpy(), study["measurements"].numpy()).lds
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_queries_that_say_nothing_count_zero_with_a_warning(study):
    scores = study["scores"].clone()
    scores[2] = 0
    with pytest.warns(UserWarning, match="1 queries of 7"):
        result = linear_datamodeling_score(scores, study["subsets"], study["measurements"])
    assert result.per_query[2] == 0


def test_wrong_inputs_are_named(study):
    scores, subsets, measured = study["scores"], study["subsets"], study["measurements"]
    nan = scores.clone()
    nan[1, 2] = torch.nan
    ones, none, two = subsets.clone(), subsets.clone(), subsets.clone()
    ones[5], none[6], two[0, 0] = 1, 0, 2
    cases = [
        ((nan, subsets, measured), "`scores` holds 1 values"),
        ((scores, subsets, measured / 0), "`measurements` holds .* NaN or infinite"),
        ((scores, ones, measured), "subset 5 keeps every example"),
        ((scores, none, measured), "subset 6 keeps no example"),
        ((scores, two, measured), "0 and 1"),
        ((scores[:, 1:], subsets, measured), r"\[queries, 30\]"),
        ((scores, subsets, measured.transpose(1, 2)), r"\[40, 7\]"),
        ((scores[:4], subsets, measured), r"\[40, 4\]"),
        ((scores, subsets[:2], measured[:, :2]), "at least 3"),
        ((InfluenceScores(scores, torch.arange(30) + 1, torch.arange(7)), subsets, measured), "training example 30"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_datamodeling_score(*arguments)
    metric = LinearDatamodelingScore(subsets)
    metric.update(scores, measured)
    with pytest.raises(ValueError, match="3 retrainings, those before held 4"):
        metric.update(scores, measured[:3])
    for sizes, message in (([2, 1], "ascend"), ([], "ascend"), ([30], "leaves nothing")):
        with pytest.raises(ValueError, match=message):
            without_proponents(scores, sizes)
    with pytest.raises(ValueError, match=r"0 \(wrong\) and 1 \(right\)"):
        SubsetRemoval([1, 2]).update(torch.full((2, 3), 0.5), torch.ones(2, 3))
    detection = MislabelDetection()
    with pytest.raises(ValueError, match="one length"):
        detection.update(scores, torch.ones(30))
    detection.update(scores[0], torch.zeros(30))
    with pytest.raises(ValueError, match="needs both kinds"):
        detection.compute()
