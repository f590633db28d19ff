"""Deal the KV of a document's finished layers anew, where others go on than those that made it.

Every rank reads the pieces and heads that are its own now from the shards of the job before, compares them with their
checksums, and writes them to its own shard. When all of it is on disk on all ranks, the checkpoint's manifest is
replaced by one that names the new shards. Until then the old ones hold, and a kill in the middle changes nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.comm.stop import Stop
from cpmpi.errors import Stopped, UserError
from cpmpi.run import checkpoint
from cpmpi.run.hdf5 import tensor_of
from cpmpi.run.manifest import KVPlace, Manifest
from cpmpi.run.shard import OpenShards
from cpmpi.run.sharded_kv import ShardedKV
from cpmpi.run.spec import KVSpec, RunSpec
from cpmpi.run.writer import ShardWriter
from cpmpi.text import counted, human_bytes


class DamagedKVError(UserError):
    """What was to be dealt anew is damaged: the checkpoint cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Redeal:
    """Moves the KV of documents in work between sets of shards.

    Args:
        folder, spec: of the run.
        ranks: all of which take part.
        writer: of this rank's shard.
        stop: whether this rank was asked to stop.
        progress: tells the user.
    """

    folder: Path
    spec: RunSpec
    ranks: Ranks
    writer: ShardWriter
    stop: Stop
    progress: Progress

    def needed(self, found: Manifest, index: int) -> bool:
        """Whether the KV of a checkpoint of the document at place ``index`` lies elsewhere than in these ranks' shards.

        Raises:
            UserError: it lies nowhere.
        """
        if found.kv is None:
            raise UserError("it was made where no keys and values are kept")
        return found.kv != KVPlace.of(self.spec, index, found.kv.digests)

    def check(self, found: Manifest, index: int) -> None:
        """Whether the shards are what the checkpoint was made with, as far as their checksums' digests tell.

        Among all ranks, all of them; where nothing moves, each its own.

        Raises:
            UserError: they are not.
        """
        rank, size = self.ranks.rank, self.ranks.size
        with self._stored(found, index) as stored:
            for shard in stored.ranks[rank::size] if self.needed(found, index) else (rank,):
                stored.check(shard)

    def move(self, found: Manifest, index: int) -> None:
        """Move the KV of the layers that are done, and have the checkpoint say so. Collective.

        Raises:
            DamagedKVError: on all ranks: what is there is not what was written.
            UserError: on all ranks: it cannot be written. The checkpoint is as it was.
            Stopped: on all ranks: somebody was asked to stop. The checkpoint is as it was.
        """
        assert found.kv is not None
        document, kv = self.spec.documents[index], self._kv
        numbers = sum(shape.numbers for shape in kv.shapes[: found.attention]) * document.n_tokens
        self.progress.say(
            f"{document.id}: the KV so far ({human_bytes(numbers * kv.stored.itemsize)}), made by "
            f"{counted(found.kv.n_ranks, 'rank')}, is dealt anew to {self.ranks.size}"
        )
        with self._stored(found, index) as stored:
            for layer in range(found.attention):
                self._stop_if_asked(document.id, found)
                self._copy(stored, index, layer)
        self.ranks.together(self.writer.sync)
        digests = self.ranks.allgather(self.writer.digest(index, found.attention))
        moved = replace(found, kv=KVPlace.of(self.spec, index, digests))
        self.ranks.on_root(checkpoint.publish, self.folder, moved)

    def _copy(self, stored: ShardedKV, index: int, layer: int) -> None:
        document, kv, rank = self.spec.documents[index], self._kv, self.ranks.rank
        heads = document.heads(rank, kv.shapes[layer].heads)
        try:
            both = self.ranks.together(stored.read, layer, document.pieces(rank), heads)
        except UserError as problem:
            raise DamagedKVError(str(problem)) from problem
        key_TGD, value_TGE = (tensor_of(raw, kv.dtype) for raw in both)
        self.ranks.together(self.writer.put, index, layer, key_TGD, value_TGE)

    @property
    def _kv(self) -> KVSpec:
        assert self.spec.kv is not None
        return self.spec.kv

    @contextmanager
    def _stored(self, found: Manifest, index: int) -> Iterator[ShardedKV]:
        """The layers that are done, where they lie now."""
        place = found.kv
        assert place is not None
        with closing(OpenShards(self.folder)) as shards:
            yield ShardedKV(
                name=self.spec.documents[index].id, part=place.dealt(self.spec.documents[index]).parts[0],
                number=place.shard_document, shapes=self._kv.shapes, stored=self._kv.stored, done=found.attention,
                shard=lambda rank: shards.get(place.shards, rank), digest=place.digests.__getitem__,
                recorded_in="the checkpoint",
            )  # fmt: skip

    def _stop_if_asked(self, name: str, found: Manifest) -> None:
        told = [number for number in self.ranks.allgather(self.stop.signal) if number]
        if told:
            raise Stopped(
                f"stopped by {signal.Signals(told[0]).name}: document {name!r} was about to go on after layer "
                f"{found.layer + 1}; the same command goes on"
            )
