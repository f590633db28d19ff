"""The KV of one rank in one HDF5 file, laid out in full before any of it is computed.

Shapes: ``L`` layers, ``T`` this rank's tokens of a document (its pieces one after another, in position order),
``P`` its pieces, ``G`` its KV heads, ``D`` key dim, ``E`` value dim. A document's group ``/documents/000000`` holds

    key         (L, T, G, D)
    value       (L, T, G, E)
    pieces      (P, 2) int64    start and stop position of each piece
    checksum    (L, P, 2) uint64    xxh3_64 of the bytes of each piece's key and value
    layer_done  (L,) uint8    1: the layer's bytes and checksums were all written
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5t

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import RawArray, create_contiguous, created_file, dataset_offset, open_file, pread_all
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import make_folder
from cpmpi.run.spec import DocumentSpec, KVSpec, RunSpec

FORMAT = "cpmpi-shard"
FORMAT_VERSION = 1
LABELS = ("layer", "token", "head", "dim")


def create_shard(folder: Path, spec: RunSpec, rank: int) -> Path:
    """Lay out the shard of ``rank`` for all documents of a run that keeps KV. The file is sparse until it is written.

    Returns:
        The path of the file.
    """
    assert spec.kv is not None
    paths = RunPaths(folder)
    make_folder(paths.shards)
    with created_file(paths.shard(rank)) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["run_id"] = spec.run_id
        file.attrs["rank"] = rank
        file.attrs["world_size"] = spec.world_size
        for index, document in enumerate(spec.documents):
            _lay_out(file.create_group(document_name(index)), document, spec.kv, rank)
    return paths.shard(rank)


def _lay_out(group: Any, document: DocumentSpec, kv: KVSpec, rank: int) -> None:
    pieces = np.array(document.pieces(rank), np.int64).reshape(-1, 2)
    n_tokens = int((pieces[:, 1] - pieces[:, 0]).sum())
    group.attrs["id"] = document.id
    group.attrs["n_tokens"] = document.n_tokens
    group.create_dataset("pieces", data=pieces)
    heads = document.heads(rank, kv.heads).size
    for name, dim in (("key", kv.key_dim), ("value", kv.value_dim)):
        create_contiguous(group, name, (kv.layers, n_tokens, heads, dim), kv.stored.h5type(), labels=LABELS)
    create_contiguous(group, "checksum", (kv.layers, len(pieces), 2), h5t.STD_U64LE, fill=np.uint64(0))
    create_contiguous(group, "layer_done", (kv.layers,), h5t.STD_U8LE, fill=np.uint8(0))


def prepare_shard(folder: Path, spec: RunSpec, rank: int, finished: Collection[int]) -> Path:
    """The shard of ``rank`` for a new or a resumed run: kept where it exists and belongs to the run, else laid out.

    Args:
        folder: the run folder.
        spec: with the run id that is in ``run.h5``.
        rank: whose shard.
        finished: indices of the documents that ``run.h5`` says are complete.

    Raises:
        UserError: documents are finished but their shard is missing, or is of another run.
    """
    path = RunPaths(folder).shard(rank)
    if path.exists():
        try:
            ShardFile(path, spec.run_id, rank).close()
            return path
        except UserError:
            if finished:
                raise
    elif finished:
        raise UserError(
            f"{path}: no such file, but {len(finished)} finished documents of the run have KV in it; "
            "put it back, or start again with --overwrite"
        )
    return create_shard(folder, spec, rank)


@dataclass(frozen=True, kw_only=True)
class ShardDocument:
    """Where a document's bytes lie in a shard file."""

    pieces: tuple[Piece, ...]
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    key_offset: int
    value_offset: int
    checksum_offset: int
    layer_done_offset: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the document in this shard."""
        return sum(piece.size for piece in self.pieces)

    def firsts(self) -> list[int]:
        """For each piece, the row of its first token on the token axis of this shard."""
        return [sum(piece.size for piece in self.pieces[:i]) for i in range(len(self.pieces))]


class ShardFile:
    """A shard opened for reading, past h5py: metadata once, then bytes at their offsets.

    Raises:
        UserError: the file is missing, is no shard, belongs to another run or rank, or has another size.
    """

    def __init__(self, path: Path, run_id: str, rank: int, size: int | None = None) -> None:
        """Open ``path`` and compare it with the ``run_id``, ``rank`` and ``size`` (bytes; None: any) of its run."""
        self.path = path
        self._file = open_file(path)
        self._documents: dict[int, ShardDocument] = {}
        try:
            found = self._file.attrs.get("format")
            if found != FORMAT:
                raise UserError(f"{path}: not a shard of a run (format {found!r}, expected {FORMAT!r})")
            if self._file.attrs["run_id"] != run_id:
                raise UserError(f"{path}: belongs to run {self._file.attrs['run_id']}, not to this run {run_id}")
            if self._file.attrs["rank"] != rank:
                raise UserError(f"{path}: is the shard of rank {self._file.attrs['rank']}, not of rank {rank}")
            actual = path.stat().st_size
            if size is not None and actual != size:
                raise UserError(f"{path}: has {actual} bytes, but the run recorded {size}: truncated or replaced")
            self._descriptor = os.open(path, os.O_RDONLY)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        os.close(self._descriptor)

    def document(self, index: int) -> ShardDocument:
        """Where document ``index`` lies in the file."""
        if index not in self._documents:
            name = document_name(index)
            if name not in self._file:
                raise UserError(f"{self.path}: has no group {name}")
            group = self._file[name]
            layers, _, heads, key_dim = group["key"].shape
            self._documents[index] = ShardDocument(
                pieces=tuple(Piece(int(start), int(stop)) for start, stop in group["pieces"][:]),
                layers=layers,
                heads=heads,
                key_dim=key_dim,
                value_dim=group["value"].shape[3],
                key_offset=dataset_offset(group["key"]),
                value_offset=dataset_offset(group["value"]),
                checksum_offset=dataset_offset(group["checksum"]),
                layer_done_offset=dataset_offset(group["layer_done"]),
            )
        return self._documents[index]

    def read(self, data: RawArray, offset: int) -> None:
        """Fill ``data``, contiguous, with the bytes at ``offset``."""
        pread_all(self._descriptor, data, offset, self.path)

    def checksums(self, index: int) -> npt.NDArray[np.uint64]:
        """The checksum table (L, P, 2) of a document."""
        place = self.document(index)
        table = np.empty((place.layers, len(place.pieces), 2), np.dtype("<u8"))
        self.read(table, place.checksum_offset)
        return table

    def layers_done(self, index: int) -> npt.NDArray[np.bool_]:
        """Which layers (L,) of a document were written in full."""
        place = self.document(index)
        done = np.empty(place.layers, np.uint8)
        self.read(done, place.layer_done_offset)
        return done.astype(np.bool_)

    def digest(self, index: int) -> int:
        """xxh3_64 of a document's checksum table: ties all its bytes in this shard to ``run.h5``."""
        return xxhash.xxh3_64_intdigest(self.checksums(index).tobytes())
