"""What a run will hold, known before any work starts: everything that decides the layout of its files."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout, Piece
from cpmpi.errors import UserError
from cpmpi.run.extras import Extra
from cpmpi.run.hdf5 import ALIGNMENT_BYTES, STORED_FLOATS, StoredFloat
from cpmpi.text import counted, human_bytes
from cpmpi.version import __version__

# Upper estimates of what HDF5 needs besides the numbers.
FILE_METADATA_BYTES = 64 << 10
DOCUMENT_METADATA_BYTES = 8 << 10
DATASET_METADATA_BYTES = 1 << 10
VIRTUAL_BLOCK_METADATA_BYTES = 512
# A read checks whole blocks: little enough for a slice of a few tokens, enough that checksums are few.
BLOCK_TOKENS = 1024
# The group of what was appended to a document, in its own.
APPENDED = "appended"
# Attributes of a continuation of a stored document.
CONTINUES = ("context_run_id", "context_document", "context_tokens", "question", "answer", "question_sha256")
# Attributes of a document that was given as text: how much of it there is, and how much of that its nll is of.
TEXT = ("n_characters", "n_bytes", "scored_characters", "scored_bytes")


class KVShape(NamedTuple):
    """The shape of a token's keys and values in one layer."""

    heads: int
    """KV heads (the G of grouped-query attention)."""
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """How many numbers they are."""
        return self.heads * (self.key_dim + self.value_dim)


class KVGroup(NamedTuple):
    """The layers whose keys and values have one shape: they share a pair of datasets."""

    key: str
    """Name of the dataset of the keys."""
    value: str
    shape: KVShape
    layers: tuple[int, ...]
    """The layer at each place of the datasets' first axis."""


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """The shapes and the type of the stored keys and values.

    Raises:
        UserError: the type is not one that is stored.
    """

    shapes: tuple[KVShape, ...]
    """Of every layer."""
    dtype: str = "bfloat16"
    """The type in the file: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        if self.dtype not in STORED_FLOATS:
            raise UserError(f"KV type {self.dtype!r} is not one of {', '.join(STORED_FLOATS)}")
        assert self.shapes, self
        assert min(map(min, self.shapes)) >= 1, self

    @classmethod
    def alike(cls, layers: int, heads: int, key_dim: int, value_dim: int, dtype: str = "bfloat16") -> KVSpec:
        """Layers that all have the same shape."""
        return cls(shapes=(KVShape(heads, key_dim, value_dim),) * layers, dtype=dtype)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.shapes)

    @property
    def stored(self) -> StoredFloat:
        """The stored type."""
        return STORED_FLOATS[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers together."""
        return sum(shape.numbers for shape in self.shapes) * self.stored.itemsize

    def groups(self) -> tuple[KVGroup, ...]:
        """The datasets: ``key`` and ``value``, or ``key0``, ``value0``, ``key1`` and so on where shapes differ."""
        shapes = list(dict.fromkeys(self.shapes))
        names = [""] if len(shapes) == 1 else [str(number) for number in range(len(shapes))]
        layers = [tuple(i for i, one in enumerate(self.shapes) if one == shape) for shape in shapes]
        return tuple(KVGroup(f"key{n}", f"value{n}", *rest) for n, rest in zip(names, zip(shapes, layers)))


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A file per rank of the job that laid them out. A run has several sets where several jobs did its documents."""

    world_size: int
    number: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Ties the files to their ``run.h5``."""
    sizes: tuple[int, ...] = ()
    """Bytes of each file; -1, or empty, until they are laid out."""


