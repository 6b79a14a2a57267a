"""Dataclasses as JSON: one writer, and one reader that checks every value and names the field that is wrong.

A field without a default must be there. One whose default is ``None`` is left out while it is ``None``. A key that is
not a Python name is given as ``field(metadata={"key": …})``; a NamedTuple is a JSON list. Keys that a class does not
have are derived values, or come from a later version of the same schema, and are passed over.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class FieldError(ValueError):
    """A value is missing, or not of its field's type; the message begins with the dotted name of the field."""


def to_json(value: object) -> object:
    """A dataclass, or whatever its fields may hold, as lists and dictionaries for ``json.dumps``."""
    if hasattr(value, "to_json"):
        own: object = value.to_json()
        return own
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field: getattr(value, field.name) for field in fields(value)}
        return {_key(f): to_json(x) for f, x in kept.items() if x is not None or f.default is not None}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], value: object, name: str = "") -> T:
    """The inverse of :func:`to_json`.

    Args:
        kind: the dataclass to make.
        value: what ``json.loads`` gave.
        name: the dotted name of the value, for messages.

    Raises:
        FieldError: something is missing or of another type.
    """
    return cast(T, _read(kind, value, name))


def _read(kind: object, value: object, name: str) -> object:
    """A value of any type that a field may have."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, name)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(name, value, " or ".join(map(repr, arguments)))
        return value
    if origin in (list, tuple):
        items = _of(list, value, name)
        any_length = origin is list or arguments[-1] is Ellipsis
        return origin(_read_items(arguments[:1] * len(items) if any_length else arguments, items, name))
    if origin is dict:
        entries = _of(dict, value, name).items()
        return {_read_key(arguments[0], key, name): _read(arguments[1], x, f"{name}.{key}") for key, x in entries}
    assert isinstance(kind, type), kind
    if is_dataclass(kind):
        return _read_fields(kind, value, name)
    if issubclass(kind, tuple):  # a NamedTuple
        make: Callable[..., object] = kind
        return make(*_read_items(list(_hints(kind).values()), _of(list, value, name), name))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # a bool is no int
        raise _wrong(name, value, f"a value of type {kind.__name__}")
    return value


def _read_union(kinds: Sequence[object], value: object, name: str) -> object:
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    # First the kind that fits: a list, and not the number that might stand in its place.
    errors: list[FieldError] = []
    for kind in sorted(others, key=lambda kind: not _fits(kind, value)):
        try:
            return _read(kind, value, name)
        except FieldError as error:
            errors.append(error)
    raise errors[0]


def _fits(kind: object, value: object) -> bool:
    origin: object = get_origin(kind)
    return (kind if origin is None else origin) is type(value)


def _read_items(kinds: Sequence[object], items: Sequence[object], name: str) -> list[object]:
    if len(items) != len(kinds):
        raise FieldError(f"{name} has {len(items)} entries where {len(kinds)} are expected")
    return [_read(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, items, strict=True))]


def _read_key(kind: object, key: str, name: str) -> object:
    if kind is not int:
        return key
    if not key.isdecimal():
        raise FieldError(f'{name} has the key "{key}" where a number is expected')
    return int(key)


def _read_fields(kind: type, value: object, name: str) -> object:
    values, hints = _of(dict, value, name), _hints(kind)
    known = {}
    for field in fields(kind):
        key = _key(field)
        inside = f"{name}.{key}" if name else key
        if key in values:
            known[field.name] = _read(hints[field.name], values[key], inside)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FieldError(f"{inside} is missing")
    made: object = kind(**known)
    return made


def _key(field: Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


@cache
def _hints(kind: type) -> dict[str, object]:
    return get_type_hints(kind)


def _of(kind: type[T], value: object, name: str) -> T:
    if not isinstance(value, kind):
        raise _wrong(name, value, "an object" if kind is dict else "a list")
    return value


def _wrong(name: str, value: object, expected: str) -> FieldError:
    text = repr(value)
    return FieldError(f"{name} is {text if len(text) < 60 else text[:57] + '…'} where {expected} is expected")
