"""A flight recorder: the last events of a rank and what it does now, for when ranks wait for each other without end.

Written by the rank's main thread, at each message and each meeting; read by its watchdog (`cpmpi.comm.watchdog`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

EVENTS = 2048
NOBODY = -1  # no peer in particular: all ranks, or none
DISK = "disk"  # the one wait that is not for other ranks
LARGE_BYTES = 1 << 16  # of smaller messages, the time says nothing of the network's rate


class Event(NamedTuple):
    """Something that a rank began or ended.

    Attributes:
        seq: its number.
        time_s: when, of ``time.monotonic``.
        document, layer, round: where the rank was, counted from 0; -1: not there yet.
        kind: what: a message that is posted (``send``, ``receive``, ``sum``), a wait that is over (``sent``,
            ``received``, ``summed``, or the name of a meeting), ``document``, ``pass``, ``layer``, ``attend``.
        peer: the other rank; -1: none, or all.
        n_bytes: of a message.
    """

    seq: int
    time_s: float
    document: int
    layer: int
    round: int
    kind: str
    peer: int = NOBODY
    n_bytes: int = 0


class Wait(NamedTuple):
    """What a rank waits for, and since when (of ``time.monotonic``)."""

    kind: str
    peer: int
    n_bytes: int
    since_s: float


class Flight:
    """The recorder of one rank.

    ``document``, ``layer`` and ``round`` say where it is, from 0 on; ``name`` and ``layers`` are of the document.
    ``passes`` counts the ways through the layers so far: after a stored document there are many.
    ``waiting`` is what its main thread waits for now; None: it computes, reads or writes. ``moved_s`` is when it had
    its last event.
    """

    def __init__(self) -> None:
        self.seq = 0
        self.passes = 0
        self.document = self.layer = self.round = -1
        self.name, self.layers, self.rounds = "", 0, 0
        self.waiting: Wait | None = None
        self.moved_s = time.monotonic()
        self.waits_ended, self.longest_wait_s, self.slowest_s_per_byte = 0, 0.0, 0.0
        self._events: list[tuple | None] = [None] * EVENTS

    def note(self, kind: str, peer: int = NOBODY, n_bytes: int = 0) -> None:
        """Something happens, here and now."""
        seq, self.moved_s = self.seq, time.monotonic()
        self._events[seq % EVENTS] = (
            seq, self.moved_s, self.document, self.layer, self.round, kind, peer, n_bytes,
        )  # fmt: skip
        self.seq = seq + 1

    def begin(self, document: int, name: str, layers: int) -> None:
        """A document begins, or goes on; or what follows it."""
        self.document, self.name, self.layers = document, name, layers
        self.pass_on("document")

    def pass_on(self, kind: str = "pass") -> None:
        """Another way through the layers begins."""
        self.passes, self.layer, self.round = self.passes + 1, -1, -1
        self.note(kind)

    def enter(self, layer: int, rounds: int) -> None:
        """The attention of a layer begins, in so many rounds."""
        self.layer, self.round, self.rounds = layer, -1, rounds
        self.note("layer")

    @contextmanager
    def waits(self, kind: str, peer: int = NOBODY, n_bytes: int = 0, over: str = "") -> Iterator[None]:
        """Within it the main thread waits; at its end ``over`` is noted (by default ``kind``)."""
        began_s = time.monotonic()
        self.waiting = Wait(kind, peer, n_bytes, began_s)
        try:
            yield
        finally:
            self.waiting = None
            if kind != DISK:
                self._learn(time.monotonic() - began_s, n_bytes)
            self.note(over or kind, peer, n_bytes)

    def events(self) -> list[Event]:
        """The last events, the oldest first."""
        kept = [Event(*event) for event in list(self._events) if event is not None]
        return sorted(kept)

    def _learn(self, waited_s: float, n_bytes: int) -> None:
        self.waits_ended += 1
        self.longest_wait_s = max(self.longest_wait_s, waited_s)
        if n_bytes >= LARGE_BYTES:
            self.slowest_s_per_byte = max(self.slowest_s_per_byte, waited_s / n_bytes)
