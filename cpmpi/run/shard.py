"""The KV of one rank in one HDF5 file, laid out in full before any of it is computed.

Shapes: ``L`` layers, ``T`` this rank's tokens of a document (its pieces one after another, in position order),
``P`` its pieces, ``B`` the blocks of tokens that these are cut into, ``G`` its KV heads, ``D`` key dim, ``E`` value
dim. A document's group ``/documents/000000`` holds

    key         (L, T, G, D)
    value       (L, T, G, E)
    pieces      (P, 2) int64    start and stop position of each piece
    checksum    (L, B, 2) uint64    xxh3_64 of the bytes of each block's key and value
    layer_done  (L,) uint8    1: the layer's bytes and checksums were all written

Where layers differ in shape there are ``key0``, ``value0``, ``key1`` and so on, each with some of the layers; the
attribute ``layers`` of each says which.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5t

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import RawArray, create_contiguous, created_file, dataset_offset, open_file, pread_all
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import make_folder, saying
from cpmpi.run.spec import BLOCK_TOKENS, Inside, KVShape, KVSpec, RunSpec, ShardSet

FORMAT = "cpmpi-shard"
FORMAT_VERSION = 2
LABELS = ("layer", "token", "head", "dim")
MOST_OPEN = 64  # shards: each takes two descriptors, of which a process may have some 1,000


def create_shard(folder: Path, spec: RunSpec, rank: int) -> Path:
    """Lay out the shard of ``rank`` for all documents that this job does. The file is sparse until it is written.

    Returns:
        The path of the file.
    """
    assert spec.kv is not None
    path = RunPaths(folder).shard(rank, spec.shard_set.number)
    make_folder(path.parent)
    own = spec.own()
    with created_file(path, most_places=len(own) * (2 + 2 * len(spec.kv.groups()))) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["set_id"] = spec.shard_set.id
        file.attrs["rank"] = rank
        file.attrs["world_size"] = spec.shard_set.world_size
        for one in own:
            _lay_out(file.create_group(document_name(one.number)), one, spec.kv, rank)
    return path


def _lay_out(group: Any, inside: Inside, kv: KVSpec, rank: int) -> None:
    pieces = inside.part.pieces(rank)
    n_tokens = sum(piece.size for piece in pieces)
    group.attrs["id"] = inside.document.id
    group.attrs["n_tokens"] = inside.part.layout.n_tokens
    group.attrs["block_tokens"] = BLOCK_TOKENS
    group.create_dataset("pieces", data=np.array(pieces, np.int64).reshape(-1, 2))
    for one in kv.groups():
        heads = inside.part.heads(rank, one.shape.heads).size
        for name, dim in ((one.key, one.shape.key_dim), (one.value, one.shape.value_dim)):
            shape = (len(one.layers), n_tokens, heads, dim)
            dataset = create_contiguous(group, name, shape, kv.stored.h5type(), labels=LABELS)
            dataset.attrs["layers"] = np.array(one.layers, np.int64)
    blocks = cut(pieces, BLOCK_TOKENS)
    create_contiguous(group, "checksum", (kv.layers, len(blocks), 2), h5t.STD_U64LE, fill=np.uint64(0))
    create_contiguous(group, "layer_done", (kv.layers,), h5t.STD_U8LE, fill=np.uint8(0))


def prepare_shard(folder: Path, spec: RunSpec, rank: int, finished: Collection[int]) -> Path:
    """The shard of ``rank`` for a new or a resumed run: kept where it exists and belongs to the run, else laid out.

    Args:
        folder: the run folder.
        spec: with what ``run.h5`` says of the shards.
        rank: whose shard.
        finished: indices of the documents that ``run.h5`` says are complete.

    Raises:
        UserError: documents are finished but their shard is missing, or is of another run.
    """
    path = RunPaths(folder).shard(rank, spec.shard_set.number)
    inside = [one for one in spec.own() if one.document_index in finished]
    if path.exists():
        try:
            ShardFile(path, spec.shard_set.id, rank).close()
            return path
        except UserError:
            if inside:
                raise
    elif inside:
        raise UserError(
            f"{path}: no such file, but {len(inside)} finished documents of the run have KV in it; "
            "put it back, or start again with --overwrite"
        )
    return create_shard(folder, spec, rank)


class Block(NamedTuple):
    """Tokens of a piece that have a checksum together."""

    row: int
    """Of its first token, on the token axis of the shard."""
    start: int
    """Position of its first token in the document."""
    stop: int


def cut(pieces: Collection[Piece], block_tokens: int) -> tuple[Block, ...]:
    """The pieces of a document in a shard, cut into blocks of at most so many tokens."""
    firsts = accumulate((piece.size for piece in pieces), initial=0)
    return tuple(
        Block(first + start - piece.start, start, min(start + block_tokens, piece.stop))
        for first, piece in zip(firsts, pieces)
        for start in range(piece.start, piece.stop, block_tokens)
    )


class LayerPlace(NamedTuple):
    """Where a layer of a document is in a shard file."""

    shape: KVShape
    """With this shard's heads."""
    key_offset: int
    value_offset: int


