"""The documents that ``--input`` names, as token ids, checked before any other work starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.documents.input_files import InputFile, find_input_files
from cpmpi.documents.tokenization import load_tokenizer, tokenize
from cpmpi.errors import UserError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Document:
    """One document of a run."""

    id: str
    """Its name, unique in the run."""
    source: str
    """The file it came from, with ``:`` and the line number for one of a .jsonl file."""
    token_ids: npt.NDArray[np.int32]
    """(T,), at least one, read-only."""


class _Found(NamedTuple):
    """A document as its file has it."""

    id: str
    source: str
    content: str | npt.NDArray[np.int32]


def read_documents(
    inputs: Sequence[str | Path],
    *,
    checkpoint: Path,
    vocab_size: int,
    special_tokens: bool | None = None,
    progress: Progress | None = None,
) -> list[Document]:
    """All documents of ``inputs``, in the order given; every file is checked before the first text is tokenized.

    - ``.jsonl``: a document per line, ``{"id": ..., "text": ...}`` or ``{"id": ..., "token_ids": [...]}``; other keys
      are not read, blank lines are skipped.
    - ``.npy``: one document, a 1-D array of integer token ids.
    - any other file: one document, UTF-8 text exactly as stored, line ends and all, but for a byte order mark.

    Which files a folder or glob means, and their names, which are the ids: see ``find_input_files``.

    Arguments:
        inputs: files, folders and globs.
        checkpoint: the folder with the tokenizer; not looked at where all inputs are token ids.
        vocab_size: the model's; every id must be below it.
        special_tokens: whether the tokenizer adds its special tokens; None leaves that to the tokenizer.
        progress: called after each text with the characters tokenized so far, and of all.

    Raises:
        UserError: an input is missing, empty, broken or ambiguous; the message names file, line and numbers.
    """
    files = find_input_files(inputs)
    found = [document for file in files for document in _read(file, vocab_size)]
    for document in found:
        _check_name(document.id, f"{document.source!a}: the document's name")
        _check_name(document.source, f"{document.source!a}: the file's name")
    _check_ids_differ(found)
    characters = sum(len(d.content) for d in found if isinstance(d.content, str))
    tokenizer = load_tokenizer(checkpoint) if characters else None
    documents, done = [], 0
    for id, source, content in found:
        if isinstance(content, str):
            token_ids = tokenize(tokenizer, content, special_tokens)
            _check_token_ids(token_ids, vocab_size, f"{source}: document {id!r}")
            done += len(content)
            if progress:
                progress(done, characters)
        else:
            token_ids = content
        token_ids.setflags(write=False)
        documents.append(Document(id=id, source=source, token_ids=token_ids))
    return documents


def _read(file: InputFile, vocab_size: int) -> Iterator[_Found]:
    try:
        if file.path.stat().st_size == 0:
            raise UserError(f"{file.path}: the file is empty")
        match file.path.suffix.lower():
            case ".jsonl":
                yield from _read_jsonl(file.path, vocab_size)
            case ".npy":
                yield _Found(file.name, str(file.path), _read_npy(file, vocab_size))
            case _:
                yield _Found(file.name, str(file.path), _read_text(file.path))
    except OSError as error:
        raise UserError(f"{file.path}: {error.strerror}") from error


def _read_text(path: Path) -> str:
    text = _decode(path.read_bytes(), 0, path).removeprefix("\ufeff")
    if not text:
        raise UserError(f"{path}: no text but a byte order mark")
    return text


def _decode(data: bytes, offset: int, path: Path) -> str:
    """The text of ``data``, which stands at byte ``offset`` of the file."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise UserError(f"{path}: not text: a zero byte at byte {offset + nul}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"0x{data[error.start]:02x} at byte {offset + error.start}"
        raise UserError(f"{path}: not UTF-8 text: {bad} ({error.reason}); convert it with iconv") from error


def _read_npy(file: InputFile, vocab_size: int) -> npt.NDArray[np.int32]:
    try:
        with file.path.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), "no data")
        raise UserError(f"{file.path}: not a .npy file of numbers: {reason}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        shape = f"shape {array.shape} and dtype {array.dtype}"
        raise UserError(f"{file.path}: token ids must be a 1-D array of integers; this one has {shape}")
    _check_token_ids(array, vocab_size, f"{file.path}: document {file.name!r}")
    return array.astype(np.int32)


def _read_jsonl(path: Path, vocab_size: int) -> Iterator[_Found]:
    count = offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = _decode(line, offset, path)
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.strip():
                count += 1
                yield _read_record(text.rstrip("\r\n"), f"{path}:{number}", vocab_size)
    if not count:
        raise UserError(f"{path}: no documents: all lines are blank")


def _read_record(line: str, source: str, vocab_size: int) -> _Found:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or an integer of too many digits
        raise UserError(f"{source}: not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f'{source}: must be an object with "id" and "text" or "token_ids", not {_kind(record)}')
    if "id" not in record:
        raise UserError(f'{source}: no "id"; its keys are {", ".join(map(repr, record)) or "none"}')
    id = record["id"]
    if not isinstance(id, str) or not id:
        raise UserError(f'{source}: "id" must be a string that is not empty, not {_kind(id)}')
    _check_encodable(id, f'{source}: "id"')
    given = [key for key in ("text", "token_ids") if key in record]
    if len(given) != 1:
        both = "both" if given else "neither"
        raise UserError(f'{source}: document {id!r} must have one of "text" and "token_ids", not {both}')
    if given == ["text"]:
        return _Found(id, source, _checked_text(record["text"], f'{source}: "text" of document {id!r}'))
    integers = _checked_integers(record["token_ids"], f'{source}: "token_ids" of document {id!r}')
    _check_token_ids(integers, vocab_size, f"{source}: document {id!r}")
    return _Found(id, source, np.array(integers, dtype=np.int32))


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where} must be a string, not {_kind(text)}")
    if not text:
        raise UserError(f"{where} is empty")
    _check_encodable(text, where)
    return text


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is no character
        raise UserError(f"{where} has half a surrogate pair at character {error.start}") from error


def _check_name(name: str, where: str) -> None:
    """Refuse a name that HDF5 cannot hold."""
    if "\0" in name:
        raise UserError(f"{where} has a zero byte")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8: {name[error.start]!a} at character {error.start}") from error


def _checked_integers(values: Any, where: str) -> list[int]:
    if not isinstance(values, list):
        raise UserError(f"{where} must be a list of integers, not {_kind(values)}")
    for index, value in enumerate(values):
        if type(value) is not int:  # bool is a subclass
            raise UserError(f"{where} must be a list of integers; item {index} is {_kind(value)}")
    return values


def _kind(value: Any) -> str:
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


def _check_token_ids(ids: npt.NDArray[np.integer] | list[int], vocab_size: int, where: str) -> None:
    if len(ids) == 0:
        raise UserError(f"{where} has no tokens")
    if np.min(ids) < 0 or np.max(ids) >= vocab_size:
        index, value = next((i, value) for i, value in enumerate(ids) if not 0 <= value < vocab_size)
        allowed = f"the vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}"
        raise UserError(f"{where} has token id {value} at index {index}: {allowed}")


def _check_ids_differ(found: list[_Found]) -> None:
    sources: dict[str, str] = {}
    for document in found:
        if document.id in sources:
            raise UserError(
                f"two documents have the id {document.id!r}: {sources[document.id]} and {document.source}; "
                "rename one, or give both ids of their own in a .jsonl file"
            )
        sources[document.id] = document.source
