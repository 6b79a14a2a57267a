"""Gauss-Newton products against dense matrices made of Jacobians and of torch's own Hessians."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from capture import test_losses, test_more_losses
from helpers import classes, close, mlp
from torch import nn
from torch.utils.data import TensorDataset

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.data import Examples
from lightning_source.capture.losses import read_call
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.curvature.block_gradients import BlockGradients, contract
from lightning_source.passes.calibration import calibrate
from lightning_source.passes.gauss_newton import GaussNewton, _batched_grad, expand
from lightning_source.passes.workspace import Workspace

QUERIES = 3


class Step(L.LightningModule):
    """A network under any loss of its output and the targets."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch, batch_idx):
        *inputs, targets = batch
        return self.loss(self.net(*inputs), targets)


def product_of(module, data, batch_size=5, **options):
    """A Gauss-Newton matrix by products, and the module's state that it stands for."""
    module.eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    examples = Examples(data, batch_size)
    (_, batch), *_ = examples.batches(range(min(4, len(data))))
    objective = Objective(module)
    coverage = probe(module, objective, find_blocks(module, [parameters]), batch, len(batch[0]))
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    workspace = Workspace(module, coverage.blocks, objective)
    with workspace.at(state):
        calibrate(workspace, examples, batch_size)
    return GaussNewton(workspace, examples, lambda: state, **options)


def dense(matrix):
    """The matrix, column by column, over parameters as they are named in the layout."""
    like = next(matrix.workspace.module.parameters())
    columns = matrix(torch.eye(matrix.layout.width, dtype=like.dtype))
    assert torch.allclose(columns, columns.T, atol=float(1e-5 * columns.abs().max()))
    rows = torch.cat([p.flatten(1) for p in matrix.layout.by_parameter(columns)], 1)
    return torch.cat([p.flatten(1) for p in matrix.layout.by_parameter(rows.T.contiguous())], 1)


def reference(matrix, second_derivative):
    """``(1/N) Σ_m J_mᵀ (∂²ℓ/∂z²)_m J_m`` with the network's output ``z_m``, by ``torch.func``."""
    module, data = matrix.workspace.module, matrix.data.dataset
    names = matrix.layout.parameters
    values = {name: p.detach() for name, p in module.named_parameters()}
    total = 0
    for *inputs, target in data:

        def output(chosen, inputs=inputs):
            free = {name.removeprefix("net."): value for name, value in (values | chosen).items()}
            return torch.func.functional_call(module.net, free, tuple(x.unsqueeze(0) for x in inputs)).flatten()

        chosen = {name: values[name] for name in names}
        z = output(chosen)
        jacobian = torch.func.jacrev(output)(chosen)
        j = torch.cat([jacobian[name].reshape(len(z), -1) for name in names], 1)
        total = total + j.T @ second_derivative(z, target) @ j
    return total / len(data)


def of_cross_entropy(z, target):
    p = z.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def of_squares(z, target):
    return 2 * torch.eye(len(z), dtype=z.dtype)


