"""Ranks that wait without end: what each tells of itself, the files that it does so in, and who is the first behind.

    log/beats/rank-00000                     a rank's sign of life and state, written anew every few seconds; of a job
                                             beside others, in log/beats-START
    log/hang-20261124T170341-4711/           made by the rank that raises the alarm, once for a start of a job
        rank-00000.json                      a rank's state, its last events and its stack
        verdict.json                         who is the first behind

Files, since they work where MPI does not: the run folder is shared by contract.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpmpi.comm.flight import DISK, NOBODY, Event, Flight
from cpmpi.errors import UserError
from cpmpi.text import counted, duration, human_bytes, shown

BEAT_BYTES = 1024  # always written in full, over the one before
NAME_WIDTH = 60

# what a rank waits for, in words; others are meetings of all ranks
WAITS = {
    "send": "to send {size} to rank {peer}", "receive": "to receive {size} from rank {peer}",
    "sum": "for the sum of {size} over the ranks that share the weights", "root": "for rank 0",
    DISK: "for its disk",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class State:
    """What a rank tells of itself, or what is known of it.

    Attributes:
        rank, node, pid: who it is.
        beat: the number of this sign of life; 0: there was none.
        seq: of its next event.
        passes: through the layers that it has begun.
        document, name, layer, layers, round, rounds: where it is, counted from 0; -1: not there yet.
        kind, peer, n_bytes: what it waits for; an empty kind: it computes, reads or writes.
        since_s: seconds since its last event.
        idle_s: seconds in which it neither had an event nor used the processor.
        left: it is no more in the job, and why.
        silent_s: seconds without a sign of life, as the rank saw that raised the alarm; None: there is one.
    """

    rank: int
    node: str
    pid: int = 0
    beat: int = 0
    seq: int = 0
    passes: int = 0
    document: int = -1
    name: str = ""
    layer: int = -1
    layers: int = 0
    round: int = -1
    rounds: int = 0
    kind: str = ""
    peer: int = NOBODY
    n_bytes: int = 0
    since_s: float = 0.0
    idle_s: float = 0.0
    left: str = ""
    silent_s: float | None = None

    @property
    def gone(self) -> bool:
        """Whether nothing can come from it any more: it left, or gives no sign of life."""
        return bool(self.left) or self.silent_s is not None

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return self.kind not in ("", DISK)

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it is."""
        return self.passes, self.layer, self.round

    def where(self) -> str:
        """Where it is, in words; layers and rounds counted from 1."""
        if self.document < 0:
            return "the time before the first document"
        parts = [f"document '{shown(self.name, NAME_WIDTH)}'"]
        if self.layer >= 0:
            parts.append(f"layer {self.layer + 1} of {self.layers}")
        if self.round >= 0:
            parts.append(f"round {self.round + 1} of {self.rounds}")
        return ", ".join(parts)

    def doing(self, nodes: Sequence[str] = ()) -> str:
        """What it does, in words, with the peer's node where nodes are given."""
        if not self.kind:
            return "computes"
        peer = f"{self.peer} on {nodes[self.peer]}" if 0 <= self.peer < len(nodes) else str(self.peer)
        text = WAITS.get(self.kind, f"for all ranks ({self.kind})")
        return f"waits {text.format(size=human_bytes(self.n_bytes), peer=peer)}"


def state_of(flight: Flight, now_s: float, known: State) -> State:
    """The state of the rank whose recorder this is; what else is known of it stays."""
    wait, seq = flight.waiting, flight.seq
    kind, peer, n_bytes = (wait.kind, wait.peer, wait.n_bytes) if wait is not None else ("", NOBODY, 0)
    return replace(
        known, seq=seq, passes=flight.passes, document=flight.document, name=shown(flight.name, NAME_WIDTH),
        layer=flight.layer, layers=flight.layers, round=flight.round, rounds=flight.rounds, kind=kind, peer=peer,
        n_bytes=n_bytes, since_s=now_s - flight.moved_s,
    )  # fmt: skip


def first_behind(states: Sequence[State]) -> State:
    """The rank that the others wait for: of those that are gone, if any is, else of all, the one least far."""
    return min(states, key=lambda state: (not state.gone, state.place, state.rank))


