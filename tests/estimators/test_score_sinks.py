"""What an estimator declares and yields, and how its scores flow to a sink."""

from dataclasses import replace

import pytest
import torch
from helpers import Classifier, classes, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import Dataset

from lightning_source import SourceScorer
from lightning_source.capture.data import query_of
from lightning_source.estimators import (
    Contraction,
    DirectScores,
    MatrixSink,
    Metadata,
    Query,
    Table,
    estimates,
    estimator_for,
    floats_per_parameter_of,
    register_estimator,
    registry,
    unit_of,
)

QUERY = [x[:4] for x in classes(8, seed=2).tensors]


class Counted(Dataset):
    """Counts the examples that were read."""

    def __init__(self):
        self.data, self.read = classes(), 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read += 1
        return self.data[index]


class Blocks:
    """A sink that keeps the blocks, and how many examples were read when each came."""

    def __init__(self, data):
        self.data, self.blocks, self.read = data, [], []

    def add(self, rows, columns, values, segment):
        self.blocks.append((rows, columns, values, segment))
        self.read.append(self.data.read)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded")
    fitted(path, segments=2, snapshots_per_segment=2)
    return path / "run"


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_ESTIMATORS", dict(registry._ESTIMATORS))


def opened(path, data=None):
    scorer = SourceScorer.from_run(path, Classifier(mlp()))
    scorer.score(QUERY, data or classes(), method="grad-dot")  # calibrates, and knows the examples
    return scorer


@pytest.mark.parametrize("ids", [None, torch.tensor([7, 2, 2, 11, 0, 23, 4, 5, 6])])
def test_a_term_hands_over_each_batch_as_it_comes(recorded, ids):
    data = Counted()
    scorer = opened(recorded, data)
    query = Query(scorer.run, query_of(QUERY, None), "loss")
    sink, matrix = Blocks(data), MatrixSink(4, 24 if ids is None else len(ids), 2)
    for term in estimator_for("source", {})(query):
        data.read = 0
        for receiver in (sink, matrix):
            term.compute(scorer.run.workspace, scorer.run.data, ids, receiver, slice(0, 4))
    sizes = [8, 8, 8] if ids is None else [8, 1]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    expected = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    assert [columns for _, columns, _, _ in sink.blocks] == 4 * expected  # 4 snapshots, one term each
    assert sink.read == 4 * [s.stop for s in expected]  # no block waits for the rest of the pass
    assert [segment for *_, segment in sink.blocks] == [1] * 2 * len(sizes) + [0] * 2 * len(sizes)
    again = MatrixSink(4, sum(sizes), 2)
    for block in sink.blocks:
        again.add(*block)
    scores = scorer.score(QUERY, per_segment=True, train_ids=ids)
    for values in (matrix, again):
        assert torch.equal(values.values, scores.values)
        assert torch.equal(values.by_segment, scores.by_segment)