def regression(examples=11, outputs=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    shapes = ((examples, 6), (examples, outputs))
    return TensorDataset(*(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes))


def in_dtype(data, dtype):
    return TensorDataset(*(x.to(dtype) if x.is_floating_point() else x for x in data.tensors))


# loss, data, second derivative with respect to the output of the loss as trained in batches of 5, relative tolerance
LOSSES = {
    "cross entropy": (F.cross_entropy, classes(11), of_cross_entropy),
    "cross entropy, sum": (
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        classes(11),
        lambda z, y: 5 * of_cross_entropy(z, y),
    ),
    "log-softmax and nll": (lambda z, y: F.nll_loss(z.log_softmax(1), y), classes(11), of_cross_entropy),
    "squares": (F.mse_loss, regression(outputs=3), lambda z, y: of_squares(z, y) / 3),
    "half the sum of squares": (
        lambda z, y: 0.5 * F.mse_loss(z, y, reduction="sum"),
        regression(outputs=3),
        lambda z, y: 5 / 2 * of_squares(z, y),
    ),
    "two losses": (
        lambda z, y: F.mse_loss(z, y) + F.cross_entropy(z, y.argmax(1)),
        regression(outputs=3),
        lambda z, y: of_squares(z, y) / 3 + of_cross_entropy(z, y),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_the_dense_matrix(name, dtype):
    """Round-off alone: products and dense matrices are the same sums in another order."""
    loss, data, second = LOSSES[name]
    module = Step(mlp(), loss).to(dtype)
    matrix = product_of(module, in_dtype(data, dtype))
    expected = reference(matrix, second)
    error = (dense(matrix) - expected).abs().max() / expected.abs().max()
    assert matrix.kind == "gauss-newton"
    assert error < (1e-8 if dtype == torch.float64 else 1e-4)


def test_products_do_not_depend_on_the_batch_size_or_on_the_other_vectors():
    module = Step(mlp(), F.cross_entropy)
    five = product_of(module, classes(11), 5)
    vectors = torch.randn(40, five.layout.width)
    whole = five(vectors)
    for other in (product_of(module, classes(11), 1), product_of(module, classes(11), 64)):
        close(other(vectors), whole)
    close(five(vectors[7:8]), whole[7:8], 1e-6)


def test_some_examples_and_minibatches():
    module = Step(mlp(), F.cross_entropy)
    data = classes(12)
    ids = torch.tensor([1, 4, 5, 10])
    some = product_of(module, data, 3, ids=ids)
    vectors = torch.randn(QUERIES, some.layout.width)
    alone = product_of(module, TensorDataset(*(x[ids] for x in data.tensors)), 3)
    torch.testing.assert_close(some(vectors), alone(vectors))
    whole = product_of(module, data, 3)
    with whole.minibatches(4, 200, seed=0) as products:
        found = torch.stack([product(vectors) for product in products])
    assert not torch.equal(found[0], found[1])
    # Five standard errors of a mean of 200.
    error = 5 * found.std(0) / math.sqrt(200) + 1e-6
    assert ((found.mean(0) - whole(vectors)).abs() <= error).all()


class Sequence(nn.Module):
    """Every kind of block: an embedding, attention, normalisation, a convolution and a free parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 3, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens):
        x = self.embedding(tokens.long()) * self.scale
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.head(self.conv(x.mT).mean(2).tanh())


def test_every_kind_of_block():
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(
        torch.randint(6, (9, 5), generator=generator).double(), torch.randint(3, (9,), generator=generator)
    )
    matrix = product_of(Step(Sequence().double(), F.cross_entropy), data, 4)
    forms = {block.form for block in matrix.workspace.blocks}
    assert len(forms) >= 5, forms
    expected = reference(matrix, of_cross_entropy)
    assert (dense(matrix) - expected).abs().max() < 1e-8 * expected.abs().max()


def by_examples(matrix, losses):
    """``E[∇ℓ ∇ℓᵀ]`` of losses ``[N]``, over parameters as they are named in the layout."""
    named = dict(matrix.workspace.module.named_parameters())
    own = [named[name] for name in matrix.layout.parameters]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, own, retain_graph=True)]) for x in losses]
    return torch.stack(rows).T @ torch.stack(rows) / len(rows)


def cubes(z, y):
    return (z - y).abs().pow(3).sum(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_is_not_recognised_has_its_empirical_fisher(reduction):
    data = regression(12)
    module = Step(mlp(outputs=2), lambda z, y: getattr(cubes(z, y), reduction)())
    matrix = product_of(module, data, 5)
    found = dense(matrix)
    assert matrix.kind == "empirical"
    expected = by_examples(matrix, cubes(module.net(data.tensors[0]), data.tensors[1]))
    expected = expected * (5 if reduction == "sum" else 1)
    close(found, expected, 1e-4)


class Hooked(Step):
    """Says by itself of which distribution it minimises the negative log-likelihood."""

    def attribution_distribution(self, batch):
        inputs, targets = batch
        return self.distribution(self.net(inputs)), targets


def laplace(z):
    return torch.distributions.Laplace(z.tanh(), 0.5)


def normal(z):
    mean, raw = z.chunk(2, 1)
    return torch.distributions.Independent(torch.distributions.Normal(mean, F.softplus(raw) + 0.1), 1)


def information_of_normal(z, target):
    jacobian = torch.autograd.functional.jacobian(
        lambda z: torch.cat([z.chunk(2)[0], F.softplus(z.chunk(2)[1]) + 0.1]), z
    )
    deviation = F.softplus(z.chunk(2)[1]) + 0.1
    return jacobian.T @ torch.diag(torch.cat([1 / deviation**2, 2 / deviation**2])) @ jacobian


DISTRIBUTIONS = {
    "categorical": (lambda z: torch.distributions.Categorical(logits=z), classes(11), mlp(), of_cross_entropy),
    "normal": (normal, regression(), mlp(outputs=4), information_of_normal),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_that_the_module_names(name):
    distribution, data, net, information = DISTRIBUTIONS[name]
    module = Hooked(net, lambda z, y: -distribution(z).log_prob(y).mean())
    module.distribution = distribution
    matrix = product_of(module, data)
    expected = reference(matrix, information)
    found = dense(matrix)
    assert matrix.kind == "gauss-newton"
    close(found, expected, 1e-4)


def test_a_distribution_without_a_closed_form_is_sampled_and_stays_one_matrix():
    module = Hooked(mlp(outputs=2), lambda z, y: -laplace(z).log_prob(y).mean())
    module.distribution = laplace
    matrix = product_of(module, regression(), draws=2)
    found = dense(matrix)  # checks that it is symmetric
    assert matrix.kind == "sampled"
    assert torch.linalg.eigvalsh(found).min() > -1e-5 * found.abs().max()
    torch.testing.assert_close(dense(matrix), found)


class Unbatched(torch.autograd.Function):
    """An operation whose derivative looks at values, which cannot be done for many directions at once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos() if gradient.sum().item() is not None else None


def test_directions_are_taken_one_by_one_where_they_have_to():
    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    directions = torch.randn(4, 3)
    found, zeros = _batched_grad([Unbatched.apply(x)], [x, unused], [directions])
    torch.testing.assert_close(found, directions * x.detach().cos())
    assert zeros.shape == (4, 2)
    assert not zeros.any()


@pytest.mark.parametrize("positions", [1, 3])
def test_expand_is_the_adjoint_of_contract(positions):
    captured = BlockGradients(torch.randn(2, 4, positions, 3), torch.randn(2, 4, positions, 5))
    vectors, weights = torch.randn(6, 2, 5, 3), torch.randn(6, 4)
    left = (contract(captured, vectors) * weights).sum(1)
    torch.testing.assert_close(left, (vectors * expand(captured, weights)).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    tokens = BlockGradients(torch.randint(7, (1, 4, positions)), torch.randn(1, 4, positions, 5), 7)
    vectors = torch.randn(6, 1, 5, 7)
    left = (contract(tokens, vectors) * weights).sum(1)
    torch.testing.assert_close(left, (vectors * expand(tokens, weights)).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", test_losses.CASES)
@test_losses.ignore_broadcasting
def test_information_is_the_hessian_by_the_losses_input(name):
    """The Gauss-Newton matrix of a loss that is linear in its targets is its Hessian, however the input is made."""
    case = test_losses.CASES[name]
    z = case.output.clone().requires_grad_()
    expected = torch.autograd.functional.hessian(lambda z: case.torch(z, "sum"), case.output)
    check_information(case.read(z), z, expected.reshape(z.numel(), -1))


@pytest.mark.parametrize("name", test_more_losses.CASES)
@test_losses.ignore_broadcasting
def test_information_is_the_fisher_matrix_in_closed_form(name):
    case = test_more_losses.CASES[name]
    z = case.output[:1].clone().requires_grad_()
    positional, options = case.arguments(z, slice(1))
    call = read_call(case.function, tuple(positional), options | {"reduction": "sum"})
    expected = case.fisher(z.detach())
    check_information(call, z, expected.reshape(z.numel(), -1))


def check_information(call, z, expected):
    outputs = [o for o in call.outputs if o.requires_grad]
    rows = []
    for tangent in torch.eye(z.numel()).view(-1, *z.shape):
        duals = [torch.zeros_like(o, requires_grad=True) for o in outputs]
        (pulled,) = torch.autograd.grad(outputs, z, duals, create_graph=True)
        moved = iter(torch.autograd.grad(pulled, duals, tangent, retain_graph=True, allow_unused=True))
        tangents = []
        for o in call.outputs:
            found = next(moved) if o.requires_grad else None
            tangents.append((torch.zeros_like(o) if found is None else found).unsqueeze(0))
        products = call.information(call.curvature, tangents)
        used = [m.squeeze(0) for m, o in zip(products, call.outputs, strict=True) if o.requires_grad]
        (row,) = torch.autograd.grad(outputs, z, used, retain_graph=True)
        rows.append(row.flatten())
    torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
