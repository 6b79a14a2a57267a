"""Retrains hundreds of small MLPs at once, as one batch of matrices: ground truth for the digit studies.

Every optimizer that works element by element trains the stacked parameters as it would train each copy alone.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (64, 64, 32, 10)
Parameters = list[Tensor]  # weights [M, O, I] and biases [M, 1, O] in turn


def initial(copies: int, generator: torch.Generator, widths: Sequence[int] = WIDTHS) -> Parameters:
    """``nn.Linear``'s default initialisation, drawn anew for each copy."""
    parameters = []
    for fan_in, fan_out in pairwise(widths):
        bound = fan_in**-0.5
        parameters.append((2 * torch.rand(copies, fan_out, fan_in, generator=generator) - 1) * bound)
        parameters.append((2 * torch.rand(copies, 1, fan_out, generator=generator) - 1) * bound)
    return [p.requires_grad_() for p in parameters]


def logits(parameters: Parameters, inputs: Tensor) -> Tensor:
    """``[M, B, I]`` to ``[M, B, classes]``."""
    for index in range(0, len(parameters), 2):
        inputs = torch.baddbmm(parameters[index + 1], inputs, parameters[index].mT)
        if index + 2 < len(parameters):
            inputs = inputs.relu()
    return inputs


def train_stage(
    parameters: Parameters,
    inputs: Tensor,
    labels: Tensor,
    kept: Tensor,
    optimizer: Callable[[Parameters], torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Train each copy on its own examples in its own order, partial batches dropped.

    Args:
        parameters: trained in place.
        inputs: ``[N, I]``.
        labels: ``[N]``.
        kept: ``[M, K]``, the examples of each copy.
        optimizer: makes an element-wise optimizer.
        epochs: passes over each copy's examples.
        batch_size: examples a step.
        generator: draws the orders.
    """
    stepper = optimizer(parameters)
    copies, size = kept.shape
    for _ in range(epochs):
        order = kept.gather(1, torch.rand(copies, size, generator=generator).argsort(1))
        for step in range(size // batch_size):
            chosen = order[:, step * batch_size : (step + 1) * batch_size]
            output = logits(parameters, inputs[chosen])
            # A sum over copies of each copy's mean: no copy's gradient knows of another.
            loss = F.cross_entropy(output.flatten(0, 1), labels[chosen].flatten(), reduction="sum") / batch_size
            stepper.zero_grad()
            loss.backward()
            stepper.step()


@torch.no_grad()
def margins(parameters: Parameters, inputs: Tensor, labels: Tensor) -> Tensor:
    """``log p - log(1 - p)`` of the true class, ``[M, Q]``."""
    output = logits(parameters, inputs.expand(len(parameters[0]), -1, -1))
    target = labels.expand(output.shape[:2]).unsqueeze(-1)
    rest = output.scatter(-1, target, -torch.inf).logsumexp(-1)
    return output.gather(-1, target).squeeze(-1) - rest


def half_subsets(count: int, examples: int, generator: torch.Generator) -> Tensor:
    """``[count, examples]`` of 0 and 1, half of them 1."""
    ranks = torch.rand(count, examples, generator=generator).argsort(1).argsort(1)
    return (ranks < examples // 2).to(torch.uint8)
