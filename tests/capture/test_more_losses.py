"""Losses read as other densities than the categorical and the Normal of fixed variance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from capture.sampled import DRAWS, check_second_moment
from torch import Tensor

from lightning_source.capture.losses import read_call
from lightning_source.capture.objective import Objective

N, C = 3, 4  # examples, and output coordinates or classes


def fixed(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGET = fixed(N, C, seed=2)
COUNTS = torch.tensor([[0.0, 1, 3, 0], [2, 1, 0, 5], [1, 0, 0, 2]])
SOFT = fixed(N, C, seed=5).softmax(1)
WEIGHT = fixed(N, C, seed=3).abs()


def same(z: Tensor) -> tuple[Tensor]:
    return (z,)


def log_probs(z: Tensor) -> tuple[Tensor]:
    return (z.log_softmax(-1),)


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and a variance bounded away from 0."""
    mean, raw = z.chunk(2, dim=1)
    return mean, F.softplus(raw) + 0.1


class Case(NamedTuple):
    """A call of a loss on what ``link`` makes of the network's output."""

    function: Callable[..., Tensor]
    fisher: Callable[[Tensor], Tensor]  # of the first example's output, in closed form, over all of its coordinates
    output: Tensor = fixed(N, C)
    target: Tensor = TARGET
    link: Callable[[Tensor], tuple[Tensor, ...]] = same
    options: dict[str, Any] = {}  # noqa: RUF012

    def arguments(self, output: Tensor, rows: slice = slice(None), times: int = 1) -> tuple[list[Any], dict[str, Any]]:
        first, *more = self.link(output)

        def tile(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.dim() and len(value) == N
            return value[rows].repeat(times, *[1] * (value.dim() - 1)) if whole else value

        return [first, tile(self.target), *more], {name: tile(value) for name, value in self.options.items()}

    def torch(self, output: Tensor, reduction: str) -> Tensor:
        positional, options = self.arguments(output)
        return self.function(*positional, **options, reduction=reduction)


def constant(information: float, weight: Tensor | float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.diag(torch.full_like(z, information).flatten() * weight)


def numerically(loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> float:
    """Expected squared score of the density ``exp(-loss)`` by quadrature."""
    r = torch.linspace(-60, 60, 600_001, dtype=torch.float64, requires_grad=True)
    values = loss(r, torch.zeros_like(r), reduction="none", **options)
    (score,) = torch.autograd.grad(values.sum(), r)
    density = (-values.detach()).exp()
    return float((score**2 * density).sum() / density.sum())


def of_normal(z: Tensor) -> Tensor:
    """``Jᵀ diag(1 / v, 1 / (2 v²)) J`` of mean and variance by output."""
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.cat(halves(x.view(1, -1)), 1).flatten(), z.flatten())
    _, v = halves(z.view(1, -1))
    return jacobian.T @ torch.diag(torch.cat([1 / v, 0.5 / v**2], 1).flatten()) @ jacobian


def one_variance(z: Tensor) -> tuple[Tensor, Tensor]:
    """The last coordinate as the variance of all others."""
    return z[:, :-1], F.softplus(z[:, -1:]) + 0.1


def of_one_variance(z: Tensor) -> Tensor:
    raw = z.flatten()[-1]
    v = F.softplus(raw) + 0.1
    count = z.numel() - 1
    return torch.diag(torch.cat([(1 / v).expand(count), (count * 0.5 * raw.sigmoid() ** 2 / v**2).view(1)]))


def of_classes(mass: float = 1.0) -> Callable[[Tensor], Tensor]:
    def fisher(z: Tensor) -> Tensor:
        p = z.view(-1, C).softmax(-1)
        return mass * torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))

    return fisher


