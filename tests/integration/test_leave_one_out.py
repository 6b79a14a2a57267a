"""Acceptance: scores against really leaving an example out, and against closed forms where there are any."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Classifier, fitted
from scipy.stats import spearmanr
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

from lightning_source.recording.snapshots import snapshot_parameters

N, QUERIES, STEPS = 160, 20, 200


def diabetes():
    """``(x, y, query x, query y)``, standardised; curvature from 0.02 to 7."""
    x, y = load_diabetes(return_X_y=True)
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y[:, None]))
    order = np.random.default_rng(0).permutation(len(x))[: N + QUERIES]
    x, y = (torch.tensor(v[order], dtype=torch.float32) for v in (x, y))
    return x[:N], y[:N], x[N:], y[N:]


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1)], 1).double()


def weights_of(module):
    return torch.cat([module.net.weight.detach(), module.net.bias.detach().unsqueeze(1)], 1).double()


def trained(path, x, y, start=None, steps=STEPS, rate=0.02, momentum=0.0, decay=0.0, **settings):
    """Linear regression by full-batch gradient descent: ``(initial weights, trainer)``."""
    module = Classifier(
        nn.Linear(x.shape[1], 1),
        F.mse_loss,
        lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay),
    )
    if start is not None:
        with torch.no_grad():
            module.net.weight.copy_(start[:, :-1])
            module.net.bias.copy_(start[:, -1])
    start = weights_of(module)
    return start, fitted(path, module, TensorDataset(x, y), len(x), max_epochs=steps, **settings)


def retrained(x, y, start, steps=STEPS, rate=0.02, momentum=0.0, decay=0.0):
    """Weights after the same recipe, ``[N + 1, I]``: on everything, and without each of the examples."""
    x, y = with_ones(x), y.double().T
    kept = torch.cat([torch.ones(1, len(x)), 1 - torch.eye(len(x))]).double()
    weights = start.repeat(len(kept), 1)
    velocity = torch.zeros_like(weights)
    for _ in range(steps):
        gradient = 2 * (kept * (weights @ x.T - y)) @ x / kept.sum(1, keepdim=True) + decay * weights
        velocity = momentum * velocity + gradient
        weights = weights - rate * velocity
    return weights


RECIPES = {
    "plain": {},
    "momentum": {"momentum": 0.9, "rate": 0.002},
    "decay": {"decay": 0.5},
    "momentum and decay": {"momentum": 0.9, "rate": 0.002, "decay": 0.5},
}
CUTS = {"three by two": {"segments": 3, "snapshots_per_segment": 2}, "default": {}}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_predict_leaving_one_out(tmp_path, recipe, cut):
    """Λσ runs from 0.07 to 28: some directions have not begun to converge, others have long done so."""
    x, y, query_x, query_y = diabetes()
    start, trainer = trained(tmp_path, x, y, **RECIPES[recipe], **CUTS[cut])
    weights = retrained(x, y, start, **RECIPES[recipe])
    torch.testing.assert_close(weights[:1], weights_of(trainer.lightning_module), rtol=0, atol=1e-6)

    losses = (with_ones(query_x) @ weights.T - query_y.double()).square()
    actual = (losses[:, 1:] - losses[:, :1]).numpy()
    predicted = trainer.attribute((query_x, query_y), removal="few").values.double().numpy()
    rank = np.mean([spearmanr(a, p).statistic for a, p in zip(actual, predicted, strict=True)])
    slope = np.mean([np.polyfit(p, a, 1)[0] for a, p in zip(actual, predicted, strict=True)])
    figures = f"Spearman {rank:.3f}, slope {slope:.3f} (actual over predicted)"
    assert rank >= 0.93, figures
    assert 0.85 <= slope <= 1.2, figures


# ---------------------------------------------------------------- closed forms


def easy(examples=50, inputs=4, queries=7):
    """A regression whose curvature is near 2 everywhere."""
    x = torch.randn(examples + queries, inputs)
    y = x.sum(1, keepdim=True) + torch.randn(examples + queries, 1)
    return x[:examples], y[:examples], x[examples:], y[examples:]


def gradients(x, y, weights):
    """Of the squared error of each example, ``[B, I]``."""
    x = with_ones(x)
    return 2 * (x @ weights.T - y.double()) * x


METHODS = {"source": {}, "fast-source": {}, "influence": {"damping": 0.0}}


@pytest.mark.parametrize("method", METHODS)
def test_a_converged_run_gives_the_influence_function(tmp_path, method):
    """``∇fᵀ H⁻¹ g / N``, undamped: training starts at the solution and goes on until Λσ > 10 in every direction."""
    x, y, query_x, query_y = easy()
    a = with_ones(x)
    solution = torch.linalg.lstsq(a, y.double()).solution.T
    _, trainer = trained(tmp_path, x, y, solution, 80, 0.2)
    hessian = 2 * a.T @ a / len(a)
    assert 80 * 0.2 * torch.linalg.eigvalsh(hessian)[0] > 10
    inverse = torch.linalg.solve(hessian, gradients(x, y, solution).T)
    expected = gradients(query_x, query_y, solution) @ inverse / len(x)
    scores = trainer.attribute((query_x, query_y), method=method, **METHODS[method]).values.double()
    assert (scores - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("method", ["source", "fast-source", "grad-dot"])
def test_one_tiny_step_gives_the_gradient_product(tmp_path, method):
    """``Λ ∇fᵀ g / N``: the whole effect of the step, which leaving out one term of the mean undoes."""
    x, y, query_x, query_y = easy()
    start, trainer = trained(tmp_path, x, y, steps=1, rate=1e-5)
    expected = 1e-5 * gradients(query_x, query_y, start) @ gradients(x, y, start).T / len(x)
    scores = trainer.attribute((query_x, query_y), method=method).values.double()
    assert (scores - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("which", ["mean", "point"])
def test_tracin_of_one_unit_is_its_closed_form(tmp_path, which, momentum):
    """``Σ_c Λ_c 4 r_q r_n ⟨a_q, a_n⟩ / N`` with the residuals at each of five snapshots of two steps."""
    x, y, query_x, query_y = easy()
    rate = 0.05
    recipe = {"steps": 10, "rate": rate, "momentum": momentum}
    start, trainer = trained(tmp_path, x, y, **recipe, snapshots_per_segment=5, snapshots=which)
    steps = [retrained(x, y, start, **(recipe | {"steps": k}))[:1] for k in range(11)]
    expected = 0
    for first in range(0, 10, 2):
        # the gradients of both steps were taken before them; the point is where the first of the two ended
        weights = (steps[first] + steps[first + 1]) / 2 if which == "mean" else steps[first + 1]
        residual, query_residual = with_ones(x) @ weights.T - y, with_ones(query_x) @ weights.T - query_y
        expected += 4 * (query_residual @ residual.T) * (with_ones(query_x) @ with_ones(x).T)
    expected *= 2 * rate / (1 - momentum) / len(x)
    scores = trainer.attribute((query_x, query_y), method="tracin").values.double()
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
    run = trainer.callbacks[0]._open(trainer, trainer.lightning_module)
    recorded = snapshot_parameters(run.store, run.snapshots[2], which)["net.weight"]
    middle = (steps[4] + steps[5]) / 2 if which == "mean" else steps[5]
    torch.testing.assert_close(recorded.double(), middle[:, :-1], rtol=0, atol=1e-6)
