"""Numbers that a module holds outside its ``state_dict`` and changes while it trains, with the step of each reading.

A hook sets ``self.beta = 0.1 * self.current_epoch`` and the loss reads it. Passes at a snapshot must compute what
training computed there, and a model in another process has only what its constructor gave it. They are read whenever a
bin is written. Those that never change are left alone, so that a model which is built with another value keeps its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_source._lightning import LightningModule, is_lightning_module
from lightning_source.names import named_modules

# A plain tensor of more scalars (a queue, a cache) is not written into the manifest.
LARGEST = 256
# Libraries whose modules keep caches and counters of their own there.
_LIBRARIES = ("torch", "torchmetrics")
_FRAMEWORK = set(vars(LightningModule())) | {"training"}
_PLAIN = (bool, int, float, str)
_SPECIAL = set(".[]{}")  # characters of a place


class Reading(NamedTuple):
    """What attributes held at a step, as JSON by their place: ``beta``, ``encoder.beta``, ``weights[kl]``.

    Attributes:
        step: recorded steps before it.
        values: JSON by place.
    """

    step: int
    values: dict[str, str]


def places(module: nn.Module) -> Iterator[tuple[str, MutableMapping[str, object]]]:
    """The mappings that hold a module's plain attributes, each with what its keys are to be formatted into.

    Those of the module and of the user's modules in it, of helper objects that these hold, of dicts and of ``hparams``.
    """
    for name, child in named_modules(module).items():
        if type(child).__module__.partition(".")[0] in _LIBRARIES:
            continue
        prefix = f"{name}." if name else ""
        own = vars(child)
        yield prefix + "{}", own
        held = {key: value for key, value in own.items() if key not in _FRAMEWORK}
        if is_lightning_module(child) and "_hparams" in own:
            held["hparams"] = own["_hparams"]
        for key, value in held.items():
            if isinstance(value, dict):
                yield f"{prefix}{key}[{{}}]", value
            elif _is_helper(value):
                yield f"{prefix}{key}.{{}}", vars(value)


def _is_helper(value: object) -> bool:
    """An object of the user's with attributes of its own."""
    if isinstance(value, (nn.Module, type)) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    return type(value).__module__.partition(".")[0] not in _LIBRARIES


def read_attributes(module: nn.Module, step: int) -> Reading:
    """What the attributes hold now."""
    values = {}
    for form, holder in places(module):
        for key, value in holder.items():
            if not isinstance(key, str) or key in _FRAMEWORK or _SPECIAL & set(key):
                continue
            if (text := _encoded(value)) is not None:
                values[form.format(key)] = text
    return Reading(step, values)


def tensors_beside(module: nn.Module) -> dict[str, list[tuple[Tensor, int]]]:
    """The tensors that attributes hold beside the ``state_dict``, by place, each with torch's count of its writes.

    While the answer is kept, another tensor in an attribute is known by its ``id``.
    """
    found = {}
    for form, holder in places(module):
        for key, value in holder.items():
            leaves = [] if key in _FRAMEWORK else [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if leaves:
                found[form.format(key)] = [(leaf, 0 if leaf.is_inference() else leaf._version) for leaf in leaves]
    return found


def with_reading(readings: Sequence[Reading], reading: Reading, steps: Collection[int]) -> tuple[Reading, ...]:
    """Readings and one more, of which is kept what differs from those before.

    Args:
        readings: the first has all values, each later one those that were others than before it.
        reading: a whole one, at a later step.
        steps: of the readings that stay, besides the first; what others say is said by the next one that does.

    Example:
        >>> readings = (Reading(0, {"beta": "0.0", "rate": "1"}), Reading(3, {"beta": "0.3"}))
        >>> with_reading(readings, Reading(6, {"beta": "0.6", "rate": "1"}), [3])[1:]
        (Reading(step=3, values={'beta': '0.3'}), Reading(step=6, values={'beta': '0.6'}))
    """
    held = _values(readings)
    last = Reading(reading.step, {n: v for n, v in reading.values.items() if held.get(n) != v})
    kept, waiting = [*readings[:1]], dict[str, str]()
    for step, values in (*readings[1:], last):
        waiting |= values
        if step in steps or step == reading.step:
            kept.append(Reading(step, waiting))
            waiting = {}
    return tuple(kept)


def attributes_at(readings: Sequence[Reading], step: int) -> dict[str, str]:
    """What changed attributes held in the training step that follows ``step`` recorded ones.

    That is what the next reading found, or the last one.

    Example:
        >>> attributes_at([Reading(0, {"beta": "0.0", "rate": "1"}), Reading(3, {"beta": "0.3"})], 1)
        {'beta': '0.3'}
    """
    changed = _values(readings[1:])
    until = 1 + next((i for i, reading in enumerate(readings) if reading.step > step), len(readings))
    values = _values(readings[:until])
    return {name: values[name] for name in changed if name in values}


def _values(readings: Sequence[Reading]) -> dict[str, str]:
    return {name: value for reading in readings for name, value in reading.values.items()}


@contextmanager
def attributes_seen(module: nn.Module, values: Mapping[str, str]) -> Iterator[None]:
    """Inside, attributes hold these values; a place that the model does not have is passed over."""
    before: list[tuple[MutableMapping[str, object], dict[str, object], list[str]]] = []
    try:
        for form, holder in [*places(module)] if values else ():
            opening, closing = form.split("{}")
            inner = {v[len(opening) : len(v) - len(closing)]: v for v in values if v.startswith(opening)}
            keys = [key for key, place in inner.items() if form.format(key) == place and not _SPECIAL & set(key)]
            kept = {key: holder[key] for key in keys if key in holder}
            before.append((holder, kept, [key for key in keys if key not in holder]))
            holder.update({key: _decoded(values[inner[key]], holder.get(key)) for key in keys})
        yield
    finally:
        for holder, kept, added in before:
            for key in added:
                holder.pop(key, None)
            holder.update(kept)


def _encoded(value: object) -> str | None:
    """A plain value as JSON; ``None`` for any other."""
    if isinstance(value, torch.nn.Parameter):
        return None
    if type(value) in _PLAIN:
        return json.dumps(value) if len(str(value)) <= LARGEST else None
    if type(value) is Tensor and value.numel() <= LARGEST and not (value.requires_grad or value.is_meta):
        if value.is_complex() or value.is_sparse or value.is_quantized:
            return None
        return json.dumps({"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()})
    return None


def _decoded(text: str, present: object) -> object:
    """The inverse of :func:`_encoded`; a tensor comes to where the present one is."""
    value = json.loads(text)
    if not isinstance(value, dict):
        return value
    device = present.device if isinstance(present, Tensor) else None
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device=device)


def is_reading(text: str) -> bool:
    """Whether a text is a value of a :class:`Reading`, and no larger than one may be."""
    try:
        value = json.loads(text)
        return not isinstance(value, dict) or _decoded(text, None) is not None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        return False
