"""Checkpoints inside a document, taken where all chunks meet, and a stop that loses nothing.

When the chunks of a document meet at an attention that follows a finished block, the hidden state after that block is
whole: each chunk's was kept as it came out. If a checkpoint is due, a thread writes this rank's rows of it, once the KV
of the layers before is on disk, while the next layer computes. At every meeting ranks read what all of them told when
they left the one before (`cpmpi.comm.agreement`): whether rank 0 found a checkpoint due, whether somebody was asked to
stop, and whose file is whole. When all are, rank 0 publishes the manifest. So nobody waits for anybody.

Legend: C tokens of a chunk.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Piece
from cpmpi.comm.agreement import Agreement
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.comm.stop import Stop, last_words
from cpmpi.engine.pace import Pace
from cpmpi.engine.told import Told
from cpmpi.errors import Stopped, UserError, one_line
from cpmpi.model.blocks import Blocks, watched
from cpmpi.model.forward import Chunk
from cpmpi.run import checkpoint, hidden
from cpmpi.run.manifest import KVPlace, Manifest
from cpmpi.run.paths import RunPaths
from cpmpi.run.spec import RunSpec
from cpmpi.run.writer import ShardWriter
from cpmpi.text import duration

logger = logging.getLogger("cpmpi")


@dataclass(kw_only=True)
class InWork:
    """The document that is in work.

    Attributes:
        index, identity, name, n_tokens: of the document.
        began_s: when its work would have begun, had it not been interrupted.
        parts: the chunks that this rank computes.
    """

    index: int
    identity: str
    name: str
    n_tokens: int
    began_s: float
    parts: Sequence[Piece] = ()


class Pending(NamedTuple):
    """A checkpoint under way: its number, the last block and the next attention, seconds of work before it."""

    number: int
    layer: int
    attention: int
    seconds: float


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of a job, on one rank. Use `opened`.

    Args:
        folder, spec: of the run.
        ranks, grid: who writes what: ranks that share the weights have the same hidden states, and write a part each.
        blocks: where a document can go on.
        writer: of the KV, where it is kept.
        stop: whether this rank was asked to stop.
        pace: when checkpoints are due; rank 0's counts.
        progress: tells the user.
    """

    folder: Path
    spec: RunSpec
    ranks: Ranks
    grid: Grid
    blocks: Blocks
    writer: ShardWriter | None
    stop: Stop
    pace: Pace
    progress: Progress
    document: InWork | None = None
    _agreement: Agreement = field(init=False)
    _thread: ThreadPoolExecutor = field(init=False)
    _kept: dict[int, torch.Tensor] = field(default_factory=dict)
    _told: Told = field(default_factory=Told)
    _pending: Pending | None = None
    _number: int = 0
    _work: Future[None] | None = None
    _met_s: float = 0.0
    _warned: bool = False
    _broken: UserError | None = None

    def __post_init__(self) -> None:
        self._agreement = Agreement(self.ranks.comm, len(Told._fields), self.ranks.flight)
        self._thread = ThreadPoolExecutor(1, "cpmpi-checkpoint")

    @contextmanager
    def opened(self) -> Iterator[Checkpoints]:
        """Within it checkpoints can be taken. Collective."""
        try:
            yield self
            self._agreement.close()
        finally:
            self._thread.shutdown(cancel_futures=True)

    @contextmanager
    def watching(self, causal_lm: torch.nn.Module, parts: Sequence[Piece]) -> Iterator[None]:
        """Within it the document runs, in these parts here; at its end what was under way is done. Collective."""
        assert self.document is not None, "say first which document comes"
        self.document.parts = parts
        self._pending, self._kept, self._met_s = None, {}, 0.0
        self.pace.taken()
        with watched(causal_lm, self.blocks, self._keep):
            yield
        self._agreement.read()
        self.wait()

    def wait(self) -> None:
        """Return when this rank's file is written, or could not be."""
        if self._work is not None:
            self._work.result()

    @property
    def spent_s(self) -> float:
        """Seconds of work on the document, those before an interruption included."""
        assert self.document is not None
        return time.monotonic() - self.document.began_s

    def meet(self, attention: int) -> None:
        """All chunks of this rank have come to an attention. Collective, and waits for none that is a layer behind.

        Raises:
            Stopped: on all ranks: somebody was asked to stop.
            AgreedError: on all ranks: somebody's keys and values cannot be written.
        """
        kept, self._kept = self._kept, {}
        block = self.blocks.before(attention)
        heard = self._agreement.read()
        self._time_layer()
        if heard is None:
            return
        self._hear(heard)
        if heard[:, Told._fields.index("broken")].any():
            self.ranks.together(self.go_on)
        if told := heard[:, Told._fields.index("stop")].max():
            self._stop(signal.Signals(told).name, block, attention, kept)
        elif block is not None and heard[0, Told._fields.index("due")]:
            self._save(block, attention, kept)

    def broke(self, problem: UserError) -> None:
        """This rank's keys and values cannot be written: all ranks end the job together where they meet next."""
        logger.error("%s", problem)
        self._broken = self._broken or problem

    def go_on(self) -> None:
        """Return where this rank's keys and values can be written, so far.

        Raises:
            UserError: they cannot.
        """
        if self._broken is not None:
            raise self._broken

    def leave(self, attention: int) -> None:
        """The attention is done: tell all others how things stand here."""
        assert self.document is not None
        logger.info("document %d: attention %d is done", self.document.index, attention)
        due = self.ranks.is_root and self._pending is None and self.pace.due
        self._agreement.post(self._told._replace(stop=self.stop.signal, due=due, broken=self._broken is not None))

    def check_grace(self) -> None:
        """End the job where the layer under way does not fit into the time that is left: it is dropped.

        Raises:
            Stopped: this rank is the only one; else all are ended.
        """
        if self.stop.left_s > 0:
            return
        text = f"the layer under way did not fit in --grace {self.stop.grace_s:.0f} s and is dropped"
        if self.ranks.size == 1:
            raise Stopped(f"stopped: {text}; the same command goes on")
        time.sleep(0.0 if self.ranks.is_root else 1.0)  # rank 0 speaks, if it was asked, too
        last_words(f"stopped: {text}; the same command goes on")
        logger.warning(text)
        self.ranks.comm.Abort(Stopped.status)

    def _keep(self, _: int, chunk: Chunk, hidden_C: torch.Tensor) -> None:
        """A chunk's hidden state comes out of a block. It stays as it is until the next meeting, and longer where no
        block overwrites it."""
        self.check_grace()
        self._kept[chunk.start] = hidden_C

    def _time_layer(self) -> None:
        """Warn once where a layer takes longer than there would be time for."""
        before_s, self._met_s = self._met_s, time.monotonic()
        needed_s = self._met_s - before_s + self.pace.write_s
        if before_s and needed_s > self.stop.grace_s and not self._warned:
            self._warned = True
            self.progress.say(
                f"warning: a layer and its checkpoint take about {duration(needed_s)}, more than --grace "
                f"{self.stop.grace_s:.0f} s: a stop would drop the layer under way"
            )

    def _save(self, block: int, attention: int, kept: dict[int, torch.Tensor]) -> None:
        """Have the thread write this rank's rows."""
        document = self.document
        assert document is not None
        self.pace.taken()
        self._number += 1
        self._pending = Pending(self._number, block, attention, self.spent_s)
        runs = self._rows(document.parts, kept)
        layers = self.writer.taken if self.writer is not None else 0
        self._work = self._thread.submit(self._write, self._pending, document, runs, layers)

    def _rows(self, parts: Sequence[Piece], kept: dict[int, torch.Tensor]) -> list[tuple[Piece, torch.Tensor]]:
        """What this rank writes: of each chunk, the part that falls to it among the ranks that share the weights."""
        tp, index = self.grid.tp, self.grid.tp_index(self.ranks.rank)
        runs = []
        for part in parts:
            first, stop = (part.size * i // tp for i in (index, index + 1))
            if first < stop:
                rows = kept[part.start][first:stop]
                run = Piece(part.start + first, part.start + stop)
                runs.append((run, rows.clone() if self.blocks.in_place and rows.device.type == "cpu" else rows.cpu()))
        return runs

    def _write(
        self, pending: Pending, document: InWork, runs: list[tuple[Piece, torch.Tensor]], layers: int
    ) -> None:  # fmt: skip
        """The thread: the KV of the layers before is made durable, then the file is written."""
        began = time.perf_counter()
        try:
            kv_digest = 0
            if self.writer is not None:
                self.writer.sync(layers)
                kv_digest = self.writer.digest(document.index, pending.attention)
            part = hidden.write_part(self.folder, document.identity, pending.layer, self.ranks.rank, runs)
        except Exception as problem:  # the document goes on without
            logger.warning("checkpoint after layer %d: %s", pending.layer, one_line(problem))
            self._told = self._told._replace(failed=pending.number)
            return
        took_us = int((time.perf_counter() - began) * 1e6)
        self._told = Told.of(part, kv_digest, written=pending.number, failed=self._told.failed, write_us=took_us)

    def _hear(self, heard: npt.NDArray[np.int64]) -> None:
        """If the files of all ranks are whole, publish the checkpoint; if one failed, say so."""
        pending = self._pending
        if pending is None:
            return
        everyone = [Told(*map(int, numbers)) for numbers in heard]
        failed = [rank for rank, told in enumerate(everyone) if told.failed == pending.number]
        if failed:
            log = RunPaths(self.folder).log / f"rank-{failed[0]:05d}.log"
            self.progress.say(f"the checkpoint after layer {pending.layer + 1} could not be written (see {log})")
            self._pending = None
        elif all(told.written == pending.number for told in everyone):
            self.pace.measured(max(told.write_us for told in everyone) / 1e6)
            self._pending = None
            if self.ranks.is_root:
                self._work = self._thread.submit(self._publish, self._manifest(pending, everyone))

    def _manifest(self, pending: Pending, everyone: Sequence[Told]) -> Manifest:
        document, paths = self.document, RunPaths(self.folder)
        assert document is not None
        names = [paths.checkpoint_part(document.identity, pending.layer, rank) for rank in range(len(everyone))]
        parts = [told.part(name.relative_to(self.folder)) for name, told in zip(names, everyone, strict=True)]
        kv = None
        if self.writer is not None:
            kv = KVPlace.of(self.spec, document.index, [told.shard_digest for told in everyone])
        return Manifest(
            identity=document.identity, layer=pending.layer, attention=pending.attention,
            n_tokens=document.n_tokens, shape=self.blocks.shape, dtype=str(self.blocks.dtype).removeprefix("torch."),
            seconds=pending.seconds, parts=tuple(parts), kv=kv,
        )  # fmt: skip

    def _publish(self, manifest: Manifest) -> None:
        try:
            checkpoint.publish(self.folder, manifest)
            logger.info("checkpoint %s after layer %d is whole", manifest.identity[:12], manifest.layer)
        except Exception as problem:  # the one before stays
            logger.warning("checkpoint after layer %d: %s", manifest.layer, one_line(problem))

    def _stop(self, name: str, block: int | None, attention: int, kept: dict[int, torch.Tensor]) -> None:
        """Save what is done and stop, on all ranks alike; or go on to where that can be done."""
        document = self.document
        assert document is not None
        if self.pace.off:
            raise self._stopped(name, "begins again (--checkpoint off)")
        if block is None:
            if any(self.blocks.blocks[later].last >= attention for later in self.blocks.whole):
                return
            raise self._stopped(name, "cannot be saved here")
        self._save(block, attention, kept)
        self.wait()
        self._hear(np.array(self.ranks.allgather(self._told), np.int64))
        self.wait()
        path = RunPaths(self.folder).checkpoint(document.identity, block)
        layer = f"layer {block + 1} of {len(self.blocks.blocks)}"
        if self.ranks.on_root(path.exists):
            raise self._stopped(name, f"is saved after {layer}", saved=True)
        raise self._stopped(name, f"could not be saved after {layer}, the checkpoint before stays")

    def _stopped(self, name: str, how: str, *, saved: bool = False) -> Stopped:
        assert self.document is not None
        stopped = Stopped(f"stopped by {name}: document {self.document.name!r} {how}; the same command goes on")
        stopped.saved = saved
        return stopped
