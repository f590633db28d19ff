"""The keys and values of a document in a set of shards: who has which of them, and their checksums.

Shapes: ``L`` layers, ``B`` blocks of tokens, ``G`` KV heads, ``D`` key dim, ``E`` value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from cpmpi.attention.layout import Piece
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import RawArray, StoredFloat
from cpmpi.run.layer_reader import Rows, Source, read_layer
from cpmpi.run.shard import ShardFile
from cpmpi.run.spec import KVShape, Part


@dataclass(frozen=True, kw_only=True)
class ShardedKV:
    """The layers of a document, or of a part of it, in a set of shards: all of them, or the first ones, which are done.

    Args:
        name: the document's id, for error messages.
        part: the tokens, as they were dealt to the ranks of the set.
        number: of the document there.
        stored: the type of the numbers.
        shapes: (KV heads, key dim, value dim) of every layer.
        shard: opens the shard of a rank.
        digest: what was recorded of a rank's checksums, xxh3_64.
        recorded_in: which file says so.
        done: how many layers it was recorded of; None: of all.
    """

    name: str
    part: Part
    number: int
    shapes: Sequence[KVShape]
    stored: StoredFloat
    shard: Callable[[int], ShardFile]
    digest: Callable[[int], int]
    recorded_in: str
    done: int | None = None
    _tables: dict[int, npt.NDArray[np.uint64]] = field(default_factory=dict)

    @property
    def ranks(self) -> range:
        """Those of the set to which the document was dealt."""
        return range(self.part.first_rank, self.part.first_rank + self.part.n_ranks)

    def sources(
        self, layer: int, first: int, last: int, *, heads: Piece | None = None, verify: bool = True
    ) -> Iterator[Source]:
        """What shards hold of the positions ``first .. last`` of a layer, and of these of its KV heads.

        Raises:
            UserError: a shard is missing or damaged, or not laid out as it was recorded.
        """
        for rank in self.ranks:
            held = self.part.heads(rank, self.shapes[layer].heads)
            if heads is not None and not (held.start < heads.stop and heads.start < held.stop):
                continue
            if any(piece.start < last and first < piece.stop for piece in self.part.pieces(rank)):
                shard = self.shard(rank)
                self._check_layout(shard, rank, layer)
                yield Source(
                    shard=shard, place=shard.document(self.number), layer=layer, heads=held, document=self.name,
                    raw=self.stored.raw, checksums_B2=self._checksums(rank)[layer] if verify else None,
                )  # fmt: skip

    def read(self, layer: int, pieces: Sequence[Piece], heads: Piece) -> tuple[RawArray, RawArray]:
        """The bits of a layer's keys and values, of some heads and of these tokens, one piece after another.

        Returns:
            key_TGD and value_TGE, contiguous.

        Raises:
            UserError: a shard is missing or damaged.
        """
        _, *dims = self.shapes[layer]
        tokens = sum(piece.size for piece in pieces)
        key_TGD, value_TGE = (np.empty((tokens, heads.size, dim), self.stored.raw) for dim in dims)
        row = 0
        for piece in pieces:
            into = key_TGD[row : row + piece.size], value_TGE[row : row + piece.size]
            read_layer(self.sources(layer, *piece, heads=heads), Rows(piece.start, heads, into))
            row += piece.size
        return key_TGD, value_TGE

    def check(self, rank: int) -> None:
        """Whether a shard has what was recorded of it, as far as its checksums tell: their own digest.

        Raises:
            UserError: it is missing, or damaged, or layers were not written in full.
        """
        shard = self.shard(rank)
        undone = np.flatnonzero(~shard.layers_done(self.number)[: self.done])
        if len(undone):
            raise UserError(f"{shard.path}: KV of layers {undone.tolist()} is not whole")
        for layer in range(len(self.shapes)):
            self._check_layout(shard, rank, layer)
        self._checksums(rank)

    def _check_layout(self, shard: ShardFile, rank: int, layer: int) -> None:
        place, heads = shard.document(self.number), self.part.heads(rank, self.shapes[layer].heads)
        shape = self.shapes[layer]._replace(heads=heads.size)
        if place.pieces != self.part.pieces(rank) or place.layers[layer].shape != shape:
            raise UserError(f"{shard.path}: damaged: document {self.name!r} is not laid out as in {self.recorded_in}")

    def _checksums(self, rank: int) -> npt.NDArray[np.uint64]:
        """The checksum table (L, B, 2) in a shard, which is the one whose digest was recorded."""
        if rank not in self._tables:
            shard = self.shard(rank)
            table = shard.checksums(self.number)[: self.done]
            if xxhash.xxh3_64_intdigest(table.tobytes()) != self.digest(rank):
                raise UserError(
                    f"{shard.path}: document {self.name!r}: its checksums are not those that "
                    f"{self.recorded_in} recorded"
                )
            self._tables[rank] = table
        return self._tables[rank]
