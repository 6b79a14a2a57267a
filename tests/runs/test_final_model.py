"""Final-model-only attribution: runs made from a model alone, against recorded runs and closed forms."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, classes, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_source import SourceScorer
from lightning_source.evaluation.cosine import cosine_by_query
from lightning_source.evaluation.further_training import further_training


def queries() -> list[Tensor]:
    return list(classes(4, seed=7).tensors)


def regression(examples: int = 300) -> tuple[Classifier, TensorDataset, list[Tensor]]:
    """A linear model without bias, somewhere off the minimum."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(examples, 4, generator=generator) * torch.tensor([2.0, 1.0, 0.5, 0.2])
    targets = inputs.sum(1) + torch.randn(examples, generator=generator)
    module = Classifier(nn.Sequential(nn.Linear(4, 1, bias=False), nn.Flatten(0)), F.mse_loss).double()
    with torch.no_grad():
        module.net[0].weight.copy_(torch.linalg.lstsq(inputs, targets[:, None]).solution.T)
    query = [torch.randn(5, 4, generator=generator).double(), torch.full((5,), 3.0).double()]
    return module, TensorDataset(inputs.double(), targets.double()), query


def dense(module: Any, train: TensorDataset, query: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian of the risk, examples' gradients and queries' gradients of :func:`regression`, by hand."""
    inputs, targets = train.tensors
    weights = module.net[0].weight.detach().flatten()
    hessian = 2 * inputs.T @ inputs / len(inputs)
    return hessian, *(2 * (x @ weights - y)[:, None] * x for x, y in ((inputs, targets), query))


# ---------------------------------------------------------------- the same as a recorded run's final model


def test_methods_of_the_final_model_agree_with_a_recorded_run(tmp_path):
    train = classes(24)
    trainer = fitted(tmp_path, data=train, batch_size=8)
    module = trainer.lightning_module
    scorer = SourceScorer.from_model(module, train, batch_size=8)
    for method in ("influence", "grad-cos"):
        recorded = trainer.attribute(queries(), method=method)
        assert torch.allclose(scorer.score(queries(), method=method).values, recorded.values, rtol=1e-5, atol=1e-8)
    recorded = trainer.attribute(queries(), method="grad-dot")
    rate = recorded.metadata["segments"][0]["rates"][0]
    # Without a rate the gradient product stands for Λ = 1.
    assert torch.allclose(rate * scorer.score(queries(), method="grad-dot").values, recorded.values, rtol=1e-5)
    told = SourceScorer.from_model(module, train, batch_size=8, rate=rate)
    assert torch.allclose(told.score(queries(), method="grad-dot").values, recorded.values, rtol=1e-5)


# ---------------------------------------------------------------- closed forms


def test_source_is_the_spectral_function_of_the_hessian():
    """One layer with one output, where EK-FAC is exact: ``(1/N) ∇fᵀ F_r(H) g`` by dense matrices."""
    module, train, query = regression()
    hessian, examples, asked = dense(module, train, query)
    values, vectors = torch.linalg.eigh(hessian)
    for rate in (0.01, 1.0, 50.0):
        scorer = SourceScorer.from_model(module, train, batch_size=50, rate=rate)
        response = vectors @ torch.diag((1 - torch.exp(-rate * values)) / values) @ vectors.T
        expected = asked @ response @ examples.T / len(train)
        # Scores are float32.
        assert torch.allclose(scorer.score(query).values.double(), expected, rtol=1e-5, atol=1e-7)
        expected = asked @ torch.linalg.inv(hessian + torch.eye(4) / rate) @ examples.T / len(train)
        found = scorer.score(query, method="influence", damping=1 / rate).values
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_source_predicts_further_training_of_a_quadratic():
    """From the minimum, to first order in 1/N and in the rate of a step: 300 examples and ησ < 0.1."""
    module, train, query = regression()
    left_out = list(range(0, 300, 12))
    result = further_training(
        module,
        train,
        query,
        leave_out=left_out,
        epochs=60,
        seeds=1,
        batch_size=300,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    )
    scorer = SourceScorer.from_model(module, train, batch_size=300, rate=1.0)
    for epoch in (1, 10, 60):
        gold = result.gold()[epoch - 1]
        scores = scorer.set_rate(float(result.rates[epoch - 1, 0])).score(query, train_ids=left_out).values.double()
        assert float(cosine_by_query(gold, scores).min()) > 0.999
        assert float((scores * gold).sum() / scores.square().sum()) == pytest.approx(1, abs=0.05)
    # Told nothing of the horizon, the other two are each right at one end only.
    last, first = result.gold()[-1], result.gold()[0]
    influence = scorer.score(query, method="influence", damping=1e-6, train_ids=left_out).values
    product = scorer.score(query, method="grad-dot", train_ids=left_out).values
    assert cosine_by_query(first, product).min() > 0.999 > cosine_by_query(last, product).min()
    assert cosine_by_query(last, influence).mean() > cosine_by_query(first, influence).mean()


def test_source_lies_between_the_gradient_product_and_influence():
    train = classes(40)
    module = Classifier(mlp())
    short = SourceScorer.from_model(module, train, batch_size=8, rate=1e-5)
    product = short.score(queries(), method="grad-dot").values
    assert torch.allclose(short.score(queries()).values, product, rtol=1e-3, atol=1e-10)
    long = short.set_rate(1e9)
    undamped = long.score(queries(), method="influence", damping=1e-9).values
    # Directions without curvature are where the two differ most, by 1 - exp(-x) over x / (1 + x).
    assert cosine_by_query(undamped, long.score(queries()).values).min() > 0.99


def test_weight_decay_shifts_every_eigenvalue():
    module, train, query = regression()
    hessian, examples, asked = dense(module, train, query)
    decay, rate = 0.3, 2.0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=decay)
    scorer = SourceScorer.from_model(module, train, batch_size=50, rate=9.0, optimizer=optimizer).set_rate(rate)
    values, vectors = torch.linalg.eigh(hessian + decay * torch.eye(4))
    response = vectors @ torch.diag((1 - torch.exp(-rate * values)) / values) @ vectors.T
    expected = asked @ response @ examples.T / len(train)
    assert torch.allclose(scorer.score(query).values.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_summed_loss_is_scaled_by_the_batch_size():
    train = classes(24)
    mean = Classifier(mlp())
    total = Classifier(mean.net, lambda o, t: F.cross_entropy(o, t, reduction="sum"))
    one = SourceScorer.from_model(mean, train, batch_size=8, rate=0.8).score(queries()).values
    other = SourceScorer.from_model(total, DataLoader(train, 8, shuffle=True), rate=0.1).score(queries()).values
    assert torch.allclose(other, one, rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------- optimizers


def test_an_adaptive_optimizer_brings_its_moments():
    train = classes(24)
    module = Classifier(mlp())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    with pytest.raises(MisconfigurationException, match=r"`Adam` scales gradients by moments.*HINT"):
        SourceScorer.from_model(module, train, batch_size=8, rate=0.1, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        module.training_step(list(train.tensors), 0).backward()
        optimizer.step()
    run = SourceScorer.from_model(module, train, batch_size=8, rate=0.1, optimizer=optimizer).run
    scale = run.preconditioner(run.snapshots)
    moment = optimizer.state[module.net[2].weight]["exp_avg_sq"] / (1 - 0.999**3)
    assert torch.allclose(scale["net.2"][0, :, :5], 1 / (moment.sqrt() + 1e-8), rtol=1e-5)


def test_groups_have_rates_of_their_own():
    train = classes(24)
    module = Classifier(mlp())
    optimizer = torch.optim.SGD([{"params": module.net[0].parameters()}, {"params": module.net[2].parameters()}], lr=1)
    scorer = SourceScorer.from_model(module, train, batch_size=8, rate=[0.5, 1e-12], optimizer=optimizer)
    first = SourceScorer.from_model(module, train, batch_size=8, rate=0.5, include=["net.0"])
    assert torch.allclose(scorer.score(queries()).values, first.score(queries()).values, rtol=1e-4, atol=1e-9)
    frozen = torch.optim.SGD(module.net[0].parameters(), lr=1)  # what no group holds does not move
    alone = SourceScorer.from_model(module, train, batch_size=8, rate=0.5, optimizer=frozen)
    assert torch.allclose(alone.score(queries()).values, first.score(queries()).values, rtol=1e-4, atol=1e-9)


# ---------------------------------------------------------------- the run


def test_another_rate_is_another_scorer_with_the_same_factors(tmp_path):
    train, module = classes(24), Classifier(mlp())
    scorer = SourceScorer.from_model(module, train, batch_size=8, rate=0.1, dirpath=tmp_path / "run")
    scorer.score(queries())
    factors = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "segments").iterdir()}
    found = scorer.set_rate(3.0).score(queries())
    assert found.metadata["segments"][0]["rates"] == [3.0]
    expected = SourceScorer.from_model(module, train, batch_size=8, rate=3.0).score(queries()).values
    assert torch.equal(found.values, expected)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "segments").iterdir()} == factors


def test_a_kept_run_opens_in_another_process(tmp_path):
    train, module = classes(24), Classifier(mlp())
    scorer = SourceScorer.from_model(module, train, batch_size=8, rate=0.3, dirpath=tmp_path / "run")
    expected = scorer.score(queries()).values
    with torch.no_grad():
        module.net[0].weight.mul_(2)  # the weights come from the run
    assert torch.equal(scorer.score(queries()).values, expected)
    again = SourceScorer.from_run(tmp_path / "run", Classifier(mlp()))
    assert torch.equal(again.score(queries(), train).values, expected)
    assert torch.equal(again.self_influence(), scorer.self_influence())
    with pytest.raises(MisconfigurationException, match="already holds a run"):
        SourceScorer.from_model(module, train, batch_size=8, dirpath=tmp_path / "run")


def test_a_temporary_run_vanishes_with_its_scorer():
    scorer = SourceScorer.from_model(Classifier(mlp()), classes(24), batch_size=8)
    path = Path(scorer.run.store.path)
    assert (path / "manifest.json").exists()
    del scorer
    gc.collect()
    assert not path.exists()


def test_what_is_missing_is_named(tmp_path):
    train, module = classes(24), Classifier(mlp())
    with pytest.raises(MisconfigurationException, match=r"batch size .* not known.*HINT"):
        SourceScorer.from_model(module, train)
    with pytest.raises(MisconfigurationException, match=r"`rate=0` must be .* above 0"):
        SourceScorer.from_model(module, train, batch_size=8, rate=0)
    with pytest.raises(MisconfigurationException, match=r"one for each of the 1 parameter groups"):
        SourceScorer.from_model(module, train, batch_size=8, rate=[1.0, 2.0])
    open_ended = SourceScorer.from_model(module, train, batch_size=8)
    for method in ("source", "fast-source"):
        with pytest.raises(MisconfigurationException, match=r"how far training moves the model.*HINT.*rate=Λ"):
            open_ended.score(queries(), method=method)
    with pytest.raises(MisconfigurationException, match="how far training moves"):
        open_ended.self_influence()
    assert open_ended.set_rate(1.0).score(queries()).values.any()
    recorded = SourceScorer.from_run(_recorded(tmp_path), Classifier(mlp()))
    with pytest.raises(MisconfigurationException, match=r"recorded while training.*HINT"):
        recorded.set_rate(1.0)
    broken = Classifier(mlp(), lambda o, t: F.cross_entropy(o, t) * float("nan"))
    with pytest.raises(MisconfigurationException, match="no finite loss"):
        SourceScorer.from_model(broken, train, batch_size=8)


def _recorded(tmp_path: Path) -> Path:
    fitted(tmp_path, data=classes(24), max_epochs=1)
    return tmp_path / "run"
