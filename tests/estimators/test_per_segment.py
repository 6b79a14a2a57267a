"""Segments' shares: those that there are sum to the scores, and a method that has none is refused by name."""

import pytest
import torch
from helpers import Classifier, classes, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source import SourceScorer
from lightning_source.estimators import registry
from lightning_source.passes.workspace import Workspace

QUERY = [x[:4] for x in classes(8, seed=2).tensors]
WITH = {"source", "fast-source", "astra-source", "tracin"}
WITHOUT = {
    *("influence", "influence-cg", "influence-lissa", "astra", "datainf"),
    *("trak", "grad-dot", "grad-cos", "repsim"),
}


@pytest.fixture(scope="module")
def three_segments(tmp_path_factory):
    path = tmp_path_factory.mktemp("three")
    fitted(path, segments=3, snapshots_per_segment=1)
    return path / "run"


def scorer_of(path):
    return SourceScorer.from_run(path, Classifier(mlp()))


def test_every_method_is_tried_here():
    assert set(registry._ESTIMATORS) == WITH | WITHOUT
    assert {name for name, estimator in registry._ESTIMATORS.items() if estimator.segments} == WITH


@pytest.mark.parametrize("method", sorted(WITH))
@pytest.mark.parametrize("ids", [None, [5, 3, 20]])
def test_shares_sum_to_the_scores(three_segments, method, ids):
    scorer = scorer_of(three_segments)
    scores = scorer.score(QUERY, classes(), method=method, per_segment=True, train_ids=ids)
    assert scores.by_segment.shape == (3, *scores.values.shape)
    largest = float(scores.values.abs().max())
    torch.testing.assert_close(scores.by_segment.sum(0), scores.values, rtol=0, atol=1e-6 * largest)
    assert (scores.segment_shares() > 0.01).all()
    assert torch.equal(scorer.score(QUERY, method=method, train_ids=ids).values, scores.values)


@pytest.mark.parametrize("method", sorted(WITHOUT))
def test_a_method_without_segments_is_refused_before_any_pass(three_segments, method, monkeypatch):
    def no_pass(*args, **kwargs):
        raise AssertionError("a pass was run")

    monkeypatch.setattr(Workspace, "at", no_pass)
    with pytest.raises(
        MisconfigurationException,
        match=rf'`method="{method}"` are not made of shares.*HINT: leave `per_segment` out, or ask one of "source"',
    ):
        scorer_of(three_segments).score(QUERY, classes(), method=method, per_segment=True)
