"""SOURCE with dense Gauss-Newton matrices, for tests and studies of a few thousand parameters.

Parameters are one flat vector here, so that a curvature is a matrix. Nothing is approximated but what SOURCE itself
approximates (stationary segments): against it stands the error of EK-FAC, and against :mod:`unrolled` that of SOURCE.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from lightning_source.curvature.unroll import segment_decay, segment_response

Network = Callable[[Tensor, Tensor], Tensor]  # parameters [P] and inputs [B, ...] to outputs [B, ...]
Loss = Callable[[Tensor, Tensor], Tensor]  # one example's output and target to its loss, a scalar


def flat_network(module: nn.Module) -> tuple[Tensor, Network]:
    """A module's trainable parameters as one vector, and the module as a function of such a vector.

    Frozen parameters and buffers stay as they are in the module, and so does its mode: layers that are random or change
    buffers (dropout, batch normalisation in training) have no place in an exact reference.

    Returns:
        ``[P]``, in the order of ``named_parameters``, and ``network(vector, inputs)``.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    vector = torch.cat([p.detach().flatten() for p in named.values()])
    sizes = [p.numel() for p in named.values()]

    def network(parameters: Tensor, inputs: Tensor) -> Tensor:
        pieces = parameters.split(sizes)
        shaped = {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        return functional_call(module, shaped, (inputs,))

    return vector, network


def example_gradients(network: Network, loss: Loss, parameters: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradient of each example's loss, ``[B, P]``.

    Args:
        network: of :func:`flat_network`.
        loss: of one example.
        parameters: ``[P]``.
        inputs: ``[B, ...]``.
        targets: ``[B, ...]``.
    """

    def example_loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss(network(vector, x[None])[0], y)

    gradients: Tensor = vmap(grad(example_loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    return gradients


def gauss_newton(
    network: Network, loss: Loss, parameters: Tensor, inputs: Tensor, targets: Tensor, chunk: int = 64
) -> Tensor:
    """Generalised Gauss-Newton matrix of the mean loss, ``(1/B) Σ JᵀΛJ``, ``[P, P]``.

    ``J`` is the Jacobian of an example's outputs and ``Λ`` the Hessian of its loss in them. For cross entropy and
    squared error this is the Fisher matrix with labels drawn from the model.

    Args:
        network: of :func:`flat_network`.
        loss: of one example, convex in the output.
        parameters: ``[P]``.
        inputs: ``[B, ...]``.
        targets: ``[B, ...]``.
        chunk: examples whose Jacobians are held at once.
    """

    def example_curvature(vector: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        def outputs(v: Tensor) -> Tensor:
            return network(v, x[None])[0]

        jacobian = jacrev(outputs)(vector)
        output = outputs(vector)
        curvature = torch.func.hessian(loss)(output, y)
        return jacobian.flatten(0, -2), curvature.reshape(output.numel(), output.numel())

    total = parameters.new_zeros(len(parameters), len(parameters))
    for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
        jacobians, curvatures = vmap(example_curvature, in_dims=(None, 0, 0))(parameters, x, y)
        total += jacobians.flatten(0, 1).T @ (curvatures @ jacobians).flatten(0, 1)
    return total / len(inputs)


class DenseSegment(NamedTuple):
    """One stationary segment of training, with its curvature as a matrix."""

    curvature: Tensor  # H [P, P], of the mean loss as trained
    gradients: Tensor  # g [N, P], of each example's loss
    rate: float  # Λ, sum of effective learning rates over the segment's steps
    weight_decay: float = 0.0  # w
    # P̄ [P] > 0, the diagonal that multiplies gradient and decay (Adam; a group's own learning rate over ``rate``).
    preconditioner: Tensor | None = None
    decoupled: bool = False  # the decay is not preconditioned


def dense_segment(
    network: Network,
    loss: Loss,
    snapshots: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    rate: float,
    weight_decay: float = 0.0,
) -> DenseSegment:
    """A segment's Gauss-Newton matrix and gradients, averaged over its snapshots (Bae et al. 2024, Eq. 20).

    Args:
        network: of :func:`flat_network`.
        loss: of one example.
        snapshots: parameter vectors ``[P]``.
        inputs: ``[N, ...]``, the training set.
        targets: ``[N, ...]``.
        rate: ``Λ``.
        weight_decay: ``w``.
    """
    curvatures = [gauss_newton(network, loss, vector, inputs, targets) for vector in snapshots]
    gradients = [example_gradients(network, loss, vector, inputs, targets) for vector in snapshots]
    return DenseSegment(
        torch.stack(curvatures).mean(0), torch.stack(gradients).mean(0), rate, weight_decay=weight_decay
    )


def dense_source(query_gradients: Tensor, segments: Sequence[DenseSegment]) -> Tensor:
    """SOURCE's scores by eigendecomposition of the segments' matrices (Bae et al. 2024, Eq. 15-24 and 39-43).

    With a preconditioner ``P`` the operators are ``S = P^½ exp(-Λ M) P^-½`` and ``r = (1/N) P^½ F_r(M) P^½ g`` where
    ``M = P^½ H P^½``; the walk from the query's side needs ``Sᵀ``.

    Args:
        query_gradients: ``[Q, P]``, the measurement's gradients at the end of training.
        segments: in the order of training, of the same examples.

    Returns:
        ``[S, Q, N]``, the segments' shares; their sum is the score. Positive = removing the example raises the
        measurement; 1/N and learning rates included.
    """
    vectors, shares = query_gradients, []
    for segment in reversed(segments):
        decay = segment.weight_decay
        scale = torch.ones_like(vectors[0]) if segment.preconditioner is None else segment.preconditioner.sqrt()
        matrix = scale[:, None] * segment.curvature * scale
        if not segment.decoupled:  # inside the preconditioner, where the decay is no multiple of the identity
            matrix, decay = matrix + torch.diag(decay * scale.square()), 0.0
        values, basis = torch.linalg.eigh(matrix)
        rotated = (vectors * scale) @ basis
        response = (rotated * segment_response(values, segment.rate, decay)) @ basis.T * scale
        shares.append(response @ segment.gradients.T / len(segment.gradients))
        carried = (rotated * segment_decay(values, segment.rate, decay)) @ basis.T
        vectors = torch.where(scale > 0, carried / torch.where(scale > 0, scale, 1.0), vectors)
    return torch.stack(shares[::-1])
