"""The loss of a ``training_step`` that optimizes by hand, read without letting it optimize.

While the step runs for us, ``self.optimizers()`` gives optimizers that do not move anything, and each loss that is
passed to ``manual_backward`` or ``.backward()`` is kept instead. Gradients add up in ``.grad`` until ``zero_grad``, so
a step of one optimizer follows the sum of the losses since its last ``zero_grad`` that reach its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_source._trainer import optimizer_lists

ItemT = TypeVar("ItemT")


class ManualStep:
    """What one run of a manually optimizing ``training_step`` asked for.

    Args:
        optimizers: how many optimizers the module has.
        schedulers: how many learning rate schedulers.
        attributed: index of the optimizer whose parameters are attributed.
        groups: the numbers in each optimizer's parameter groups, for steps that log them.
    """

    def __init__(
        self,
        optimizers: int = 1,
        schedulers: int = 0,
        attributed: int = 0,
        groups: Sequence[Sequence[Mapping[str, object]]] = (),
    ) -> None:
        self.attributed = attributed
        known: list[Sequence[Mapping[str, object]]] = [*groups, *([{"lr": 0.0}] for _ in range(optimizers))]
        self.optimizers = [InertOptimizer(self, index, known[index]) for index in range(optimizers)]
        self.schedulers = [InertScheduler() for _ in range(schedulers)]
        self.pending: list[list[Tensor]] = [[] for _ in range(optimizers)]
        self.toggled: int | None = None
        self._steps: list[list[Tensor]] = []
        self._real: dict[int, int] = {}  # the Trainer's own optimizers: index by id

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        """A backward adds to the gradients of every optimizer, or of the one that is toggled."""
        for index, losses in enumerate(self.pending):
            if self.toggled in (None, index):
                losses.append(loss)

    def step(self, index: int) -> None:
        """An optimizer would have moved along what is pending for it."""
        if index == self.attributed:
            self._steps.append(list(self.pending[index]))

    @property
    def stepped(self) -> bool:
        """Whether the attributed optimizer made a step."""
        return bool(self._steps)

    def toggle(self, optimizer: object) -> None:
        """Only the parameters of this optimizer, ours or the Trainer's, get gradients from now on."""
        self.toggled = optimizer.index if isinstance(optimizer, InertOptimizer) else self._real[id(optimizer)]

    def untoggle(self, optimizer: object = None) -> None:
        """All parameters get gradients again."""
        self.toggled = None

    @property
    def loss(self) -> Tensor | None:
        """The loss that the attributed optimizer follows: the mean over its steps in this batch.

        A batch on which it accumulates without a step counts what it adds; ``None`` if that is nothing.
        """
        steps = self._steps or [self.pending[self.attributed]]
        losses = [loss for step in steps for loss in step]
        total: Tensor | None = None
        for loss in losses:
            total = loss if total is None else total + loss
        return None if total is None else total / len(steps)

    @contextmanager
    def in_place_of(self, module: Any) -> Iterator[None]:
        """Inside, the module optimizes through this object and moves nothing."""
        stand_ins: dict[str, Callable[..., Any]] = {
            "optimizers": lambda use_pl_optimizer=True: _one_or_all(self.optimizers),
            "lr_schedulers": lambda: _one_or_all(self.schedulers) if self.schedulers else None,
            "manual_backward": self.backward,
            "toggle_optimizer": self.toggle,
            "untoggle_optimizer": self.untoggle,
            "clip_gradients": lambda *args, **kwargs: None,
        }
        with ExitStack() as stack:
            stack.enter_context(_replaced(module, stand_ins))
            for real in optimizer_lists(module):  # a step may hold on to the real ones
                for inert, optimizer in zip(self.optimizers, real, strict=False):
                    self._real[id(optimizer)] = inert.index
                    names = ("step", "zero_grad", "toggle_model")
                    has = {name: getattr(inert, name) for name in names if hasattr(optimizer, name)}
                    stack.enter_context(_replaced(optimizer, has))
            yield


@contextmanager
def _replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """The instance has these attributes inside, and its own again afterwards."""
    previous = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        vars(owner).update(attributes)
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(previous)


class InertOptimizer:
    """Looks like a LightningOptimizer to a ``training_step`` and moves nothing."""

    def __init__(self, owner: ManualStep, index: int, groups: Sequence[Mapping[str, object]]) -> None:
        self.owner = owner
        self.index = index
        self.param_groups: list[dict[str, object]] = [{**group, "params": []} for group in groups]
        self.state: dict[object, object] = {}

    @property
    def optimizer(self) -> InertOptimizer:
        """What a LightningOptimizer wraps."""
        return self

    def step(self, closure: Callable[[], object] | None = None, **kwargs: object) -> object:
        """Runs the closure, if there is one, as the optimizer would."""
        value = closure() if closure is not None else None
        self.owner.step(self.index)
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what is pending."""
        self.owner.pending[self.index].clear()

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """As ``LightningOptimizer.toggle_model``."""
        self.owner.toggle(self)
        yield
        self.owner.untoggle()


class InertScheduler:
    """A learning rate scheduler that does nothing."""

    def step(self, *args: object, **kwargs: object) -> None:
        """Nothing."""

    def get_last_lr(self) -> list[float]:
        """No rate."""
        return [0.0]


def _one_or_all(items: list[ItemT]) -> ItemT | list[ItemT]:
    return items[0] if len(items) == 1 else items


def numbers_of(optimizer: Optimizer | LightningOptimizer) -> list[dict[str, int | float | str | bool]]:
    """What is plain in an optimizer's parameter groups, for :class:`ManualStep` in another process."""
    return [
        {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if isinstance(value, (int, float, str, bool)) or (isinstance(value, Tensor) and value.numel() == 1)
        }
        for group in optimizer.param_groups
    ]
