"""Gradients of sampled labels against the Fisher matrix that they estimate."""

import math
from typing import Any

import torch
from checks import measured
from torch import Tensor

DRAWS = 20_000


def check_second_moment(call: Any, output: Tensor, fisher: Tensor) -> None:
    """Over all elements at once, so elements that are not drawn independently fail too.

    The estimate over ``DRAWS`` draws must lie within 5 of its own standard errors, which are about 1 % of the matrix;
    where the draws have no variance (a sign squared), within float32, or a quadrature's 1e-4.

    Args:
        call: the loss as it was read, of a batch that is repeated ``DRAWS`` times.
        output: what the loss is of, which needs a gradient, ``[DRAWS · N, ...]``.
        fisher: of the batch, ``[D, D]`` over all of its coordinates.
    """
    sampled = (call.curvature.sqrt() * call.sample(torch.Generator().manual_seed(0))).sum()
    gradient = torch.autograd.grad(sampled, output)[0].reshape(DRAWS, -1)
    products = gradient.unsqueeze(1) * gradient.unsqueeze(2)
    largest = fisher.abs().max()
    error = 5 * products.std(0) / math.sqrt(DRAWS) + 1e-4 * largest
    assert (error < 0.1 * largest).all()
    assert ((products.mean(0) - fisher).abs() <= error).all()
    measured((products.mean(0) - fisher).abs().max() / largest)
