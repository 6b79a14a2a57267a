"""Many runs at once, as copies of the parameters stacked along a first dimension that ``torch.func`` maps over.

An optimizer that works element by element trains stacked parameters as it would train each copy. Before a run one step
is checked against the plain loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_source.capture.objective import Objective
from lightning_source.evaluation.further_runs.elements import NotStackable, elements_of, measured
from lightning_source.evaluation.further_runs.plain import PlainRuns
from lightning_source.evaluation.further_runs.recipe import ExampleLoss, Pair, Recipe, Trace, unchanged

# What keeps one number of state for each parameter and mixes none.
ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)
# Share of a loss by which two computations of it may differ: float32 sums in another order.
TOLERANCE = 1e-4


class StackedRuns:
    """Many runs at once, in eval mode.

    Args:
        recipe: how training goes on.
        plain: the plain loop, against which one step is checked.

    Raises:
        NotStackable: the runs cannot be stacked; the message says why.
    """

    def __init__(self, recipe: Recipe, plain: PlainRuns) -> None:
        self.recipe = recipe
        self.start = plain.start
        self._step = _Call(recipe.module)
        self._example_losses: ExampleLoss = recipe.loss or elements_of(Objective(recipe.module))
        self._ratio = 1.0
        _check(recipe)
        with unchanged(recipe.module):
            self._data = _all_examples(recipe)
            self._queries = recipe.query_batches()
            try:
                self._compare(plain)
            except NotStackable:
                raise
            except Exception as error:  # whatever user code does under vmap
                raise NotStackable(f"the loss cannot be mapped over copies ({type(error).__name__}: {error})") from None

    def run(self, pairs: Sequence[Pair]) -> Trace:
        """Measurements and distances of these runs."""
        recipe = self.recipe
        measurements, distances = [], []
        with unchanged(recipe.module):
            own = recipe.trained()
            start = {name: p.detach() for name, p in own.items()}
            copies = {
                name: p.expand(len(pairs), *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
                for name, p in start.items()
            }
            optimizer = recipe.new_optimizer({id(own[name]): copy for name, copy in copies.items()})
            points = torch.tensor([-1 if point is None else point for point, _ in pairs])
            for epoch in zip(*map(recipe.order, pairs), strict=True):
                for batches in zip(*epoch, strict=True):
                    loss = self._loss(copies, *self._rows(batches, points))
                    gradients = torch.autograd.grad(loss, list(copies.values()), allow_unused=True)
                    for copy, gradient in zip(copies.values(), gradients, strict=True):
                        copy.grad = gradient
                    optimizer.step()
                measurements.append(self._measure(copies))
                squares = [
                    (copy.detach() - start[name]).double().square().flatten(1).sum(1) for name, copy in copies.items()
                ]
                distances.append(torch.stack(squares).sum(0).sqrt().cpu())
        return Trace(torch.stack(measurements), torch.stack(distances))

    def _rows(self, batches: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
        """Ids ``[C, W]`` of what a step looks at, and the weight of each in the step's loss.

        Under ``"downweight"`` the left-out example comes last, with its ``-1/N``.
        """
        ids = nn.utils.rnn.pad_sequence(list(batches), batch_first=True, padding_value=-2)
        sizes = torch.tensor([len(b) for b in batches], dtype=torch.float64)
        weights = (ids >= 0) / sizes[:, None]
        if self.recipe.removal == "mask":
            weights = weights * (ids != points[:, None])
        elif self.recipe.removal == "downweight":
            ids = torch.cat([ids, points[:, None]], 1)
            own = (points >= 0).double() / -len(self.recipe.data)
            weights = torch.cat([weights, own[:, None]], 1)
        device = self.recipe.module.device
        return ids.clamp_min(0).to(device), weights.to(device)

    def _loss(self, copies: dict[str, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        batch = apply_to_collection(self._data, Tensor, lambda values: values[ids])
        losses = vmap(lambda parameters, rows: self._step.at(parameters, self._example_losses, rows))(copies, batch)
        # A sum over copies: no copy's gradient knows of another.
        return self._ratio * (weights.to(losses.dtype) * losses).sum()

    @torch.no_grad()
    def _measure(self, copies: dict[str, Tensor]) -> Tensor:
        by_batch = []
        for size, batch in self._queries:
            measure = measured(self.recipe, self._example_losses, size)
            values = vmap(lambda parameters, b=batch, m=measure: self._step.at(parameters, m, b))(copies)
            scale = self._ratio if self.recipe.measurement == "loss" else 1.0
            by_batch.append(scale * values.T.cpu())
        return torch.cat(by_batch)

    def _compare(self, plain: PlainRuns) -> None:
        """Losses of every batch, one step's gradient and the measurements must be those of the plain loop."""
        recipe = self.recipe
        own = recipe.trained()
        for first, ids in enumerate(torch.arange(len(recipe.data)).split(recipe.batch_size)):
            loss = plain.loss.batch(recipe.fetch(ids), len(ids), None)
            mean = self._example_losses(recipe.module, recipe.fetch(ids)).mean()
            if not first:
                self._ratio = float((loss / mean).detach())
            if not _close(self._ratio * mean, loss):
                raise NotStackable("`training_step` is not the mean of one loss's elements, weighted alike")
        point = recipe.fetch(torch.tensor([0]))
        single = plain.loss.single(point)
        if not _close(self._ratio * self._example_losses(recipe.module, point).sum(), single):
            raise NotStackable("an example's own loss is not its part of the step's loss")
        ids = torch.arange(min(recipe.batch_size, len(recipe.data)))
        copies = {n: p.detach().expand(2, *p.shape).clone().requires_grad_() for n, p in own.items()}
        loss = self._loss(copies, *self._rows([ids, ids], torch.tensor([-1, -1])))
        stacked = torch.autograd.grad(loss, list(copies.values()), allow_unused=True)
        alone = torch.autograd.grad(
            plain.loss.batch(recipe.fetch(ids), len(ids), None), list(own.values()), allow_unused=True
        )
        for of_copies, gradient in zip(stacked, alone, strict=True):
            if (of_copies is None) != (gradient is None) or (
                gradient is not None and not _close(of_copies[1], gradient)
            ):
                raise NotStackable("the gradient of stacked copies differs from that of the plain loop")
        if not _close(self._measure(copies)[:, 1], plain.start):
            raise NotStackable("the measurement of stacked copies differs from that of the plain loop")


