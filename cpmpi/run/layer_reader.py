"""Reads keys and values of a layer from shards into rows of an array, and compares them with their checksums.

A checksum is of a block of tokens (in runs of format version 1: of a whole piece), so a slice reads the blocks that it
begins and ends in whole. Blocks are read by several threads: a checksum costs little while the bytes are in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import xxhash

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import RawArray
from cpmpi.run.shard import MOST_OPEN, Block, ShardDocument, ShardFile

CHUNK_BYTES = 1 << 18  # stays in a core's own cache between the read and the checksum
THREADS = min(8, len(os.sched_getaffinity(0)))
PARTS = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a shard holds of a layer of a document."""

    shard: ShardFile
    place: ShardDocument
    layer: int
    heads: Piece
    """Of the layer's KV heads."""
    document: str
    """Its id, for error messages."""
    checksums_B2: npt.NDArray[np.uint64] | None
    """Of the layer; None: nothing is compared."""

    def read_block(self, number: int, part: int, first: int, rows_TGD: RawArray) -> None:
        """Read what is wanted of a block's keys (part 0) or values (1) into the rows, whose first position is given.

        Raises:
            UserError: the block does not have its checksum, or the file ends before.
        """
        block = self.place.blocks[number]
        start, stop = max(block.start, first), min(block.stop, first + len(rows_TGD))
        wanted = rows_TGD[start - first : stop - first, slice(*self.heads)]
        if self.checksums_B2 is None:
            read = np.ascontiguousarray(wanted)  # the rows themselves where a shard has all heads
            self.shard.read(read, self._offset(part, block.row + start - block.start, wanted.shape[2]))
            _put(read, wanted)
            return
        whole = wanted.shape[0] == block.stop - block.start and wanted.flags.c_contiguous
        read = wanted if whole else np.empty((block.stop - block.start, *wanted.shape[1:]), wanted.dtype)
        checksum = self._read_summed(read, self._offset(part, block.row, wanted.shape[2]))
        if checksum != self.checksums_B2[number, part]:
            raise UserError(
                f"{self.shard.path}: document {self.document!r}: layer {self.layer}: {PARTS[part]} of tokens "
                f"{block.start} to {block.stop - 1} does not have its checksum"
            )
        _put(read if whole else read[start - block.start : stop - block.start], wanted)

    def overlapping(self, first: int, last: int) -> list[int]:
        """Numbers of the blocks with positions in ``first .. last``."""
        return [i for i, block in enumerate(self.place.blocks) if _overlap(block, first, last)]

    def _offset(self, part: int, row: int, dim: int) -> int:
        place = self.place.layers[self.layer]
        return (place.key_offset, place.value_offset)[part] + row * place.shape.heads * dim * self.place.itemsize

    def _read_summed(self, read: RawArray, offset: int) -> int:
        data, checksum = read.reshape(-1).view(np.uint8), xxhash.xxh3_64()
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            self.shard.read(chunk, offset + start)
            checksum.update(chunk.data)
        return checksum.intdigest()


def read_layer(sources: Iterable[Source], first: int, key_TGD: RawArray, value_TGE: RawArray) -> None:
    """Fill the rows, which are positions ``first`` and following, from all shards that hold some of them."""
    sources = iter(sources)
    while some := list(islice(sources, MOST_OPEN // 2)):  # those before may be closed when further shards are opened
        _read_from(some, first, key_TGD, value_TGE)


def _read_from(sources: Sequence[Source], first: int, key_TGD: RawArray, value_TGE: RawArray) -> None:
    last = first + len(key_TGD)
    work = [
        (source, number, part, rows)
        for source in sources
        for number in source.overlapping(first, last)
        for part, rows in enumerate((key_TGD, value_TGE))
    ]
    if len(work) <= 2:
        for source, number, part, rows in work:
            source.read_block(number, part, first, rows)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda one: one[0].read_block(one[1], one[2], first, one[3]), work):
            pass


def _overlap(block: Block, first: int, last: int) -> bool:
    return block.start < last and first < block.stop


def _put(read: RawArray, wanted: RawArray) -> None:
    if read is not wanted:
        wanted[...] = read
