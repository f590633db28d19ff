"""Run a rank's program: one layer's attention across ranks.

Legend: T this rank's query tokens, S tokens of a shard, H query heads, G KV heads, D key head dim, E value head dim,
B bytes. Everything that travels is a flat byte tensor: keys and values of a shard in one, queries in one, a partial's
(out, lse) in float32 in one.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cpmpi.attention.layout import Holding, Piece
from cpmpi.attention.schedule import Item, Program, Transfer, releases
from cpmpi.comm.flight import Flight
from cpmpi.comm.transport import Pending, Transport
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.partial import Partial
from cpmpi.timeline.intervals import Recorder


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Shape and type of a layer's queries, keys and values."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores become weights: mask, scale, soft cap, and attention sinks (one logit per head)."""

    mask: Mask
    scale: float
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None


class Keys(NamedTuple):
    """The keys and values of one rank: pieces of positions, and both tensors as views of one flat byte tensor."""

    pieces: tuple[Piece, ...]
    flat_B: torch.Tensor
    k_SGD: torch.Tensor
    v_SGE: torch.Tensor

    @staticmethod
    def over(pieces: tuple[Piece, ...], heads: Heads, flat_B: torch.Tensor) -> Keys:
        """Keys and values of ``pieces`` as views of ``flat_B``."""
        tokens = sum(p.size for p in pieces)
        shapes = (tokens, heads.kv_heads, heads.key_dim), (tokens, heads.kv_heads, heads.value_dim)
        k_SGD, v_SGE = unpack(flat_B, shapes, heads.dtype)
        return Keys(pieces, flat_B, k_SGD, v_SGE)

    @staticmethod
    def empty(pieces: tuple[Piece, ...], heads: Heads, device: torch.device) -> Keys:
        """Uninitialised keys and values of ``pieces``."""
        n_bytes = sum(p.size for p in pieces) * heads.kv_heads * (heads.key_dim + heads.value_dim)
        return Keys.over(pieces, heads, torch.empty(n_bytes * heads.dtype.itemsize, dtype=torch.uint8, device=device))


class Queries(NamedTuple):
    """Queries of one rank as contiguous runs of positions: (first position, q_THD) each, in row order."""

    runs: tuple[tuple[int, torch.Tensor], ...]

    @staticmethod
    def over(pieces: tuple[Piece, ...], heads: Heads, flat_B: torch.Tensor) -> Queries:
        """Queries of ``pieces``, a run each, as views of ``flat_B``."""
        tokens = sum(p.size for p in pieces)
        (q_THD,) = unpack(flat_B, ((tokens, heads.query_heads, heads.key_dim),), heads.dtype)
        parts = torch.split(q_THD, [p.size for p in pieces]) if pieces else ()
        return Queries(tuple((p.start, q) for p, q in zip(pieces, parts, strict=True)))

    def pack(self) -> torch.Tensor:
        """All queries in one flat byte tensor."""
        return flat([torch.cat([q for _, q in self.runs])])


SHORT = 256
"""Tokens of a run below which it shares a kernel call with its neighbours: reading the keys is most of its work."""
JOINED = 4096
"""Tokens of runs that share one."""


class Group(NamedTuple):
    """Runs of queries, one after the other from ``row`` on, and all of them in one tensor."""

    row: int
    runs: tuple[tuple[int, torch.Tensor], ...]
    q_THD: torch.Tensor

    def over(self, piece: Piece, mask: Mask) -> Iterator[tuple[int, int, torch.Tensor, Piece, Mask]]:
        """The kernel calls that take these queries to the keys of a piece: row, first position and queries, keys, mask.

        Keys that all of the queries see, as continuations of one context do, are read once for all of them.
        """
        stop = piece.stop
        if len(self.runs) > 1 and piece.stop <= 1 + min(start for start, _ in self.runs):
            stop = min(stop, max(piece.start, *(mask.first_key(start + len(q) - 1) for start, q in self.runs)))
            if stop < piece.stop:
                yield self.row, piece.stop, self.q_THD, Piece(stop, piece.stop), Mask()
        row = self.row
        for start, q_THD in self.runs if stop > piece.start else ():
            yield row, start, q_THD, Piece(piece.start, stop), mask
            row += len(q_THD)


