"""Every loss that is read: its value, its curvature under sampled labels, and what it says of its targets."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from capture.sampled import DRAWS, check_second_moment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_source.capture.losses import draw_classes, read_call
from lightning_source.capture.objective import Objective

N, C = 3, 4  # examples and classes, or examples and output coordinates


def fixed(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def soft_labels(*shape: int, dim: int = 1) -> Tensor:
    return fixed(*shape, seed=5).softmax(dim)


class Case(NamedTuple):
    function: Callable[..., Tensor]
    output: Tensor  # of the network
    target: Tensor
    options: dict[str, Any]

    def input(self, output: Tensor) -> Tensor:
        """What the loss takes of the network's output."""
        links = {F.nll_loss: lambda x: x.log_softmax(1 if x.dim() > 1 else 0), F.binary_cross_entropy: torch.sigmoid}
        return links.get(self.function, lambda x: x)(output)

    def torch(self, output: Tensor, reduction: str) -> Tensor:
        return self.function(self.input(output), self.target, reduction=reduction, **self.options)

    def read(self, output: Tensor, **arguments: Any) -> Any:
        return read_call(self.function, (self.input(output), self.target), self.options | arguments)

    def repeated(self, times: int) -> "Case":
        """The same batch many times over: one backward pass then holds many draws."""

        def tile(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == N
            return value.repeat(times, *[1] * (value.dim() - 1)) if batched else value

        options = {name: tile(value) for name, value in self.options.items()}
        return Case(self.function, tile(self.output), tile(self.target), options)


LABELS = torch.tensor([2, 0, 3])
GRID = torch.tensor([[2, 0], [1, -100], [3, 3]])  # [N, d], one position ignored
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])
SOFT = soft_labels(N, C)
BITS = torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
POSITIVE = torch.tensor([0.3, 1.0, 2.0, 4.0])
ELEMENT_WEIGHT = fixed(N, C, seed=3).abs()


def cases() -> dict[str, Case]:
    z, zd, z1 = fixed(N, C), fixed(N, C, 2), fixed(C)
    ce, nll, logits, bce, mse = (
        F.cross_entropy,
        F.nll_loss,
        F.binary_cross_entropy_with_logits,
        F.binary_cross_entropy,
        F.mse_loss,
    )
    everything = {"weight": CLASS_WEIGHT, "label_smoothing": 0.2}
    return {
        "ce": Case(ce, z, LABELS, {}),
        "ce, one example without batch": Case(ce, z1, LABELS[0], {"weight": CLASS_WEIGHT}),
        "ce, class weight": Case(ce, z, LABELS, {"weight": CLASS_WEIGHT}),
        "ce, a class of weight 0": Case(ce, z, LABELS, {"weight": torch.tensor([0.0, 1.0, 2.0, 1.0])}),
        "ce, label smoothing": Case(ce, z, LABELS, {"label_smoothing": 0.2}),
        "ce, ignore_index": Case(ce, z, LABELS, {"ignore_index": 0}),
        "ce, [N, C, d] with all options": Case(ce, zd, GRID, everything),
        "ce, [N, C, d], padding of -100": Case(ce, zd, GRID, {}),
        "ce, [N, C, d1, d2]": Case(ce, fixed(N, C, 2, 1), GRID.unsqueeze(2), {}),
        "ce, ignored class weighted and smoothed": Case(ce, z, LABELS, everything | {"ignore_index": 3}),
        "ce, soft": Case(ce, z, SOFT, {}),
        "ce, soft, class weight and smoothing": Case(ce, z, SOFT, everything),
        "ce, soft, [N, C, d]": Case(ce, zd, soft_labels(N, C, 2), everything),
        "ce, soft targets that do not sum to 1": Case(ce, z, 0.5 * SOFT, {"label_smoothing": 0.2}),
        "nll": Case(nll, z, LABELS, {}),
        "nll, class weight and ignore_index": Case(nll, z, LABELS, {"weight": CLASS_WEIGHT, "ignore_index": 2}),
        "nll, [N, C, d]": Case(nll, zd, GRID, {"weight": CLASS_WEIGHT}),
        "bce logits": Case(logits, z, BITS, {}),
        "bce logits, pos_weight": Case(logits, z, BITS, {"pos_weight": POSITIVE}),
        "bce logits, soft, weight and pos_weight": Case(
            logits, z, SOFT, {"weight": ELEMENT_WEIGHT, "pos_weight": POSITIVE}
        ),
        "bce logits, [N]": Case(logits, z[:, 0], BITS[:, 0], {"weight": ELEMENT_WEIGHT[:, 0]}),
        "bce": Case(bce, z, BITS, {}),
        "bce, soft, weight": Case(bce, z, SOFT, {"weight": ELEMENT_WEIGHT}),
        "bce, weight of the columns": Case(bce, z, BITS, {"weight": POSITIVE}),
        "mse": Case(mse, z, fixed(N, C, seed=2), {}),
        "mse, weight": Case(mse, z, fixed(N, C, seed=2), {"weight": ELEMENT_WEIGHT}),
        "mse, one target for all": Case(mse, z, fixed(C, seed=2), {}),
        "mse, one prediction for several targets": Case(mse, fixed(N, 1), fixed(N, C, seed=2), {}),
        "mse, column against row": Case(mse, fixed(N, 1), fixed(C, seed=2), {}),
        "mse, broadcast and weight": Case(mse, fixed(N, 1), fixed(N, C, seed=2), {"weight": ELEMENT_WEIGHT[:, :1]}),
    }


