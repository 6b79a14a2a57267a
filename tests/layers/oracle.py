"""The gradients of a network's blocks against autograd on one example at a time: the one oracle of all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from checks import measured
from torch import Tensor, nn

from lightning_source.capture.coverage import Coverage, find_blocks
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.curvature.block_gradients import BlockGradients, contract, contract_diagonal, squared_norms
from lightning_source.curvature.ekfac import (
    Basis,
    CovarianceSums,
    eigenbasis,
    eigenvalue_sums,
    mean_covariances,
    rotated_matrices,
)
from lightning_source.names import clean_name

EXAMPLES = 4
# Share of an example's own gradient norm. Batched and single products sum float32 in another order, which costs about
# 1e-6 here; a wrong layout, a lost call or a missing position costs tens of percent.
TOLERANCE = 1e-4
Groups = Callable[[dict[str, nn.Parameter]], list[list[nn.Parameter]]]


class Net(L.LightningModule):
    """A loss that is a sum over examples, whatever the network puts out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        *inputs, targets = batch
        output = self.net(*inputs).flatten(1)
        return F.mse_loss(output, targets.expand_as(output), reduction="sum")


class Apply(nn.Module):
    """Modules and parameters under names, and any function of them."""

    def __init__(self, function: Callable[..., Tensor], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def floats(*shape: int) -> Tensor:
    return torch.randn(EXAMPLES, *shape)


def tokens(*shape: int, size: int = 11) -> Tensor:
    return torch.randint(size, (EXAMPLES, *shape))


def one_group(named: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    return [list(named.values())]


def biases_apart(named: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    return [[p for name, p in named.items() if name.endswith("bias") == apart] for apart in (False, True)]


def prepared(net: nn.Module, *inputs: Tensor) -> tuple[Net, tuple[Tensor, ...]]:
    """In eval mode, with running statistics and parameters that are not the initial ones and zeros; and a batch."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        net(*inputs)
    return Net(net).eval(), (*inputs, floats(1))


def covered(
    module: L.LightningModule,
    batch: tuple[Tensor, ...],
    groups: Groups = one_group,
    objective: Objective | None = None,
) -> Coverage:
    """What a probe of the batch leaves of the blocks."""
    blocks = find_blocks(module, groups(dict(module.named_parameters())))
    return probe(module, objective or Objective(module), blocks, batch, EXAMPLES)


def compare(
    net: nn.Module,
    *inputs: Tensor,
    names: list[str] | None = None,
    groups: Groups = one_group,
    share: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Coverage:
    """Every block against single examples, and every sum that factors take of it; gives back the coverage.

    Args:
        net: what is examined, made for the inputs.
        inputs: with the examples first.
        names: those of the blocks, in order.
        groups: the optimizer's parameter groups, from the parameters by name.
        share: at least this share of the parameters is covered.
        tolerance: share of an example's own gradient norm.
    """
    module, batch = prepared(net, *inputs)
    objective = Objective(module)
    coverage = covered(module, batch, groups, objective)
    assert coverage.share >= share, coverage.summary()
    assert names is None or [block.name for block in coverage.blocks] == names
    held = [name for block in coverage.blocks for name in block.parameters]
    assert len(held) == len(set(held))
    capture = GradientCapture(module, coverage.blocks)
    captured = capture.captured(objective.evaluate(batch, EXAMPLES, capture).each(), EXAMPLES)
    singles = [single(module, tuple(x[i : i + 1] for x in batch)) for i in range(EXAMPLES)]
    for block in coverage.blocks:
        expected = torch.stack([block.matrix(gradients) for gradients in singles])
        assert expected.shape == (EXAMPLES, *block.shape), block.name
        check(captured[block.name], expected, block.indexed, tolerance)
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    return coverage


def single(module: Net, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The gradients of one example by autograd, zeros where it has none."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(module.training_step(batch, 0), list(named.values()), allow_unused=True)
    return {
        clean_name(name): torch.zeros_like(p) if gradient is None else gradient.to_dense()
        for (name, p), gradient in zip(named.items(), gradients, strict=True)
    }


def check(found: BlockGradients, expected: Tensor, indexed: bool, tolerance: float) -> None:
    """``expected``: the examples' matrices ``[B, P, O, I]``."""
    shape = expected.shape[1:]
    norms = expected.flatten(1).norm(dim=1)
    largest = float(norms.max())
    assert largest > 0
    error = (found.per_example().transpose(0, 1) - expected).flatten(1).norm(dim=1)
    assert (error <= tolerance * norms + 1e-6 * largest).all(), error / norms
    measured((error / norms.clamp_min(1e-2 * largest)).max())
    close: dict[str, float] = {"rtol": 5 * tolerance, "atol": 5 * tolerance * largest**2}
    torch.testing.assert_close(squared_norms(found), norms**2, rtol=2 * tolerance, atol=1e-6 * largest**2)
    products = expected.flatten(1) @ expected.flatten(1).T
    torch.testing.assert_close(contract(found, expected), products, **close)
    weights = torch.rand(shape)
    diagonal = (weights * expected.square()).sum((1, 2, 3))
    torch.testing.assert_close(contract_diagonal(found, found, weights), diagonal, **close)
    basis = Basis(None, torch.linalg.qr(torch.randn(*shape[:2], shape[1]))[0])
    rotated = basis.gradients.mT @ expected
    torch.testing.assert_close(rotated_matrices(found, basis), rotated, **close)
    torch.testing.assert_close(eigenvalue_sums(found, basis), rotated.square().sum(0), **close)
    sums, zeros = CovarianceSums.of(found), CovarianceSums.zeros(shape, indexed, expected)
    for key in ("activations", "gradients"):
        assert getattr(sums, key).shape == getattr(zeros, key).shape
        assert not getattr(zeros, key).any()
    # The eigenbasis is a rotation: squared norms and products are what they were.
    basis, kronecker = eigenbasis(*mean_covariances([sums], [1.0]), torch.float32)
    eigenvalues = eigenvalue_sums(found, basis)
    assert kronecker.shape == eigenvalues.shape == shape
    assert kronecker.isfinite().all()
    torch.testing.assert_close(eigenvalues.sum(), expected.square().sum(), rtol=5 * tolerance, atol=0)
    torch.testing.assert_close(contract(basis.rotate(found), rotated_matrices(found, basis)), products, **close)