def cases() -> dict[str, Case]:
    gauss, poisson = F.gaussian_nll_loss, F.poisson_nll_loss
    return {
        "l1": Case(F.l1_loss, constant(1.0)),
        "l1, column against row": Case(
            F.l1_loss, lambda z: constant(float(C))(z), output=fixed(N, 1), target=fixed(C, seed=2)
        ),
        "huber": Case(F.huber_loss, constant(numerically(F.huber_loss))),
        "huber, delta": Case(F.huber_loss, constant(numerically(F.huber_loss, delta=0.3)), options={"delta": 0.3}),
        "huber, wide": Case(F.huber_loss, constant(1.0), options={"delta": 20.0}),
        "huber, weight": Case(F.huber_loss, constant(numerically(F.huber_loss), WEIGHT[0]), options={"weight": WEIGHT}),
        "smooth l1": Case(F.smooth_l1_loss, constant(numerically(F.smooth_l1_loss))),
        "smooth l1, beta": Case(
            F.smooth_l1_loss, constant(numerically(F.smooth_l1_loss, beta=2.5)), options={"beta": 2.5}
        ),
        "smooth l1, beta 0": Case(F.smooth_l1_loss, constant(1.0), options={"beta": 0.0}),
        "gaussian": Case(gauss, of_normal, output=fixed(N, 2 * C), link=halves),
        "gaussian, full": Case(gauss, of_normal, output=fixed(N, 2 * C), link=halves, options={"full": True}),
        "gaussian, one variance": Case(gauss, of_one_variance, output=fixed(N, C + 1), link=one_variance),
        "gaussian, one variance, dimension left out": Case(
            gauss,
            of_one_variance,
            output=fixed(N, C + 1),
            link=lambda z: (z[:, :-1], one_variance(z)[1].squeeze(1)),
        ),
        "gaussian, variance below eps": Case(
            gauss, constant(2.0), link=lambda z: (z, torch.full_like(z, 0.1)), options={"eps": 0.5}
        ),
        "poisson": Case(poisson, lambda z: torch.diag(z.flatten().exp()), target=COUNTS),
        "poisson, full": Case(poisson, lambda z: torch.diag(z.flatten().exp()), target=COUNTS, options={"full": True}),
        "poisson, rate": Case(
            poisson,
            lambda z: torch.diag(1 / z.flatten()),
            output=fixed(N, C).abs() + 0.5,
            target=COUNTS,
            options={"log_input": False, "eps": 1e-6},
        ),
        "kl": Case(F.kl_div, of_classes(), target=SOFT, link=log_probs),
        "kl, log target": Case(F.kl_div, of_classes(), target=SOFT.log(), link=log_probs, options={"log_target": True}),
        "kl, targets that sum to 1/2": Case(F.kl_div, of_classes(0.5), target=0.5 * SOFT, link=log_probs),
        "kl, tokens": Case(
            F.kl_div,
            of_classes(),
            output=fixed(N, 2, C),
            target=fixed(N, 2, C, seed=5).softmax(-1),
            link=log_probs,
        ),
    }


CASES = cases()
VARIANTS = [
    (name, reduction)
    for name, case in CASES.items()
    for reduction in ["mean", "sum", "none"] + ["batchmean"] * (case.function is F.kl_div)
]
quietly = pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction. 'mean' divides")


@pytest.mark.check("loss", "{name}", "value as torch's")
@pytest.mark.parametrize(("name", "reduction"), VARIANTS)
@quietly
def test_value_is_torchs_own(name, reduction):
    case = CASES[name]
    positional, options = case.arguments(case.output)
    call = read_call(case.function, tuple(positional), options | {"reduction": reduction})
    torch.testing.assert_close(call.value, case.torch(case.output, reduction))
    assert call.elements.shape == call.weights.shape == call.curvature.shape
    assert not call.weights.requires_grad
    assert not call.curvature.requires_grad


@pytest.mark.check("loss", "{name}", "true Fisher against its exact expectation")
@pytest.mark.parametrize("name", CASES)
@quietly
def test_sampled_gradients_have_the_fisher_as_second_moment(name):
    case = CASES[name]
    one = case.output[:1]
    output = one.repeat(DRAWS, *[1] * (one.dim() - 1)).requires_grad_()
    positional, options = case.arguments(output, slice(1), DRAWS)
    check_second_moment(read_call(case.function, tuple(positional), options), output, case.fisher(one))


