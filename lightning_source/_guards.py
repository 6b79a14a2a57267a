"""Extra passes that leave no trace: modes, RNG, buffers, metrics, logged values and plain attributes come back.

Each guard is there because a run without it differed: see the bit-identity tests.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

_CONTAINERS = (list, dict, set, deque)
# A plain tensor attribute up to this many scalars (a running statistic) is kept by value, a larger one by reference.
_SMALL = 1 << 16


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
    """``self.log`` inside a hook of ours would raise, or add a metric under our hook's name."""
    names = [name for name in ("log", "log_dict") if hasattr(module, name)]
    previous = {name: module.__dict__[name] for name in names if name in module.__dict__}
    try:
        for name in names:
            module.__dict__[name] = lambda *args, **kwargs: None
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(previous)


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Restore what a ``training_step`` may write besides parameters: counters, output lists, buffers, metric states."""
    kept = [(child, _save_attributes(child), _save_buffers(child)) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes, buffers in kept:
            _restore_attributes(child, attributes)
            for name, (buffer, values) in buffers.items():
                with torch.no_grad():
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)
                child._buffers[name] = buffer


def _save_buffers(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (b, b.detach().clone()) for name, b in module._buffers.items() if b is not None}


def _save_attributes(module: nn.Module) -> dict[str, Any]:
    own = {
        name: (value, _copy(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and not isinstance(value, nn.Module)
    }
    if isinstance(module, Metric):
        private = ("_update_count", "_update_called", "_computed", "_cache", "_is_synced")
        names = [*module._defaults, *(name for name in private if name in vars(module))]
        own |= {name: (value := vars(module)[name], _copy(value)) for name in names if name in vars(module)}
    return own


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.numel() <= _SMALL else None
    return copy.copy(value) if isinstance(value, _CONTAINERS) else None


def _restore_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in [name for name in vars(module) if not name.startswith("_") and name != "training"]:
        if name not in attributes and not isinstance(vars(module)[name], nn.Module):
            del vars(module)[name]
    for name, (value, saved) in attributes.items():
        vars(module)[name] = value
        if saved is None:
            continue
        if isinstance(value, Tensor):
            if not torch.equal(value, saved):
                with torch.no_grad():
                    value.copy_(saved)
        elif isinstance(value, list):
            value[:] = saved
        elif isinstance(value, deque):
            value.clear()
            value.extend(saved)
        else:
            value.clear()
            value.update(saved)
