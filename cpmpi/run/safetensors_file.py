"""A safetensors file that is laid out first and filled in any order, so that no tensor is ever in memory as a whole.

The library's own writer takes whole tensors. Format: 8 bytes with the header's length, the header (JSON: for each
tensor its type, shape, and where its bytes begin and end after the header), then the bytes, without gaps. Source:
https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cpmpi.run.hdf5 import RawArray, pwrite_all
from cpmpi.run.publish import published, saying

ITEMSIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
ALIGNMENT_BYTES = 8  # of the header's end: the widest type


class TensorSpec(NamedTuple):
    """Type, as safetensors calls it, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return ITEMSIZES[self.dtype] * math.prod(self.shape)


class TensorFile:
    """A file that was laid out, to be filled: ``write`` puts a run of a tensor's elements in their place."""

    def __init__(self, descriptor: int, tensors: Mapping[str, TensorSpec], offsets: Mapping[str, int]) -> None:
        self._descriptor, self._tensors, self._offsets = descriptor, tensors, offsets
        self._left = {name: spec.n_bytes for name, spec in tensors.items()}

    def write(self, name: str, first: int, values: RawArray) -> None:
        """Write contiguous ``values``, the tensor's elements from number ``first`` on in row order."""
        start = first * ITEMSIZES[self._tensors[name].dtype]
        assert 0 <= start <= start + values.nbytes <= self._tensors[name].n_bytes, (name, first, values.shape)
        pwrite_all(self._descriptor, values, self._offsets[name] + start)
        self._left[name] -= values.nbytes

    def check_full(self) -> None:
        """Every byte of every tensor was written."""
        assert not any(self._left.values()), self._left


def file_bytes(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """The size of the file."""
    return len(_header(tensors, metadata)[0]) + sum(spec.n_bytes for spec in tensors.values())


@contextmanager
def created_tensor_file(
    path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Iterator[TensorFile]:
    """Yield a new file to be filled; it appears at ``path``, whole and durable, when the block ends well.

    Raises:
        UserError: it cannot be written.
    """
    header, offsets = _header(tensors, metadata)
    with saying(path, "cannot be written"), published(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(descriptor, header)
            file = TensorFile(descriptor, tensors, offsets)
            yield file
            file.check_full()
        finally:
            os.close(descriptor)


def _header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where each tensor's bytes are: the widest types first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, at = {}, 0
    for name in sorted(tensors, key=lambda name: -ITEMSIZES[tensors[name].dtype]):  # stable
        spec = tensors[name]
        entries[name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.n_bytes],
        }  # fmt: skip
        starts[name], at = at, at + spec.n_bytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