def verdict(states: Sequence[State], rank: int, waited_s: float) -> str:
    """One line: which rank is the first behind, where, and what it waits for.

    Args:
        states: of all ranks, by rank.
        rank: who raised the alarm.
        waited_s: how long it has waited.
    """
    nodes = [state.node for state in states]
    behind = first_behind(states)
    who = f"rank {behind.rank}/{len(states)} on {behind.node}"
    if behind.left:
        head = f"{who} has left the job ({behind.left}) in {behind.where()}"
    elif behind.gone:
        head = f"{who} gives no sign of life, the last from {behind.where()}, where it {behind.doing(nodes)}"
    elif not behind.waits:
        head = f"{who} does not go on in {behind.where()}, where it {behind.doing(nodes)} without using its processor"
    else:
        head = f"all ranks wait; the first behind is {who} in {behind.where()}, where it {behind.doing(nodes)}"
    more = sum(state.gone for state in states) - 1
    others = f"; {counted(more, 'more rank')} likewise" if more > 0 else ""
    waited = f"rank {rank} has waited for {duration(waited_s)} in {states[rank].where()}"
    return f"{head}{others}; {waited}; the job ends, and the same command goes on"


class Beats:
    """The files of the ranks' signs of life.

    Args:
        log: the folder of the logs.
        start: what tells this start of the job from others.
        rank: this one.
        beside: whether other jobs may use the logs at the same time.
    """

    def __init__(self, log: Path, start: str, rank: int, *, beside: bool = False) -> None:
        self.log, self.start, self.rank = log, start, rank
        self.folder = log / (f"beats-{start}" if beside else "beats")

    def write(self, state: State) -> bool:
        """Tell the others; False where that fails. Closed each time, so that other nodes see it."""
        content = json.dumps({"start": self.start, **asdict(state)}).encode()
        with suppress(OSError):
            descriptor = os.open(self._path(self.rank), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                return os.pwrite(descriptor, content.ljust(BEAT_BYTES), 0) == max(BEAT_BYTES, len(content))
            finally:
                os.close(descriptor)
        return False

    def read(self, rank: int) -> State | None:
        """What another rank told last; None where there is nothing of this start."""
        with suppress(OSError, ValueError, TypeError):
            content = json.loads(self._path(rank).read_bytes())
            if content.pop("start") == self.start:
                return State(**content)
        return None

    def clear(self) -> None:
        """Delete what an earlier start has left."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete this rank's, and the folder with the last one."""
        with suppress(OSError):
            self._path(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}"


@dataclass(frozen=True, kw_only=True)
class Dump:
    """What a rank wrote down when the alarm was raised."""

    state: State
    events: tuple[Event, ...]
    stack: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """As ``rank-00000.json`` in the folder of a hang, at once."""
        path = folder / f"rank-{self.state.rank:05d}.json"
        content = {"state": asdict(self.state), "fields": Event._fields, "events": self.events, "stack": self.stack}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)

    @staticmethod
    def read(path: Path) -> Dump:
        """The one in a file.

        Raises:
            UserError: it is none.
        """
        try:
            content = json.loads(path.read_bytes())
            events = tuple(Event(*event) for event in content["events"])
            return Dump(state=State(**content["state"]), events=events, stack=tuple(content["stack"]))
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise UserError(f"{path}: not what a rank writes when the job hangs ({problem})") from problem


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A job that hung: the line that was said, what was known of every rank, and what those wrote that could."""

    folder: Path
    line: str
    states: tuple[State, ...]
    dumps: dict[int, Dump]


def hangs(log: Path) -> list[Path]:
    """The folders of the hangs of a run, the earliest first."""
    return sorted(path for path in log.glob("hang-*") if path.is_dir())


def dumps_in(folder: Path) -> dict[int, Dump]:
    """What ranks wrote in the folder of a hang, by rank."""
    return {dump.state.rank: dump for dump in map(Dump.read, sorted(folder.glob("rank-*.json")))}


def write_verdict(folder: Path, line: str, states: Sequence[State]) -> None:
    """Write down how a hang was understood."""
    content: dict[str, Any] = {"line": line, "states": [asdict(state) for state in states]}
    (folder / "verdict.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _as_written(known: State, dumps: dict[int, Dump]) -> State:
    """A rank's state as it wrote it, perhaps later: a stopped process may go on for a moment when it is ended."""
    if known.rank not in dumps:
        return known
    return replace(dumps[known.rank].state, silent_s=known.silent_s, left=known.left)


def read_hang(folder: Path) -> Hang:
    """A hang from its folder; where the rank that raised the alarm was killed early, from what the others wrote.

    Raises:
        UserError: a file in it is damaged, or there is none.
    """
    dumps = dumps_in(folder)
    path = folder / "verdict.json"
    if not path.exists():
        if not dumps:
            raise UserError(f"{folder}: no rank wrote anything")
        states = tuple(dump.state for dump in dumps.values())
        return Hang(folder=folder, line="(no rank came to say who is behind)", states=states, dumps=dumps)
    try:
        content = json.loads(path.read_bytes())
        states = tuple(_as_written(State(**state), dumps) for state in content["states"])
        return Hang(folder=folder, line=str(content["line"]), states=states, dumps=dumps)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise UserError(f"{path}: damaged ({problem})") from problem
