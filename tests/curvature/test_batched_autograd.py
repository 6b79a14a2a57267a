"""Many derivatives at once: the same numbers batched or one after another, and the user's errors come through."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.func import grad

from lightning_source.curvature.batched_autograd import batched_gradients, batched_rows


class Cube(torch.autograd.Function):
    """``x³`` whose backward has no batching rule, since NumPy takes no batched tensor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy())


class Broken(torch.autograd.Function):
    """A backward with an error of its own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        if gradient.dim():
            raise RuntimeError("the user's own error")
        return gradient


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("cube", [lambda x: x**3, Cube.apply], ids=["batched", "one by one"])
def test_gradients_are_those_of_single_backwards(cube) -> None:
    x, y, unused = (vectors(3).requires_grad_() for _ in range(3))
    outputs = [cube(x) * y.sum(), y.square().sum()]
    directions = [vectors(5, 3), vectors(5)]
    of_x, of_y, of_unused = batched_gradients(outputs, [x, y, unused], directions)
    assert of_unused is None
    for row in range(5):
        expected = torch.autograd.grad(outputs, [x, y], [d[row] for d in directions], retain_graph=True)
        torch.testing.assert_close((of_x[row], of_y[row]), expected)


def test_sparse_gradients_come_dense() -> None:
    table = vectors(4, 2).requires_grad_()
    rows = torch.nn.functional.embedding(torch.tensor([1, 3]), table, sparse=True)
    (gradient,) = batched_gradients([rows], [table], [torch.eye(4, dtype=torch.float64).view(4, 2, 2)])
    assert gradient.shape == (4, 4, 2)
    assert gradient.nonzero()[:, 1:].tolist() == [[1, 0], [1, 1], [3, 0], [3, 1]]


def test_an_operation_without_a_batching_rule_does_not_warn() -> None:
    x = vectors(3).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched_gradients([Cube.apply(x)], [x], [vectors(5, 3)])


def test_the_error_is_that_of_the_code_run_by_itself() -> None:
    x = vectors(3).requires_grad_()
    with pytest.raises(RuntimeError, match="the user's own error") as caught:
        batched_gradients([Broken.apply(x)], [x], [vectors(5, 3)])
    assert caught.value.__context__ is None


def one_at_a_time(x: Tensor) -> Tensor:
    return x.square().sum() * (1.0 if float(x.detach().sum()) > 0 else -1.0)  # no vmap over a branch


@pytest.mark.parametrize("function", [lambda x: x.square().sum(), one_at_a_time], ids=["batched", "one by one"])
def test_rows_are_those_of_single_calls(function) -> None:
    rows = vectors(6, 3)
    expected = torch.stack([grad(function)(row) for row in rows])
    assert torch.equal(batched_rows(grad(function), rows), expected)


def test_an_error_that_is_no_runtime_error_is_raised_at_once() -> None:
    calls = []

    def refuse(row: Tensor) -> Tensor:
        calls.append(row)
        raise ValueError("not this row")

    with pytest.raises(ValueError, match="not this row"):
        batched_rows(refuse, vectors(6, 3))
    assert len(calls) == 1
