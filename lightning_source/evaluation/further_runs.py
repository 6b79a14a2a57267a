"""Trains a model further from where it is, on all examples or on all but one, under the same randomness.

:class:`PlainRuns` runs the user's ``training_step`` one run after the other. :class:`StackedRuns` runs many at once, as
copies stacked along a first dimension that ``torch.func`` maps over; an optimizer that works element by element trains
stacked parameters as it would train each copy. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_source.capture.coverage import find_blocks
from lightning_source.capture.data import Examples, GivenBatches, to_module
from lightning_source.capture.isolation import undisturbed
from lightning_source.capture.losses import LossCall, read_call, unreduced
from lightning_source.capture.objective import Losses, Measurement, Objective
from lightning_source.passes.calibration import calibrate
from lightning_source.passes.workspace import Workspace

Removal = Literal["downweight", "mask", "shift"]
ExampleLoss = Callable[[Any, Any], Tensor]  # (module, batch) -> [B], of which a training step takes the mean
Pair = tuple[int | None, int]  # the left-out example (None: all are there) and the seed of a run
# What keeps one number of state for each parameter and mixes none.
ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)
# Share of a loss by which two computations of it may differ: float32 sums in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """How training goes on.

    Attributes:
        module: the LightningModule, with the parameters to start from; they come back unchanged.
        data: its training examples.
        queries: what is measured after every epoch.
        optimizer: over the module's parameters; each run takes a new one like it.
        epochs: of further training.
        batch_size: of further training; the last, short batch of an epoch is kept.
        removal: how an example is left out.
        mode: ``"eval"`` or ``"train"``, the mode of the module while it trains.
        measurement: name or callable, what a query is measured by.
        loss: per-example losses of which a step takes the mean; ``None`` for the module's ``training_step``.
        hooks: the LightningDataModule, if it transforms batches.
    """

    module: Any
    data: Examples
    queries: Examples | GivenBatches
    optimizer: Optimizer
    epochs: int
    batch_size: int
    removal: Removal
    mode: Literal["eval", "train"]
    measurement: str | Measurement
    loss: ExampleLoss | None = None
    hooks: Any = None

    def order(self, pair: Pair) -> Iterator[list[Tensor]]:
        """The batches of each epoch, as ids. The seed alone draws the order; ``"shift"`` then deletes the example."""
        point, seed = pair
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            ids = torch.randperm(len(self.data), generator=generator)
            if self.removal == "shift" and point is not None:
                ids = ids[ids != point]
            yield list(ids.split(self.batch_size))

    def new_optimizer(self, like: dict[int, Tensor]) -> Optimizer:
        """A fresh optimizer of the same kind and groups over other tensors, given by ``id`` of the module's own."""
        groups: list[dict[str, Any]] = []
        for group in self.optimizer.param_groups:
            tensors = [like[id(p)] for p in group["params"] if id(p) in like]
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": tensors})
        kind: Any = type(self.optimizer)
        return kind(groups)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer moves, by name."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad and id(p) in held}

    def fetch(self, ids: Tensor) -> Any:
        """These training examples as one batch on the module's device."""
        batches = replace(self.data, batch_size=len(ids), workers=0).batches(ids)
        return to_module(next(batches)[1], self.module, self.hooks)

    def query_batches(self) -> list[tuple[int, Any]]:
        """Number of queries and batch, on the module's device."""
        return [(len(ids), to_module(batch, self.module, self.hooks)) for ids, batch in self.queries.batches()]


@dataclass(frozen=True)
class Trace:
    """What was measured along runs.

    Attributes:
        measurements: ``[E, Q, C]``, after every epoch.
        distances: ``[E, C]``, Euclidean distance of the trained parameters from where they started.
    """

    measurements: Tensor
    distances: Tensor