@dataclass(frozen=True, kw_only=True)
class ShardDocument:
    """Where a document's bytes lie in a shard file."""

    pieces: tuple[Piece, ...]
    block_tokens: int
    layers: tuple[LayerPlace, ...]
    itemsize: int
    checksum_offset: int
    layer_done_offset: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the document in this shard."""
        return sum(piece.size for piece in self.pieces)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """What checksums are for."""
        return cut(self.pieces, self.block_tokens)

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.n_tokens * sum(layer.shape.numbers for layer in self.layers) * self.itemsize


class ShardFile:
    """A shard opened for reading, past h5py: metadata once, then bytes at their offsets.

    Raises:
        UserError: the file is missing, damaged, is no shard, belongs to another run or rank, or has another size.
    """

    def __init__(self, path: Path, set_id: str, rank: int, size: int | None = None) -> None:
        """Open ``path`` and compare it with the ``set_id``, ``rank`` and ``size`` (bytes; None: any) of its run."""
        self.path = path
        actual = path.stat().st_size if path.exists() else None
        if size is not None and actual not in (None, size):
            raise UserError(f"{path}: has {actual} bytes, but the run recorded {size}: truncated or replaced")
        self._file = open_file(path)
        self._documents: dict[int, ShardDocument] = {}
        try:
            with saying(path, "cannot be read"):
                attributes = dict(self._file.attrs)
            if attributes.get("format") != FORMAT:
                raise UserError(f"{path}: not a shard of a run (format {attributes.get('format')!r}, not {FORMAT!r})")
            found = attributes.get("set_id", attributes.get("run_id"))  # version 1 had one set
            if found != set_id:
                raise UserError(f"{path}: belongs to run {found}, not to this run {set_id}")
            if attributes["rank"] != rank:
                raise UserError(f"{path}: is the shard of rank {attributes['rank']}, not of rank {rank}")
            self._descriptor = os.open(path, os.O_RDONLY)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        os.close(self._descriptor)

    def document(self, number: int) -> ShardDocument:
        """Where the document with this number lies in the file."""
        if number not in self._documents:
            name = document_name(number)
            with saying(self.path, "cannot be read"):
                if name not in self._file:
                    raise UserError(f"{self.path}: has no group {name}")
                self._documents[number] = _places(self._file[name])
        return self._documents[number]

    def read(self, data: RawArray, offset: int) -> None:
        """Fill ``data``, contiguous, with the bytes at ``offset``."""
        pread_all(self._descriptor, data, offset, self.path)

    def checksums(self, number: int) -> npt.NDArray[np.uint64]:
        """The checksum table (L, B, 2) of a document."""
        place = self.document(number)
        table = np.empty((len(place.layers), len(place.blocks), 2), np.dtype("<u8"))
        self.read(table, place.checksum_offset)
        return table

    def layers_done(self, number: int) -> npt.NDArray[np.bool_]:
        """Which layers (L,) of a document were written in full."""
        place = self.document(number)
        done = np.empty(len(place.layers), np.uint8)
        self.read(done, place.layer_done_offset)
        marked: npt.NDArray[np.bool_] = done == 1
        return marked

    def digest(self, number: int, layers: int | None = None) -> int:
        """xxh3_64 of a document's checksum table: ties all its bytes in this shard to ``run.h5``, or those of its first
        ``layers`` layers to a checkpoint."""
        return xxhash.xxh3_64_intdigest(self.checksums(number)[:layers].tobytes())


class OpenShards:
    """The shards of a run, opened when they are asked for; those not asked for longest are closed where many are open.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = RunPaths(folder)
        self._open: dict[tuple[str, int], ShardFile] = {}

    def get(self, shard_set: ShardSet, rank: int, path: Path | None = None) -> ShardFile:
        """The shard of a rank; it stays open while fewer than `MOST_OPEN` others are asked for.

        Args:
            shard_set: the set.
            rank: of the job that laid it out.
            path: where it is; None: in the run folder.

        Raises:
            UserError: it is missing, truncated, damaged, or belongs to another run.
        """
        key = (shard_set.id, rank)
        shard = self._open.pop(key, None)
        if shard is None:
            while len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            size = shard_set.sizes[rank] if shard_set.sizes and shard_set.sizes[rank] >= 0 else None  # not recorded yet
            shard = ShardFile(path or self._paths.shard(rank, shard_set.number), shard_set.id, rank, size)
        self._open[key] = shard  # now the last
        return shard

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1].close()


def _places(group: Any) -> ShardDocument:
    """Read where a document's bytes are."""
    pieces = tuple(Piece(int(start), int(stop)) for start, stop in group["pieces"][:])
    layers: dict[int, LayerPlace] = {}
    for name in sorted(name for name in group if name.startswith("key")):
        key, value = group[name], group["value" + name.removeprefix("key")]
        count, tokens, heads, key_dim = key.shape
        shape = KVShape(heads, key_dim, value.shape[3])
        key_offset, value_offset = dataset_offset(key), dataset_offset(value)
        itemsize = key.id.get_type().get_size()
        for i, layer in enumerate(key.attrs.get("layers", range(count))):
            row = i * tokens * heads * itemsize
            layers[int(layer)] = LayerPlace(shape, key_offset + row * key_dim, value_offset + row * shape.value_dim)
    whole = max((piece.size for piece in pieces), default=1)  # version 1 had a checksum per piece
    return ShardDocument(
        pieces=pieces,
        block_tokens=int(group.attrs.get("block_tokens", whole)),
        layers=tuple(layers[layer] for layer in range(len(layers))),
        itemsize=itemsize,
        checksum_offset=dataset_offset(group["checksum"]),
        layer_done_offset=dataset_offset(group["layer_done"]),
    )