def joined(runs: Sequence[tuple[int, torch.Tensor]], mask: Mask) -> list[Group]:
    """Runs of queries in groups: short ones that are next to one another in one document, and long ones alone."""
    groups: list[tuple[int, list[tuple[int, torch.Tensor]]]] = []
    row, held, last = 0, JOINED, -1  # tokens of the last group, and the document that they are of
    for start, q_THD in runs:
        document = bisect_right(mask.documents, start)
        if len(q_THD) >= SHORT or held + len(q_THD) > JOINED or document != last:
            groups.append((row, []))
            held = JOINED if len(q_THD) >= SHORT else 0
        groups[-1][1].append((start, q_THD))
        row += len(q_THD)
        held, last = held + len(q_THD), document
    return [
        Group(row, tuple(each), each[0][1] if len(each) == 1 else torch.cat([q for _, q in each]))
        for row, each in groups
    ]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of the tensors one after the other; no copy for a single contiguous one."""
    parts = [t.contiguous().view(-1).view(torch.uint8) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(flat_B: torch.Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Views of ``flat_B`` as tensors of these shapes, one after the other."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    assert sum(sizes) == flat_B.numel()
    return [part.view(dtype).view(shape) for part, shape in zip(torch.split(flat_B, sizes), shapes, strict=True)]


@dataclass(kw_only=True)
class Execution:
    """One layer's attention across ranks, as one rank runs it.

    Args:
        rank: this rank.
        program: what it does, from a schedule.
        transport: how messages travel.
        backend: the attention kernel.
        heads, rule: the layer's shapes and how scores become weights.
        query_layout: which rank holds which queries.
        key_layouts: which rank holds which keys: stored ones first, then new ones; a shard is their concatenation.
        tick: called after every kernel call with the part of the work that is done, 0 to 1.
        recorder: notes what happens when, where a timeline is wanted.
        flight: records where this rank is.
    """

    rank: int
    program: Program
    transport: Transport
    backend: Backend
    heads: Heads
    rule: Rule
    query_layout: Holding
    key_layouts: tuple[Holding, ...]
    device: torch.device
    tick: Callable[[float], None] = lambda _: None
    recorder: Recorder | None = None
    flight: Flight = field(default_factory=Flight)
    partials: dict[int, Partial] = field(default_factory=dict)
    keys: dict[int, Keys] = field(default_factory=dict)
    queries: dict[int, Queries] = field(default_factory=dict)

    def run(self, queries: Queries, keys: Keys) -> torch.Tensor:
        """The attention output (T, H, E) of this rank's queries over all keys, in float32."""
        self.keys[self.rank], self.queries[self.rank] = keys, queries
        released = releases(self.program)
        calls = sum(len(now.attends) for now in self.program)
        done = 0
        due: list[list[tuple[Transfer, Pending, bool]]] = [[] for _ in self.program]
        for i, now in enumerate(self.program):
            self.flight.round = i
            with self.transport.batch():
                for t in now.receives:
                    if n_bytes := sum(map(self._n_bytes, t.items)):
                        due[t.due].append((t, self.transport.receive(n_bytes, t.peer, t.channel, self.device), True))
                for t in now.sends:
                    if parts := [self._bytes(item) for item in t.items if self._n_bytes(item)]:
                        due[t.due].append((t, self.transport.send(flat(parts), t.peer, t.channel), False))
            begun = time.perf_counter()
            for query, key in now.attends:
                self.flight.note("attend", key)
                for part in self._attend(query, key):
                    self.tick((done + part) / calls)
                done += 1
            self._note("compute", i, begun)
            while due[i]:  # no message stays, and with it what it brought
                self._complete(i, *due[i].pop(0))
            for item in released[i]:
                if item.owner != self.rank:
                    (self.keys if item.kind == "key" else self.queries).pop(item.owner, None)
        out_THE, _ = self._partial(self.rank).finish(self.rule.sinks_H)
        return out_THE

    def _complete(self, i: int, transfer: Transfer, pending: Pending, incoming: bool) -> None:
        """Wait for a message of round ``i``, and keep what it brings."""
        begun = time.perf_counter()
        payload_B = pending.wait()
        self._note("wait", i, begun)
        if not incoming:
            return
        if self.recorder is not None:
            n_bytes = payload_B.numel()
            self.recorder.note("transfer", i, pending.posted_s, pending.complete_s, transfer.peer, n_bytes)
        for item, part_B in zip(
            transfer.items, torch.split(payload_B, [*map(self._n_bytes, transfer.items)]), strict=True
        ):
            if len(part_B):
                self._take(item, part_B)

    def _note(self, what: str, i: int, begun: float) -> None:
        if self.recorder is not None:
            self.recorder.note(what, i, begun, time.perf_counter())

    def _attend(self, query: int, key: int) -> Iterator[float]:
        """The queries of one rank attend to the keys of one rank, run by run and piece by piece; yields how far."""
        if not (self._tokens(query, (self.query_layout,)) and self._tokens(key, self.key_layouts)):
            return
        partial, keys, rule = self._partial(query), self.keys[key], self.rule
        groups = joined(self.queries[query].runs, rule.mask)
        for i, group in enumerate(groups, start=1):
            first = 0
            for piece in keys.pieces:
                for row, q_start, q_THD, seen, mask in group.over(piece, rule.mask):
                    part = slice(first + seen.start - piece.start, first + seen.stop - piece.start)
                    self.backend.attend_into(
                        partial, row, q_THD, keys.k_SGD[part], keys.v_SGE[part], q_start=q_start, k_start=seen.start,
                        mask=mask, scale=rule.scale, softcap=rule.softcap,
                    )  # fmt: skip
                first += piece.size
            yield i / len(groups)

    def _partial(self, owner: int) -> Partial:
        """The accumulator for the queries of ``owner``, made at its first use."""
        if owner not in self.partials:
            tokens = self._tokens(owner, (self.query_layout,))
            self.partials[owner] = Partial(tokens, self.heads.query_heads, self.heads.value_dim, device=self.device)
        return self.partials[owner]

    def _tokens(self, owner: int, layouts: tuple[Holding, ...]) -> int:
        return sum(layout.size(owner) for layout in layouts)

    def _n_bytes(self, item: Item) -> int:
        h = self.heads
        if item.kind == "key":
            tokens = self._tokens(item.owner, self.key_layouts)
            return tokens * h.kv_heads * (h.key_dim + h.value_dim) * h.dtype.itemsize
        tokens = self._tokens(item.owner, (self.query_layout,))
        if item.kind == "query":
            return tokens * h.query_heads * h.key_dim * h.dtype.itemsize
        return tokens * h.query_heads * (h.value_dim + 1) * torch.float32.itemsize

    def _bytes(self, item: Item) -> torch.Tensor:
        """What to send for an item."""
        if item.kind == "key":
            return self.keys[item.owner].flat_B
        if item.kind == "query":
            return self.queries[item.owner].pack()
        partial = self._partial(item.owner)
        if item.owner != self.rank:
            del self.partials[item.owner]
        return flat([partial.out_THE, partial.lse_TH])

    def _take(self, item: Item, part_B: torch.Tensor) -> None:
        """Keep what has arrived; a partial is merged at once."""
        pieces = tuple(p for layout in self.key_layouts for p in layout.pieces(item.owner))
        if item.kind == "key":
            self.keys[item.owner] = Keys.over(pieces, self.heads, part_B)
        elif item.kind == "query":
            self.queries[item.owner] = Queries.over(self.query_layout.pieces(item.owner), self.heads, part_B)
        else:
            tokens, (h, e) = (
                self._tokens(item.owner, (self.query_layout,)),
                (self.heads.query_heads, self.heads.value_dim),
            )
            out, lse = torch.split(part_B.view(torch.float32), [tokens * h * e, tokens * h])
            self._partial(item.owner).merge_(out.view(tokens, h, e), lse.view(tokens, h))