CASES = cases()
ignore_broadcasting = pytest.mark.filterwarnings("ignore:Using a target size")


@pytest.mark.check("loss", "{name}", "value as torch's")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CASES)
@ignore_broadcasting
def test_value_is_torchs_own(name, reduction):
    case = CASES[name]
    call = case.read(case.output, reduction=reduction)
    torch.testing.assert_close(call.value, case.torch(case.output, reduction))
    assert call.reduction == reduction
    assert call.elements.shape == call.weights.shape == call.curvature.shape


@pytest.mark.check("loss", "{name}", "true Fisher against its exact expectation")
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.output.dim() > 1 or len(case.output) == N]
)
@ignore_broadcasting
def test_sampled_gradients_have_the_gauss_newton_matrix_as_second_moment(name):
    case = CASES[name]
    hessian = torch.autograd.functional.hessian(lambda z: case.torch(z, "sum"), case.output)
    hessian = hessian.reshape(case.output.numel(), -1)
    many = case.repeated(DRAWS)
    output = many.output.requires_grad_()
    check_second_moment(many.read(output), output, hessian)


def closed_form(case: Case) -> tuple[Tensor, Tensor] | None:
    """Probability of each target and where there is one; ``None`` where targets are not classes."""
    z, target = case.output, case.target
    if case.function is F.mse_loss or (bool(((target != 0) & (target != 1)).any()) and target.is_floating_point()):
        return None
    if target.is_floating_point():
        return torch.where(target == 1, z.sigmoid(), 1 - z.sigmoid()), torch.ones_like(target, dtype=torch.bool)
    known = target != case.options.get("ignore_index", -100)
    dim = 1 if z.dim() > 1 else 0
    return z.softmax(dim).gather(dim, (target * known).unsqueeze(dim)).squeeze(dim), known


@pytest.mark.check("loss", "{name}", "margin and log-probability")
@pytest.mark.parametrize("name", CASES)
@ignore_broadcasting
def test_margin_and_log_prob_are_those_of_the_target(name):
    case = CASES[name]
    call = case.read(case.output)
    if case.function is F.mse_loss:
        likelihood = torch.distributions.Normal(case.output, math.sqrt(0.5)).log_prob(case.target)
        torch.testing.assert_close(call.log_prob(), likelihood + 0.5 * math.log(math.pi))
        assert call.margin is None
        return
    expected = closed_form(case)
    if expected is None:
        assert call.margin is None
        assert call.log_prob is None
        return
    p, known = expected
    torch.testing.assert_close(call.margin()[known], torch.log(p / (1 - p))[known])
    torch.testing.assert_close(call.log_prob()[known], p.log()[known])


def test_margin_stays_finite_where_the_model_is_certain():
    call = read_call(F.cross_entropy, (torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([0])), {})
    torch.testing.assert_close(call.margin(), torch.tensor([200 - math.log(2)]))