def _check(recipe: Recipe) -> None:
    if recipe.mode != "eval":
        raise NotStackable("copies in train mode would not draw what single runs draw")
    if type(recipe.optimizer) not in ELEMENTWISE:
        raise NotStackable(f"`{type(recipe.optimizer).__name__}` may not work element by element")
    if recipe.removal == "shift" and (len(recipe.data) - 1) % recipe.batch_size == 0:
        raise NotStackable("with an example deleted an epoch has one batch less")


def _all_examples(recipe: Recipe) -> object:
    """The whole training set as one batch, if any of its examples is a row of it."""
    everything = recipe.fetch(torch.arange(len(recipe.data)))
    tensors: list[Tensor] = []
    apply_to_collection(everything, Tensor, tensors.append)
    some = torch.arange(len(recipe.data)).flip(0)[: recipe.batch_size]
    again: list[Tensor] = []
    apply_to_collection(recipe.fetch(some), Tensor, again.append)
    for values, part in zip(tensors, again, strict=True):
        if not values.dim() or len(values) != len(recipe.data) or not torch.equal(values[some.to(values.device)], part):
            raise NotStackable("examples are not rows of a tensor, or are drawn anew each time")
    return everything


class _Call(nn.Module):
    """A function of a module and a batch, as a forward that ``functional_call`` can give other parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: ExampleLoss, batch: object) -> Tensor:
        return function(self.module, batch)

    def at(self, parameters: dict[str, Tensor], function: ExampleLoss, batch: object) -> Tensor:
        """The function's value with these parameters in the module."""
        named = {f"module.{name}": value for name, value in parameters.items()}
        values: Tensor = functional_call(self, named, (function, batch))
        return values


def _close(values: Tensor, expected: Tensor) -> bool:
    return float((values - expected).detach().norm()) <= TOLERANCE * float(expected.detach().norm()) + 1e-12