class PlainRuns:
    """One run after the other, in the module itself.

    Args:
        recipe: how training goes on.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.loss = _GivenLoss(recipe) if recipe.loss is not None else _StepLoss(recipe)
        if (
            isinstance(self.loss, _StepLoss)
            and self.loss.spec.origin == "whole"
            and isinstance(recipe.queries, Examples)
        ):
            recipe = replace(recipe, queries=replace(recipe.queries, batch_size=1))  # a loss as a whole tells no others
        self._queries = recipe.query_batches()
        with _kept(recipe.module):
            self.start = self._measure()

    def run(self, pairs: Sequence[Pair]) -> Trace:
        """Measurements and distances of these runs."""
        found = [self._run(pair) for pair in pairs]
        return Trace(torch.stack([m for m, _ in found], 2), torch.stack([d for _, d in found], 1))

    def _run(self, pair: Pair) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        point, seed = pair
        measurements, distances = [], []
        with _kept(recipe.module, seed):
            parameters = recipe.trained()
            start = {name: p.detach().clone() for name, p in parameters.items()}
            optimizer = recipe.new_optimizer({id(p): p for p in parameters.values()})
            for batches in recipe.order(pair):
                if recipe.mode == "train":
                    recipe.module.train()
                for ids in batches:
                    gradients = torch.autograd.grad(
                        self._loss_of(ids, point), list(parameters.values()), allow_unused=True
                    )
                    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                measurements.append(self._measure())
                squares = [(p.detach() - start[name]).double().square().sum() for name, p in parameters.items()]
                distances.append(torch.stack(squares).sum().sqrt().cpu())
            optimizer.zero_grad()
        return torch.stack(measurements), torch.stack(distances)

    def _loss_of(self, ids: Tensor, point: int | None) -> Tensor:
        recipe = self.recipe
        masked = recipe.removal == "mask" and point is not None and point in ids
        loss = self.loss.batch(recipe.fetch(ids), len(ids), ids.tolist().index(point) if masked else None)
        if recipe.removal != "downweight" or point is None:
            return loss
        # What this pass draws must not move the draws of the batches.
        with torch.random.fork_rng(devices=[recipe.module.device] if recipe.module.device.type == "cuda" else []):
            own = self.loss.single(recipe.fetch(torch.tensor([point])))
        return loss - own / len(recipe.data)

    @torch.no_grad()
    def _measure(self) -> Tensor:
        for child in self.recipe.module.modules():
            child.training = False
        found = [self.loss.measure(batch, size).detach().cpu() for size, batch in self._queries]
        for values, (size, _) in zip(found, self._queries, strict=True):
            if values.shape != (size,):
                raise MisconfigurationException(
                    f"a batch of {size} queries was measured by a tensor {list(values.shape)}, not one value each."
                    " HINT: a measurement gives `[B]`; a loss that is only known for a batch as a whole needs the"
                    " queries as a Dataset."
                )
        return torch.cat(found)


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
        self._each: ExampleLoss = recipe.loss or _elements_of(Objective(recipe.module))
        self._ratio = 1.0
        _check(recipe)
        with _kept(recipe.module):
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
        with _kept(recipe.module):
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
        each = vmap(lambda parameters, rows: self._step.at(parameters, self._each, rows))(copies, batch)
        # A sum over copies: no copy's gradient knows of another.
        return self._ratio * (weights.to(each.dtype) * each).sum()

    @torch.no_grad()
    def _measure(self, copies: dict[str, Tensor]) -> Tensor:
        found = []
        for size, batch in self._queries:
            measure = _measured(self.recipe, self._each, size)
            values = vmap(lambda parameters, b=batch, m=measure: self._step.at(parameters, m, b))(copies)
            scale = self._ratio if self.recipe.measurement == "loss" else 1.0
            found.append(scale * values.T.cpu())
        return torch.cat(found)

    def _compare(self, plain: PlainRuns) -> None:
        """Losses of every batch, one step's gradient and the measurements must be those of the plain loop."""
        recipe = self.recipe
        own = recipe.trained()
        for first, ids in enumerate(torch.arange(len(recipe.data)).split(recipe.batch_size)):
            loss = plain.loss.batch(recipe.fetch(ids), len(ids), None)
            mean = self._each(recipe.module, recipe.fetch(ids)).mean()
            if not first:
                self._ratio = float((loss / mean).detach())
            if not _close(self._ratio * mean, loss):
                raise NotStackable("`training_step` is not the mean of one loss's elements, weighted alike")
        point = recipe.fetch(torch.tensor([0]))
        single = plain.loss.single(point)
        if not _close(self._ratio * self._each(recipe.module, point).sum(), single):
            raise NotStackable("an example's own loss is not its part of the step's loss")
        ids = torch.arange(min(recipe.batch_size, len(recipe.data)))
        copies = {n: p.detach().expand(2, *p.shape).clone().requires_grad_() for n, p in own.items()}
        loss = self._loss(copies, *self._rows([ids, ids], torch.tensor([-1, -1])))
        stacked = torch.autograd.grad(loss, list(copies.values()), allow_unused=True)
        alone = torch.autograd.grad(
            plain.loss.batch(recipe.fetch(ids), len(ids), None), list(own.values()), allow_unused=True
        )
        for one, other in zip(stacked, alone, strict=True):
            if (one is None) != (other is None) or (one is not None and not _close(one[1], other)):
                raise NotStackable("the gradient of stacked copies differs from that of the plain loop")
        if not _close(self._measure(copies)[:, 1], plain.start):
            raise NotStackable("the measurement of stacked copies differs from that of the plain loop")


class NotStackable(Exception):
    """Why runs have to be made one after the other."""


def _check(recipe: Recipe) -> None:
    if recipe.mode != "eval":
        raise NotStackable("copies in train mode would not draw what single runs draw")
    if type(recipe.optimizer) not in ELEMENTWISE:
        raise NotStackable(f"`{type(recipe.optimizer).__name__}` may not work element by element")
    if recipe.removal == "shift" and (len(recipe.data) - 1) % recipe.batch_size == 0:
        raise NotStackable("with an example deleted an epoch has one batch less")