def test_a_sink_that_fails_leaves_the_model_as_it_was(recorded):
    class Full:
        def add(self, rows, columns, values, segment):
            raise OSError("no space left")

    scorer = opened(recorded)
    module = scorer.run.workspace.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    (term,) = estimator_for("grad-dot", {})(Query(scorer.run, query_of(QUERY, None), "loss"))
    with pytest.raises(OSError, match="no space left"):
        term.compute(scorer.run.workspace, scorer.run.data, None, Full(), slice(0, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_block_adds_to_its_rows_columns_and_segment():
    sink = MatrixSink(3, 4, segments=2)
    sink.add(slice(1, 3), slice(0, 2), torch.ones(2, 2), 1)
    sink.add(slice(1, 2), slice(1, 4), torch.full((1, 3), 10.0), 0)
    assert sink.values.tolist() == [[0, 0, 0, 0], [1, 11, 10, 10], [1, 1, 0, 0]]
    assert sink.by_segment[0].tolist() == [[0, 0, 0, 0], [0, 10, 10, 10], [0, 0, 0, 0]]
    assert torch.equal(sink.by_segment.sum(0), sink.values)


@pytest.mark.usefixtures("own_registry")
def test_what_a_method_declares_and_says_is_in_its_scores(recorded):
    weights = torch.arange(24.0)
    blocks = []

    @register_estimator("own", unit="apples", floats_per_parameter=lambda options: 4 * options.get("copies", 1))
    def own(query, *, copies: int = 1):
        blocks.append(len(query.examples))
        yield Metadata({"block": len(blocks), "kind": "own"}, residual=1 / len(blocks), kernel_weights=weights)
        gradients = query.gradients(query.run.final())
        doubled = replace(gradients, values={name: 2 * values for name, values in gradients.values.items()})
        yield Contraction(query.run.final_of_stage, doubled, 0.25)
        yield DirectScores(lambda data, ids: torch.ones(len(query.examples), len(data) if ids is None else len(ids)))

    scorer = opened(recorded)
    scorer.memory = 2 * 4 * 4 * scorer.run.coverage.trainable  # two queries at once, one with two copies
    queries = torch.utils.data.TensorDataset(*QUERY)
    scores = scorer.score(queries, method="own", train_ids=[3, 9])
    assert blocks == [2, 2]
    said = {key: scores.metadata[key] for key in ("unit", "block", "kind", "residual")}
    assert said == {"unit": "apples", "block": 2, "kind": "own", "residual": 1.0}
    assert scores.kernel_weights.tolist() == [3.0, 9.0]
    blocks.clear()
    assert torch.equal(scorer.score(queries, method="own", copies=2).values[:, [3, 9]], scores.values)
    assert blocks == [1, 1, 1, 1]
    assert (unit_of("own"), floats_per_parameter_of("own", {"copies": 3})) == ("apples", 12)

    dot = scorer.score(queries, method="grad-dot", train_ids=[3, 9])
    rate = sum(segment["rates"][0] for segment in dot.metadata["segments"])
    expected = 1 + dot.values * 24 / rate / 2
    torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-6)
    assert dot.kernel_weights is None
    assert "residual" not in dot.metadata


@pytest.mark.usefixtures("own_registry")
def test_a_method_that_declares_segments_must_give_each_term_its_own(recorded):
    @register_estimator("own", segments=True)
    def own(query):
        yield DirectScores(lambda data, ids: torch.ones(len(query.examples), len(data)))

    scorer = opened(recorded)
    assert scorer.score(QUERY, method="own").by_segment is None
    with pytest.raises(MisconfigurationException, match=r"a term of the score belongs to no segment.*HINT"):
        scorer.score(QUERY, method="own", per_segment=True)


def test_earlier_names_are_kept():
    assert (Table, estimates) == (DirectScores, register_estimator)
    assert floats_per_parameter_of("influence", {}) == 3
    assert floats_per_parameter_of("astra-source", {"iterations": 5}) == 20


def test_columns_of_an_embedding_come_with_its_gradients(tmp_path):
    """The queries use 2 of 9 tokens, and a term that is made of their gradients needs nothing else to be right."""
    tokens = torch.randint(9, (12, 2))
    data = torch.utils.data.TensorDataset(tokens, torch.randint(3, (12,)))
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    trainer = fitted(tmp_path, Classifier(net), data, batch_size=4)
    query = [torch.tensor([[7, 2], [2, 2]]), torch.tensor([0, 1])]
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scores = scorer.score(query, method="grad-dot").values
        gradients = Query(scorer.run, query_of(query, None), "loss").gradients(scorer.run.final())
    assert gradients.columns["net.0"].tolist() == [2, 7]
    assert gradients.values["net.0"].shape == (2, 1, 4, 2)
    assert "net.2" not in gradients.columns
    eigenvalues = torch.arange(36.0).view(1, 4, 9)
    assert torch.equal(gradients.restrict("net.0", eigenvalues), eigenvalues[..., [2, 7]])
    assert gradients.restrict("net.2", eigenvalues) is eigenvalues
    module = trainer.lightning_module.eval()

    def gradient(x, y):
        loss = nn.functional.cross_entropy(module.net(x[None]), y[None])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    rows = torch.stack([gradient(x, y) for x, y in zip(*query, strict=True)])
    dense = rows @ torch.stack([gradient(x, y) for x, y in data]).T
    torch.testing.assert_close(scores / scores.abs().max(), dense / dense.abs().max(), rtol=0, atol=1e-5)
