"""Error bars of scores: against the jackknife written out, SciPy's quantiles, and how often intervals hold."""

import json

import pytest
import torch
from helpers import classes, fitted
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_source import InfluenceScores
from lightning_source._student import student_quantile
from lightning_source.ensembling import ensemble
from lightning_source.estimators import Query
from lightning_source.estimators.registry import estimator_for
from lightning_source.estimators.sinks import MatrixSink

QUERY = [x[:4] for x in classes(8, seed=2).tensors]


class TermSink(MatrixSink):
    """Keeps the blocks of each term apart: every example of every term comes once."""

    def __init__(self, queries, examples):
        super().__init__(queries, examples)
        self.terms = []

    def add(self, rows, columns, values, segment):
        if columns.start == 0:
            self.terms.append((segment, torch.zeros_like(self.values, dtype=torch.float64)))
        self.terms[-1][1][rows, columns] += values


@pytest.mark.parametrize(("method", "segments"), [("source", 1), ("source", 2), ("tracin", 2)])
def test_it_is_the_jackknife_over_snapshots(tmp_path, method, segments):
    """Every snapshot left out in turn, the others of its segment scaled up, in float64; rtol for float32 terms."""
    trainer = fitted(tmp_path, segments=segments, snapshots_per_segment=3, max_epochs=12)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        plain = scorer.score(QUERY, method=method)
        scores = scorer.score(QUERY, method=method, stderr=True, per_segment=True)
        sink = TermSink(*plain.values.shape)
        query = Query(scorer.run, scorer.run.queries(_queries(scorer)), "loss")
        for term in estimator_for(method, {})(query):
            term.compute(scorer.run.workspace, scorer.run.data, None, sink, slice(0, len(QUERY[0])))
    variance = 0
    for segment in range(segments):
        terms = torch.stack([term for index, term in sink.terms if index == segment])
        left_out = (terms.sum(0) - terms) * len(terms) / (len(terms) - 1)
        variance += (len(terms) - 1) / len(terms) * (left_out - left_out.mean(0)).square().sum(0)
    torch.testing.assert_close(scores.stderr.double(), variance.sqrt(), rtol=1e-4, atol=1e-7)
    assert torch.equal(scores.values, plain.values)  # the bar changes no score
    torch.testing.assert_close(scores.by_segment.sum(0), scores.values)
    assert scores.metadata["error_bar"] == {"over": "snapshots", "degrees": 2 * segments}
    assert plain.stderr is None


def _queries(scorer):
    from lightning_source.capture.data import query_of

    return query_of(QUERY, scorer.run.stage.examples, None)


def test_blocks_of_queries_have_the_bars_of_all_at_once(tmp_path):
    trainer = fitted(tmp_path, snapshots_per_segment=3, max_epochs=6)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        together = scorer.score(QUERY, stderr=True)
        scorer.memory = 1
        torch.testing.assert_close(scorer.score(QUERY, stderr=True).stderr, together.stderr)
        some = scorer.score(QUERY, stderr=True, train_ids=[5, 2])
    torch.testing.assert_close(some.stderr, together.stderr[:, [5, 2]])


@pytest.mark.parametrize("method", ["influence", "fast-source", "repsim"])
def test_one_term_has_no_bar(tmp_path, method):
    trainer = fitted(tmp_path, snapshots_per_segment=3, max_epochs=6)
    with pytest.raises(MisconfigurationException, match=r"`stderr=True`: .* is one term.* HINT: .*ensemble"):
        trainer.attribute(QUERY, method=method, stderr=True)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 300])
def test_quantiles_of_student(level, degrees):
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-6)


def _runs(count, truth, noise, seed):
    draws = truth + noise * torch.randn(count, *truth.shape, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(truth.shape[1])
    return [InfluenceScores(draw, ids, torch.arange(len(truth)), metadata={"measurement": "loss"}) for draw in draws]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_intervals_of_ensembles_hold_as_often_as_they_say(count):
    """Normal runs of no effect: one in ten of 20,000 is called significant at 0.9, to four standard deviations."""
    scores = ensemble(_runs(count, torch.zeros(4, 5000), torch.linspace(0.5, 2, 5000), seed=count))
    assert scores.metadata["error_bar"] == {"over": "runs", "degrees": count - 1}
    assert scores.significant(0.9).float().mean() == pytest.approx(0.1, abs=4 * (0.09 / 20000) ** 0.5)


def test_sure_proponents_leave_out_the_doubtful():
    values, stderr = torch.tensor([[5.0, 3.0, 1.0, -6.0, -4.0]]), torch.tensor([[4.0, 0.1, 0.1, 5.0, 0.1]])
    bar = {"over": "runs", "degrees": 10}
    for sign, measurement in ((1, "loss"), (-1, "margin")):
        scores = InfluenceScores(
            sign * values,
            torch.arange(5),
            torch.arange(1),
            metadata={"measurement": measurement, "error_bar": bar},
            stderr=stderr,
        )
        assert scores.proponents(1)[1].tolist() == [[0]]
        assert scores.proponents(2, sure=0.9)[1].tolist() == [[1, 2]]
        assert scores.opponents(1)[1].tolist() == [[3]]
        ends, ids = scores.opponents(1, sure=0.9)
        assert ids.tolist() == [[4]]
        assert ends[0, 0] == pytest.approx(sign * (-4 + student_quantile(0.9, 10) * 0.1))


def test_bars_are_saved_with_the_scores(tmp_path):
    scores = ensemble(_runs(3, torch.ones(2, 5), 1.0, seed=0))
    scores.save(tmp_path / "scores.safetensors")
    loaded = InfluenceScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.stderr, scores.stderr)
    assert torch.equal(loaded.significant(), scores.significant())


@pytest.mark.parametrize("said", [None, {}, {"degrees": 0}, {"degrees": 1.5}, {"degrees": True}, [1]])
def test_bars_of_unknown_degrees_are_refused(tmp_path, said):
    scores = ensemble(_runs(3, torch.ones(2, 5), 1.0, seed=0))
    scores.metadata["error_bar"] = said
    json.dumps(scores.metadata)
    scores.save(tmp_path / "scores.safetensors")
    with pytest.raises(MisconfigurationException, match="does not say what `stderr` is taken over"):
        InfluenceScores.load(tmp_path / "scores.safetensors")


def test_without_a_bar_nothing_is_significant(tmp_path):
    scores = _runs(1, torch.ones(2, 5), 1.0, seed=0)[0]
    for ask in (scores.significant, lambda: scores.proponents(1, sure=0.9)):
        with pytest.raises(MisconfigurationException, match=r"no error bar. HINT: score with `stderr=True`"):
            ask()
    with pytest.raises(MisconfigurationException, match="a level of 90 is no probability"):
        scores.significant(90)
