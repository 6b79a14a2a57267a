from pathlib import Path

import pytest
import torch
from helpers import QUERY, Classifier, classes, close, fitted, mlp, run_python

from lightning_source import InfluenceScores, SourceScorer, attribute
from lightning_source.capture.data import Examples

METHODS = ["source", "fast-source", "influence", "tracin", "grad-dot", "grad-cos"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two segments that tests ask and leave as it is."""
    torch.manual_seed(0)
    return fitted(tmp_path_factory.mktemp("recorded"), segments=2, snapshots_per_segment=2)


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_the_batch_size(recorded, method):
    one = recorded.attribute(QUERY, method=method, batch_size=1).values
    many = recorded.attribute(QUERY, method=method, batch_size=64).values
    assert one.shape == (4, 24)
    assert one.abs().max() > 0
    close(one, many)


ELSEWHERE = """
import sys
import torch
from helpers import QUERY, Classifier, classes, mlp
from lightning_source import SourceScorer
folder, *methods = sys.argv[1:]
torch.manual_seed(7)
scorer = SourceScorer.from_run(f"{folder}/run", Classifier(mlp()))
for method in methods:
    scorer.score(QUERY, classes(), method=method).save(f"{folder}/{method}.safetensors")
"""


@pytest.fixture(scope="module")
def elsewhere(recorded):
    """The folder in which another process leaves the scores of each method."""
    run_python("-c", ELSEWHERE, recorded.default_root_dir, *METHODS)
    return Path(recorded.default_root_dir)


@pytest.mark.parametrize("method", METHODS)
def test_another_process_gives_bit_equal_scores(recorded, elsewhere, method):
    here = recorded.attribute(QUERY, method=method)
    there = InfluenceScores.load(elsewhere / f"{method}.safetensors")
    assert torch.equal(here.values, there.values)
    assert here.metadata == there.metadata


def test_a_deferred_run_gives_the_scores_of_an_eager_one(tmp_path):
    torch.manual_seed(3)
    eager = fitted(tmp_path / "a").attribute(QUERY).values
    torch.manual_seed(3)
    deferred = fitted(tmp_path / "b", mode="deferred").attribute(QUERY).values
    assert torch.equal(eager, deferred)


def test_segments_sum_to_the_score(tmp_path):
    trainer = fitted(tmp_path, segments=3, snapshots_per_segment=1)
    scores = trainer.attribute(QUERY, per_segment=True)
    assert scores.by_segment.shape == (3, 4, 24)
    close(scores.by_segment.sum(0), scores.values)
    torch.testing.assert_close(scores.segment_shares().sum(0), torch.ones(4))


def test_recutting_segments_after_training_equals_training_with_them(tmp_path):
    torch.manual_seed(3)
    two = fitted(tmp_path / "a", segments=2, snapshots_per_segment=2)
    torch.manual_seed(3)
    four = fitted(tmp_path / "b", segments=1, snapshots_per_segment=4)
    assert torch.equal(two.attribute(QUERY).values, four.attribute(QUERY, segments=2).values)


@pytest.mark.parametrize("segments", [1, 3])
def test_self_influence_is_the_diagonal_of_the_scores(tmp_path, segments):
    trainer = fitted(tmp_path, segments=segments, snapshots_per_segment=2)
    full = trainer.attribute(classes(), removal="few").values
    with trainer.callbacks[0].scorer(trainer) as scorer:
        alone = scorer.self_influence()
        scorer.memory = 1  # one example at a time
        chunked = scorer.self_influence(train_ids=[5, 3])
    close(alone, full.diagonal())
    close(chunked, full.diagonal()[[5, 3]])


def test_query_blocks_give_the_same_scores(tmp_path):
    trainer = fitted(tmp_path)
    queries = classes(10, seed=5)
    whole = trainer.attribute(queries)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scorer.memory = 3 * 4 * 3 * scorer.run.coverage.trainable  # three queries at once
        blocks = scorer.score(queries)
    close(blocks.values, whole.values)
    assert torch.equal(blocks.query_ids, torch.arange(10))


def test_batch_dataset_and_loader_queries_agree(tmp_path):
    trainer = fitted(tmp_path)
    queries = classes(10, seed=5)
    loader = torch.utils.data.DataLoader(queries, 4, shuffle=True, drop_last=True)
    batch = trainer.attribute(list(queries.tensors)).values
    close(trainer.attribute(queries).values, batch)
    close(trainer.attribute(loader).values, batch)
    close(attribute(trainer, queries).values, batch)


def test_some_training_examples(tmp_path):
    trainer = fitted(tmp_path)
    scores = trainer.attribute(QUERY, train_ids=[7, 2])
    assert scores.train_ids.tolist() == [7, 2]
    close(scores.values, trainer.attribute(QUERY).values[:, [7, 2]])


def test_copies_of_one_snapshot_are_that_snapshot(tmp_path):
    """A frozen run (learning rate 0 after the first step) has the same parameters in every snapshot."""
    net = mlp()

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    scores = []
    for snapshots in (1, 3):
        trainer = fitted(
            tmp_path / str(snapshots),
            Classifier(net, optimizer=optimizer),
            snapshots_per_segment=snapshots,
            label_samples=1,
        )
        run = trainer.callbacks[0]._open(trainer, trainer.lightning_module)
        rates = [segment.stretch.rates for segment in run.segments()]
        assert rates == [(0.0,)]
        scores.append([f.eigenvalues for f in run.snapshot_factors(run.segments()[0]).values()])
    for one, three in zip(*scores, strict=True):
        torch.testing.assert_close(one, three)


def test_measurements_differ_as_they_should(tmp_path):
    trainer = fitted(tmp_path)
    loss = trainer.attribute(QUERY, removal="few").values
    log_prob = trainer.attribute(QUERY, removal="few", measurement="log-prob").values
    margin = trainer.attribute(QUERY, removal="few", measurement="margin").values

    def own(module, batch):
        logits = module.net(batch[0])
        return torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")

    close(log_prob, -loss)  # cross entropy is minus the log-probability
    close(trainer.attribute(QUERY, removal="few", measurement=own).values, loss)
    # d margin = d log p / (1 - p): the same direction, another length
    p = torch.exp(-own(trainer.lightning_module, QUERY)).detach()
    close(margin, log_prob / (1 - p).unsqueeze(1), rtol=1e-4)


def test_the_scores_file_round_trips(tmp_path):
    scores = fitted(tmp_path).attribute(QUERY, per_segment=True)
    scores.save(tmp_path / "s.safetensors")
    loaded = InfluenceScores.load(tmp_path / "s.safetensors")
    assert loaded.metadata == scores.metadata
    assert "removing" in loaded.metadata["sign"]
    for name in ("values", "train_ids", "query_ids", "by_segment"):
        assert torch.equal(getattr(loaded, name), getattr(scores, name))


def test_topk_orders_and_names_the_examples():
    values = torch.tensor([[0.1, 3.0, -2.0], [5.0, -1.0, 0.0]])
    scores = InfluenceScores(values, torch.tensor([10, 11, 12]), torch.arange(2))
    assert scores.proponents(2)[1].tolist() == [[11, 10], [10, 12]]
    assert scores.opponents(1)[1].tolist() == [[12], [11]]
    assert scores.topk(9)[0].shape == (2, 3)
    margins = InfluenceScores(values, torch.tensor([10, 11, 12]), torch.arange(2), None, {"measurement": "margin"})
    assert margins.proponents(1)[1].tolist() == [[12], [11]]  # their removal lowers the margin most
    assert margins.opponents(1)[1].tolist() == [[11], [10]]


def test_scoring_leaves_the_model_as_it_was(tmp_path):
    trainer = fitted(tmp_path)
    module = trainer.lightning_module
    module.train()
    module.net[0].eval()
    module.net[2].weight.requires_grad_(False)
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    rng = torch.get_rng_state()
    module.net[2].weight.requires_grad_(True)
    trainer.attribute(QUERY, per_segment=True)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scorer.self_influence()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks for m in module.modules())
    assert torch.equal(module.net[0].weight.grad, torch.ones_like(module.net[0].weight))
    assert all(p.requires_grad for p in module.parameters())


def test_examples_keep_their_ids():
    examples = Examples(classes(7), 3)
    batches = list(examples.batches([6, 0, 2, 5]))
    assert [ids.tolist() for ids, _ in batches] == [[6, 0, 2], [5]]
    assert torch.equal(batches[0][1][0], classes(7).tensors[0][[6, 0, 2]])
    assert [len(piece) for piece in examples.split(3)] == [3, 3, 1]


def test_from_run_needs_the_training_data_by_name(tmp_path):
    fitted(tmp_path)
    scorer = SourceScorer.from_run(tmp_path / "run", Classifier(mlp()))
    with pytest.raises(Exception, match="train="):
        scorer.score(QUERY)