class Origin(NamedTuple):
    """How a document that is finished was done."""

    world_size: int
    """Ranks of the job."""
    shard_set: int = 0
    """Where its keys and values are."""
    number: int = 0
    """Its number in these shards."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is scored, given what, and what is kept of it: a run that goes on must ask for the same.

    Attributes:
        keep: the scores besides log-probabilities, in one spelling; empty: none.
        scored_from: position of the first token that is scored, where something predicts it.
        prefix_token: how what comes before the first token was chosen: ``tokenizer``, ``none``, ``bos`` or an id.
        prefix_token_id: the token before the first one, which is no token of the document; -1: none.
        spans: the parts of the text that are summed over; empty: none.
        context, stride: of windows: how many tokens they have, and how far apart they begin; 0: whole documents.
    """

    keep: str = ""
    scored_from: int = 0
    prefix_token: str = "tokenizer"
    prefix_token_id: int = -1
    spans: str = ""
    context: int = 0
    stride: int = 0

    @property
    def prefix(self) -> int:
        """How many tokens come before the first one: 0 or 1."""
        return int(self.prefix_token_id >= 0)

    @property
    def first(self) -> int:
        """The first token that is scored."""
        return max(self.scored_from, 1 - self.prefix)

    @property
    def windows(self) -> str:
        """In words, what windows documents are scored in; empty: they are scored as wholes."""
        if not self.context:
            return ""
        seen = f"{self.context - self.stride + 1:,} to {self.context:,} before each"
        return f"windows of {counted(self.context, 'token')}, stride {self.stride:,}: {seen}"


PLAIN = Scoring()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens of a document that one job did: how they lie on its ranks, and in which shards."""

    layout: Layout
    """Over the positions of a head group."""
    grid: Grid = field(default_factory=Grid)
    """How ranks share heads and tokens."""
    first_rank: int = 0
    """The world rank that is rank 0 of the grid: a short document may use only some of the ranks."""
    origin: Origin | None = None
    """None: it is for this job to do."""
    id: str = ""
    """The name of a text that was appended."""
    token_ids_sha256: str = ""
    """``token_digest`` of its token ids."""

    @property
    def n_ranks(self) -> int:
        """Ranks among which the tokens are dealt."""
        return self.layout.world * self.grid.head_groups

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The non-empty pieces of world rank ``rank``, in position order."""
        place = rank - self.first_rank
        return self.layout.pieces(self.grid.position(place)) if 0 <= place < self.n_ranks else ()

    def heads(self, rank: int, kv_heads: int) -> Piece:
        """Which of the KV heads world rank ``rank`` holds."""
        assert kv_heads % self.grid.head_groups == 0, (kv_heads, self.grid)
        each = kv_heads // self.grid.head_groups
        first = self.grid.group(rank - self.first_rank) * each
        return Piece(first, first + each)


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
    """With those that were appended."""
    layout: Layout
    """This, ``grid``, ``first_rank`` and ``origin`` are of the tokens that were there at first; see `Part`."""
    grid: Grid = field(default_factory=Grid)
    first_rank: int = 0
    token_ids_sha256: str = ""
    """``token_digest`` of the token ids; empty: unknown, so that it cannot be found finished."""
    origin: Origin | None = None
    """None: it is for this job to do."""
    appended: tuple[Part, ...] = ()
    """What later jobs added."""
    first_sha256: str = ""
    """``token_digest`` of the tokens that were there at first, where some were added."""
    scored: bool = True
    """Whether its log-probabilities are known; not where its keys and values alone were imported. Those of appended
    tokens always are."""
    continues: tuple[tuple[str, str | int], ...] = ()
    """Of a continuation: what it follows, as the attributes of ``CONTINUES`` with their values."""
    text: tuple[tuple[str, int], ...] = ()
    """Of a document given as text: the attributes of ``TEXT`` with their values."""
    extras: tuple[Extra, ...] = ()
    """Datasets besides the outputs."""

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise UserError(f"document {self.id!r} ({self.source}) has no tokens")
        stops = [part.layout.start + part.layout.n_tokens for part in self.parts]
        assert [part.layout.start for part in self.parts] == [0, *stops[:-1]], self
        assert stops[-1] - self.n_tokens in ((0,) if self.appended else (0, 1)), self  # 1: a prefix token
        assert {name for name, _ in self.continues} <= {*CONTINUES}, self.continues

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of it, in position order."""
        first = Part(layout=self.layout, grid=self.grid, first_rank=self.first_rank, origin=self.origin)
        return first, *self.appended

    @property
    def n_ranks(self) -> int:
        """Ranks among which the first part is dealt."""
        return self.parts[0].n_ranks

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The pieces of world rank ``rank`` in the first part; see `Part.pieces`."""
        return self.parts[0].pieces(rank)

    def heads(self, rank: int, kv_heads: int) -> Piece:
        """Which of the KV heads world rank ``rank`` holds of the first part."""
        return self.parts[0].heads(rank, kv_heads)

    def first_scored(self, scoring: Scoring) -> int:
        """The first token that has a log-probability; see `Document.first_scored`."""
        if not self.scored:
            return self.layout.n_tokens
        return 0 if self.continues else min(scoring.first, self.n_tokens)

    @property
    def contents(self) -> tuple[tuple[int, str], ...]:
        """What it is, whatever its name and place, as number and digest of tokens; then what it was at first."""
        now = (self.n_tokens, self.token_ids_sha256)
        return (now, (self.layout.n_tokens, self.first_sha256)) if self.appended else (now,)


