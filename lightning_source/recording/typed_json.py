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
# What `json` reads and writes: scalars, lists and dictionaries of them.
Json = Any


class FieldError(ValueError):
    """A value is missing, or not of its field's type; the message begins with the dotted name of the field."""


def to_json(value: object) -> Json:
    """A dataclass, or whatever its fields may hold, as lists and dictionaries."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field: getattr(value, field.name) for field in fields(value)}
        return {_key(f): to_json(x) for f, x in kept.items() if x is not None or f.default is not None}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], value: Json, name: str = "") -> T:
    """The inverse of :func:`to_json`.

    Args:
        kind: the dataclass to make, or any type that a field may have.
        value: what ``json.loads`` gave.
        name: the dotted name of the value, for messages.

    Raises:
        FieldError: something is missing or of another type.
    """
    return cast(T, _read(kind, value, name))


def _read(kind: Any, value: Json, name: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, name)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(name, value, " or ".join(map(repr, arguments)))
        return value
    if origin in (list, tuple):
        return _read_list(origin, arguments, value, name)
    if origin is dict:
        keys, values = arguments
        items = _of(dict, value, name).items()
        return {_read_key(keys, key, name): _read(values, item, f"{name}.{key}") for key, item in items}
    if is_dataclass(kind):
        return _read_record(kind, value, name)
    if issubclass(kind, tuple):  # a NamedTuple
        make: Callable[..., object] = kind
        return make(*_items(list(_hints(kind).values()), _of(list, value, name), name))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # a bool is no int
        raise _wrong(name, value, "null" if kind is types.NoneType else f"a value of type {kind.__name__}")
    return value


def _read_union(kinds: tuple[Any, ...], value: Json, name: str) -> object:
    for kind in kinds:
        if kind is types.NoneType and value is None:
            return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    errors: list[FieldError] = []
    for kind in sorted(others, key=lambda kind: kind is not type(value)):
        try:
            return _read(kind, value, name)
        except FieldError as error:
            errors.append(error)
    # The one error that says most of what is wrong is that from deepest inside.
    raise max(errors, key=lambda error: len(str(error).split(" ", 1)[0]))


def _read_list(origin: Any, kinds: tuple[Any, ...], value: Json, name: str) -> object:
    items = _of(list, value, name)
    any_length = origin is list or kinds[-1] is Ellipsis
    return origin(_items(kinds[:1] * len(items) if any_length else kinds, items, name))


def _items(kinds: Sequence[Any], items: Sequence[Json], name: str) -> list[object]:
    if len(items) != len(kinds):
        raise FieldError(f"{name} has {len(items)} entries where {len(kinds)} are expected")
    return [_read(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, items, strict=True))]


def _read_key(kind: Any, key: str, name: str) -> object:
    if kind is not int:
        return key
    if not key.isdecimal():
        raise FieldError(f'{name} has the key "{key}" where a number is expected')
    return int(key)


def _read_record(kind: Any, value: Json, name: str) -> object:
    values, hints = _of(dict, value, name), _hints(kind)
    known = {}
    for field in fields(kind):
        key = _key(field)
        inside = f"{name}.{key}" if name else key
        if key in values:
            known[field.name] = _read(hints[field.name], values[key], inside)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FieldError(f"{inside} is missing")
    return kind(**known)


def _key(field: Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _of(kind: type[T], value: Json, name: str) -> T:
    if not isinstance(value, kind):
        raise _wrong(name, value, "an object" if kind is dict else "a list")
    return value


def _wrong(name: str, value: Json, expected: str) -> FieldError:
    text = repr(value)
    return FieldError(f"{name} is {text if len(text) < 60 else text[:57] + '…'} where {expected} is expected")
