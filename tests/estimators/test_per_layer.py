"""Layers' shares: those of gradient products are autograd's, all sum to the scores, methods without any are refused."""

import pytest
import torch
import torch.nn.functional as F
from estimators.test_per_segment import WITH as WITH_SEGMENTS
from helpers import QUERY, Classifier, classes, close, fitted, gradient_rows, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_source import InfluenceScores, SourceScorer
from lightning_source.ensembling import ensemble
from lightning_source.estimators import DirectScores, MatrixSink, register_estimator, registry
from lightning_source.passes.workspace import Workspace

WITHOUT = {"trak", "repsim"}
WITH = set(registry._ESTIMATORS) - WITHOUT


class Net(Classifier):
    """A parameter of its own, a weight that two layers share, and one layer whose parameters are in two groups."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential())
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.outputs(batch[0]), batch[1])

    def outputs(self, x):
        return self.head(torch.tanh(self.second(self.scale * self.norm(torch.tanh(self.first(x))))))

    def configure_optimizers(self):
        bias = self.head.bias
        others = [p for p in self.parameters() if p is not bias]
        return torch.optim.SGD([{"params": others}, {"params": [bias]}], lr=0.1)

    def of_layers(self):
        return {
            "Net": [self.scale],
            "first": [self.first.weight, self.first.bias],
            "norm": [self.norm.weight, self.norm.bias],
            "second": [self.second.bias],
            "head": [self.head.weight, self.head.bias],
        }


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("deep"), Net())


@pytest.fixture(scope="module")
def two_segments(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    fitted(path, segments=2, snapshots_per_segment=2)
    return path / "run"


def scorer_of(path):
    return SourceScorer.from_run(path, Classifier(mlp()))


def sums_to(parts, values):
    """To 1e-5 of the absolute parts, which may cancel."""
    error = (parts.double().sum(0) - values.double()).abs()
    assert (error <= 1e-5 * parts.double().abs().sum(0)).all(), float(error.max())


@pytest.mark.parametrize("method", ["grad-dot", "grad-cos"])
def test_parts_of_gradient_products_are_those_of_autograd(deep, method):
    module = deep.lightning_module
    scores = deep.attribute(QUERY, method=method, per_layer=True)
    names = list(module.of_layers())
    assert scores.metadata["layers"] == names

    def rows(batch):
        examples = [[x[None], y[None]] for x, y in zip(*batch, strict=True)]
        return {
            name: gradient_rows((module.training_step(example, 0) for example in examples), parameters).double()
            for name, parameters in module.of_layers().items()
        }

    asked, trained = rows(QUERY), rows(classes().tensors)
    expected = torch.stack([asked[name] @ trained[name].T for name in names])
    if method == "grad-cos":
        lengths = [sum(part.square().sum(1) for part in parts.values()).sqrt() for parts in (asked, trained)]
        expected = expected / lengths[0][:, None] / lengths[1]
    else:
        expected = expected * sum(segment["rates"][0] for segment in scores.metadata["segments"]) / 24
    for found, wanted in zip(scores.by_layer, expected, strict=True):
        close(found, wanted)
    sums_to(scores.by_layer, scores.values)


@pytest.mark.parametrize("method", sorted(WITH))
@pytest.mark.parametrize("ids", [None, [5, 3, 20]])
def test_parts_sum_to_the_scores(two_segments, method, ids):
    scorer = scorer_of(two_segments)
    scores = scorer.score(QUERY, classes(), method=method, per_layer=True, train_ids=ids)
    assert scores.metadata["layers"] == ["net.0", "net.2"]
    assert scores.by_layer.shape == (2, *scores.values.shape)
    sums_to(scores.by_layer, scores.values)
    assert (scores.layer_shares() > 0.01).all()
    close(scores.layer_shares().sum(0), torch.ones(4))
    alone = scorer.score(QUERY, method=method, train_ids=ids)
    assert torch.equal(alone.values, scores.values)
    assert alone.by_layer is None
    assert "layers" not in alone.metadata


@pytest.mark.parametrize("method", ["source", "tracin"])
def test_segments_layers_and_errors_come_together(two_segments, method):
    assert method in WITH_SEGMENTS
    scorer = scorer_of(two_segments)
    scores = scorer.score(QUERY, classes(), method=method, per_layer=True, per_segment=True, stderr=True)
    sums_to(scores.by_segment, scores.values)
    sums_to(scores.by_layer, scores.values)
    for argument, name in (("per_layer", "by_layer"), ("per_segment", "by_segment"), ("stderr", "stderr")):
        alone = scorer.score(QUERY, method=method, **{argument: True})
        close(getattr(alone, name), getattr(scores, name))


def test_parts_of_queries_in_blocks_are_those_of_all_at_once(two_segments):
    scorer = scorer_of(two_segments)
    queries = torch.utils.data.TensorDataset(*QUERY)
    whole = scorer.score(queries, classes(), per_layer=True)
    scorer.memory = 1
    close(scorer.score(queries, per_layer=True).by_layer, whole.by_layer)


def test_a_layer_that_a_query_does_not_reach_has_no_share(two_segments):
    scorer = scorer_of(two_segments)
    scorer.measurement = lambda module, batch: module.net[0](batch[0]).square().sum(1)
    scores = scorer.score(QUERY, classes(), method="grad-dot", per_layer=True)
    assert scores.metadata["layers"] == ["net.0", "net.2"]
    assert torch.equal(scores.by_layer[0], scores.values)
    assert not scores.by_layer[1].any()


@pytest.mark.parametrize("method", sorted(WITHOUT))
def test_a_method_without_layers_is_refused_before_any_pass(two_segments, method, monkeypatch):
    def no_pass(*args, **kwargs):
        raise AssertionError("a pass was run")

    monkeypatch.setattr(Workspace, "at", no_pass)
    with pytest.raises(
        MisconfigurationException, match=rf'`method="{method}"` are not made of shares of the layers.*HINT: leave `per_'
    ) as raised:
        scorer_of(two_segments).score(QUERY, classes(), method=method, per_layer=True)
    assert all(f'"{name}"' in str(raised.value) for name in WITH)


def test_a_term_that_is_no_contraction_is_refused_by_name(two_segments, monkeypatch):
    monkeypatch.setattr(registry, "_ESTIMATORS", dict(registry._ESTIMATORS))

    @register_estimator("own")
    def own(query):
        yield DirectScores(lambda data, ids: torch.ones(len(query.examples), len(data)))

    scorer = scorer_of(two_segments)
    assert scorer.score(QUERY, classes(), method="own").by_layer is None
    with pytest.raises(MisconfigurationException, match=r"a term of the score is no sum over layers.*`layers=False`"):
        scorer.score(QUERY, method="own", per_layer=True)


def test_parts_of_a_block_add_to_its_rows_and_columns():
    sink = MatrixSink(3, 4, layers=2)
    sink.add_layers(slice(1, 3), slice(0, 2), torch.tensor([1.0, 10.0])[:, None, None].expand(2, 2, 2))
    sink.add_layers(slice(1, 2), slice(1, 4), torch.ones(2, 1, 3))
    assert sink.by_layer.tolist() == [
        [[0, 0, 0, 0], [1, 2, 1, 1], [1, 1, 0, 0]],
        [[0, 0, 0, 0], [10, 11, 1, 1], [10, 10, 0, 0]],
    ]


# ---------------------------------------------------------------- the result


def by_layer(names=("a", "b"), seed=0):
    parts = torch.randn(len(names), 2, 5, generator=torch.Generator().manual_seed(seed))
    metadata = {"layers": list(names), "run_id": str(seed)}
    return InfluenceScores(parts.sum(0), torch.arange(5), torch.arange(2), None, metadata, by_layer=parts)


def test_the_file_round_trips(tmp_path):
    scores = by_layer()
    scores.save(tmp_path / "s.safetensors")
    loaded = InfluenceScores.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.by_layer, scores.by_layer)
    assert loaded.metadata == scores.metadata


@pytest.mark.parametrize("layers", [None, "ab", ["a"], ["a", 1], {"a": 0, "b": 1}])
def test_a_file_that_does_not_name_its_layers_is_refused(tmp_path, layers):
    scores = by_layer()
    scores.metadata["layers"] = layers
    scores.save(tmp_path / "s.safetensors")
    with pytest.raises(MisconfigurationException, match="does not name the layers"):
        InfluenceScores.load(tmp_path / "s.safetensors")


def test_shares_are_those_of_the_absolute_parts():
    scores = by_layer()
    sizes = scores.by_layer.abs().sum(2)
    torch.testing.assert_close(scores.layer_shares(), sizes / (sizes[0] + sizes[1]))
    with pytest.raises(MisconfigurationException, match="score with `per_layer=True`"):
        InfluenceScores(scores.values, scores.train_ids, scores.query_ids).layer_shares()


def test_an_ensemble_averages_the_parts_of_equal_layers():
    one, other = by_layer(seed=0), by_layer(seed=1)
    mean = ensemble([one, other])
    torch.testing.assert_close(mean.by_layer, (one.by_layer + other.by_layer) / 2)
    assert mean.metadata["layers"] == ["a", "b"]
    for different in (by_layer(("a", "c"), 1), by_layer(("a",), 1)):
        mixed = ensemble([one, different])
        assert mixed.by_layer is None
        assert "layers" not in mixed.metadata