class Inside(NamedTuple):
    """A part of a document in a set of shards."""

    number: int
    """Of the document there."""
    document_index: int
    """Place of the document in the run."""
    document: DocumentSpec
    part: Part


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
    """Ranks of this job."""
    hidden_size: int
    documents: tuple[DocumentSpec, ...]
    set_aside: tuple[DocumentSpec, ...] = ()
    """Finished documents that are no longer asked for."""
    scoring: Scoring = PLAIN
    """What is scored and kept of every document."""
    shard_set: ShardSet = ShardSet(world_size=0)
    """The shards of this job; made where none is given."""
    earlier_sets: tuple[ShardSet, ...] = ()
    """Those of other jobs, in which finished documents are."""
    model_path: str = ""
    """The checkpoint's folder, absolute, as the job saw it."""
    topology: str = "{}"
    """The machine, JSON."""
    command: str = ""
    version: str = __version__
    """The version of cpmpi that made the run."""
    """Where the checkpoint is."""
    files: tuple[tuple[str, str], ...] = ()
    """Of the checkpoint: name and digest of each, to say which one changed."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of one layout of ``run.h5``. Made once, on rank 0; when a run is resumed, the one in the file holds."""

    def __post_init__(self) -> None:
        assert min(self.world_size, self.hidden_size) >= 1, (self.world_size, self.hidden_size)
        if not self.shard_set.world_size:
            object.__setattr__(self, "shard_set", ShardSet(world_size=self.world_size))
        if not self.documents:
            raise UserError("there are no documents to work on")
        twice = [repr(name) for name, count in Counter(d.id for d in self.documents).items() if count > 1]
        if twice:
            raise UserError(f"document ids must differ, but these occur more than once: {', '.join(twice[:5])}")
        for document in self.documents:
            positions = sum(part.layout.n_tokens for part in document.parts)
            assert positions == document.n_tokens + self.scoring.prefix, (document, self.scoring)
            for part in document.parts:
                assert 0 <= part.first_rank <= self.world_of(part) - part.n_ranks, document

    def world_of(self, part: DocumentSpec | Part) -> int:
        """Ranks of the job that does a part of a document, or did it."""
        return self.world_size if part.origin is None else part.origin.world_size

    def place(self, part: DocumentSpec | Part, index: int) -> tuple[ShardSet, int]:
        """The shards of a part of the document at place ``index``, and its number in them: its place, unless it is
        older."""
        if part.origin is None:
            return self.shard_set, index
        sets = {one.number: one for one in (*self.earlier_sets, self.shard_set)}
        return sets[part.origin.shard_set], part.origin.number

    def own(self) -> list[Inside]:
        """What is, or will be, in the shards of this job."""
        found = []
        for i, document in enumerate(self.documents):
            for part in document.parts:
                shard_set, number = self.place(part, i)
                if shard_set.number == self.shard_set.number:
                    found.append(Inside(number, i, document, part))
        return found

    def used_sets(self) -> list[ShardSet]:
        """The sets of shards that the run names."""
        return [*self.earlier_sets, *([self.shard_set] if self.own() else [])]


