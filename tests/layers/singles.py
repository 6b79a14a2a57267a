"""BlockGradients gradients of a whole module against autograd on one example at a time."""

import lightning as L
import torch
import torch.nn.functional as F
from checks import measured
from torch import nn

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.layer_gradients import GradientCapture
from lightning_source.capture.objective import Objective
from lightning_source.capture.probe import probe
from lightning_source.curvature.block_gradients import contract, contract_diagonal, squared_norms
from lightning_source.curvature.ekfac import Basis, CovarianceSums, eigenvalue_sums, rotated_matrices
from lightning_source.names import clean_name

EXAMPLES = 4
# Share of an example's own gradient norm. Batched and single products sum float32 in another order, which costs about
# 1e-6 here; a wrong layout, a lost call or a missing position costs tens of percent.
TOLERANCE = 1e-4


class Net(L.LightningModule):
    """A loss that is a sum over examples, whatever the network puts out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        *inputs, targets = batch
        output = self.net(*inputs).flatten(1)
        return F.mse_loss(output, targets.expand_as(output), reduction="sum")


class Apply(nn.Module):
    """Modules and parameters under names, and any function of them."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def floats(*shape):
    return torch.randn(EXAMPLES, *shape)


def tokens(*shape, size=11):
    return torch.randint(size, (EXAMPLES, *shape))


def compare(net, *inputs, groups=None, share=1.0):
    """Every block against single examples, and every sum that factors take of it; gives back the coverage."""
    module = (net if isinstance(net, L.LightningModule) else Net(net)).eval()
    batch = (*inputs, torch.randn(EXAMPLES, 1))
    objective = Objective(module)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = find_blocks(module, [list(named.values())] if groups is None else groups(named))
    coverage = probe(module, objective, found, batch, EXAMPLES)
    assert coverage.share >= share, coverage.summary()
    held = [name for block in coverage.blocks for name in block.parameters]
    assert len(held) == len(set(held))
    recording = GradientCapture(module, coverage.blocks)
    captured = recording.captured(objective.evaluate(batch, EXAMPLES, recording).each(), EXAMPLES)
    singles = []
    for i in range(EXAMPLES):
        loss = module.training_step(tuple(x[i : i + 1] for x in batch), 0)
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        singles.append(
            {
                clean_name(n): torch.zeros_like(p) if g is None else g.to_dense()
                for (n, p), g in zip(named.items(), gradients, strict=True)
            }
        )
    for block in coverage.blocks:
        check(captured[block.name], torch.stack([block.matrix(one) for one in singles]), block)
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    return coverage


def check(one, expected, block):
    """``expected``: the examples' matrices ``[B, P, O, I]``."""
    assert expected.shape == (EXAMPLES, *block.shape)
    norms = expected.flatten(1).norm(dim=1)
    assert (norms > 0).any(), block.name
    bound = TOLERANCE * norms + 1e-6 * norms.max()
    error = (one.per_example().transpose(0, 1) - expected).flatten(1).norm(dim=1)
    assert (error <= bound).all(), (block.name, error / norms)
    measured((error / norms.clamp_min(1e-2 * norms.max())).max())
    close = {"rtol": 10 * TOLERANCE, "atol": float(10 * TOLERANCE * norms.max() ** 2)}
    torch.testing.assert_close(squared_norms(one), norms**2, **close)
    products = expected.flatten(1) @ expected.flatten(1).T
    torch.testing.assert_close(contract(one, expected), products, **close)
    basis = Basis(None, torch.linalg.qr(torch.randn(*block.shape[:2], block.shape[1]))[0])
    rotated = basis.gradients.mT @ expected
    torch.testing.assert_close(rotated_matrices(one, basis), rotated, **close)
    torch.testing.assert_close(eigenvalue_sums(one, basis), rotated.square().sum(0), **close)
    weights = torch.rand(block.shape)
    torch.testing.assert_close(
        contract_diagonal(one, one, weights), (weights * expected.square()).sum((1, 2, 3)), **close
    )
    sums, zeros = CovarianceSums.of(one), CovarianceSums.zeros(block.shape, block.indexed, expected)
    for key in ("activations", "gradients"):
        assert getattr(sums, key).shape == getattr(zeros, key).shape
        assert torch.isfinite(getattr(sums, key)).all()
        assert not getattr(zeros, key).any()
