"""Plain frozen dataclasses to JSON and back, with errors that name the place in the file.

Tuples of whole numbers, which are lists of cores here, are written as Linux writes them: ``"0-3,8"``.
"""

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
    if isinstance(value, tuple) and value and all(type(item) is int for item in value):
        return ranges(value)
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
    if origin is tuple and typing.get_args(expected)[0] is int and isinstance(data, str):
        return _numbers(data, where)
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


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in Linux' list format: 0, 1, 2, 3, 8 is ``0-3,8``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def numbers(text: str) -> tuple[int, ...]:
    """The inverse of :func:`ranges`.

    Raises:
        ValueError: the text is not in that format.
    """
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def _numbers(text: str, where: str) -> tuple[int, ...]:
    try:
        return numbers(text)
    except ValueError:
        raise ValueError(f"{where}: expected numbers such as '0-3,8', found {_shown(text)}") from None


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
