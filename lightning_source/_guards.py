"""Extra passes that leave no trace: modes, RNG, buffers, metrics, logged values and plain attributes come back.

Each guard is there because a run without it differed: see the bit-identity tests.
"""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

# A plain tensor attribute up to this many scalars (a running statistic) is kept by value, a larger one by reference,
# and so is everything after this many scalars and items in all (a data set that the module holds).
_SMALL = 1 << 16
_MOST = 1 << 20
_NUMBERS = (int, float, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, set, deque)
_FRAMEWORK = set(vars(LightningModule()))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators inside, restore them outside, also when the body raises."""
    raised: BaseException | None = None
    with isolate_rng():  # has no finally of its own, so no exception may cross it
        try:
            torch.manual_seed(seed)
            yield
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


@contextmanager
def undisturbed(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run passes of ``module`` in eval mode without disturbing it or the process.

    Inside: every submodule in eval mode (set one by one: a user's ``train()`` may freeze parts), gradients enabled,
    ``log`` silent, hooks honoured under ``torch.compile``, global generators seeded with ``seed``.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_rng(seed))
        stack.enter_context(_attributes_kept(module))
        stack.enter_context(_eval_mode(module))
        stack.enter_context(_silent_log(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def _silent_log(module: nn.Module) -> Iterator[None]:
    """``self.log`` inside a hook of ours would raise, or add a metric under our hook's name; loggers take nothing."""
    names = [name for name in ("log", "log_dict") if hasattr(module, name)]
    previous = {name: module.__dict__[name] for name in names if name in module.__dict__}
    trainer: Any = getattr(module, "_trainer", None)
    loggers = trainer.loggers if trainer is not None else []
    try:
        for name in names:
            module.__dict__[name] = lambda *args, **kwargs: None
        if loggers:
            trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(previous)
        if loggers:
            trainer.loggers = loggers


@contextmanager
def thawed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that are frozen now, and were trained at some time, take gradients inside."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def parameters_kept(module: nn.Module) -> Iterator[None]:
    """Restore parameters that a ``training_step`` writes itself, such as those of a momentum encoder."""
    kept = [(p, p.detach().clone()) for p in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                if not torch.equal(parameter, values):
                    parameter.copy_(values)


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Restore what a ``training_step`` may write besides parameters: counters, output lists, buffers, metric states."""
    kept = _Kept()
    for child in module.modules():
        kept.add(child)
    try:
        yield
    finally:
        kept.restore()


def _is_record(value: Any) -> bool:
    """A user's meter or history. Anything with parts of other kinds (a client, a lock) is not ours to turn back."""
    own = getattr(value, "__dict__", None)
    kinds = (*_NUMBERS, *_CONTAINERS, Tensor, np.ndarray)
    return type(own) is dict and bool(own) and all(isinstance(part, kinds) for part in own.values())


class _Kept:
    """The mutable objects that can be reached from some, each with its contents."""

    def __init__(self) -> None:
        self.restores: list[Callable[[], Any]] = []
        self.seen: dict[int, Any] = {}  # objects by id; held, so that no id is used twice
        self.left = _MOST

    def restore(self) -> None:
        for restore in self.restores:
            restore()

    def add(self, value: Any) -> None:
        """Keep an object's contents and, in turn, what they refer to."""
        if isinstance(value, _NUMBERS) or id(value) in self.seen or self.left <= 0:
            return
        self.seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._keep_attributes(value, [name for name in vars(value) if name not in _FRAMEWORK])
            self._keep_buffers(value)
        elif isinstance(value, (Tensor, np.ndarray)):
            if not isinstance(value, nn.Parameter) and math.prod(value.shape) <= _SMALL:
                self.left -= math.prod(value.shape)
                self._keep_values(value)
        elif isinstance(value, torch.Generator):
            self.restores.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.restores.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.restores.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, (list, set, dict, deque)):
            self.left -= len(value)
            self._keep_items(value, copy.copy(value))
        elif isinstance(value, tuple):
            for item in value:
                self.add(item)
        elif _is_record(value):
            self._keep_attributes(value, list(vars(value)))

    def _keep_attributes(self, owner: Any, names: list[str]) -> None:
        saved = {name: vars(owner)[name] for name in names}

        def restore() -> None:
            ignored = _FRAMEWORK if isinstance(owner, nn.Module) else ()
            for name in [name for name in vars(owner) if name not in saved and name not in ignored]:
                del vars(owner)[name]
            vars(owner).update(saved)

        self.restores.append(restore)
        for value in saved.values():
            self.add(value)

    def _keep_buffers(self, module: nn.Module) -> None:
        saved = dict(module._buffers)

        def restore() -> None:
            module._buffers.clear()
            module._buffers.update(saved)

        self.restores.append(restore)
        for buffer in saved.values():
            if buffer is not None:  # of any size
                self._keep_values(buffer)

    def _keep_values(self, tensor: Any) -> None:
        saved = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor.copy()

        def restore() -> None:
            with torch.no_grad():
                if isinstance(tensor, np.ndarray):
                    np.copyto(tensor, saved)
                elif not torch.equal(tensor, saved):
                    tensor.copy_(saved)

        self.restores.append(restore)

    def _keep_items(self, container: Any, saved: Any) -> None:
        def restore() -> None:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(saved)

        self.restores.append(restore)
        for item in saved.values() if isinstance(saved, dict) else saved:
            self.add(item)
