"""Gradients and curvature of a small classifier as dense matrices, by autograd alone."""

import torch


def per_example(module, data, measure):
    """Gradients ``[B, D]`` of ``measure(outputs, targets)`` one example at a time, over all parameters."""
    rows = []
    for x, y in zip(*data, strict=True):
        value = measure(module.net(x.unsqueeze(0)), y.unsqueeze(0))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.net.parameters()))]))
    return torch.stack(rows).double()


def gauss_newton(module, inputs):
    """Of the mean cross entropy over inputs, ``[D, D]``."""
    total = 0
    for x in inputs:
        z = module.net(x.unsqueeze(0))[0]
        rows = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(value, list(module.net.parameters()), retain_graph=True)]
            )
            for value in z
        ]
        j, p = torch.stack(rows).double(), z.detach().softmax(0).double()
        total = total + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    return total / len(inputs)
