"""Estimators beside SOURCE: closed forms, dense matrices, leave-one-out refits and what scores must not depend on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from estimators.dense import gauss_newton, per_example
from helpers import QUERY, Classifier, classes, close, fitted, mlp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits, make_regression
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from lightning_source.ensembling import ensemble


def standing(path, net, data, loss=F.cross_entropy, batch_size=8, **settings):
    """A run that never moves: its final model is ``net`` as it is."""
    module = Classifier(net, loss, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return fitted(path, module, data, batch_size, max_epochs=1, **settings)


# ---------------------------------------------------------------- linear regression, all of it in closed form

L2 = 1e-2


def regression():
    x, y = make_regression(n_samples=110, n_features=10, noise=1.0, random_state=0)
    x, y = torch.tensor(x), torch.tensor((y - y.mean()) / y.std()).unsqueeze(1)
    return x[:100], y[:100], x[100:], y[100:]


def ridge(x, y, kept=slice(None), examples=100):
    """Minimiser of ``Σ (w·x - y)² / examples + L2/2 |w|²`` over the kept rows, ``[D]``."""
    x, y = x[kept], y[kept]
    return torch.linalg.solve(2 / examples * x.T @ x + L2 * torch.eye(x.shape[1]), 2 / examples * x.T @ y).squeeze(1)


def of_regression(path, loss=F.mse_loss):
    """``(scorer of the ridge solution, exact influence, true change of each query's loss on leaving one out)``."""
    x, y, query_x, query_y = regression()
    w = ridge(x, y)
    net = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(w)
    trainer = standing(path, net, TensorDataset(x.float(), y.float()), loss, 20)
    hessian = 2 / 100 * x.T @ x + L2 * torch.eye(10)
    gradients = 2 * (x @ w - y.squeeze(1)).unsqueeze(1) * x
    asked = 2 * (query_x @ w - query_y.squeeze(1)).unsqueeze(1) * query_x
    exact = asked @ torch.linalg.solve(hessian, gradients.T) / 100
    refits = torch.stack([ridge(x, y, torch.arange(100) != i) for i in range(100)])
    losses = (query_x @ torch.cat([w.unsqueeze(0), refits]).T - query_y).square()
    return trainer, [query_x.float(), query_y.float()], exact, losses[:, 1:] - losses[:, :1]


# Tolerances relative to the largest score: solvers that converge, and a series of random batches.
SOLVERS = {
    "influence-cg": ({"iterations": 20, "tolerance": 1e-5, "preconditioner": None}, 1e-3),
    "influence-cg, preconditioned": ({"iterations": 20, "tolerance": 1e-5}, 1e-3),
    "influence-lissa": ({"depth": 120, "examples_per_step": 100}, 0.015),
    "influence-lissa, of random batches": ({"depth": 400}, 0.15),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_linear_regression_has_the_closed_form_and_predicts_leaving_one_out(tmp_path, name):
    options, tolerance = SOLVERS[name]
    trainer, query, exact, actual = of_regression(tmp_path)
    scores = trainer.attribute(query, method=name.split(",")[0], damping=L2, **options).values
    close(scores, exact, tolerance)
    for one, other in zip(scores.numpy(), actual.numpy(), strict=True):
        assert pearsonr(one, other).statistic > 0.9
        assert spearmanr(one, other).statistic > 0.9
    assert 0.8 < np.polyfit(scores.double().flatten(), actual.flatten(), 1)[0] < 1.25  # leverage, of order 10 / 100


# ---------------------------------------------------------------- logistic regression, refitted


def test_digits_1_or_3_by_logistic_regression_predicts_leaving_one_out(tmp_path):
    x, y = load_digits(return_X_y=True)
    chosen = np.isin(y, [1, 3])
    x, y = x[chosen] / 16, (y[chosen] == 3).astype(float)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    x, y, query_x, query_y = x[:200], y[:200], x[200:203], y[200:203]
    l2 = 2e-2

    def refit(kept):
        model = LogisticRegression(C=1 / (200 * l2), fit_intercept=False, tol=1e-8, max_iter=1000)
        return model.fit(x[kept], y[kept]).coef_[0]

    def losses(w):
        margin = query_x @ w * (2 * query_y - 1)
        return np.log1p(np.exp(-margin))

    whole = refit(np.arange(200))
    net = nn.Linear(65, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor(whole))
    data = TensorDataset(torch.tensor(x).float(), torch.tensor(y).float().unsqueeze(1))
    trainer = standing(tmp_path, net, data, F.binary_cross_entropy_with_logits, 50)
    query = [torch.tensor(query_x).float(), torch.tensor(query_y).float().unsqueeze(1)]
    scores = trainer.attribute(query, method="influence-cg", damping=l2).values.numpy()
    for q in range(3):
        order = scores[q].argsort()
        ends = np.concatenate([order[:20], order[-20:]])
        actual = [(losses(refit(np.arange(200) != i)) - losses(whole))[q] for i in ends]
        assert pearsonr(scores[q][ends], actual).statistic > 0.9
        assert spearmanr(scores[q][ends], actual).statistic > 0.9


# ---------------------------------------------------------------- dense references on a small network


def classifier(path, **settings):
    """A trained classifier, its examples, and the dense influence with a damping."""
    trainer = fitted(path, max_epochs=5, **settings)
    module = trainer.lightning_module.eval()
    data = classes().tensors
    return trainer, module, data


@pytest.mark.parametrize("preconditioner", [None, "ekfac"])
def test_cg_is_the_dense_solution(tmp_path, preconditioner):
    trainer, module, data = classifier(tmp_path)
    h = gauss_newton(module, data[0]) + 0.01 * torch.eye(53)
    g, asked = per_example(module, data, F.cross_entropy), per_example(module, QUERY, F.cross_entropy)
    expected = asked @ torch.linalg.solve(h, g.T) / len(g)
    options = {"damping": 0.01, "preconditioner": preconditioner, "tolerance": 1e-4}
    scores = trainer.attribute(QUERY, method="influence-cg", **options)
    close(scores.values, expected, 1e-3)
    assert scores.metadata["curvature"] == "gauss-newton"
    assert scores.metadata["residual"] <= 1e-4
    assert "on removing" in scores.metadata["unit"]


def test_cg_says_what_is_left(tmp_path):
    trainer, *_ = classifier(tmp_path)
    with pytest.warns(UserWarning, match=r"2 iterations with a residual of .* HINT: raise `iterations`"):
        trainer.attribute(QUERY, method="influence-cg", damping=1e-5, iterations=2, preconditioner=None)


@pytest.mark.parametrize("options", [{"iterations": 100}, {"iterations": 400, "examples_per_step": 12}])
def test_astra_goes_from_influence_to_the_dense_solution(tmp_path, options):
    trainer, module, data = classifier(tmp_path)
    h = gauss_newton(module, data[0]) + 0.05 * torch.eye(53)
    g, asked = per_example(module, data, F.cross_entropy), per_example(module, QUERY, F.cross_entropy)
    expected = asked @ torch.linalg.solve(h, g.T) / len(g)
    scores = trainer.attribute(QUERY, method="astra", damping=0.05, **options).values
    ekfac = trainer.attribute(QUERY, method="influence", damping=0.05).values
    close(trainer.attribute(QUERY, method="astra", damping=0.05, iterations=1, step=1e-9).values, ekfac)
    error, before = ((x - expected).abs().max() / expected.abs().max() for x in (scores, ekfac))
    assert before > 0.02
    # All examples at every step, or batches of half of them, whose mean of iterates has noise left.
    assert error < (1e-3 if len(options) == 1 else 0.25 * before)


def test_astra_says_that_it_diverged(tmp_path):
    trainer, *_ = classifier(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"diverged: after .* HINT: lower `step=100`"):
        trainer.attribute(QUERY, method="astra", step=100.0)


def test_lissa_says_that_it_diverged(tmp_path):
    trainer, *_ = classifier(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"diverged: after .* HINT: raise `scale=0.001`"):
        trainer.attribute(QUERY, method="influence-lissa", scale=1e-3)


def test_the_default_damping_is_that_of_influence(tmp_path):
    """Where blocks are one number each and activations of equal size, EK-FAC is exact, and so both methods agree."""
    x = torch.randint(2, (24, 1)).float() * 2 - 1
    data = TensorDataset(x, x + torch.randn(24, 1))
    trainer = standing(tmp_path, nn.Linear(1, 1, bias=False), data, F.mse_loss)
    query = [data.tensors[0][:3], data.tensors[1][:3]]
    exact = trainer.attribute(query, method="influence-cg", preconditioner=None, tolerance=1e-5).values
    close(exact, trainer.attribute(query, method="influence").values, 1e-4)


def test_datainf_is_its_closed_form(tmp_path):
    """Layer by layer, ``λ = 0.1 Σ_i |∇L_i|² / (n d)``, each inverse formed."""
    trainer, module, data = classifier(tmp_path)
    g, asked = per_example(module, data, F.cross_entropy), per_example(module, QUERY, F.cross_entropy)
    expected, start = 0, 0
    for size in (35, 18):
        a, b = asked[:, start : start + size], g[:, start : start + size]
        amount = 0.1 * b.square().sum(1).mean() / size
        inverse = sum(torch.linalg.inv(amount * torch.eye(size) + torch.outer(row, row)) for row in b) / len(b)
        expected = expected + a @ inverse @ b.T / len(b)
        start += size
    scores = trainer.attribute(QUERY, method="datainf")
    close(scores.values, expected, 1e-4)
    assert scores.metadata["curvature"] == "empirical"


def trak_parts(trainer, data, measure, k, seed=0):
    """Kernel ``[Q, N]`` and weights ``[N]`` in numpy, the projection drawn as the estimator draws it."""
    module = trainer.lightning_module.eval()
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randint(2, (size, k), generator=generator, dtype=torch.int8) * 2.0 - 1 for size in (35, 18)]

    def margin(z, y):
        log_p = z.log_softmax(1)[0, y]
        return log_p - torch.log1p(-log_p.exp())

    def features(data, measure):
        rows = per_example(module, data, measure)
        # A block is a matrix with the bias as its last column.
        w1, b1, w2, b2 = rows.split([30, 5, 15, 3], 1)
        first = torch.cat([w1.view(-1, 5, 6), b1.unsqueeze(2)], 2).flatten(1)
        second = torch.cat([w2.view(-1, 3, 5), b2.unsqueeze(2)], 2).flatten(1)
        return (torch.cat([first, second], 1) @ torch.cat(pieces).double()).numpy() / np.sqrt(k)

    phi, asked = features(data, margin), features(QUERY, measure or margin)
    p = module.net(data[0]).softmax(1)[torch.arange(len(data[0])), data[1]].detach().double().numpy()
    return asked @ np.linalg.pinv(phi.T @ phi, rcond=1e-6, hermitian=True) @ phi.T, 1 - p


@pytest.mark.parametrize("measurement", ["margin", "loss"])
def test_trak_is_a_plain_computation_with_the_same_projection(tmp_path, measurement):
    trainer, _, data = classifier(tmp_path)
    kernel, weights = trak_parts(trainer, data, None if measurement == "margin" else F.cross_entropy, 9)
    scores = trainer.attribute(QUERY, method="trak", measurement=measurement, dimension=9)
    close(scores.values, torch.tensor(-kernel * weights), 1e-4)
    other = trainer.attribute(QUERY, method="trak", dimension=9, seed=1).values
    assert (other - scores.values).abs().max() > 0.01 * other.abs().max()


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
def test_trak_of_a_linear_regression_is_influence_whatever_the_projection(tmp_path, projection):
    """A square projection drops out, and ``ΦᵀΦ`` is the Gauss-Newton matrix of half the squares."""
    x, y, query_x, query_y = (v.float() for v in regression())
    trainer = standing(tmp_path, nn.Linear(10, 1, bias=False), TensorDataset(x, y), F.mse_loss, 20)
    exact = trainer.attribute([query_x, query_y], method="influence-cg", damping=0.0, tolerance=1e-5).values
    scores = trainer.attribute([query_x, query_y], method="trak", dimension=10, projection=projection, seed=1)
    close(scores.values, 2 * exact, 1e-3)


def test_trak_names_what_it_needs(tmp_path):
    trainer, *_ = classifier(tmp_path)
    with pytest.raises(MisconfigurationException, match="24 training examples"):
        trainer.attribute(QUERY, method="trak", dimension=25)
    data = TensorDataset(torch.randn(24, 6), torch.randn(24, 2))
    several = standing(tmp_path / "b", mlp(outputs=2), data, F.mse_loss)
    with pytest.raises(MisconfigurationException, match=r"one output for each example.*`mse_loss`"):
        several.attribute(list(data.tensors), method="trak")


def test_ensembles_average_scores_and_trak_averages_its_parts(tmp_path):
    trainers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        trainers.append(fitted(tmp_path / str(seed), Classifier(mlp()), max_epochs=5))
    members = [t.attribute(QUERY, per_segment=True) for t in trainers]
    mean = ensemble(members)
    close(mean.values, (members[0].values + members[1].values) / 2)
    close(mean.by_segment.sum(0), mean.values)
    assert mean.metadata["members"] == [m.metadata["run_id"] for m in members]
    assert len(set(mean.metadata["members"])) == 2
    assert mean.metadata["sign"] == members[0].metadata["sign"]
    assert torch.equal(ensemble(members[:1]).values, members[0].values)

    data = classes().tensors
    parts = [trak_parts(t, data, F.cross_entropy, 9) for t in trainers]
    expected = -np.mean([k for k, _ in parts], axis=0) * np.mean([w for _, w in parts], axis=0)
    found = ensemble([t.attribute(QUERY, method="trak", dimension=9) for t in trainers]).values
    close(found, torch.tensor(expected), 1e-4)

    influence = trainers[1].attribute(QUERY, method="influence")
    with pytest.raises(MisconfigurationException, match="method is 'source' and 'influence'"):
        ensemble([members[0], influence])
    with pytest.raises(MisconfigurationException, match="measurement is 'loss' and 'margin'"):
        ensemble([members[0], trainers[1].attribute(QUERY, measurement="margin")])
    with pytest.raises(MisconfigurationException, match="`train_ids`"):
        ensemble([members[0], trainers[1].attribute(QUERY, train_ids=[1, 2])])
    with pytest.raises(MisconfigurationException, match="at least one"):
        ensemble([])


def test_repsim_is_the_cosine_of_the_last_layers_inputs(tmp_path):
    trainer, module, data = classifier(tmp_path)
    features = [F.normalize(module.net[:2](x).detach().double(), dim=1) for x in (QUERY[0], data[0])]
    scores = trainer.attribute(QUERY, method="repsim")
    close(scores.values, features[0] @ features[1].T)
    assert scores.metadata["unit"] == "cosine of representations"
    close(trainer.attribute(QUERY, method="repsim", measurement="margin").values, -scores.values)
    inputs = [F.normalize(x, dim=1) for x in (QUERY[0], data[0])]
    close(trainer.attribute(QUERY, method="repsim", module="net.0").values, inputs[0] @ inputs[1].T)
    with pytest.raises(MisconfigurationException, match="no module of"):
        trainer.attribute(QUERY, method="repsim", module="net.7")


# ---------------------------------------------------------------- another library


def restored(net, path):
    net.load_state_dict(torch.load(path))
    return 1.0


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_captum_gives_the_same_gradient_products(tmp_path):
    influence = pytest.importorskip("captum.influence")
    trainer, module, _ = classifier(tmp_path)
    torch.save(module.net.state_dict(), tmp_path / "final.pt")
    files, loss = [str(tmp_path / "final.pt")], nn.CrossEntropyLoss(reduction="none")
    tracin = influence.TracInCP(module.net, classes(), files, restored, loss_fn=loss, batch_size=6)
    scores = trainer.attribute(QUERY, method="grad-dot")
    rate = sum(segment["rates"][0] for segment in scores.metadata["segments"])
    close(tracin.influence(tuple(QUERY)) * rate / 24, scores.values)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_captum_gives_the_same_influence_of_a_linear_model(tmp_path, reduction):
    """Its Hessian is that of the sum over examples, whatever the loss it is given, so its scores hold the same 1/N."""
    influence = pytest.importorskip("captum.influence")
    trainer, query, *_ = of_regression(tmp_path)
    net = trainer.lightning_module.net
    torch.save(net.state_dict(), tmp_path / "final.pt")
    x, y, *_ = (v.float() for v in regression())
    naive = influence.NaiveInfluenceFunction(
        net,
        TensorDataset(x, y),
        str(tmp_path / "final.pt"),
        restored,
        loss_fn=nn.MSELoss(reduction=reduction),
        batch_size=20,
        hessian_reg=0.0,
        projection_dim=10,
        sample_wise_grads_per_batch=reduction != "none",
    )
    scores = trainer.attribute(query, method="influence-cg", damping=0.0, tolerance=1e-5)
    close(naive.influence(tuple(query)), scores.values, 1e-3)


# ---------------------------------------------------------------- what scores do not depend on

METHODS = {
    "influence-cg": {"damping": 0.05, "tolerance": 1e-5},
    "influence-lissa": {"damping": 0.05, "depth": 60},
    "datainf": {},
    "astra": {"damping": 0.05, "iterations": 20},
    "astra-source": {},
    "trak": {"dimension": 10},
    "repsim": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_batch_size_query_order_and_subsets(tmp_path, method):
    trainer = fitted(tmp_path)
    options = {"method": method} | METHODS[method]
    whole = trainer.attribute(QUERY, **options).values
    assert whole.shape == (4, 24)
    assert whole.abs().max() > 0
    close(trainer.attribute(QUERY, batch_size=3, **options).values, whole, 1e-4)
    back = [x.flip(0) for x in QUERY]
    close(trainer.attribute(back, **options).values, whole.flip(0), 1e-4)
    close(trainer.attribute(QUERY, train_ids=[7, 2], **options).values, whole[:, [7, 2]])
    with trainer.callbacks[0].scorer(trainer) as scorer:
        scorer.memory = 1  # queries one by one
        single = scorer.score(TensorDataset(*QUERY), **options).values
    close(single, whole, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_sum_loss_gives_the_scores_of_a_mean_loss(tmp_path, method):
    """Learning rate η on the sum over batches of 8 is 8 η on their mean."""
    found = []
    for reduction, rate in (("mean", 0.1), ("sum", 0.1 / 8)):
        torch.manual_seed(3)
        module = Classifier(
            mlp(),
            lambda z, y, reduction=reduction: F.cross_entropy(z, y, reduction=reduction),
            lambda parameters, rate=rate: torch.optim.SGD(parameters, lr=rate),
        )
        trainer = fitted(tmp_path / reduction, module)
        options = dict(METHODS[method])
        if "damping" in options and reduction == "sum":
            options["damping"] *= 8  # it stands beside the curvature of the loss as trained
        found.append(trainer.attribute(QUERY, method=method, **options).values)
    close(*found, 1e-3)


@pytest.mark.parametrize("method", ["influence-cg", "datainf", "trak"])
def test_the_final_model_is_all_that_counts(tmp_path, method):
    """Whatever optimizer led to it: here both stand still, Adam with its preconditioner."""
    net, found = mlp(), []
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        module = Classifier(net, optimizer=lambda parameters, kind=optimizer: kind(parameters, lr=0.0))
        trainer = fitted(tmp_path / optimizer.__name__, module)
        found.append(trainer.attribute(QUERY, method=method, **METHODS[method]).values)
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(tmp_path, method):
    trainer = fitted(tmp_path)
    module = trainer.lightning_module.train()
    module.zero_grad()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    rng = torch.get_rng_state()
    trainer.attribute(QUERY, method=method, **METHODS[method])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(child.training for child in module.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.equal(module.net[0].weight.grad, torch.ones_like(module.net[0].weight))
    assert module.net[2].weight.grad is None
