"""SOURCE with the exact Gauss-Newton matrix against the paper's equations with dense matrices."""

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from estimators.dense import gauss_newton, per_example
from helpers import QUERY, Classifier, classes, close, fitted, mlp, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_source import SourceCallback
from lightning_source.curvature.krylov import spectral_responses
from lightning_source.recording.snapshots import mean_preconditioner

HIDDEN, SIZE = 3, 33
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1.0),
}


def by_groups(parameters):
    first, *rest = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": rest, "lr": 0.05, "weight_decay": 0.2}])


OPTIMIZERS["two groups"] = by_groups


def dense_source(run, module, *stages):
    """``Σ_ℓ ∇fᵀ S_L … S_{ℓ+1} r_ℓ`` with matrices over all parameters, flattened as they are named.

    The flow of a segment is ``θ' = -R (H + W) θ``, with ``R`` the effective rates (times Adam's preconditioner) and
    ``W`` the decay, which does not pass through the preconditioner where it is decoupled.
    """
    names = [name for name, _ in module.named_parameters()]
    shapes = {name: p.shape for name, p in module.named_parameters()}
    groups = {name: block.group for block in run.coverage.blocks for name in block.parameters}

    def load(state):
        module.load_state_dict({name: state[name] for name in names})

    def each(values):
        return torch.cat([torch.as_tensor(values[n]).double().expand(shapes[n]).flatten() for n in names])

    load(run.final())
    back = per_example(module, QUERY, F.cross_entropy)
    asked = stages[run.stage.index]
    total = torch.zeros(len(QUERY[0]), len(asked[0])).double()
    for segment in reversed([*run.segments(), *run.later_segments()]):
        data = stages[segment.stage]
        hessian, gradients = 0, 0
        for snapshot, weight in zip(segment.snapshots, segment.weights, strict=True):
            load(run.state(snapshot, run.settings.snapshots))
            hessian = hessian + weight * gauss_newton(module, data[0])
            gradients = gradients + weight * per_example(module, data, F.cross_entropy)
        rates = each({n: segment.stretch.rates[groups[n]] for n in names})
        decay = each({n: segment.stretch.weight_decay(groups[n]) for n in names})
        scale = preconditioner(run, segment, names)
        decoupled = run.stage.decoupled(segment.stretch.first, 0)
        field = (rates * scale)[:, None] * hessian + torch.diag(rates * decay * (1 if decoupled else scale))
        # exp of a block matrix: its corner is ∫ exp(-s field) ds
        block = torch.zeros(2 * SIZE, 2 * SIZE).double()
        block[:SIZE, :SIZE], block[:SIZE, SIZE:] = -field, torch.eye(SIZE)
        flow = torch.tensor(scipy.linalg.expm(block.numpy()))
        decays, integral = flow[:SIZE, :SIZE], flow[:SIZE, SIZE:]
        if segment.stage == run.stage.index:
            total += back @ integral @ torch.diag(rates * scale) @ gradients.T / len(asked[0])
        back = back @ decays
    return total


def preconditioner(run, segment, names):
    found = mean_preconditioner(run.store, segment.snapshots)
    return torch.cat([found[n].flatten() for n in names]).double() if found else torch.ones(SIZE).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_dense_product_over_segments(tmp_path, name):
    """With as many iterations as there are parameters the subspace is everything, up to float32."""
    module = Classifier(mlp(hidden=HIDDEN), optimizer=OPTIMIZERS[name])
    trainer = fitted(tmp_path, module, batch_size=24, max_epochs=20, segments=3, snapshots_per_segment=2)
    scores = trainer.attribute(QUERY, method="astra-source", iterations=SIZE, tolerance=1e-6, per_segment=True)
    run = trainer.callbacks[0]._open(trainer, module)
    expected = dense_source(run, Classifier(mlp(hidden=HIDDEN)), classes().tensors)
    close(scores.values, expected, 1e-3)
    close(scores.by_segment.sum(0), scores.values)
    assert scores.metadata["curvature"] == "gauss-newton"


