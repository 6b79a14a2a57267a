"""The exact derivative of one training run with respect to its examples' weights, by unrolling it in reverse.

A run is ``state ← step(state, batch, weights)`` over recorded batches, every example's loss multiplied by a weight that
is 1. Removing example ``n`` from this very run (same initialisation, same batches, its place left empty) is weight 0 in
every step, so to first order it changes the measurement by ``-df/dw_n``. Nothing is stationary here and no curvature is
approximated; nor is there an expectation over runs.

Source: Maclaurin et al. 2015; Hara et al. 2019; Bae et al. 2024, section 3.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

State = tuple[Tensor, ...]  # [P] each; the parameters first


class Batch(NamedTuple):
    """What one optimizer step saw."""

    examples: Tensor  # [B], int64, positions in the training set
    learning_rate: float
    number: int  # of the step, from 1


Step = Callable[[State, Batch, Tensor], State]  # with the weights [B] of the batch's examples
ExampleLosses = Callable[[Tensor, Tensor], Tensor]  # parameters [P] and positions [B] to losses [B]


def batches(examples: Iterable[Tensor], learning_rates: float | Sequence[float]) -> list[Batch]:
    """Recorded steps.

    Args:
        examples: each step's positions in the training set.
        learning_rates: one, or one for each step (a schedule).

    Raises:
        ValueError: not as many rates as steps.
    """
    positions = list(examples)
    rates = [learning_rates] * len(positions) if isinstance(learning_rates, (int, float)) else list(learning_rates)
    if len(rates) != len(positions):
        raise ValueError(f"{len(rates)} learning rates for {len(positions)} steps.")
    return [Batch(x, float(rate), k) for k, (x, rate) in enumerate(zip(positions, rates, strict=True), 1)]


def sgd(
    losses: ExampleLosses,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Callable[[Tensor], State], Step]:
    """``torch.optim.SGD`` on the weighted mean loss ``(1/B) Σ w_i ℓ_i``.

    Args:
        losses: ``losses(parameters, positions)``, each example's own.
        momentum: ``β``.
        nesterov: look ahead.
        dampening: ``d``, of the gradient in the velocity.
        weight_decay: coupled.

    Returns:
        ``start(parameters)``, the state before the first step, and the step.
    """
    gradient = _weighted_gradient(losses, weight_decay)

    def start(parameters: Tensor) -> State:
        return (parameters, torch.zeros_like(parameters)) if momentum else (parameters,)

    def step(state: State, batch: Batch, weights: Tensor) -> State:
        change = gradient(state[0], batch, weights)
        if not momentum:
            return (state[0] - batch.learning_rate * change,)
        # The first velocity is the gradient itself, undamped.
        share = 1.0 if batch.number == 1 else 1 - dampening
        velocity = momentum * state[1] + share * change
        change = change + momentum * velocity if nesterov else velocity
        return state[0] - batch.learning_rate * change, velocity

    return start, step


def adam(
    losses: ExampleLosses,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> tuple[Callable[[Tensor], State], Step]:
    """``torch.optim.Adam`` on the weighted mean loss ``(1/B) Σ w_i ℓ_i``; with ``decoupled``, ``torch.optim.AdamW``.

    A parameter whose gradient has been exactly 0 so far gets derivative 0 through the root of its second moment, which
    has none there.

    Args:
        losses: ``losses(parameters, positions)``, each example's own.
        betas: decay of the moments.
        eps: added to the root.
        weight_decay: the decay.
        decoupled: it shrinks the parameters beside the update (AdamW), not through the gradient.

    Returns:
        ``start(parameters)``, the state before the first step, and the step.
    """
    gradient = _weighted_gradient(losses, 0.0 if decoupled else weight_decay)
    shrink = weight_decay if decoupled else 0.0

    def start(parameters: Tensor) -> State:
        return parameters, torch.zeros_like(parameters), torch.zeros_like(parameters)

    def step(state: State, batch: Batch, weights: Tensor) -> State:
        parameters, first, second = state
        change = gradient(parameters, batch, weights)
        first = betas[0] * first + (1 - betas[0]) * change
        second = betas[1] * second + (1 - betas[1]) * change.square()
        positive = second > 0
        root = torch.where(positive, torch.where(positive, second, 1.0).sqrt(), 0.0)
        root = root / (1 - betas[1] ** batch.number) ** 0.5
        update = first / (1 - betas[0] ** batch.number) / (root + eps)
        return parameters * (1 - batch.learning_rate * shrink) - batch.learning_rate * update, first, second

    return start, step


def run(step: Step, state: State, steps: Sequence[Batch], weights: Tensor | None = None) -> State:
    """The state after all steps.

    Args:
        step: of :func:`sgd`, :func:`adam`, or the user's own.
        state: before the first.
        steps: the recorded batches.
        weights: ``[N]``, of the training examples; all 1 by default.
    """
    for batch in steps:
        state = step(state, batch, _ones(state, batch) if weights is None else weights[batch.examples])
    return state


def unrolled_scores(
    step: Step,
    state: State,
    steps: Sequence[Batch],
    query_gradients: Callable[[Tensor], Tensor],
    examples: int,
    *,
    checkpoint_every: int | None = None,
    queries_at_once: int | None = None,
) -> Tensor:
    """Exact scores of one run, ``-df/dw`` by the adjoint of its steps.

    The run is made forwards once, keeping a state every ``√T`` steps, and again from each of them on the way back: time
    is two runs and a Hessian-vector product for each step and query, memory ``O(√T)`` states and a cotangent a query.

    Args:
        step: a pure, deterministic function of state, batch and weights; differentiable by ``torch.func``.
        state: before the first step.
        steps: the recorded batches.
        query_gradients: from the final parameters ``[P]`` to the measurements' gradients ``[Q, P]``.
        examples: ``N``.
        checkpoint_every: steps between kept states, for another trade of memory for nothing.
        queries_at_once: bounds the memory of the reverse pass; default: all.

    Returns:
        ``[Q, N]``. Positive = removing the example raises the measurement; learning rates and 1/B included. Examples
        that no batch held have 0.
    """
    every = checkpoint_every or max(1, round(len(steps) ** 0.5))
    starts = range(0, len(steps), every)
    kept = []
    for first in starts:
        kept.append(state)
        state = run(step, state, steps[first : first + every])
    gradients = query_gradients(state[0])
    cotangents: State = (gradients, *(torch.zeros_like(gradients) for _ in state[1:]))
    scores = gradients.new_zeros(len(gradients), examples)
    for first, here in zip(reversed(starts), reversed(kept), strict=True):
        block, states = steps[first : first + every], [here]
        for batch in block[:-1]:
            states.append(step(states[-1], batch, _ones(state, batch)))
        for batch in reversed(block):
            pull = vjp(lambda s, w, batch=batch: step(s, batch, w), states.pop(), _ones(state, batch))[1]
            cotangents, of_weights = vmap(pull, chunk_size=queries_at_once)(cotangents)
            scores.index_add_(1, batch.examples, of_weights, alpha=-1)
    return scores


def _ones(state: State, batch: Batch) -> Tensor:
    return state[0].new_ones(len(batch.examples))


def _weighted_gradient(losses: ExampleLosses, weight_decay: float) -> Callable[[Tensor, Batch, Tensor], Tensor]:
    def mean_loss(parameters: Tensor, batch: Batch, weights: Tensor) -> Tensor:
        # The divisor stays the batch's size: weight 0 leaves an example's place empty, as the run had it.
        return (weights * losses(parameters, batch.examples)).sum() / len(batch.examples)

    def gradient(parameters: Tensor, batch: Batch, weights: Tensor) -> Tensor:
        of_loss: Tensor = grad(mean_loss)(parameters, batch, weights)
        return of_loss + weight_decay * parameters if weight_decay else of_loss

    return gradient
