"""Extra passes that leave no trace: modes, RNG, buffers, metrics, logged values and plain attributes come back.

Nor do they wait for other processes, or see what an earlier batch of theirs left behind. Each guard is there because a
run without it differed: see the bit-identity tests.
"""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_source._lightning import LightningModule, convert_to_tensors, is_lightning_module, isolate_rng
from lightning_source._trainer import gathers, silent_loggers
from lightning_source.capture.modes import EVAL, PassMode, in_mode

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
def undisturbed(module: nn.Module, seed: int = 0, mode: PassMode = EVAL) -> Iterator[None]:
    """Run passes of ``module`` without disturbing it or the process, by default in eval mode.

    Inside: every submodule in that mode, no ``.grad`` yet, gradients enabled, ``log`` silent, ``all_gather`` of this
    process alone, hooks honoured under ``torch.compile``, global generators seeded with ``seed``.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_rng(seed))
        stack.enter_context(_attributes_kept(module))
        stack.enter_context(_gradients_aside(module))
        stack.enter_context(in_mode(module, mode))
        stack.enter_context(_silent_log(module))
        stack.enter_context(_gathering_alone(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _gradients_aside(module: nn.Module) -> Iterator[None]:
    """A step may call ``backward()`` itself: what that adds to ``.grad`` goes, and what training left there is back.

    Hooks on the parameters are away, too: passes want the loss's own gradient, and what hooks made of it in training is
    in the rates.
    """
    kept = [(p, p.grad, p._backward_hooks) for p in module.parameters()]
    try:
        for parameter, _, hooks in kept:
            parameter.grad = None
            if hooks:
                parameter._backward_hooks = None
        yield
    finally:
        for parameter, gradient, hooks in kept:
            parameter.grad = gradient
            if hooks:
                parameter._backward_hooks = hooks


@contextmanager
def _silent_log(module: nn.Module) -> Iterator[None]:
    """``self.log`` inside a hook of ours would raise, or add a metric under our hook's name; loggers take nothing."""
    names = [name for name in ("log", "log_dict") if hasattr(module, name)]
    previous = {name: module.__dict__[name] for name in names if name in module.__dict__}
    try:
        for name in names:
            module.__dict__[name] = lambda *args, **kwargs: None
        with silent_loggers(module):
            yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(previous)


