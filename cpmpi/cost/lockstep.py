"""Play a ring of many ranks in step: the same times as `simulate`, a round of all ranks at once.

Where all nodes have as many ranks and the messages between nodes share no wire with those inside, a rank waits for
nobody but its neighbours in the ring and, at the end of an outer step, for the shards that crossed between nodes. So a
round of all ranks is a few operations on arrays, and only the messages that cross are taken one by one, as they queue.

Legend: N ranks, M nodes, P ranks of a node.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.attention.schedule import Schedule
from cpmpi.cost.links import Links, Route
from cpmpi.cost.rates import Rates
from cpmpi.cost.simulate import Played, Seconds, Sizes
from cpmpi.timeline.intervals import Interval

Ranks = npt.NDArray[np.int64]
SHOWN_RANKS = 32  # evenly spread, of which intervals are kept
MOST_SHOWN = 50_000  # rounds of these ranks together; beyond, no intervals are


class OutOfStepError(Exception):
    """Two messages met on a wire in another order than that of the steps: only `simulate.play` gets that right."""


def in_step(schedule: Schedule, links: Links) -> bool:
    """Whether a schedule can be played in step."""
    nodes = schedule.nodes
    if schedule.kind != "ring" or len({len(node) for node in nodes}) > 1:
        return False
    inside = {wire for node in nodes if len(node) > 1 for a, b in _around(node) for wire in links.route(a, b).wires}
    across = {wire for one, two in _around(nodes) if one is not two for wire in _between(links, one, two)}
    return not inside & across


def _around(items: Any) -> list[tuple[Any, Any]]:
    return list(zip(items, [*items[1:], items[0]], strict=True))


def _between(links: Links, one: Any, two: Any) -> set[int]:
    return {wire for a, b in zip(one, two, strict=True) for wire in links.route(a, b).wires}


def play_ring(
    schedule: Schedule, sizes: Sizes, rates: Rates, links: Links, seconds: Seconds, steps: int | None = None
) -> Played:
    """What `simulate.play` gives for a ring that is `in_step`, but for intervals of some ranks only.

    Args:
        schedule: the ring.
        sizes: of the shards.
        rates: of every rank.
        links: of the machine.
        seconds: (N, N), from `simulate.attend_seconds`.
        steps: outer steps to play; None for all.

    Raises:
        OutOfStepError: nodes drift so far apart that a message of a later step goes before one of an earlier step.
    """
    return _Ring(schedule, sizes, rates, links, seconds).play(steps)


class _Ring:
    """The state of all ranks between two rounds; see `play_ring`."""

    def __init__(self, schedule: Schedule, sizes: Sizes, rates: Rates, links: Links, seconds: Seconds) -> None:
        self.ranks_MP = np.array(schedule.nodes, np.int64)
        self.rates, self.links, self.seconds = rates, links, seconds
        self.bytes_N = np.array(sizes.of["key"], np.int64)
        world = self.ranks_MP.size
        self.successor_N, self.predecessor_N = np.empty(world, np.int64), np.empty(world, np.int64)
        self.successor_N[self.ranks_MP] = np.roll(self.ranks_MP, -1, axis=1)
        self.predecessor_N[self.ranks_MP] = np.roll(self.ranks_MP, 1, axis=1)
        self.inner = self._routes() if self.ranks_MP.shape[1] > 1 else None
        self.begun_N, self.busy_N = np.zeros(world), np.zeros(world)
        self.free: dict[int, float] = {}  # when each wire between nodes has carried what queues on it
        self.last: dict[int, tuple[float, int, bool]] = {}  # the latest message on it
        self.wire_bytes: dict[int, int] = {}
        self.ends: list[npt.NDArray[np.float64]] = []
        self.intervals: list[Interval] = []
        self.shown = (
            sorted({i * world // SHOWN_RANKS for i in range(SHOWN_RANKS)}) if world > SHOWN_RANKS else range(world)
        )

    def _routes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], list[Route]]:
        """From each rank to its successor: (3, N) bytes/s of the pair and of both wires, (N,) latency, the routes."""
        routes = [self.links.route(a, int(b)) for a, b in enumerate(self.successor_N)]
        capacity = self.links.capacity
        rates_3N = np.array([[r.bytes_per_s, *(capacity[wire] for wire in r.wires)] for r in routes]).T
        return rates_3N, np.array([r.latency_s for r in routes]), routes

    def play(self, steps: int | None) -> Played:
        m, p = self.ranks_MP.shape
        outer = m if steps is None else min(steps, m)
        keep = min(self.ranks_MP.size, SHOWN_RANKS) * outer * p <= MOST_SHOWN
        for step in range(outer):
            crossed_N = self._cross(step, step * p, keep) if step < outer - 1 else None
            for i in range(p):
                self._round(step, i, crossed_N if i == p - 1 else None, keep)
        return Played(
            round_ends=np.stack(self.ends, axis=1).tolist(), busy_s=self.busy_N.tolist(),
            wire_bytes=self.wire_bytes, intervals=self.intervals,
        )  # fmt: skip

    def _held(self, step: int, i: int) -> Ranks:
        """Whose keys each rank has in round ``i`` of a step."""
        held_N = np.empty(self.ranks_MP.size, np.int64)
        held_N[self.ranks_MP] = np.roll(np.roll(self.ranks_MP, step, axis=0), i, axis=1)
        return held_N

    def _round(self, step: int, i: int, crossed_N: npt.NDArray[np.float64] | None, keep: bool) -> None:
        """All ranks compute, and pass on the keys that they hold unless these have been everywhere in the node."""
        held_N, number = self._held(step, i), step * self.ranks_MP.shape[1] + i
        computing_N = self.seconds[np.arange(len(held_N)), held_N]
        self.busy_N += computing_N
        computed_N = self.begun_N + computing_N
        arrived_N = np.zeros_like(computed_N) if crossed_N is None else crossed_N
        if self.inner is not None and i < self.ranks_MP.shape[1] - 1:
            n_bytes_N = self.bytes_N[held_N]
            start_N, stop_N = self._pass_on(n_bytes_N)
            arrived_N = np.maximum(arrived_N, np.maximum(stop_N, stop_N[self.predecessor_N]))
            if keep:
                self._show_messages(number, n_bytes_N, start_N, stop_N)
        ended_N = np.maximum(computed_N, arrived_N)
        if keep:
            for r in self.shown:
                self._note(r, "compute", number, self.begun_N[r], computed_N[r])
                self._note(r, "wait", number, computed_N[r], ended_N[r])
        self.ends.append(ended_N)
        self.begun_N = ended_N

    def _pass_on(self, n_bytes_N: Ranks) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """When each rank's message to its successor starts and stops; both 0 where there are no bytes."""
        assert self.inner is not None
        rates_3N, latency_N, routes = self.inner
        start_N = np.maximum(self.begun_N, self.begun_N[self.successor_N])
        stop_N = (start_N + n_bytes_N / rates_3N).max(axis=0) + (latency_N + self.rates.message_s)
        for route, n_bytes in zip(routes, n_bytes_N.tolist(), strict=True):
            for wire in route.wires if n_bytes else ():
                self.wire_bytes[wire] = self.wire_bytes.get(wire, 0) + n_bytes
        sent_N = n_bytes_N > 0
        return np.where(sent_N, start_N, 0.0), np.where(sent_N, stop_N, 0.0)

    def _cross(self, step: int, number: int, keep: bool) -> npt.NDArray[np.float64]:
        """Each node's shards go on to the next node; when both that a rank sends and receives are there."""
        held_N, arrived_N = self._held(step, 0), np.zeros(self.ranks_MP.size)
        messages = []
        for one, two in _around(self.ranks_MP):
            for a, b in zip(one.tolist(), two.tolist(), strict=True):
                if n_bytes := int(self.bytes_N[held_N[a]]):
                    both = (float(self.begun_N[a]), a), (float(self.begun_N[b]), b)
                    now, later = max(both)  # who enters the step last starts the message; its receives come first
                    messages.append((now, later, later == a, a, b, n_bytes))
        shown = set(self.shown) if keep else ()
        for now, later, sends, a, b, n_bytes in sorted(messages):
            start, stop = self._carry((now, later, sends), self.links.route(a, b), n_bytes)
            arrived_N[a], arrived_N[b] = max(arrived_N[a], stop), max(arrived_N[b], stop)
            if b in shown:
                self._note(b, "transfer", number, start, stop, a, n_bytes)
        return arrived_N

    def _carry(self, at: tuple[float, int, bool], route: Route, n_bytes: int) -> tuple[float, float]:
        """A message goes over its wires, behind what is on them, as in `simulate`."""
        now = at[0]
        start = max([now, *(self.free.get(wire, 0.0) for wire in route.wires)])
        stop = start + n_bytes / route.bytes_per_s
        for wire in route.wires:
            if self.last.get(wire, at) > at:
                raise OutOfStepError(self.links.names[wire])
            self.last[wire] = at
            self.free[wire] = max(self.free.get(wire, 0.0), now) + n_bytes / self.links.capacity[wire]
            stop = max(stop, self.free[wire])
            self.wire_bytes[wire] = self.wire_bytes.get(wire, 0) + n_bytes
        return start, stop + (route.latency_s + self.rates.message_s)

    def _show_messages(
        self, number: int, n_bytes_N: Ranks, start_N: npt.NDArray[np.float64], stop_N: npt.NDArray[np.float64]
    ) -> None:
        for receiver in self.shown:
            sender = int(self.predecessor_N[receiver])
            self._note(receiver, "transfer", number, start_N[sender], stop_N[sender], sender, int(n_bytes_N[sender]))

    def _note(
        self, rank: int, what: str, number: int, start: float, stop: float, peer: int | None = None, n_bytes: int = 0
    ) -> None:
        if stop > start:
            self.intervals.append(
                Interval(
                    rank=rank, what=what, start_s=float(start), stop_s=float(stop), round=number, peer=peer,
                    n_bytes=n_bytes,
                )
            )  # fmt: skip
