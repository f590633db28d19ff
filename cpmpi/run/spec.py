"""What a run will hold, known before any work starts: everything that decides the layout of its files."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout, Piece
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import ALIGNMENT_BYTES, STORED_FLOATS, StoredFloat
from cpmpi.run.paths import RunPaths
from cpmpi.text import human_bytes
from cpmpi.version import __version__

# Upper estimates of what HDF5 needs besides the numbers.
FILE_METADATA_BYTES = 64 << 10
DOCUMENT_METADATA_BYTES = 8 << 10
VIRTUAL_BLOCK_METADATA_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """The shape and type of the stored keys and values, the same in every layer.

    Raises:
        UserError: the type is not one that is stored.
    """

    layers: int
    heads: int
    """KV heads (the G of grouped-query attention)."""
    key_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    """The type in the file: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        if self.dtype not in STORED_FLOATS:
            raise UserError(f"KV type {self.dtype!r} is not one of {', '.join(STORED_FLOATS)}")
        assert min(self.layers, self.heads, self.key_dim, self.value_dim) >= 1, self

    @property
    def stored(self) -> StoredFloat:
        """The stored type."""
        return STORED_FLOATS[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return self.heads * (self.key_dim + self.value_dim) * self.stored.itemsize


@dataclass(frozen=True, kw_only=True)
class DocumentSpec:
    """One document and how its tokens lie on the ranks.

    Raises:
        UserError: the document has no tokens.
    """

    id: str
    source: str
    """Where the text came from: a path, or a path and line."""
    n_tokens: int
    layout: Layout
    """Over the positions of a head group."""
    grid: Grid = field(default_factory=Grid)
    """How ranks share heads and tokens."""
    first_rank: int = 0
    """The world rank that is rank 0 of the grid: a short document may use only some of the ranks."""
    token_ids_sha256: str = ""
    """``token_digest`` of the token ids; empty: not checked when a run is resumed."""

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise UserError(f"document {self.id!r} ({self.source}) has no tokens")
        assert self.layout.n_tokens == self.n_tokens, (self.layout, self.n_tokens)
        assert self.layout.start == 0, self.layout

    @property
    def n_ranks(self) -> int:
        """Ranks among which the document is dealt."""
        return self.layout.world * self.grid.head_groups

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The non-empty pieces of world rank ``rank``, in position order."""
        place = rank - self.first_rank
        return self.layout.pieces(self.grid.position(place)) if 0 <= place < self.n_ranks else ()

    def heads(self, rank: int, kv_heads: int) -> Piece:
        """Which of the KV heads world rank ``rank`` holds."""
        each = kv_heads // self.grid.head_groups
        first = self.grid.group(rank - self.first_rank) * each
        return Piece(first, first + each)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides the files of a run.

    Raises:
        UserError: there is no document, or two have the same id.
    """

    model: str
    """The model's configuration, JSON."""
    model_sha256: str
    tokenizer_sha256: str
    dtype: str
    """The type that the model computed in."""
    kv: KVSpec | None
    """None: only outputs are kept, and there are no shard files."""
    world_size: int
    hidden_size: int
    documents: tuple[DocumentSpec, ...]
    topology: str = "{}"
    """The machine, JSON."""
    command: str = ""
    version: str = __version__
    """The version of cpmpi that made the run."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Ties the shards to their ``run.h5``. Made once, on rank 0; when a run is resumed, the one in the file holds."""

    def __post_init__(self) -> None:
        assert min(self.world_size, self.hidden_size) >= 1, (self.world_size, self.hidden_size)
        if not self.documents:
            raise UserError("there are no documents to work on")
        twice = [repr(name) for name, count in Counter(d.id for d in self.documents).items() if count > 1]
        if twice:
            raise UserError(f"document ids must differ, but these occur more than once: {', '.join(twice[:5])}")
        for document in self.documents:
            assert 0 <= document.first_rank <= self.world_size - document.n_ranks, document


def token_digest(token_ids: npt.ArrayLike) -> str:
    """SHA-256 of token ids (T,) as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def needed_bytes(spec: RunSpec, rank: int) -> int:
    """Bytes that ``rank`` will write: its shard, and for rank 0 also ``run.h5`` (a few KiB a document too many)."""
    return shard_bytes(spec, rank) + (index_bytes(spec) if rank == 0 else 0)


def shard_bytes(spec: RunSpec, rank: int) -> int:
    """Bytes of the shard of ``rank``: KV, a checksum pair per piece and layer, and HDF5's metadata."""
    if spec.kv is None:
        return 0
    total = FILE_METADATA_BYTES
    for document in spec.documents:
        pieces = document.pieces(rank)
        tokens = sum(piece.size for piece in pieces)
        token_bytes = spec.kv.token_bytes // document.grid.head_groups
        total += spec.kv.layers * (tokens * token_bytes + 16 * len(pieces) + 1) + 16 * len(pieces)
        total += DOCUMENT_METADATA_BYTES + 2 * ALIGNMENT_BYTES
    return total


def index_bytes(spec: RunSpec) -> int:
    """Bytes of ``run.h5``: outputs, the map of the virtual datasets, and HDF5's metadata."""
    total = FILE_METADATA_BYTES + len(spec.model) + len(spec.topology) + len(spec.command) + 64 * spec.world_size
    for document in spec.documents:
        total += 8 * document.n_tokens + 4 * spec.hidden_size + DOCUMENT_METADATA_BYTES + 3 * ALIGNMENT_BYTES
        if spec.kv is not None:
            blocks = document.n_ranks * document.layout.segments
            total += 2 * blocks * VIRTUAL_BLOCK_METADATA_BYTES + 8 * spec.world_size
    return total


def bytes_to_write(folder: Path, spec: RunSpec, rank: int) -> int:
    """``needed_bytes`` less what is on disk already: a run that is resumed needs room only for the rest."""
    paths = RunPaths(folder)
    written = [paths.shard(rank), *([paths.index] if rank == 0 else [])]
    on_disk = sum(path.stat().st_blocks * 512 for path in written if path.exists())
    return max(0, needed_bytes(spec, rank) - on_disk)


def check_room(folder: Path, needed: int) -> None:
    """Refuse, before any work, a run that cannot fit. Quotas are not seen here; they show when they are hit.

    Args:
        folder: the run folder; it need not exist yet.
        needed: bytes to be written there, of all ranks together (the sum of ``bytes_to_write``).

    Raises:
        UserError: the file system has less room than that.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder}: the run needs {human_bytes(needed)} ({needed} bytes), but its file system has "
            f"{human_bytes(free)} ({free} bytes) free; choose another --output, a smaller --kv-dtype, or "
            "`cpmpi score`, which keeps no KV"
        )
