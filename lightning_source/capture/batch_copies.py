"""Copies of batches: a step may write into its batch, pop keys or consume it, and the user's own stays whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import GeneratorType
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_source._lightning import MisconfigurationException

T = TypeVar("T")
_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, nn.Module)


def copied(batch: T) -> T:
    """The batch with tensors and containers of its own, to any depth; what cannot be copied is shared.

    Tensors keep their device, layout and whether they require gradients; views do not share memory in the copy.
    Dataclasses and objects are copied without their constructors, so that checks in these do not run again.

    Args:
        batch: what a ``DataLoader`` or a user gives: tensors, containers, dataclasses, objects with tensors in them.

    Raises:
        MisconfigurationException: the batch holds a generator, which can be gone through only once.
    """
    copies: dict[int, object] = {}
    return _copied(batch, copies)


def _copied(value: object, copies: dict[int, object]) -> Any:
    if isinstance(value, _ATOMS):
        return value
    if id(value) not in copies:
        copies[id(value)] = value  # an object that refers to itself
        copies[id(value)] = _copy_of(value, copies)
    return copies[id(value)]


def _copy_of(value: Any, copies: dict[int, object]) -> Any:
    if isinstance(value, Tensor):
        # Outside of inference mode, the copy of an inference tensor is a normal one, which autograd can keep.
        fresh = value.detach().clone()
        # Under functorch's transforms the flag cannot be set, to whatever value.
        return fresh.requires_grad_() if value.requires_grad and value.is_leaf else fresh
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return type(value)(*(_copied(part, copies) for part in value))
    if isinstance(value, tuple):
        parts = [_copied(part, copies) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else _rebuilt(value, tuple(parts))
    if isinstance(value, list):
        return _refilled(value, lambda new: new.__setitem__(slice(None), [_copied(part, copies) for part in value]))
    if isinstance(value, dict):
        items = {key: _copied(part, copies) for key, part in value.items()}
        return _refilled(value, lambda new: new.update(items))
    if isinstance(value, set):
        return _refilled(value, lambda new: None)
    return _copied_object(value, copies)


def _rebuilt(value: tuple[object, ...], parts: tuple[object, ...]) -> object:
    return parts if type(value) is tuple else type(value)(parts)


def _refilled(container: Any, fill: Any) -> Any:
    """A shallow copy of a container, its class and attributes kept, with other contents."""
    new = copy.copy(container)
    fill(new)
    return new


def _copied_object(value: object, copies: dict[int, object]) -> object:
    try:
        new = copy.copy(value)
    except Exception:  # an open file, a lock: whatever the user's class says of copies
        if isinstance(value, GeneratorType):
            raise MisconfigurationException(
                f"the batch holds a generator (`{value.__name__}`), which can be gone through only once, while"
                " gradients take several calls of the step with one batch. HINT: let `collate_fn` give a list instead."
            ) from None
        return value
    if new is value:
        return value
    names = [field.name for field in fields(value)] if is_dataclass(value) else []
    held = getattr(value, "__dict__", None)
    names += list(held) if isinstance(held, dict) else []
    names += [name for kind in type(value).__mro__ for name in _slots_of(kind)]
    for name in dict.fromkeys(names):
        if hasattr(value, name):
            part = getattr(value, name)
            fresh = _copied(part, copies)
            if fresh is not part:
                _set(new, name, fresh)
    return new


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return tuple(name for name in ((slots,) if isinstance(slots, str) else slots) if not name.startswith("__"))


def _set(owner: object, name: str, value: object) -> None:
    """Past checks and frozen dataclasses: the value has passed them where the original was made."""
    held = getattr(owner, "__dict__", None)
    if isinstance(held, Mapping) and name in held:
        owner.__dict__[name] = value
    else:
        object.__setattr__(owner, name, value)