def test_few_iterations_come_closer_than_ekfac(tmp_path):
    module = Classifier(mlp(hidden=HIDDEN), optimizer=OPTIMIZERS["momentum and decay"])
    trainer = fitted(tmp_path, module, batch_size=24, max_epochs=40, segments=3, snapshots_per_segment=1)
    run = trainer.callbacks[0]._open(trainer, module)
    expected = dense_source(run, Classifier(mlp(hidden=HIDDEN)), classes().tensors)
    iterated = [{"method": "astra-source", "iterations": k, "tolerance": 0} for k in (2, 4, 8)]
    ekfac, two, four, eight = (
        float((trainer.attribute(QUERY, **options).values - expected).norm() / expected.norm())
        for options in ({}, *iterated)
    )
    figures = f"EK-FAC {ekfac:.3f}, after 2, 4 and 8 products {two:.4f}, {four:.4f}, {eight:.4f}"
    assert two > four > eight, figures
    assert four < 0.5 * ekfac, figures
    assert eight < 0.02, figures


def test_the_first_of_two_stages(tmp_path):
    module, callback = (
        Classifier(mlp(hidden=HIDDEN)),
        SourceCallback(str(tmp_path / "run"), segments=2, snapshots_per_segment=1),
    )
    data = classes(), classes(20, seed=9)
    for one in data:
        trainer = quiet_trainer(tmp_path, callback, max_epochs=10)
        trainer.fit(module, DataLoader(one, 20, shuffle=True))
    options = {"iterations": SIZE, "tolerance": 1e-6}
    scores = trainer.attribute(QUERY, train=data[0], stage=0, method="astra-source", **options)
    with callback.scorer(trainer, stage=0) as scorer:
        expected = dense_source(scorer.run, Classifier(mlp(hidden=HIDDEN)), *(one.tensors for one in data))
    close(scores.values, expected, 1e-3)


def test_a_stage_with_another_head_is_refused(tmp_path):
    trainer = fitted(tmp_path)
    module, callback = trainer.lightning_module, trainer.callbacks[0]
    module.net[2] = nn.Linear(5, 3)
    again = quiet_trainer(tmp_path, callback)
    again.fit(module, DataLoader(classes(seed=9), 8))
    with pytest.raises(MisconfigurationException, match=r'`method="source"` walks through such stages'):
        again.attribute(QUERY, train=classes(), stage=0, method="astra-source")


@pytest.mark.parametrize("top", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_spectral_responses_converge(top, preconditioned):
    """To the functions of the matrix itself, whatever approximates it; in float64 and a spectrum over many decades."""
    generator = torch.Generator().manual_seed(0)
    size, queries = 80, 3

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    turn, values = torch.linalg.qr(draw(size, size))[0], top * torch.logspace(0, -9, size, dtype=torch.float64)
    matrix = (turn * values) @ turn.T
    noise = 0.1 * draw(size, size)
    near = (turn * values.sqrt()) @ (torch.eye(size) + noise @ noise.T) @ (turn * values.sqrt()).T
    vectors = draw(queries, size) @ (turn * values.sqrt()) @ turn.T
    vectors[1] = 0
    response = vectors @ (turn * (-torch.expm1(-values) / values)) @ turn.T
    decay = vectors @ (turn * torch.exp(-values)) @ turn.T
    inverse = torch.linalg.inv(torch.eye(size) + near)
    errors = []
    for iterations in (5, 20, size):
        found = spectral_responses(
            lambda x: x @ matrix,
            vectors,
            precondition=(lambda x: x @ inverse) if preconditioned else None,
            iterations=iterations,
            tolerance=0.0,
        )
        errors.append(
            max(float((a - b).norm() / b.norm()) for a, b in ((found.response, response), (found.decay, decay)))
        )
        assert not found.response[1].any()
    assert errors[2] < 1e-6, errors
    if preconditioned:
        assert errors[1] < 0.1, errors
