"""Arrays and texts in few characters: how a page carries its numbers, and no word of a document as HTML.

A block is base64 of a zlib stream of: the length of a header (uint32), the header (JSON), the bytes of each section.
The header lists for each section its name, type, shape, first byte and number of bytes. Numbers of several bytes lie in
planes, all lowest bytes first: so they deflate to about two thirds. `page/data.js` reads it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

TYPES = {"uint8": "u8", "uint16": "u16", "uint32": "u32", "int32": "i32", "float16": "f16", "float32": "f32"}
LEVEL = 6


def packed(sections: Mapping[str, Any]) -> str:
    """A block of arrays of the ``TYPES``, of texts, and of anything else as JSON."""
    head, parts, at = [], [], 0
    for name, value in sections.items():
        kind, shape, data = _bytes_of(value)
        head.append([name, kind, shape, at, len(data)])
        parts.append(data)
        at += len(data)
    header = json.dumps(head).encode()
    stream = zlib.compressobj(LEVEL)
    first = stream.compress(len(header).to_bytes(4, "little") + header)
    body = b"".join([first, *map(stream.compress, parts), stream.flush()])
    return base64.b64encode(body).decode()


def _bytes_of(value: Any) -> tuple[str, list[int], bytes]:
    """The type, shape and bytes of a section."""
    if isinstance(value, str):
        return "text", [], value.encode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        planes = np.ascontiguousarray(value).reshape(-1).view(np.uint8).reshape(-1, value.itemsize).T
        return TYPES[value.dtype.name], list(value.shape), planes.tobytes()
    return "json", [], json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def smallest(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers that are not negative, in the smallest type that holds them.

    Raises:
        OverflowError: one is negative, or too large for 32 bits.
    """
    lowest, highest = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for kind, most in ((np.uint8, 0xFF), (np.uint16, 0xFFFF), (np.uint32, 0xFFFFFFFF)):
        if lowest >= 0 and highest <= most:
            return array.astype(kind)
    raise OverflowError(f"{lowest} to {highest}")


def halves(array: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    """Numbers in float16: three digits, which is what a page shows."""
    return np.asarray(np.clip(array, -65504, 65504), np.float16)


def plain(value: float, digits: int = 9) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
