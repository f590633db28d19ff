"""A watchdog on each rank: a job in which no rank goes on ends, and one line says who is the first behind.

A side thread tells the others every few seconds that its rank lives, where it is and what it waits for (`Beats`). It
judges only once its own rank has waited for others a quarter of the time that is allowed. The alarm is raised when, for
the whole of it, this rank had no event and

- the rank that it waits for, or any other where it waits for all, gave no sign of life, or
- all ranks live, but wait for each other without an event.

A rank that computes, reads or writes is busy, however long it takes: others wait for it. So a slow job is no hang.
What is allowed is learned: `FACTOR` times the longest wait so far. A stopped process, or a file system that stands
still, stops its own watchdog too: time in which this thread did not run does not count.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from cpmpi.comm import hang
from cpmpi.comm.flight import Flight
from cpmpi.comm.hang import Beats, Dump, State
from cpmpi.comm.ranks import AgreedError, Ranks, node_name
from cpmpi.comm.stop import LAUNCHERS, last_words
from cpmpi.errors import Stopped, UserError, one_line
from cpmpi.text import shown

FLOOR_S, CEILING_S = 60.0, 1800.0  # what is allowed at least and at most, where it is learned
FACTOR = 10.0  # times the longest wait so far
FIRST_WAIT_S, LEARNED_WAITS = 30.0, 20  # assumed for the longest wait, until there were so many
IDLE_S = 1800.0  # without an event and without using the processor: not busy, but stuck
IDLE_SHARE = 0.05  # of a processor: what the threads take that only ask for messages
BEATS_IN_LIMIT, LEAST_BEATS_IN_LIMIT, SLOW_BEAT_S, RANKS_PER_S = 12, 6, 5.0, 100
HEARD_S, LAST_S = 10.0, 60.0  # rank 0 and others end by themselves if an alarm that they heard of did not end them
# Open MPI's launcher and its daemons wait without end where they cannot reach each other: then they are ended.
LAUNCHER_S, PARENTS = 30, (*LAUNCHERS, "prted")
WRITING_BEATS = 4  # the others have so long to write down what they know
STATUS = 1
END_LAUNCHER = "i=0; while kill -0 $1; do [ $i = $2 ] && kill -9 $1; i=$((i + 1)); sleep 1; done"

logger = logging.getLogger("cpmpi")


class Limit:
    """Seconds that a rank may wait for others in vain.

    Args:
        choice_s: what the user says; None: it is learned.
    """

    def __init__(self, choice_s: float | None) -> None:
        self.choice_s = choice_s

    @property
    def least_s(self) -> float:
        """It is never less."""
        return FLOOR_S if self.choice_s is None else self.choice_s

    def of(self, flight: Flight) -> float:
        """What is allowed now, by the waits that were, and the bytes that are waited for."""
        if self.choice_s is not None:
            return self.choice_s
        expected_s = flight.longest_wait_s
        if flight.waits_ended < LEARNED_WAITS:
            expected_s = max(expected_s, FIRST_WAIT_S)
        if (wait := flight.waiting) is not None:
            expected_s = max(expected_s, wait.n_bytes * flight.slowest_s_per_byte)
        return min(CEILING_S, max(FLOOR_S, FACTOR * expected_s))


class Peers:
    """What this rank knows of the others, by looking at their signs of life now and then."""

    def __init__(self, beats: Beats, nodes: Sequence[str]) -> None:
        self._beats, self._nodes, self._rank = beats, nodes, beats.rank
        self._known: dict[int, tuple[State, float, float]] = {}  # last state, silent for, without an event for
        self._first = (beats.rank + 1) % len(nodes)

    def forget(self) -> None:
        """This rank goes on: what was seen before does not count."""
        self._known.clear()

    def look(self, ran_s: float, limit_s: float, awaited: int) -> tuple[bool, str]:
        """Look at the others, after this thread ran for so long: whether it is a hang, and who is busy otherwise."""
        still_s = float("inf")
        for rank in self._order(awaited):
            state, silent_s, unmoved_s = self._look_at(rank, ran_s)
            if state.left or silent_s >= limit_s:
                return True, ""
            if not state.waits and state.idle_s < IDLE_S and silent_s < limit_s / 2:
                self._first = rank
                if silent_s > limit_s / 4:  # perhaps not busy any more
                    return False, ""
                return False, f"rank {rank} on {state.node}, which {state.doing()} in {state.where()}"
            still_s = min(still_s, unmoved_s)
        return still_s >= limit_s, ""

    def beats(self) -> list[int]:
        """The number of everyone's last sign of life; 0 where there is none."""
        states = map(self._beats.read, range(len(self._nodes)))
        return [state.beat if state is not None else 0 for state in states]

    def states(self, dumps: dict[int, Dump], before: Sequence[int], ran_s: float) -> list[State]:
        """What is known of all in the end: what they wrote, else their last sign of life.

        Args:
            dumps: what ranks wrote.
            before: everyone's `beats`, so many seconds ago.
            ran_s: the seconds.
        """
        found = []
        for rank, node in enumerate(self._nodes):
            state = dumps[rank].state if rank in dumps else self._beats.read(rank) or State(rank=rank, node=node)
            if rank not in dumps and not state.left and state.beat == before[rank]:
                _, silent_s, _ = self._known.get(rank, (state, 0.0, 0.0))
                state = replace(state, silent_s=silent_s + ran_s)
            found.append(state)
        return found

    def _order(self, awaited: int) -> list[int]:
        """Everyone else: first the one that this rank waits for, then the one that was busy at the last look."""
        others = [rank for rank in range(len(self._nodes)) if rank != self._rank]
        return sorted(others, key=lambda rank: (rank != awaited, rank != self._first))

    def _look_at(self, rank: int, ran_s: float) -> tuple[State, float, float]:
        now = self._beats.read(rank)
        before = self._known.get(rank)
        if before is None:
            self._known[rank] = (now or State(rank=rank, node=self._nodes[rank]), 0.0, 0.0)
            return self._known[rank]
        last, silent_s, unmoved_s = before
        silent_s = silent_s + ran_s if now is None or now.beat == last.beat else 0.0
        unmoved_s = unmoved_s + ran_s if now is None or now.seq == last.seq else 0.0
        self._known[rank] = (now or last, silent_s, unmoved_s)
        return self._known[rank]


