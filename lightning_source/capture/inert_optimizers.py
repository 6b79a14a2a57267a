"""What a ``training_step`` gets in a pass where it asks for its optimizers and schedulers: like them, and inert.

User code tells optimizers apart by ``isinstance``, reads their rates and steps them. The stand-ins are of the classes
of the real ones as far as this process has loaded them, hold the numbers of their parameter groups, and move nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_source._lightning import classes

Numbers = int | float | str | bool


class Owner(Protocol):
    """Who is told what is asked of the stand-ins."""

    def step(self, index: int) -> None:
        """An optimizer would have made a step."""
        ...

    def forget(self, index: int) -> None:
        """The gradients of an optimizer would have been zeroed."""
        ...

    def toggle(self, optimizer: object) -> None:
        """Only the parameters of this optimizer get gradients from now on."""
        ...

    def untoggle(self, optimizer: object = None) -> None:
        """All parameters get gradients again."""
        ...


class InertOptimizer(Optimizer):
    """Stands for one of torch's optimizers.

    Args:
        owner: is told of its steps.
        index: among the module's optimizers.
        groups: the numbers of its parameter groups, which hold no parameters.
    """

    def __init__(self, owner: Owner, index: int, groups: Sequence[Mapping[str, object]]) -> None:
        # Not that of the class which it imitates, whose arguments nobody knows.
        Optimizer.__init__(self, [{**group, "params": []} for group in groups], {})
        self.owner = owner
        self.index = index

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: object) -> Any:
        """Runs the closure, if there is one, as the optimizer would."""
        value = closure() if closure is not None else None
        self.owner.step(self.index)
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what is pending."""
        self.owner.forget(self.index)


class _InertWrapper:
    """The methods by which Lightning's wrapper of an optimizer would reach for the Trainer."""

    _optimizer: InertOptimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: object) -> Any:
        return self._optimizer.step(closure)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        self._optimizer.owner.toggle(self._optimizer)
        yield
        self._optimizer.owner.untoggle()


def inert_optimizer(owner: Owner, index: int, groups: Sequence[Mapping[str, object]], kind: str = "") -> Any:
    """What ``self.optimizers()`` gives for one optimizer: a ``LightningOptimizer`` around an :class:`InertOptimizer`.

    Args:
        owner: is told of its steps.
        index: among the module's optimizers.
        groups: the numbers of its parameter groups.
        kind: its class, as :func:`kind_of` names it.
    """
    wrapper = _wrapping(classes("core.optimizer.LightningOptimizer"))
    imitation = _imitating(_class_named(kind))  # type: ignore[arg-type]  # a class has a hash
    return wrapper(imitation(owner, index, groups))


def kind_of(optimizer: object) -> str:
    """An optimizer's class by module and name, for another process."""
    return f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"


def _class_named(kind: str) -> type[Optimizer]:
    """The class of that name if it is loaded; nothing is imported on the word of a file."""
    module, _, path = kind.partition(":")
    value: Any = sys.modules.get(module)
    for name in path.split("."):
        value = getattr(value, name, None)
    known = isinstance(value, type) and issubclass(value, Optimizer)
    # A class that computes these from an optimizer of its own could not be given them.
    computed = any(isinstance(getattr(value, name, None), property) for name in ("param_groups", "state", "defaults"))
    return value if known and not computed else Optimizer


@cache
def _wrapping(kinds: tuple[type, ...]) -> Any:
    return type("InertLightningOptimizer", (_InertWrapper, *kinds), {})


@cache
def _imitating(kind: type[Optimizer]) -> type[InertOptimizer]:
    return InertOptimizer if kind is Optimizer else type(kind.__name__, (InertOptimizer, kind), {})


class InertScheduler(LRScheduler):
    """A learning rate scheduler that does nothing.

    Args:
        optimizer: whose rates it shows.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.last_epoch = 0
        self.base_lrs = self.get_last_lr()

    def step(self, *args: object, **kwargs: object) -> None:
        """Nothing."""

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates of its optimizer's groups."""
        return [group.get("lr", 0.0) for group in self.optimizer.param_groups]


def numbers_of(optimizer: Optimizer) -> list[dict[str, Numbers]]:
    """What is plain in an optimizer's parameter groups, for its stand-in in another process."""
    return [
        {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if isinstance(value, (int, float, str, bool)) or (isinstance(value, Tensor) and value.numel() == 1)
        }
        for group in optimizer.param_groups
    ]