@pytest.mark.check("loss", "{name}", "margin and log-probability")
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.function is not F.kl_div and "weight" not in n])
@quietly
def test_log_prob_is_the_loss_below_a_constant(name):
    case = CASES[name]
    positional, options = case.arguments(case.output)
    call = read_call(case.function, tuple(positional), options)
    torch.testing.assert_close(call.log_prob(), -case.torch(case.output, "none"))
    assert call.margin is None


@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss, F.gaussian_nll_loss])
def test_prediction_and_target_may_change_places(function):
    """Then the network's output is what the loss calls ``target``; its curvature is the same."""
    more = (torch.ones(N, C),) if function is F.gaussian_nll_loss else ()
    squares = []
    for swapped in (False, True):
        z = fixed(N, C).requires_grad_()
        call = read_call(function, ((TARGET, z) if swapped else (z, TARGET)) + more, {})
        (gradient,) = torch.autograd.grad(call.sample(torch.Generator().manual_seed(0)).sum(), z)
        squares.append(gradient.square())
    assert squares[0].any()
    torch.testing.assert_close(*squares)


REFUSED = {
    "raw scores": lambda z: F.kl_div(z, SOFT, reduction="sum"),
    "classes in dimension 0": lambda z: F.kl_div(z.log_softmax(0), SOFT, reduction="sum"),
    "no batch": lambda z: F.kl_div(z[0].log_softmax(0), SOFT[0], reduction="sum"),
    "targets from the network": lambda z: F.kl_div(z.log_softmax(1), z.softmax(1), reduction="sum"),
    "soft margin": lambda z: F.soft_margin_loss(z, TARGET.sign()),
    "hinge embedding": lambda z: F.hinge_embedding_loss(z, TARGET.sign()),
    "cosine embedding": lambda z: F.cosine_embedding_loss(z, TARGET, torch.ones(N)),
}


@pytest.mark.check("loss", "{name}", "not read as a likelihood")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_likelihood_is_not_read(name):
    module = torch.nn.Module()
    module.training_step = lambda z, batch_idx: REFUSED[name](z)
    z = fixed(N, C).requires_grad_()
    losses = Objective(module).evaluate(z, N)
    assert losses.calls == []
    torch.testing.assert_close(losses.loss, REFUSED[name](z))


@pytest.mark.parametrize(
    ("step", "scale"),
    [
        (lambda z: torch.nn.KLDivLoss(reduction="batchmean")(z.log_softmax(1), SOFT), 1 / N),
        (lambda z: F.kl_div(z.log_softmax(1), SOFT, reduction="none").sum(1).mean(), 1 / N),
        (lambda z: torch.nn.SmoothL1Loss()(z, TARGET), 1 / (N * C)),
        (lambda z: 0.5 * torch.nn.HuberLoss(reduction="sum")(z, TARGET), 0.5),
        (lambda z: torch.nn.L1Loss()(z, TARGET), 1 / (N * C)),
        (lambda z: torch.nn.PoissonNLLLoss()(z, COUNTS), 1 / (N * C)),
        (lambda z: torch.nn.GaussianNLLLoss()(z, TARGET, torch.ones(N, C)), 1 / (N * C)),
        (lambda z: F.l1_loss(z, TARGET, size_average=False), 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average")
def test_scale_of_an_element_in_a_training_step(step, scale):
    module = torch.nn.Module()
    module.training_step = lambda z, batch_idx: step(z)
    z = fixed(N, C).requires_grad_()
    losses = Objective(module).evaluate(z, N)
    torch.testing.assert_close(losses.loss, step(z))
    (found,) = losses.scales
    torch.testing.assert_close(found, torch.full_like(found, scale))