@pytest.mark.parametrize("name", ["ce, class weight", "nll", "bce logits", "bce", "mse"])
@pytest.mark.parametrize("average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(name, average, reduce):
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        legacy = {"size_average": average, "reduce": reduce}
        expected = case.function(case.input(case.output), case.target, **case.options, **legacy)
    torch.testing.assert_close(case.read(case.output, **legacy).value, expected)


def test_a_batch_of_ignored_targets_has_no_loss():
    """Torch's mean over nothing is NaN; as a sum of elements it is 0."""
    call = read_call(F.cross_entropy, (fixed(N, C), torch.full((N,), -100)), {})
    assert call.value == 0


@pytest.mark.parametrize("function", [torch.add, F.softmax, F.triplet_margin_loss])
def test_other_functions_are_not_read(function):
    assert read_call(function, (fixed(N), fixed(N)), {}) is None


class Step(L.LightningModule):
    """A training step around any loss of the network's output."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = nn.Linear(C, C)
        self.step = step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(self.net(batch))


def no_gradient(z: Tensor) -> Tensor:
    with torch.no_grad():
        F.mse_loss(z, BITS)
    F.mse_loss(z.detach(), BITS)
    F.nll_loss(z, LABELS)  # computed for the log only
    return F.cross_entropy(z, LABELS)


# What a training step computes: (the step, the losses seen in it, dloss/delement of each).
SEEN = {
    "nn.CrossEntropyLoss": (lambda z: nn.CrossEntropyLoss()(z, LABELS), ["cross_entropy"], [1 / N]),
    "nn.CrossEntropyLoss(sum)": (lambda z: nn.CrossEntropyLoss(reduction="sum")(z, LABELS), ["cross_entropy"], [1.0]),
    "nn.NLLLoss": (lambda z: nn.NLLLoss()(z.log_softmax(1), LABELS), ["nll_loss"], [1 / N]),
    "nn.BCEWithLogitsLoss": (
        lambda z: nn.BCEWithLogitsLoss(pos_weight=POSITIVE)(z, BITS),
        ["binary_cross_entropy_with_logits"],
        [1 / (N * C)],
    ),
    "nn.BCELoss": (lambda z: nn.BCELoss()(z.sigmoid(), BITS), ["binary_cross_entropy"], [1 / (N * C)]),
    "nn.MSELoss": (lambda z: nn.MSELoss()(z, BITS), ["mse_loss"], [1 / (N * C)]),
    "functional": (lambda z: F.cross_entropy(z, LABELS), ["cross_entropy"], [1 / N]),
    "functional, imported by name": (lambda z: cross_entropy(z, LABELS), ["cross_entropy"], [1 / N]),
    "keywords only": (lambda z: F.mse_loss(target=BITS, input=z, reduction="sum"), ["mse_loss"], [1.0]),
    "half": (lambda z: 0.5 * F.mse_loss(z, BITS), ["mse_loss"], [0.5 / (N * C)]),
    "none and mean": (lambda z: F.mse_loss(z, BITS, reduction="none").mean(), ["mse_loss"], [1 / (N * C)]),
    "two": (
        lambda z: F.cross_entropy(z, LABELS) + 0.3 * F.mse_loss(z, BITS, reduction="sum"),
        ["cross_entropy", "mse_loss"],
        [1 / N, 0.3],
    ),
    "only those that are trained on": (no_gradient, ["cross_entropy"], [1 / N]),
    "none of them": (lambda z: z.square().mean(), [], []),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_of_a_training_step(name):
    step, names, scales = SEEN[name]
    module = Step(step)
    inputs = fixed(N, C, seed=8)
    losses = Objective(module).evaluate(inputs, N)
    torch.testing.assert_close(losses.loss, step(module.net(inputs)))
    assert [call.name for call in losses.calls] == names
    for found, scale in zip(losses.scales, scales, strict=True):
        torch.testing.assert_close(found, torch.full_like(found, scale))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (1, 50_000)], ids=str)
def test_drawn_classes_have_their_probabilities(shape):
    """To 5 standard errors of 40,000 draws; a class of probability 0 is never drawn, first and last ones neither."""
    torch.manual_seed(0)
    weights = torch.rand(*shape, dtype=torch.float32)
    weights[..., [0, 2, -1]] = 0
    rows = weights.expand(40_000, *shape) if weights.numel() < 100 else weights
    drawn = draw_classes(rows, torch.Generator().manual_seed(1))
    assert drawn.shape == rows.shape[:-1]
    assert (rows.gather(-1, drawn.unsqueeze(-1)) > 0).all()
    if rows is not weights:
        found = torch.nn.functional.one_hot(drawn, 6).float().mean(0)
        expected = weights / weights.sum(-1, keepdim=True)
        error = 5 * (expected * (1 - expected) / 40_000).sqrt()
        assert ((found - expected).abs() <= error).all()
    again = draw_classes(rows, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