class Watchdog:
    """The side thread of one rank. Use it as a context manager, within which the rank takes part in a job.

    Args:
        flight: what the rank does.
        beats: where ranks tell each other of themselves.
        nodes: of all ranks.
        limit: how long ranks may wait.
        tell: shows the user, on rank 0, that the job waits for a busy rank.
    """

    def __init__(
        self, flight: Flight, beats: Beats, nodes: Sequence[str], limit: Limit,
        tell: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self._flight, self._beats, self._nodes, self._limit, self._tell = flight, beats, nodes, limit, tell
        self.folder = beats.log / f"hang-{beats.start}"
        self._peers = Peers(beats, nodes)
        self._me = State(rank=beats.rank, node=nodes[beats.rank], pid=os.getpid())
        self._main = threading.get_ident()
        self.beat_s = beat_seconds(limit.least_s, len(nodes))
        self._over = threading.Event()
        self._told_s, self._heard, self._waited = 0.0, True, (-1, 0.0)
        self._used_s, self._idle_s = time.process_time(), 0.0
        self._thread = threading.Thread(target=self._watch, name="cpmpi-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._over.set()
        self._thread.join()
        if error is None or isinstance(error, AgreedError | Stopped):  # all leave together
            self._beats.remove()
        else:  # the others may wait for this rank, and are not ended by its end where no launcher sees to it
            self._me = replace(self._me, left=one_line(error)[:200])
            self._beat()

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._over.wait(self.beat_s):
            now_s = time.monotonic()
            # Longer than a beat: this thread could not run, nor perhaps those of others.
            ran_s, before_s = min(now_s - before_s, 2 * self.beat_s), now_s
            try:
                self._idle(ran_s)
                self._heard = self._beat()
                if self.folder.is_dir():
                    self._follow()
                elif self._hangs(ran_s):
                    self._alarm()
            except Exception:  # a watchdog that fails is no reason to end a job, nor to be taken for dead
                logger.exception("the watchdog of rank %d", self._me.rank)

    def _beat(self) -> bool:
        self._me = hang.state_of(self._flight, time.monotonic(), replace(self._me, beat=self._me.beat + 1))
        self._me = replace(self._me, idle_s=self._idle_s)
        return self._beats.write(self._me)

    def _idle(self, ran_s: float) -> None:
        """Count the time in which the rank has no event and does not compute either."""
        used_s = time.process_time()
        moved = self._flight.seq != self._me.seq
        busy = used_s - self._used_s > IDLE_SHARE * ran_s
        self._used_s, self._idle_s = used_s, 0.0 if moved or busy else self._idle_s + ran_s

    def _hangs(self, ran_s: float) -> bool:
        """Whether this rank waits in vain; told to the user where it waits long for one that is busy."""
        seq, waited_s = self._waited
        if not self._me.waits or self._me.seq != seq or not self._heard:
            self._waited = (self._me.seq, 0.0)
            self._peers.forget()
            return False
        waited_s += ran_s
        self._waited = (seq, waited_s)
        limit_s = self._limit.of(self._flight)
        if waited_s < limit_s / 4:
            return False
        awaited = 0 if self._me.kind == "root" else self._me.peer
        hangs, busy = self._peers.look(ran_s, 0.7 * limit_s, awaited)
        if busy and self._tell is not None and waited_s >= limit_s / 2 and self._told_s < limit_s:
            self._told_s = limit_s  # again only where much longer waits have become usual
            self._tell(f"waiting for {busy}")
        return hangs

    def _alarm(self) -> None:
        """End the job, as the first to find that it hangs; or as another where somebody else was faster."""
        try:
            self.folder.mkdir()
        except FileExistsError:
            return self._follow()
        except OSError as problem:  # nothing can be written: it is said all the same
            logger.warning("%s: %s", self.folder, problem)
        see_to_launcher()
        self._dump()
        began_s, before = time.monotonic(), self._peers.beats()
        dumps = self._gather()
        states = self._peers.states(dumps, before, time.monotonic() - began_s)
        look = f"cpmpi inspect --hang {shown(self._beats.log.parent)}"
        line = f"error: {hang.verdict(states, self._me.rank, self._waited[1])} ({look})"
        with suppress(OSError):
            hang.write_verdict(self.folder, line, states)
        logger.error(line)
        last_words(line)
        end_all()

    def _gather(self) -> dict[int, Dump]:
        """What the others write, who have some beats' time for it."""
        ends_s = time.monotonic() + WRITING_BEATS * self.beat_s + 2.0
        while True:
            with suppress(OSError):
                written = len(list(self.folder.glob("rank-*.json")))
                if written == len(self._nodes):
                    break
            if time.monotonic() > ends_s:
                break
            time.sleep(min(0.2, self.beat_s))
        found: dict[int, Dump] = {}
        with suppress(OSError, UserError):
            found = hang.dumps_in(self.folder)
        return found or {self._me.rank: self._dump()}

    def _follow(self) -> None:
        """Write down what this rank knows; whoever raised the alarm says the rest, and ends this rank, too.

        If that does not come to pass, it may have lost its network; then rank 0, which is near the launcher, speaks.
        """
        logger.error("the job hangs, see %s", self.folder)
        if self._nodes.index(self._me.node) == self._me.rank:
            see_to_launcher()
        self._dump()
        time.sleep(2 * WRITING_BEATS * self.beat_s + (LAST_S if self._beats.rank else HEARD_S))
        if self._beats.rank == 0:
            with suppress(UserError):
                last_words(hang.read_hang(self.folder).line)
        end_all()

    def _dump(self) -> Dump:
        frame = sys._current_frames().get(self._main)
        stack = [line.rstrip() for line in traceback.format_stack(frame)] if frame is not None else []
        dump = Dump(state=self._me, events=tuple(self._flight.events()), stack=tuple(stack))
        with suppress(OSError):
            dump.write(self.folder)
        return dump


def beat_seconds(least_s: float, ranks: int) -> float:
    """Seconds between two signs of life: fewer where there are many ranks, for the sake of the file system."""
    return max(min(least_s / BEATS_IN_LIMIT, SLOW_BEAT_S), min(ranks / RANKS_PER_S, least_s / LEAST_BEATS_IN_LIMIT))


def watched(
    ranks: Ranks, log: Path, choice_s: float | None, tell: Callable[[str], None], *, beside: bool = False
) -> AbstractContextManager[object]:
    """A watchdog on every rank; none where there is one rank, or none is wanted. Collective.

    Args:
        ranks: of the job.
        log: the folder of the logs.
        choice_s: seconds that a rank may wait for others in vain; None: learned; endless: no watchdog.
        tell: shows the user, on rank 0, that the job waits for a busy rank.
        beside: whether other jobs may use the logs at the same time: this one only reads the run.
    """
    if ranks.size == 1 or choice_s == float("inf"):
        return nullcontext()

    def begin() -> str:
        start = "-".join([time.strftime("%Y%m%dT%H%M%S"), *[node_name()] * beside, str(os.getpid())])
        Beats(log, start, 0, beside=beside).clear()
        return start

    beats = Beats(log, ranks.on_root(begin), ranks.rank, beside=beside)
    nodes = ranks.allgather(node_name())
    return Watchdog(ranks.flight, beats, nodes, Limit(choice_s), tell if ranks.is_root else None)


def end_all() -> None:
    """End every rank from a side thread, though the main thread may be inside MPI: it is not waited for."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        threading.Thread(target=mpi.COMM_WORLD.Abort, args=(STATUS,), daemon=True).start()
        time.sleep(5.0)
    os._exit(STATUS)


def see_to_launcher() -> None:
    """Have Open MPI's launcher or daemon ended in a while, where it is this rank's parent and does not end before.

    By a process of its own, which goes when the launcher does: this one may be ended first.
    """
    parent = os.getppid()
    with suppress(OSError):
        if Path("/proc", str(parent), "comm").read_text().strip() in PARENTS:
            subprocess.Popen(
                ["/bin/sh", "-c", END_LAUNCHER, "sh", str(parent), str(LAUNCHER_S)], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
