"""What a checkpoint's manifest says: of which document and layer it is, its files, and where the KV so far lies.

The manifest names every file of the hidden state with its size and the xxh3_64 of its checksums, and the shards with
the KV of the finished layers with that of theirs; it carries a checksum of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout
from cpmpi.errors import UserError, one_line
from cpmpi.run.spec import DocumentSpec, Origin, RunSpec, ShardSet

FORMAT = "cpmpi-checkpoint"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the manifest says of one rank's file.

    Attributes:
        name: relative to the run folder.
        size: bytes.
        digest: xxh3_64 of its checksums.
    """

    name: str
    size: int
    digest: int


@dataclass(frozen=True, kw_only=True)
class KVPlace:
    """Where the KV of the layers that are done lies, and how it was dealt there; names as in ``run.h5``.

    Attributes:
        set_id, shard_set, world_size: of the set of shards.
        shard_document: the document's number in it.
        segments, n_ranks, first_rank, tp, head_groups: how its tokens and heads were dealt.
        digests: of every shard, xxh3_64 of the checksums of these layers.
    """

    set_id: str
    shard_set: int
    world_size: int
    shard_document: int
    segments: int
    n_ranks: int
    first_rank: int
    tp: int
    head_groups: int
    digests: tuple[int, ...]

    @staticmethod
    def of(run: RunSpec, index: int, digests: Sequence[int]) -> KVPlace:
        """Where a job puts the KV of the document at place ``index``."""
        document = run.documents[index]
        shard_set, number = run.place(document, index)
        return KVPlace(
            set_id=shard_set.id, shard_set=shard_set.number, world_size=shard_set.world_size, shard_document=number,
            segments=document.layout.segments, n_ranks=document.n_ranks, first_rank=document.first_rank,
            tp=document.grid.tp, head_groups=document.grid.head_groups, digests=tuple(digests),
        )  # fmt: skip

    @property
    def shards(self) -> ShardSet:
        """The set of shards."""
        return ShardSet(world_size=self.world_size, number=self.shard_set, id=self.set_id)

    def dealt(self, document: DocumentSpec) -> DocumentSpec:
        """The document as it was dealt there."""
        return replace(
            document,
            layout=Layout(
                n_tokens=document.n_tokens, world=self.n_ranks // self.head_groups, segments=self.segments
            ),
            grid=Grid(tp=self.tp, head_groups=self.head_groups),
            first_rank=self.first_rank,
            origin=Origin(world_size=self.world_size, shard_set=self.shard_set, number=self.shard_document),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole checkpoint.

    Attributes:
        identity: of the document, see `identity_of`.
        layer: the last layer that is done.
        attention: the attention that comes next: so many layers' KV are done.
        n_tokens: of the document.
        shape, dtype: of a token's hidden state.
        seconds: of work on the document so far.
        parts: by rank.
        kv: where the KV of the layers so far is; None where none is kept.
    """

    identity: str
    layer: int
    attention: int
    n_tokens: int
    shape: tuple[int, ...]
    dtype: str
    seconds: float
    parts: tuple[Part, ...]
    kv: KVPlace | None = None

    def text(self) -> str:
        """As JSON, with a checksum."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**content, "xxh3": _digest(content)}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Manifest:
        """The manifest in a file.

        Raises:
            UserError: it is none, or damaged.
        """
        try:
            content = json.loads(path.read_bytes())
            digest = content.pop("xxh3")
            if digest != _digest(content):
                raise UserError(f"{path}: does not have its checksum")
            if (content.pop("format"), content.pop("format_version")) != (FORMAT, FORMAT_VERSION):
                raise UserError(f"{path}: not a checkpoint of this version of cpmpi")
            parts = tuple(Part(**part) for part in content.pop("parts"))
            kv = content.pop("kv")
            place = None if kv is None else KVPlace(**{**kv, "digests": tuple(kv["digests"])})
            return Manifest(**{**content, "shape": tuple(content["shape"]), "parts": parts, "kv": place})
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint's manifest ({one_line(error)})") from error


def _digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