def token_digest(token_ids: npt.ArrayLike) -> str:
    """SHA-256 of token ids (T,) as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def shard_bytes(spec: RunSpec, rank: int) -> int:
    """Bytes of the shard of ``rank``: KV, a pair of checksums per block and layer, and HDF5's metadata."""
    if spec.kv is None:
        return 0
    total = FILE_METADATA_BYTES
    for *_, part in spec.own():
        pieces = part.pieces(rank)
        tokens = sum(piece.size for piece in pieces)
        checksums = 16 * sum(-(-piece.size // BLOCK_TOKENS) for piece in pieces)
        total += tokens * spec.kv.bytes_per_token // part.grid.head_groups
        total += spec.kv.layers * (checksums + 1 + 8) + 16 * len(pieces)
        total += DOCUMENT_METADATA_BYTES + 2 * len(spec.kv.groups()) * (DATASET_METADATA_BYTES + ALIGNMENT_BYTES)
    return total


def index_bytes(spec: RunSpec) -> int:
    """Bytes of ``run.h5``: outputs, the map of the virtual datasets, and HDF5's metadata."""
    total = FILE_METADATA_BYTES + len(spec.model) + len(spec.topology) + len(spec.command) + len(spec.model_path)
    total += 128 * len(spec.files)
    total += 64 * sum(one.world_size for one in (*spec.earlier_sets, spec.shard_set))
    for document in (*spec.documents, *spec.set_aside):
        total += 9 * document.n_tokens + 4 * spec.hidden_size + DOCUMENT_METADATA_BYTES + 3 * ALIGNMENT_BYTES
        total += sum(e.n_bytes + 2 * DATASET_METADATA_BYTES + ALIGNMENT_BYTES for e in document.extras)
        if spec.kv is not None:
            blocks = sum(part.n_ranks * part.layout.segments for part in document.parts)
            each = blocks * VIRTUAL_BLOCK_METADATA_BYTES + DATASET_METADATA_BYTES
            total += 2 * len(spec.kv.groups()) * each + 8 * (sum(map(spec.world_of, document.parts)) + spec.kv.layers)
            total += DOCUMENT_METADATA_BYTES * len(document.appended)
    return total


def checkpoint_bytes(spec: RunSpec, token_bytes: int) -> int:
    """Bytes of checkpoints inside documents, of all ranks together: the next one beside the last.

    Args:
        spec: of the run; documents that are finished have none.
        token_bytes: of a token's hidden state; 0: there are none.
    """
    longest = max((document.n_tokens for document in spec.documents if document.origin is None), default=0)
    return 2 * (longest * token_bytes + spec.world_size * FILE_METADATA_BYTES) if longest and token_bytes else 0


def check_room(folder: Path, needed: int, checkpoints: int = 0) -> None:
    """Refuse, before any work, a run that cannot fit. Quotas are not seen here; they show when they are hit.

    Args:
        folder: the run folder; it need not exist yet.
        needed: bytes to be written there, of all ranks together.
        checkpoints: how many of them are for checkpoints.

    Raises:
        UserError: the file system has less room than that.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        of_it = f", {human_bytes(checkpoints)} of it for checkpoints," if checkpoints else ","
        off = "--checkpoint off, " if checkpoints else ""
        raise UserError(
            f"{folder}: the run needs {human_bytes(needed)} ({needed} bytes){of_it} but its file system has "
            f"{human_bytes(free)} ({free} bytes) free; choose another --output, a smaller --kv-dtype, {off}or "
            "`cpmpi score`, which keeps no KV"
        )
