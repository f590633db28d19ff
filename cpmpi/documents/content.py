"""The bytes of an input: of a file, a pipe or standard input, decompressed."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

from cpmpi.documents.input_files import COMPRESSED, STANDARD_INPUT, InputFile
from cpmpi.errors import UserError

# How a file of each kind begins, for what has no name that tells.
MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\x93NUMPY": ".npy",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
LAUNCHER_VARIABLE = "PRTE_LAUNCHED"  # of Open MPI's launcher since version 5
CHUNK_BYTES = 1 << 24


def is_stream(file: InputFile) -> bool:
    """Whether it is a pipe or standard input, which can be read once, from its beginning to its end."""
    return file.path == STANDARD_INPUT or stat.S_ISFIFO(file.path.stat().st_mode)


def suffix_of(file: InputFile) -> str:
    """The suffix that tells what a file holds, in lower case, that of its compression left out."""
    path = Path(file.name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_input(file: InputFile) -> BinaryIO:
    """The file's bytes, decompressed; what is compressed is read to its end first, where its checksum is.

    Raises:
        UserError: it is empty, damaged or cut short.
        OSError: it cannot be read.
    """
    stream: io.BufferedReader | io.BytesIO
    if is_stream(file):
        data = _standard_input() if file.path == STANDARD_INPUT else file.path.read_bytes()
        stream = io.BytesIO(_unpacked(data, _packing(file) or kind_by_content(data), file))
    elif packing := _packing(file):
        stream = io.BytesIO(_unpacked(file.path.read_bytes(), packing, file))
    else:
        stream = file.path.open("rb")
    empty = not stream.peek(1) if isinstance(stream, io.BufferedReader) else not stream.getbuffer().nbytes
    if empty:
        stream.close()
        raise UserError(f"{file.shown}: {'nothing came' if is_stream(file) else 'the file is empty'}")
    return stream


def _standard_input() -> bytes:
    """All that comes.

    Open MPI's launcher (tried: 5.0.11) never passes its end on to the ranks, and its users report that parts of what is
    longer than 64 KB come again and again: reading it would wait for ever, or get another text.

    Raises:
        UserError: this process was started by that launcher.
    """
    if LAUNCHER_VARIABLE in os.environ:
        raise UserError(
            "standard input: Open MPI's launcher does not pass it on as it is: use a file, or mkfifo's pipe"
        )
    return sys.stdin.buffer.read()


def _packing(file: InputFile) -> str:
    """How its name says that a file is compressed."""
    suffix = file.path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def kind_by_content(data: bytes) -> str:
    """The suffix of files that begin as ``data`` does; nothing where it may be text."""
    return next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), "")


def _unpacked(data: bytes, packing: str, file: InputFile) -> bytes:
    match packing:
        case ".gz":
            return _gunzipped(data, file)
        case ".zst":
            return _unzstd(data, file)
        case _:
            return data


def _gunzipped(data: bytes, file: InputFile) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise UserError(f"{file.shown}: cut short: its gzip data has no end (it has {len(data):,} bytes)") from error
    except (OSError, zlib.error) as error:
        raise UserError(f"{file.shown}: not good gzip data: {error}") from error


def _unzstd(data: bytes, file: InputFile) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{file.shown}: .zst files need zstandard: pip install 'cpmpi[data]'") from error
    # A reader of streams takes the end of the file for the end of the data: only this one tells them apart.
    parts, at, frame = [], 0, zstandard.ZstdDecompressor().decompressobj()
    try:
        while at < len(data):
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            chunk = data[at : at + CHUNK_BYTES]
            parts.append(frame.decompress(chunk))
            at += len(chunk) - len(frame.unused_data)
    except zstandard.ZstdError as error:
        raise UserError(f"{file.shown}: not good zstd data: {error}") from error
    if data and not frame.eof:
        raise UserError(f"{file.shown}: cut short: its zstd data has no end (it has {len(data):,} bytes)")
    return b"".join(parts)
