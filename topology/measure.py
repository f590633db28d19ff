"""Measure point-to-point latency and bandwidth of a sample of links, in bounded time at any scale.

Latency is half of a round trip. Bandwidth is that of one direction while as much goes the other way, as in a ring: the
acknowledgements of one share the wire with the data of the other.

The sample grows like the number of nodes: the pairs inside each node (all of them up to 8 ranks, the links of the ring
beyond) and one pair per edge of the tree. Pairs are dealt into rounds in which no rank occurs twice and no leaf uplink
carries two pairs; all pairs of a round run at once. There are about ``7 + log2(nodes)`` rounds, and they share the time
limit, so the limit holds on ten thousand nodes as on two: where time is short, messages stay smaller.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from cpmpi.topology.derive import rings, tree
from cpmpi.topology.describe import Measurement, Topology
from cpmpi.topology.ring_search import EXACT

LIMIT_S = 2.0
GRACE_S = 0.25  # what a round may overrun before a silent peer is given up
SMALL = 8
SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
LATENCY_TRIPS, BANDWIDTH_TRIPS, PARTS = 20, 5, 4
MAX_NOTES = 8
FAILED = "could not measure"

Pair = tuple[int, int]

# Requests that were given up. MPI may yet use their buffers, which live as long as they do.
_UNFINISHED: list[MPI.Request] = []


def sample(topology: Topology) -> tuple[tuple[Pair, ...], ...]:
    """The pairs to measure, in rounds of disjoint pairs (a, b) with a < b."""
    rounds: dict[int, list[Pair]] = {}
    for ring in rings(topology):
        for i, pairs in enumerate(_tournament(ring) if len(ring) <= EXACT else _ring_links(ring)):
            rounds.setdefault(i, []).extend(pairs)
    spanning = tree(topology)
    between = [[(spanning.leaders[a], spanning.leaders[b]) for a, b in edges] for edges in spanning.rounds()]
    return tuple(tuple((min(p), max(p)) for p in pairs) for pairs in [*rounds.values(), *between] if pairs)


def measure(comm: MPI.Comm, topology: Topology, *, limit_s: float = LIMIT_S) -> Topology:
    """The description with fresh measurements in place of those it had; collective, the same on all ranks.

    A pair whose time runs out while bytes are under way gets the rate that it had at most, and a note. One that fails
    (a peer that does not answer, an MPI error) stays unknown and leaves a note; the others go on.

    Args:
        limit_s: seconds for everything.

    Raises:
        ValueError: ``comm`` does not have as many ranks as the description.
    """
    topology.require(comm.size)
    rounds = sample(topology)
    own = comm.Dup()
    begin = time.perf_counter()
    buffers = (np.ones(SIZES[-1], np.uint8), np.ones(SIZES[-1], np.uint8)) if rounds else None
    measured: list[Measurement] = []
    failures: list[str] = []
    for i, pairs in enumerate(rounds):
        left_s = limit_s - GRACE_S - _agree_on_elapsed(own, begin)
        budget_s = left_s / (len(rounds) - i)
        mine = next((pair for pair in pairs if own.rank in pair), None)
        if budget_s <= 0 or mine is None or buffers is None:
            continue
        peer = mine[0] if own.rank == mine[1] else mine[1]
        talk = _Talk(own, peer, tag=i, deadline=time.perf_counter() + budget_s + GRACE_S, buffers=buffers)
        found, problem = _talked(talk, budget_s if own.rank == mine[0] else None)
        measured += found
        name = topology.nodes[topology.node_of(own.rank)].name
        failures += [f"{name}: rank {own.rank} {FAILED} with rank {peer} ({problem})"] if problem else []
    gathered = comm.gather((measured, failures))
    results: Topology | None = None
    if gathered is not None:
        pairs_found = sorted((m for found, _ in gathered for m in found), key=lambda m: (m.a, m.b))
        kept = [note for note in topology.notes if FAILED not in note]  # those of the last measurement go with it
        new = _shortened([line for _, lines in gathered for line in lines])
        results = replace(topology, measured=tuple(pairs_found), notes=(*kept, *new))
    results = comm.bcast(results)
    assert results is not None
    if not any(FAILED in note for note in results.notes):
        own.Free()  # after a failure messages may still be under way on it
    return results


def _talked(talk: _Talk, budget_s: float | None) -> tuple[list[Measurement], str | None]:
    """What came of a talk that this rank leads for ``budget_s`` seconds or, with None, follows; and what went wrong."""
    try:
        if budget_s is None:
            follow(talk)
            return [], None
        found = lead(talk, budget_s)
    except Exception as error:  # of MPI, of a peer: the other pairs go on
        return [], str(error) or type(error).__name__
    gb_per_s, latency_us = map(_rounded, (found.gb_per_s, found.latency_us))
    ends = sorted((talk.comm.rank, talk.peer))
    pair = Measurement(a=ends[0], b=ends[1], gb_per_s=gb_per_s, latency_us=latency_us, at_most=found.at_most)
    return [pair], f"no answer from rank {talk.peer} in time; at most {gb_per_s:g} GB/s" if found.at_most else None


class Found(NamedTuple):
    """What a talk has shown: medians, or an upper bound of the bandwidth where an exchange was not over in time."""

    gb_per_s: float
    latency_us: float
    at_most: bool = False


class StuckError(TimeoutError):
    """An exchange was not over in time; ``gb_per_s``: more than this, and its next part would have been."""

    def __init__(self, peer: int, gb_per_s: float) -> None:
        super().__init__(f"no answer from rank {peer}")
        self.gb_per_s = gb_per_s


def lead(talk: _Talk, budget_s: float) -> Found:
    """Talk with a peer that follows, within about ``budget_s`` seconds.

    Messages grow until the next size would not fit into the time that is left."""
    end = time.perf_counter() + budget_s
    connect_s = talk.trips(SMALL, 1)[0]
    trips = max(1, min(LATENCY_TRIPS, int(0.2 * budget_s / connect_s)))
    latency_s = statistics.median(talk.trips(SMALL, trips)) / 2
    try:
        gb_per_s = _exchanges(talk, end)
    except StuckError as stuck:
        return Found(stuck.gb_per_s, latency_s * 1e6, at_most=True)
    talk.finish()
    return Found(gb_per_s, latency_s * 1e6)


def _exchanges(talk: _Talk, end: float) -> float:
    """GB/s a way by exchanges of growing messages until ``end``."""
    for size, bigger in zip(SIZES, (*SIZES[1:], None)):
        trip_s = talk.trips(size, 1, both_ways=True)[0]
        left_s = end - time.perf_counter()
        if bigger is None or trip_s * bigger / size > left_s:
            break
    trips = min(BANDWIDTH_TRIPS, int(left_s / trip_s))
    if trips > 0:
        trip_s = statistics.median(talk.trips(size, trips, both_ways=True))
    return size / trip_s / 1e9


def follow(talk: _Talk) -> None:
    """Answer a peer that leads until it has finished."""
    while talk.answer():
        pass


@dataclass(frozen=True)
class _Talk:
    """A conversation between two ranks that gives up at ``deadline`` instead of hanging."""

    comm: MPI.Comm
    peer: int
    tag: int
    deadline: float
    buffers: tuple[np.ndarray, np.ndarray]

    def trips(self, size: int, count: int, *, both_ways: bool = False) -> list[float]:
        """Seconds of each of ``count`` round trips of ``size`` bytes, or of as many exchanges both ways at once."""
        self._send(np.array([size, count, both_ways], np.int64))
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            if both_ways:
                self._exchange(size)
            else:
                self._send(self.buffers[0][:size])
                self._receive(self.buffers[1][:size])
            seconds.append(time.perf_counter() - begin)
        return seconds

    def finish(self) -> None:
        """Tell the peer that there is no more."""
        self._send(np.zeros(3, np.int64))

    def answer(self) -> bool:
        """Answer one call of :meth:`trips`; False once the peer has finished."""
        order = np.zeros(3, np.int64)
        self._receive(order)
        size, count, both_ways = order.tolist()
        for _ in range(count):
            if both_ways:
                self._exchange(size)
            else:
                self._receive(self.buffers[1][:size])
                self._send(self.buffers[0][:size])
        return bool(count)

    def _exchange(self, size: int) -> None:
        """Send and receive ``size`` bytes at once, in parts, so that the agreement on one hides behind another."""
        begin = time.perf_counter()
        parts = [slice(size * i // PARTS, size * (i + 1) // PARTS) for i in range(PARTS)]
        arriving = [self.comm.Irecv(self.buffers[1][part], self.peer, self.tag) for part in parts]
        leaving = [self.comm.Isend(self.buffers[0][part], self.peer, self.tag) for part in parts]
        try:
            for request in (*arriving, *leaving):
                self._wait(request)
        except TimeoutError:
            _UNFINISHED.extend((*arriving, *leaving))
            through = min(sum(bool(request.Test()) for request in way) for way in (arriving, leaving))
            # All parts of one way may have arrived, and only word of those that left is missing.
            n_bytes = size * min(through + 1, PARTS) // PARTS
            raise StuckError(self.peer, n_bytes / (time.perf_counter() - begin) / 1e9) from None

    def _send(self, data: np.ndarray) -> None:
        self._wait(self.comm.Isend(data, self.peer, self.tag))

    def _receive(self, data: np.ndarray) -> None:
        self._wait(self.comm.Irecv(data, self.peer, self.tag))

    def _wait(self, request: MPI.Request) -> None:
        while not request.Test():
            if time.perf_counter() > self.deadline:
                _UNFINISHED.append(request)
                raise TimeoutError(f"no answer from rank {self.peer}")
            os.sched_yield()


def _agree_on_elapsed(comm: MPI.Comm, begin: float) -> float:
    """Seconds since ``begin`` on the slowest rank; also the barrier between rounds.

    Those who wait sleep: where ranks share cores, their polling would slow down the pairs that still measure."""
    mine, slowest = np.array([time.perf_counter() - begin]), np.zeros(1)
    request = comm.Iallreduce(mine, slowest, MPI.MAX)
    while not request.Test():
        time.sleep(0.0002)
    return float(slowest[0])


def _tournament(ranks: Sequence[int]) -> list[list[Pair]]:
    """All pairs in rounds of disjoint pairs, everyone against everyone (the circle method)."""
    table: list[int | None] = [*ranks] if len(ranks) % 2 == 0 else [*ranks, None]
    rounds = []
    for _ in range(len(table) - 1):
        rounds.append(
            [(a, b) for a, b in zip(table, reversed(table[len(table) // 2 :])) if a is not None and b is not None]
        )
        table = [table[0], table[-1], *table[1:-1]]
    return rounds


def _ring_links(ring: Sequence[int]) -> list[list[Pair]]:
    """The links of a ring in two rounds, three where it is odd."""
    links = list(zip(ring, (*ring[1:], ring[0])))
    last = [links.pop()] if len(links) % 2 else []
    return [links[0::2], links[1::2], last]


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_NOTES
    return lines if more <= 0 else [*lines[:MAX_NOTES], f"{more} more ranks {FAILED} with another"]


def _rounded(value: float) -> float:
    """Four digits, more than any measurement of this kind is worth."""
    return float(f"{value:.4g}")