def _all_examples(recipe: Recipe) -> Any:
    """The whole training set as one batch, if any of its examples is a row of it."""
    everything = recipe.fetch(torch.arange(len(recipe.data)))
    tensors: list[Tensor] = []
    apply_to_collection(everything, Tensor, tensors.append)
    few = torch.arange(len(recipe.data)).flip(0)[: recipe.batch_size]
    again: list[Tensor] = []
    apply_to_collection(recipe.fetch(few), Tensor, again.append)
    for values, part in zip(tensors, again, strict=True):
        if not values.dim() or len(values) != len(recipe.data) or not torch.equal(values[few.to(values.device)], part):
            raise NotStackable("examples are not rows of a tensor, or are drawn anew each time")
    return everything


def _measured(recipe: Recipe, each: ExampleLoss, size: int) -> ExampleLoss:
    if callable(recipe.measurement):
        return recipe.measurement
    name, objective = recipe.measurement, Objective(recipe.module)
    if name == "loss":
        return each

    def read(module: Any, batch: Any) -> Tensor:
        with _Tap(read_call) as tap:
            loss = objective.step(batch)
        return Losses(loss, tap.found, [], size).of_targets(name)

    return read


def _elements_of(objective: Objective) -> ExampleLoss:
    """``[B]``: mean over each example's elements of the one loss that ``training_step`` computes."""

    def each(module: Any, batch: Any) -> Tensor:
        with _Tap(unreduced) as tap:
            objective.step(batch)
        if len(tap.found) != 1:
            raise NotStackable(f"`training_step` computes {len(tap.found)} losses of torch's")
        (elements,) = tap.found
        return elements if elements.dim() == 1 else elements.flatten(1).mean(1)

    return each


class _Tap(TorchFunctionMode):
    """Replaces calls of torch's losses by their elements' mean, and keeps what was read of them."""

    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        self.read = read
        self.found: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = self.read(function, args, kwargs or {})
        if found is None:
            return function(*args, **(kwargs or {}))
        self.found.append(found)
        return found.value if isinstance(found, LossCall) else found.mean()


class _Call(nn.Module):
    """A function of a module and a batch, as a forward that ``functional_call`` can give other parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: ExampleLoss, batch: Any) -> Tensor:
        return function(self.module, batch)

    def at(self, parameters: dict[str, Tensor], function: ExampleLoss, batch: Any) -> Tensor:
        """The function's value with these parameters in the module."""
        named = {f"module.{name}": value for name, value in parameters.items()}
        return functional_call(self, named, (function, batch))


class _StepLoss:
    """The loss of the module's own ``training_step``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.objective = Objective(recipe.module)
        groups = [group["params"] for group in recipe.optimizer.param_groups]
        # Blocks only serve to tell a mean from a sum where the loss is not one of torch's.
        blocks = find_blocks(recipe.module, groups).blocks
        workspace = Workspace(recipe.module, blocks, self.objective, hooks=recipe.hooks)
        batches = -(-len(recipe.data) // recipe.batch_size)
        with workspace.at({}):
            self.spec = calibrate(workspace, recipe.data, len(recipe.data) / batches)

    def batch(self, batch: Any, size: int, dropped: int | None) -> Tensor:
        losses = self.objective.evaluate(batch, size, hooked=False)
        if dropped is None:
            return losses.loss
        each = losses.each()
        if each.shape != (size,):
            raise MisconfigurationException(
                f'`removal="mask"` needs the losses of single examples, which `{type(self.recipe.module).__name__}`\'s'
                ' `training_step` does not show. HINT: use torch\'s losses, pass `loss=`, or take `removal="shift"`.'
            )
        return losses.loss - each[dropped]

    def single(self, batch: Any) -> Tensor:
        """An example's share of the risk, at the scale of the training batches (method §4)."""
        return self.objective.evaluate(batch, 1).data_target(self.spec).sum()

    def measure(self, batch: Any, size: int) -> Tensor:
        if callable(self.recipe.measurement):
            return self.recipe.measurement(self.recipe.module, batch)
        return self.objective.evaluate(batch, size).measurement(self.spec, self.recipe.measurement)


class _GivenLoss:
    """The mean of per-example losses that the user gives."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.loss is not None
        self.recipe, self.each = recipe, recipe.loss

    def batch(self, batch: Any, size: int, dropped: int | None) -> Tensor:
        losses = self.each(self.recipe.module, batch)
        if losses.shape != (size,):
            raise MisconfigurationException(
                f"`loss` must return one value per example, a tensor [{size}]; it returned {list(losses.shape)}."
            )
        return (losses.sum() - (0.0 if dropped is None else losses[dropped])) / size

    def single(self, batch: Any) -> Tensor:
        return self.each(self.recipe.module, batch).sum()

    def measure(self, batch: Any, size: int) -> Tensor:
        if callable(self.recipe.measurement):
            return self.recipe.measurement(self.recipe.module, batch)
        return self.each(self.recipe.module, batch)


@contextmanager
def _kept(module: Any, seed: int = 0) -> Iterator[None]:
    """Training inside leaves the module, its modes, buffers and gradients and the process's generators as they were."""
    with undisturbed(module, seed):
        saved = [(p, p.detach().clone(), p.grad) for p in module.parameters()]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values, gradient in saved:
                    parameter.copy_(values)
                    parameter.grad = gradient


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one.detach() - other.detach()).norm()) <= TOLERANCE * float(other.detach().norm()) + 1e-12
