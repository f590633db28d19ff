"""How each kind of file becomes documents: text, .jsonl, .json, .npy. Tables have a file of their own.

Every reader yields documents and, in place of one that cannot be read, a `UserError`: the others of the file are good.
It raises where the file as a whole is not.
"""

from __future__ import annotations

import json
import math
import tokenize
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cpmpi.documents.content import is_stream, kind_by_content, open_input, suffix_of
from cpmpi.documents.input_files import InputFile
from cpmpi.documents.records import Columns, Found, check_token_ids, document_of, kind
from cpmpi.errors import UserError, one_line
from cpmpi.text import shown

Outcome = Found | UserError


def read_file(file: InputFile, columns: Columns, vocab_size: int) -> Iterator[Outcome]:
    """The documents of a file, in its order.

    Raises:
        UserError: the file is empty, damaged or of another kind than its name says.
        OSError: it cannot be read.
    """
    suffix = suffix_of(file)
    if suffix in (".parquet", ".arrow") or (not is_stream(file) and file.path.is_dir()):
        from cpmpi.documents.tables import read_table

        yield from read_table(file, columns, vocab_size)
        return
    with open_input(file) as stream:
        if is_stream(file) and not suffix:
            suffix = _kind_of_stream(stream)
        match suffix:
            case ".jsonl":
                yield from _read_jsonl(stream, file, columns, vocab_size)
            case ".json":
                yield from _read_json(stream, file, columns, vocab_size)
            case ".npy":
                yield Found(file.name, file.source, _read_npy(stream, file, vocab_size))
            case ".parquet" | ".arrow":
                raise UserError(f"{file.shown}: {suffix} comes through no pipe: give the file")
            case _:
                yield Found(file.name, file.source, _read_text(stream, file))


def _kind_of_stream(stream: BinaryIO) -> str:
    """The suffix that fits what came: documents in JSON are never taken for text."""
    data = stream.read()
    stream.seek(0)
    if suffix := kind_by_content(data):
        return suffix
    text = data.lstrip(b"\xef\xbb\xbf \t\r\n")
    try:
        if text[:1] == b"[" and all(isinstance(item, dict) for item in json.loads(text)):
            return ".json"
        if text[:1] == b"{" and isinstance(json.loads(text.split(b"\n", 1)[0]), dict):
            return ".jsonl"
    except (ValueError, RecursionError):
        pass
    return ""


def _read_text(stream: BinaryIO, file: InputFile) -> str:
    text = _decode(stream.read(), 0, file).removeprefix("\ufeff")
    if not text:
        raise UserError(f"{file.shown}: no text but a byte order mark")
    return text


def _decode(data: bytes, offset: int, file: InputFile) -> str:
    """The text of ``data``, which stands at byte ``offset`` of the file."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise UserError(f"{file.shown}: not text: a zero byte at byte {offset + nul}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"0x{data[error.start]:02x} at byte {offset + error.start}"
        raise UserError(f"{file.shown}: not UTF-8 text: {bad} ({error.reason}); convert it with iconv") from error


def _read_npy(stream: BinaryIO, file: InputFile, vocab_size: int) -> npt.NDArray[np.int32]:
    where = f"{file.shown}: not a .npy file of numbers"
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except (ValueError, EOFError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise UserError(
            f"{file.shown}: token ids must be a 1-D array of integers; this one has shape {shape} and dtype {dtype}"
        )
    data, needed = stream.read(), math.prod(shape) * dtype.itemsize
    if len(data) != needed:  # a header can claim any number
        raise UserError(f"{where}: its header asks for {needed:,} bytes of numbers, {len(data):,} are there")
    array = np.frombuffer(data, dtype)
    check_token_ids(array, vocab_size, f"{file.shown}: document '{shown(file.name)}'")
    return array.astype(np.int32)


def _read_jsonl(stream: BinaryIO, file: InputFile, columns: Columns, vocab_size: int) -> Iterator[Outcome]:
    offset, count = 0, 0
    for number, line in enumerate(stream, start=1):
        try:
            text = _decode(line, offset, file)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            count += 1
            record = _parsed(text.rstrip("\r\n"), f"{file.shown}:{number}")
            yield document_of(record, f"{file.name}:{number}", f"{file.source}:{number}", columns, vocab_size)
        except UserError as problem:
            count += 1
            yield problem
        finally:
            offset += len(line)
    if not count:
        raise UserError(f"{file.shown}: no documents: all lines are blank")


def _read_json(stream: BinaryIO, file: InputFile, columns: Columns, vocab_size: int) -> Iterator[Outcome]:
    records = _parsed(_decode(stream.read(), 0, file).removeprefix("\ufeff"), file.shown)
    if not isinstance(records, list):
        raise UserError(f"{file.shown}: must be a list of documents, not {kind(records)}; an object per line is .jsonl")
    if not records:
        raise UserError(f"{file.shown}: no documents: the list is empty")
    for place, record in enumerate(records):
        try:
            yield document_of(record, f"{file.name}:{place}", f"{file.source}: item {place}", columns, vocab_size)
        except UserError as problem:
            yield problem


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        more = "; name it .jsonl if it has an object per line" if line and error.msg == "Extra data" else ""
        raise UserError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}{more}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or an integer of too many digits
        raise UserError(f"{where}: not JSON that can be read: {error}") from error
