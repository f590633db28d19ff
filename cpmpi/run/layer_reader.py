"""Reads keys and values of a layer from shards into rows of an array, and compares them with their checksums.

A checksum is of a block of tokens (in runs of format version 1: of a whole piece), so a slice reads the blocks that it
begins and ends in whole. Blocks are read by several threads: a checksum costs little while the bytes are in the cache,
and so does another type. What is wanted as it is stored goes straight to its rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import RawArray
from cpmpi.run.shard import MOST_OPEN, Block, ShardDocument, ShardFile

CHUNK_BYTES = 1 << 20  # stays in a core's own cache between the read and the checksum; less costs more calls
THREADS = min(8, len(os.sched_getaffinity(0)))
PARTS = ("key", "value")


def copy_bits(stored_TGD: RawArray, wanted_TGD: RawArray) -> None:
    """Put stored bits into rows of the same type."""
    wanted_TGD[...] = stored_TGD


class Rows(NamedTuple):
    """Where keys and values go.

    Attributes:
        first: position of the first row.
        heads: the KV heads that they have.
        into: keys (T, g, D) and values (T, g, E): arrays of the stored bits, or with ``put`` what slices alike.
        put: takes stored bits (n, g, D), and the rows that they belong to.
    """

    first: int
    heads: Piece
    into: tuple[Any, Any]
    put: Callable[[RawArray, Any], None] = copy_bits


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a shard holds of a layer of a document."""

    shard: ShardFile
    place: ShardDocument
    layer: int
    heads: Piece
    """Of the layer's KV heads."""
    raw: np.dtype[Any]
    """The type of the stored bits."""
    document: str
    """Its id, for error messages."""
    checksums_B2: npt.NDArray[np.uint64] | None
    """Of the layer; None: nothing is compared."""

    def read_block(self, number: int, part: int, rows: Rows) -> None:
        """Read what is wanted of a block's keys (part 0) or values (1) into the rows.

        Raises:
            UserError: the block does not have its checksum, or the file ends before.
        """
        into, block = rows.into[part], self.place.blocks[number]
        start, stop = max(block.start, rows.first), min(block.stop, rows.first + len(into))
        low, high = max(self.heads.start, rows.heads.start), min(self.heads.stop, rows.heads.stop)
        if low >= high:
            return
        wanted = into[start - rows.first : stop - rows.first, low - rows.heads.start : high - rows.heads.start]
        if self.checksums_B2 is None:
            block = Block(block.row + start - block.start, start, stop)
        whole = (start, stop, low, high) == (block.start, block.stop, *self.heads)
        direct = whole and rows.put is copy_bits and wanted.flags.c_contiguous
        checksum, offset, shape = xxhash.xxh3_64(), *self._bytes_of(block.row, part)
        row_bytes = shape[0] * shape[1] * self.place.itemsize
        step = max(1, CHUNK_BYTES // row_bytes)
        for first in range(block.start, block.stop, step):
            last = min(first + step, block.stop)
            data = wanted[first - start : last - start] if direct else _scratch((last - first, *shape), self.raw)
            self.shard.read(data, offset + (first - block.start) * row_bytes)
            if self.checksums_B2 is not None:
                checksum.update(data.reshape(-1).view(np.uint8).data)
            a, b = max(first, start), min(last, stop)
            if a < b and not direct:
                mine = data[a - first : b - first, low - self.heads.start : high - self.heads.start]
                rows.put(mine, wanted[a - start : b - start])
        if self.checksums_B2 is not None and checksum.intdigest() != self.checksums_B2[number, part]:
            raise UserError(
                f"{self.shard.path}: document {self.document!r}: layer {self.layer}: {PARTS[part]} of tokens "
                f"{block.start} to {block.stop - 1} does not have its checksum"
            )

    def overlapping(self, first: int, last: int) -> list[int]:
        """Numbers of the blocks with positions in ``first .. last``."""
        return [i for i, block in enumerate(self.place.blocks) if _overlap(block, first, last)]

    def _bytes_of(self, row: int, part: int) -> tuple[int, tuple[int, int]]:
        """Where a row of the keys or values begins in the shard, and its shape (g, D)."""
        place = self.place.layers[self.layer]
        dim = (place.shape.key_dim, place.shape.value_dim)[part]
        offset = (place.key_offset, place.value_offset)[part] + row * place.shape.heads * dim * self.place.itemsize
        return offset, (place.shape.heads, dim)


def read_layer(sources: Iterable[Source], rows: Rows, pool: Executor | None = None) -> None:
    """Fill the rows from all shards that hold some of them, by the threads of a pool, or of one for this call."""
    sources = iter(sources)
    with nullcontext(pool) if pool is not None else ThreadPoolExecutor(THREADS) as used:
        while some := list(islice(sources, MOST_OPEN // 2)):  # those before may be closed when further ones are opened
            _read_from(some, rows, used)


def _read_from(sources: Sequence[Source], rows: Rows, pool: Executor) -> None:
    first, last = rows.first, rows.first + len(rows.into[0])
    work = [
        (source, number, part) for source in sources for number in source.overlapping(first, last) for part in (0, 1)
    ]

    def read(one: tuple[Source, int, int]) -> None:
        source, number, part = one
        source.read_block(number, part, rows)

    if len(work) <= 2:
        for one in work:
            read(one)
        return
    for _ in pool.map(read, work):
        pass


def _overlap(block: Block, first: int, last: int) -> bool:
    return block.start < last and first < block.stop


_local = threading.local()


def _scratch(shape: tuple[int, ...], raw: np.dtype[Any]) -> RawArray:
    """An array of this thread, used again: fresh memory costs more than reading into it."""
    size = int(np.prod(shape)) * raw.itemsize
    if len(getattr(_local, "buffer", ())) < size:
        _local.buffer = np.empty(size, np.uint8)
    array: RawArray = _local.buffer[:size].view(raw).reshape(shape)
    return array
