"""What ``training_step`` computes for single examples, read off its calls of torch's losses under ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_source.capture.losses import read_call, unreduced
from lightning_source.capture.objective import Losses, Objective
from lightning_source.evaluation.further_runs.recipe import ExampleLoss, Recipe

Read = TypeVar("Read")


class NotStackable(Exception):
    """Why runs have to be made one after the other."""


def measured(recipe: Recipe, example_losses: ExampleLoss, size: int) -> ExampleLoss:
    """What measures a batch of ``size`` queries, ``[B]``."""
    if callable(recipe.measurement):
        return recipe.measurement
    name, objective = recipe.measurement, Objective(recipe.module)
    if name == "loss":
        return example_losses

    def read(module: object, batch: object) -> Tensor:
        with _Tap(read_call, lambda call: call.value) as tap:
            loss = objective.step(batch)
        return Losses(loss, tap.calls, [], size).target_elements(name).sum(1)

    return read


def elements_of(objective: Objective) -> ExampleLoss:
    """``[B]``: mean over each example's elements of the one loss that ``training_step`` computes."""

    def example_losses(module: object, batch: object) -> Tensor:
        with _Tap(unreduced, Tensor.mean) as tap:
            objective.step(batch)
        if len(tap.calls) != 1:
            raise NotStackable(f"`training_step` computes {len(tap.calls)} losses of torch's")
        (elements,) = tap.calls
        return elements if elements.dim() == 1 else elements.flatten(1).mean(1)

    return example_losses


class _Tap(TorchFunctionMode, Generic[Read]):
    """Reads the calls of torch's losses, and gives the step what was read as a scalar.

    Args:
        read: of a call's function and arguments; ``None`` where it is no loss.
        value: the scalar of what was read.
    """

    def __init__(self, read: Callable[..., Read | None], value: Callable[[Read], Tensor]) -> None:
        super().__init__()
        self.read, self.value = read, value
        self.calls: list[Read] = []

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        call = self.read(function, args, kwargs or {})
        if call is None:
            return function(*args, **(kwargs or {}))
        self.calls.append(call)
        return self.value(call)
