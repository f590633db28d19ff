"""Play all ranks' programs through on a described machine: what is computed, sent and waited for, and when.

An event simulation in the order of time. A rank enters a round, posts its messages, computes; a message leaves once
both ends have posted it (a rendezvous) and queues on every wire of its way; a round ends when its own computing and the
messages that are due have. What the simulation leaves out: the cores' time that moving bytes takes,
congestion inside a switch, and that messages take turns on a wire in packets rather than one after the other.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.attention.schedule import Item, Program, Schedule, Transfer
from cpmpi.cost.links import Links
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.timeline.intervals import Interval

Seconds = npt.NDArray[np.float64]


class Sizes:
    """Bytes of every item of a shape on so many ranks."""

    def __init__(self, shape: AttentionShape, world: int) -> None:
        queries = shape.query_layout(world)
        self.new = [queries.size(rank) for rank in range(world)]
        self.keys = [sum(layout.size(rank) for layout in shape.key_layouts(world)) for rank in range(world)]
        self.of = {
            "key": [n * shape.key_bytes for n in self.keys],
            "query": [n * shape.query_bytes for n in self.new],
            "partial": [n * shape.partial_bytes for n in self.new],
        }

    def bytes(self, items: Sequence[Item]) -> int:
        """Bytes of these items together."""
        return sum(self.of[kind][owner] for kind, owner in items)


def attend_seconds(shape: AttentionShape, rates: Rates, world: int) -> Seconds:
    """Seconds (N, N) that the queries of one rank take with the keys of another."""
    pairs, blocks, read = shape.pairs(world)
    reading = read * (shape.key_bytes / (rates.memory_gb_per_s * 1e9))
    seconds: Seconds = pairs * (shape.pair_flops / rates.attention_flops) + blocks * rates.call_s + reading
    return seconds


@dataclass(kw_only=True)
class Played:
    """What came out.

    Attributes:
        round_ends: for each rank, when each of its rounds ended, in seconds from the start.
        busy_s: for each rank, seconds of computing and merging.
        wire_bytes: bytes that went over each wire of the `Links`.
        intervals: what happened when, where that was asked for.
    """

    round_ends: list[list[float]]
    busy_s: list[float]
    wire_bytes: dict[int, int]
    intervals: list[Interval] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """When the last rank was done."""
        return max((ends[-1] for ends in self.round_ends if ends), default=0.0)


class _Post(NamedTuple):
    rank: int
    transfer: Transfer
    posted_in: int


class _Player:
    """The state of the simulation; see `play`."""

    def __init__(self, programs: Sequence[Program], sizes: Sizes, seconds: Seconds, rates: Rates, links: Links) -> None:
        world = len(programs)
        self.programs, self.sizes, self.rates, self.links = programs, sizes, rates, links
        self.seconds: list[list[float]] = seconds.tolist()
        self.played = Played(round_ends=[[] for _ in programs], busy_s=[0.0] * world, wire_bytes=defaultdict(int))
        self.free: dict[int, float] = defaultdict(float)  # when each wire has carried what queues on it
        self.sends: dict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self.receives: dict[tuple[int, int, int], deque[_Post]] = defaultdict(deque)
        self.open = [[0] * len(p) for p in programs]  # messages due in a round that have not left yet
        self.arrived = [[0.0] * len(p) for p in programs]  # when the last one that is due in a round is complete
        self.merge_s = [[0.0] * len(p) for p in programs]  # what the partials that are due in a round take to merge
        self.computed: list[float | None] = [None] * world  # when the computing of the present round ends
        self.begun = [0.0] * world
        self.events: list[tuple[float, int, int]] = []

    def run(self) -> Played:
        for rank, program in enumerate(self.programs):
            if program:
                heapq.heappush(self.events, (0.0, rank, 0))
        while self.events:
            self.enter(*heapq.heappop(self.events))
        for rank, program in enumerate(self.programs):
            assert len(self.played.round_ends[rank]) == len(program), f"rank {rank} waits for ever"
        return self.played

    def enter(self, now: float, rank: int, i: int) -> None:
        """A rank posts the messages of its round and computes."""
        this = self.programs[rank][i]
        ready: list[tuple[_Post, _Post, int]] = []
        for mine, theirs, incoming in ((self.receives, self.sends, True), (self.sends, self.receives, False)):
            for transfer in this.receives if incoming else this.sends:
                n_bytes = self.sizes.bytes(transfer.items)
                if not n_bytes:
                    continue
                self.open[rank][transfer.due] += 1
                post = _Post(rank, transfer, i)
                way = (transfer.peer, rank, transfer.channel) if incoming else (rank, transfer.peer, transfer.channel)
                if theirs[way]:
                    other = theirs[way].popleft()
                    ready.append((other, post, n_bytes) if incoming else (post, other, n_bytes))
                else:
                    mine[way].append(post)
        busy = sum(self.seconds[query][key] for query, key in this.attends)
        self.played.busy_s[rank] += busy
        self.begun[rank], self.computed[rank] = now, now + busy
        for send, receive, n_bytes in ready:
            self.carry(send, receive, n_bytes, now)
        self.leave(rank)

    def carry(self, send: _Post, receive: _Post, n_bytes: int, now: float) -> None:
        """A message whose two ends have posted it goes over its wires, behind what is on them."""
        route = self.links.route(send.rank, receive.rank)
        start = max([now, *(self.free[wire] for wire in route.wires)])
        stop = start + n_bytes / route.bytes_per_s
        for wire in route.wires:
            self.free[wire] = max(self.free[wire], now) + n_bytes / self.links.capacity[wire]
            stop = max(stop, self.free[wire])
            self.played.wire_bytes[wire] += n_bytes
        stop += route.latency_s + self.rates.message_s
        for post in (send, receive):
            rank, due = post.rank, post.transfer.due
            self.open[rank][due] -= 1
            self.arrived[rank][due] = max(self.arrived[rank][due], stop)
        partials = [item for item in receive.transfer.items if item.kind == "partial"]
        self.merge_s[receive.rank][receive.transfer.due] += self.rates.merge_seconds(self.sizes.bytes(partials))
        self.note(receive.rank, "transfer", receive.posted_in, start, stop, send.rank, n_bytes)
        self.leave(send.rank)
        self.leave(receive.rank)

    def leave(self, rank: int) -> None:
        """A rank ends its round if everything that this needs is known."""
        computed, i = self.computed[rank], len(self.played.round_ends[rank])
        if computed is None or self.open[rank][i]:
            return
        waited = max(computed, self.arrived[rank][i])
        end = waited + self.merge_s[rank][i]
        self.played.busy_s[rank] += self.merge_s[rank][i]
        self.played.round_ends[rank].append(end)
        self.note(rank, "compute", i, self.begun[rank], computed)
        self.note(rank, "wait", i, computed, waited)
        self.note(rank, "merge", i, waited, end)
        self.computed[rank] = None
        if i + 1 < len(self.programs[rank]):
            heapq.heappush(self.events, (end, rank, i + 1))

    def note(
        self, rank: int, what: str, i: int, start: float, stop: float, peer: int | None = None, n_bytes: int = 0
    ) -> None:
        if stop > start:
            self.played.intervals.append(
                Interval(rank=rank, what=what, start_s=start, stop_s=stop, round=i, peer=peer, n_bytes=n_bytes)
            )


def play(
    schedule: Schedule, shape: AttentionShape, rates: Rates, links: Links, seconds: Seconds, steps: int | None = None
) -> Played:
    """Play one layer's attention by ``schedule``.

    Args:
        schedule: who does what.
        shape: of the attention.
        rates: of every rank.
        links: of the machine.
        seconds: from `attend_seconds`.
        steps: outer steps of a ring to play; None for all.
    """
    programs = [schedule.program(rank, steps) for rank in range(schedule.world)]
    return _Player(programs, Sizes(shape, schedule.world), seconds, rates, links).run()