@contextmanager
def _gathering_alone(module: nn.Module) -> Iterator[None]:
    """``self.all_gather`` would wait for ranks that run no pass, or a shorter one: each gathers its own values alone.

    As Lightning gives it, except that it stands for one rank: ``[1, *shape]`` where processes train together, without a
    gradient unless ``sync_grads``; the values as they are on a single device.
    """
    if not is_lightning_module(module):
        yield
        return

    def all_gather(data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        def gather(values: Tensor) -> Tensor:
            return (values if sync_grads else values.detach()).unsqueeze(0)

        data = convert_to_tensors(data, device=module.device)
        return apply_to_collection(data, Tensor, gather) if gathers(module) else data

    previous = {name: value for name, value in vars(module).items() if name == "all_gather"}
    try:
        vars(module)["all_gather"] = all_gather
        yield
    finally:
        del vars(module)["all_gather"]
        vars(module).update(previous)


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
    kept = _SavedState()
    for child in module.modules():
        kept.add(child)
    try:
        yield
    finally:
        kept.restore()


def _is_record(value: object) -> bool:
    """A user's meter or history. Anything with parts of other kinds (a client, a lock) is not ours to turn back."""
    own = getattr(value, "__dict__", None)
    kinds = (*_NUMBERS, *_CONTAINERS, Tensor, np.ndarray)
    return type(own) is dict and bool(own) and all(isinstance(part, kinds) for part in own.values())


class StateRestorer:
    """What the calls of a ``training_step`` write is as it was before each of them.

    A momentum encoder, a running centre or a counter would else drift from batch to batch, and an example's gradient
    would depend on the batches before it; so does ``.grad``, which each of them finds empty. Generators go on: every
    batch draws its own noise.

    Args:
        module: the module, as every call is to find it.
        values: the values of its parameters by ``id``, where others hold them already; the rest is copied.
    """

    def __init__(self, module: nn.Module, values: Mapping[int, Tensor]) -> None:
        self._kept = _SavedState()
        self._parameters = list(module.parameters())
        for child in module.modules():
            self._kept.add(child)
        for p in self._parameters:
            self._kept.tensors.append(_Values(p, values[id(p)] if id(p) in values else p.detach().clone()))
        self._calls = 0

    def __call__(self) -> None:
        """To be called before each call of the step."""
        if self._calls:
            for parameter in self._parameters:
                parameter.grad = None
            for restore in self._kept.contents:
                restore()
            for tensor in self._kept.tensors:
                # Writes through ``.data`` count no version. What the first call wrote so, later ones will.
                if self._calls == 1 or tensor.suspected():
                    tensor.restore()
        self._calls += 1


class _Values:
    """A tensor and the values that it is to have again."""

    def __init__(self, tensor: Tensor, saved: Tensor) -> None:
        self.tensor = tensor
        self.saved = saved
        self.written = False  # was found to have others, at least once
        self.version = _version(tensor)  # torch's count of in-place writes

    def suspected(self) -> bool:
        """Whether it may have been written since it was restored."""
        return self.written or self.version is None or self.version != _version(self.tensor)

    def restore(self) -> None:
        """Copy the values back where they differ."""
        saved = self.saved.to(self.tensor)
        if not torch.equal(self.tensor, saved):
            self.written, self.saved = True, saved
            with torch.no_grad():
                self.tensor.copy_(saved)
        self.version = _version(self.tensor)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _SavedState:
    """The mutable objects that can be reached from some, each with its contents."""

    def __init__(self) -> None:
        self.contents: list[Callable[[], object]] = []
        self.generators: list[Callable[[], object]] = []
        self.tensors: list[_Values] = []
        self.seen: dict[int, object] = {}  # objects by id; held, so that no id is used twice
        self.left = _MOST

    def restore(self) -> None:
        for restore in (*self.contents, *self.generators):
            restore()
        for tensor in self.tensors:
            tensor.restore()

    def add(self, value: object) -> None:
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
            self.generators.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.generators.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.generators.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, (list, set, dict, deque)):
            self.left -= len(value)
            self._keep_items(value, copy.copy(value))
        elif isinstance(value, tuple):
            for item in value:
                self.add(item)
        elif _is_record(value):
            self._keep_attributes(value, list(vars(value)))

    def _keep_attributes(self, owner: object, names: list[str]) -> None:
        saved = {name: vars(owner)[name] for name in names}

        def restore() -> None:
            ignored = _FRAMEWORK if isinstance(owner, nn.Module) else ()
            for name in [name for name in vars(owner) if name not in saved and name not in ignored]:
                del vars(owner)[name]
            vars(owner).update(saved)

        self.contents.append(restore)
        for value in saved.values():
            self.add(value)

    def _keep_buffers(self, module: nn.Module) -> None:
        saved = dict(module._buffers)

        def restore() -> None:
            module._buffers.clear()
            module._buffers.update(saved)

        if isinstance(module._buffers, dict):  # a scripted module rebinds none
            self.contents.append(restore)
        for buffer in saved.values():
            if buffer is not None:  # of any size
                self._keep_values(buffer)

    def _keep_values(self, values: Tensor | np.ndarray) -> None:
        if isinstance(values, Tensor):
            self.tensors.append(_Values(values, values.detach().clone()))
        else:
            self.contents.append(partial(np.copyto, values, values.copy()))

    def _keep_items(self, container: Any, saved: Any) -> None:
        def restore() -> None:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(saved)

        self.contents.append(restore)
        for item in saved.values() if isinstance(saved, dict) else saved:
            self.add(item)
