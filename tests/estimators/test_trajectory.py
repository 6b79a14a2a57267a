"""The query's gradient along the run: against the same walk started from a mean of gradients, and by definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers import QUERY, Classifier, classes, fitted, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceCallback, SourceScorer
from lightning_source.passes.query_gradients import QueryGradients
from lightning_source.recording.snapshots import snapshot_parameters


def gradients_at(network, state, data):
    """Gradients ``[B, D]`` of each example's cross entropy at some parameters, by autograd one example at a time."""
    names = list(dict(network.named_parameters()))
    values = {name: state[f"net.{name}"].clone().requires_grad_() for name in names}
    rows = []
    for x, y in zip(*data, strict=True):
        loss = F.cross_entropy(torch.func.functional_call(network, values, (x[None],)), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(values.values()))]))
    return torch.stack(rows).double()


def weighted(parts, steps):
    """The mean over places of the run, each of which stands for some steps."""
    return torch.einsum("s,sqn->qn", torch.tensor(steps) / sum(steps), torch.stack(parts))


@pytest.mark.parametrize("segments", [1, 2])
def test_it_is_the_mean_over_the_snapshots(tmp_path, segments):
    """Learning so slow that curvature does nothing: ``score = (1/N) Σ_ℓ Λ_ℓ ⟨mean_c ∇f(θ_c), mean_c g(θ_c)⟩``.

    To 1e-3, what is left of the curvature at Λσ of about 1e-4.
    """
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, 1e-5))
    nn.init.normal_(module.net[0].weight)
    trainer = fitted(tmp_path, module, segments=segments, snapshots_per_segment=2, max_epochs=4)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        every = [[snapshot_parameters(run.store, s, "mean") for s in part.snapshots] for part in run.segments()]
        rates = [part.stretch.rates[0] for part in run.segments()]
    query = torch.stack([gradients_at(module.net, s, QUERY) for part in every for s in part]).mean(0)
    expected = sum(
        rate * query @ torch.stack([gradients_at(module.net, s, classes().tensors) for s in part]).mean(0).T
        for rate, part in zip(rates, every, strict=True)
    )
    scores = trainer.attribute(QUERY, removal="many", cross_layer=False).values.double()
    torch.testing.assert_close(scores, expected / 24, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) / 24)


def test_a_long_run_has_the_mean_of_the_scores_of_its_snapshots(tmp_path):
    """SOURCE is linear in the query's gradient: the mean over networks that are frozen at the run's snapshots."""
    trainer = fitted(tmp_path, segments=2, snapshots_per_segment=2, max_epochs=12)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        states = [snapshot_parameters(run.store, s, "mean") for s in run.snapshots]
        scores = scorer.score(QUERY, query_at="trajectory", cross_layer=False).values
        parts = []
        for state in states:
            run.final = lambda state=state: state
            parts.append(scorer.score(QUERY, query_at="final", cross_layer=False).values)
        weights = [s.steps for s in run.snapshots]
    torch.testing.assert_close(scores, weighted(parts, weights), rtol=1e-4, atol=1e-6)
    assert (parts[0] - parts[-1]).norm() > 0.1 * parts[-1].norm()  # they tell one place from another


def test_fast_source_takes_the_segments_means(tmp_path):
    trainer = fitted(tmp_path, segments=2, snapshots_per_segment=2, max_epochs=12)
    with trainer.callbacks[0].scorer(trainer) as scorer:
        run = scorer.run
        states = [run.mean_state(part) for part in run.segments()]
        scores = scorer.score(QUERY, method="fast-source").values
        parts = []
        for state in states:
            run.final = lambda state=state: state
            parts.append(scorer.score(QUERY, method="fast-source", removal="few").values)
        weights = [part.stretch.steps for part in run.segments()]
    torch.testing.assert_close(scores, weighted(parts, weights), rtol=1e-4, atol=1e-6)


def test_removal_names_the_two_options(tmp_path):
    trainer = fitted(tmp_path, max_epochs=6)
    many = trainer.attribute(QUERY).values
    few = trainer.attribute(QUERY, removal="few").values
    assert torch.equal(many, trainer.attribute(QUERY, query_at="trajectory", cross_layer=True).values)
    assert torch.equal(few, trainer.attribute(QUERY, query_at="final", cross_layer=False).values)
    assert not torch.equal(many, few)


def test_a_final_model_is_asked_at_its_end(tmp_path):
    module = Classifier(mlp())
    scorer = SourceScorer.from_model(module, classes(), rate=0.5, batch_size=8)
    assert torch.equal(scorer.score(QUERY).values, scorer.score(QUERY, removal="few").values)


@pytest.mark.parametrize("option", ["removal", "query_at", "adaptive"])
def test_unknown_words_are_refused(tmp_path, option):
    trainer = fitted(tmp_path)
    with pytest.raises(MisconfigurationException, match=f'`{option}="none"` is not known. HINT: "'):
        trainer.attribute(QUERY, **{option: "none"})


def test_an_earlier_stage_is_asked_along_the_way_of_the_last(tmp_path):
    """Whatever the first stage led to, the network that is measured is made by the last one."""
    source = SourceCallback(str(tmp_path / "run"), snapshots_per_segment=2)
    module = Classifier(mlp())
    for seed in (1, 3):
        trainer = quiet_trainer(tmp_path, source, max_epochs=4)
        trainer.fit(module, DataLoader(classes(seed=seed), 8))
    with source.scorer(trainer, stage=0) as scorer:
        run = scorer.run
        states = [snapshot_parameters(run.store, s, "mean") for s in run.snapshots if s.stage == 1]
        scores = scorer.score(QUERY, classes(), query_at="trajectory", cross_layer=False).values
        parts = []
        for state in states:
            run.final = lambda state=state: state
            parts.append(scorer.score(QUERY, query_at="final", cross_layer=False).values)
        weights = [s.steps for s in run.snapshots if s.stage == 1]
    torch.testing.assert_close(scores, weighted(parts, weights), rtol=1e-4, atol=1e-6)


class Tokens(Classifier):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3)))


def test_tokens_that_the_queries_use(tmp_path):
    data = TensorDataset(torch.randint(9, (24, 2)), torch.randint(3, (24,)))
    trainer = fitted(tmp_path, Tokens(), data, max_epochs=4)
    query = [x[:3] for x in data.tensors]
    together = trainer.attribute(query).values
    single = torch.cat([trainer.attribute([x[i : i + 1] for x in query]).values for i in range(3)])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-6)


def test_the_mean_of_gradients_at_different_tokens():
    one = QueryGradients({"e": torch.ones(1, 1, 2, 2), "w": torch.ones(1)}, {"e": torch.tensor([1, 4])})
    other = QueryGradients({"e": 3 * torch.ones(1, 1, 2, 2)}, {"e": torch.tensor([2, 4])})
    mean = QueryGradients.mean(iter([one, other]), [1, 3])
    assert mean.columns["e"].tolist() == [1, 2, 4]
    assert mean.values["e"][0, 0, 0].tolist() == [0.25, 2.25, 2.5]
    assert mean.values["w"].tolist() == [0.25]
