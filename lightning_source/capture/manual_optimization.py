"""The loss of a ``training_step`` that optimizes by hand, read without letting it optimize.

While the step runs for us, ``self.optimizers()`` gives optimizers that do not move anything, and each loss that is
passed to ``manual_backward`` or ``.backward()`` is kept instead. Gradients add up in ``.grad`` until ``zero_grad``, so
a step of one optimizer follows the sum of the losses since its last ``zero_grad`` that reach its parameters. A step
that never goes backward may have put gradients of ``torch.autograd.grad`` into ``.grad``: it follows what these are of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_source._trainer import optimizer_lists
from lightning_source.capture.inert_optimizers import InertOptimizer, InertScheduler, inert_optimizer
from lightning_source.capture.trainer_view import TrainerView

ItemT = TypeVar("ItemT")


class ManualStep:
    """What one run of a manually optimizing ``training_step`` asked for.

    Args:
        optimizers: how many optimizers the module has.
        schedulers: how many learning rate schedulers.
        attributed: index of the optimizer whose parameters are attributed.
        groups: the numbers in each optimizer's parameter groups, for steps that log them.
        kinds: the optimizers' classes, by :func:`~lightning_source.capture.inert_optimizers.kind_of`.
    """

    def __init__(
        self,
        optimizers: int = 1,
        schedulers: int = 0,
        attributed: int = 0,
        groups: Sequence[Sequence[Mapping[str, object]]] = (),
        kinds: Sequence[str] = (),
    ) -> None:
        self.attributed = attributed
        self._groups: list[Sequence[Mapping[str, object]]] = [*groups, *([{"lr": 0.0}] for _ in range(optimizers))]
        self._kinds = [*kinds, *([""] * optimizers)]
        self._count, self._schedulers = optimizers, schedulers
        self.pending: list[list[Tensor]] = [[] for _ in range(optimizers)]
        self.toggled: int | None = None
        self._steps: list[list[Tensor]] = []
        self._differentiated: list[Tensor] = []  # losses whose gradients by parameters the step asked for
        self._real: dict[int, int] = {}  # the Trainer's own optimizers: index by id

    @cached_property  # most steps that optimize automatically never ask
    def optimizers(self) -> list[Any]:
        """What stands for the module's optimizers."""
        return [inert_optimizer(self, i, self._groups[i], self._kinds[i]) for i in range(self._count)]

    @cached_property
    def schedulers(self) -> list[InertScheduler]:
        """What stands for its schedulers, each with the optimizer at its place, or the last one."""
        return [InertScheduler(self.optimizers[min(i, self._count - 1)]) for i in range(self._schedulers)]

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        """A backward adds to the gradients of every optimizer, or of the one that is toggled."""
        for index, losses in enumerate(self.pending):
            if self.toggled in (None, index):
                losses.append(loss)

    def differentiate(self, outputs: object, inputs: object, *args: object, **kwargs: object) -> object:
        """``torch.autograd.grad``, which notes losses differentiated by parameters and keeps their graph."""
        wanted, losses = _tensors(inputs), _tensors(outputs)
        if all(isinstance(tensor, nn.Parameter) for tensor in wanted):
            self._differentiated += [loss for loss in losses if isinstance(loss, Tensor) and loss.numel() == 1]
        keywords = ("grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused", "is_grads_batched")
        options = {**dict(zip(keywords, args, strict=False)), **kwargs, "retain_graph": True}
        return torch.autograd.grad(outputs, inputs, **options)  # type: ignore[call-overload]

    def step(self, index: int) -> None:
        """An optimizer would have moved along what is pending for it."""
        if index == self.attributed:
            self._steps.append(self._followed(index))
            self._differentiated.clear()

    def _followed(self, index: int) -> list[Tensor]:
        return list(self.pending[index] or self._differentiated)

    def forget(self, index: int) -> None:
        """What was pending for an optimizer was zeroed."""
        self.pending[index].clear()

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
        steps = self._steps or [self._followed(self.attributed)]
        losses = [loss for step in steps for loss in step]
        total: Tensor | None = None
        for loss in losses:
            total = loss if total is None else total + loss
        return None if total is None else total / len(steps)

    @contextmanager
    def in_place_of(self, module: Any) -> Iterator[None]:
        """Inside, the module optimizes through this object and moves nothing."""
        stand_ins: dict[str, Callable[..., Any]] = {
            "manual_backward": self.backward,
            "toggle_optimizer": self.toggle,
            "untoggle_optimizer": self.untoggle,
            "clip_gradients": lambda *args, **kwargs: None,
        }
        with ExitStack() as stack:
            stack.enter_context(self.shown_to(module))
            stack.enter_context(_replaced(module, stand_ins))
            for real in optimizer_lists(module):  # a step may hold on to the real ones
                for inert, optimizer in zip(self.optimizers, real, strict=False):
                    self._real[id(optimizer)] = inert.index
                    names = ("step", "zero_grad", "toggle_model")
                    has = {name: getattr(inert, name) for name in names if hasattr(optimizer, name)}
                    stack.enter_context(_replaced(optimizer, has))
            yield

    @contextmanager
    def shown_to(self, module: Any) -> Iterator[None]:
        """Inside, the module sees these optimizers and schedulers for its own."""

        def optimizers(use_pl_optimizer: bool = True) -> Any:
            return _one_or_all([o if use_pl_optimizer else o.optimizer for o in self.optimizers])

        def lr_schedulers() -> Any:
            return _one_or_all(self.schedulers) if self.schedulers else None

        view = vars(module).get("_trainer")
        with ExitStack() as stack:
            stack.enter_context(_replaced(module, {"optimizers": optimizers, "lr_schedulers": lr_schedulers}))
            if isinstance(view, TrainerView):
                stack.enter_context(_replaced(view, {"stand_ins": self}))
            yield


@contextmanager
def _replaced(owner: Any, attributes: Mapping[str, object]) -> Iterator[None]:
    """The instance has these attributes inside, and its own again afterwards."""
    previous = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        vars(owner).update(attributes)
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(previous)


def _tensors(given: object) -> list[object]:
    """One tensor, a sequence or a mapping of them, as a list."""
    if isinstance(given, Mapping):
        return list(given.values())
    return list(given) if isinstance(given, Sequence) else [given]


def _one_or_all(items: list[ItemT]) -> ItemT | list[ItemT]:
    return items[0] if len(items) == 1 else items
