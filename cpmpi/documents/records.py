"""What a record (a line of .jsonl, an item of .json, a row of a table) must be to be a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.errors import UserError, some
from cpmpi.text import shown

TEXT_OR_TOKENS = ("text", "token_ids", "input_ids")  # one of them, where none is named
ID = "id"


def numbered_lines(path: str, about: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers.

    Raises:
        UserError: it cannot be read, or is not UTF-8; the text begins with ``about``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{about}: {getattr(problem, 'strerror', None) or problem}") from problem
    yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


class Found(NamedTuple):
    """A document as its file has it."""

    id: str
    source: str
    content: str | npt.NDArray[np.int32]


class Columns(NamedTuple):
    """The fields of a record with its id and its text or token ids; None: the usual ones."""

    id: str | None = None
    content: str | None = None

    def of(self, present: Sequence[str], where: str) -> tuple[str | None, str]:
        """The field with the id, None where there is none, and the one with the content.

        Raises:
            UserError: a field that was named is missing, or there is none of the usual ones, or several.
        """
        have = f"it has {some([quoted(name) for name in present], 12) or 'none'}"
        for option, name in (("--id-column", self.id), ("--column", self.content)):
            if name is not None and name not in present:
                raise UserError(f"{where} has no {quoted(name)} ({option}); {have}")
        usual = [name for name in TEXT_OR_TOKENS if name in present]
        content = self.content or (usual[0] if len(usual) == 1 else None)
        if content is None and usual:
            raise UserError(f"{where} has {' and '.join(map(quoted, usual))}: choose with --column")
        if content is None:
            raise UserError(f"{where} has none of {', '.join(map(quoted, TEXT_OR_TOKENS))} (or --column); {have}")
        return self.id or (ID if ID in present else None), content


def quoted(name: str) -> str:
    """The name of a field."""
    return f'"{shown(name, 80)}"'


def document_of(record: Any, name: str, source: str, columns: Columns, vocab_size: int) -> Found:
    """The document of a JSON record.

    Args:
        record: what was read.
        name: its id unless it brings one.
        source: where it stands, for messages.
        columns: which of its fields count.
        vocab_size: every token id must be below it.

    Raises:
        UserError: it is no document; the message names source and field.
    """
    where = shown(source)
    if not isinstance(record, Mapping):
        raise UserError(f'{where}: must be an object with "text" or "token_ids", not {kind(record)}')
    id_field, field = columns.of(list(record), f"{where}: the document")
    id = name if id_field is None else checked_id(record[id_field], f'{where}: "{id_field}"')
    value, document = record[field], f"document '{shown(id)}'"
    if isinstance(value, list):
        check_integers(value, f'{where}: "{field}" of {document}')
        check_token_ids(value, vocab_size, f"{where}: {document}")
        return Found(id, source, np.array(value, dtype=np.int32))
    if not isinstance(value, str):
        raise UserError(f'{where}: "{field}" of {document} must be a string or a list of integers, not {kind(value)}')
    check_text(value, f'{where}: "{field}" of {document}')
    return Found(id, source, value)


def checked_id(value: Any, where: str) -> str:
    """An id as text: a string as it is, an integer as its decimal digits, so that ``17`` and ``"17"`` are the same.

    Raises:
        UserError: it is neither, or one that HDF5 cannot hold.
    """
    if type(value) is int:  # bool is a subclass
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} must be an integer or a string that is not empty, not {kind(value)}")
    check_name(value, where)
    return value


def check_name(name: str, where: str) -> None:
    """Refuse a name that HDF5 cannot hold."""
    if "\0" in name:
        raise UserError(f"{where} has a zero byte")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8: {name[error.start]!a} at character {error.start}") from error


def check_text(text: str, where: str) -> None:
    """Refuse a text that is empty or has no UTF-8."""
    if not text:
        raise UserError(f"{where} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is no character
        raise UserError(f"{where} has half a surrogate pair at character {error.start}") from error


def check_integers(values: list[Any], where: str) -> None:
    """Refuse what is no integer."""
    for index, value in enumerate(values):
        if type(value) is not int:  # bool is a subclass
            raise UserError(f"{where} must be a list of integers; item {index} is {kind(value)}")


def check_token_ids(ids: npt.NDArray[np.integer] | list[int], vocab_size: int, where: str) -> None:
    """Refuse no tokens at all, and ids that are not in the vocabulary."""
    if len(ids) == 0:
        raise UserError(f"{where} has no tokens")
    if np.min(ids) < 0 or np.max(ids) >= vocab_size:
        index, value = next((i, value) for i, value in enumerate(ids) if not 0 <= value < vocab_size)
        allowed = f"the vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}"
        raise UserError(f"{where} has token id {value} at index {index}: {allowed}")


def kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    if value == "":
        return "an empty string"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a fraction",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
