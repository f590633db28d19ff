"""Plain frozen dataclasses to JSON and back, with errors that name the place in the file."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any


def plain(value: Any) -> Any:
    """``value`` as JSON data: dataclasses become objects without the fields that hold their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        }
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def build(expected: Any, data: Any, where: str) -> Any:
    """The inverse of :func:`plain`: an object of the type ``expected`` from JSON data.

    Args:
        expected: a frozen dataclass, ``tuple[X, ...]``, str, int, float, bool, or one of them ``| None``.
        data: what ``json.loads`` returned.
        where: what the data is, for error messages: ``nodes[3].gpus[0]``.

    Raises:
        ValueError: an unknown or missing field, a value of another type, or a check of the dataclass itself.
    """
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else build(typing.get_args(expected)[0], data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where}: expected a list, found {_shown(data)}")
        return tuple(build(typing.get_args(expected)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _object(expected, data, where)
    right = isinstance(data, expected) and (expected is bool or not isinstance(data, bool))
    if expected is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not right:
        raise ValueError(f"{where}: expected {expected.__name__}, found {_shown(data)}")
    return data


def _object(expected: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, found {_shown(data)}")
    hints = typing.get_type_hints(expected)
    fields = {field.name: field for field in dataclasses.fields(expected)}
    _known(data, list(fields), where)
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data]
    if missing:
        raise ValueError(f"{where}: missing field {missing[0]!r}")
    values = {name: build(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return expected(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _known(names: dict[str, Any], choices: Sequence[str], where: str) -> None:
    for name in names:
        if name not in choices:
            raise ValueError(f"{where}: unknown field {name!r}; the fields are {', '.join(choices)}")


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else text[:37] + "..."
