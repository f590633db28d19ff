"""What ``cpmpi inspect --hang`` says of a job that hung: who is the first behind, and what each rank did last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpmpi.comm.flight import Event
from cpmpi.comm.hang import Hang, State, first_behind, hangs, read_hang
from cpmpi.errors import UserError
from cpmpi.run.paths import RunPaths
from cpmpi.text import duration, escaped, human_bytes, table

HEADINGS = ("rank", "node", "document", "layer", "round", "event", "does", "since", "last events")
LAST_EVENTS = 3
STACK_LINES = 8  # of the first rank behind


def last_hang(run: Path) -> Hang:
    """The latest hang of a run.

    Raises:
        UserError: there was none.
    """
    log = RunPaths.of(run).log
    found = hangs(log)
    if not found:
        raise UserError(f"{log}: no job of this run was ended because it hung")
    return read_hang(found[-1])


def hang_facts(hang: Hang) -> dict[str, Any]:
    """A hang as plain data for JSON; ranks, layers and rounds are counted from 0."""
    return {
        "folder": str(hang.folder),
        "line": hang.line,
        "first_behind": first_behind(hang.states).rank,
        "ranks": [
            {
                **asdict(state),
                "events": [e._asdict() for e in hang.dumps[state.rank].events] if state.rank in hang.dumps else None,
                "stack": list(hang.dumps[state.rank].stack) if state.rank in hang.dumps else None,
            }
            for state in hang.states
        ],
    }


def hang_text(hang: Hang) -> str:
    """A hang for a terminal: the line, a row per rank, and where the first behind stands in the program."""
    behind = first_behind(hang.states)
    nodes = {state.rank: state.node for state in hang.states}
    names = [nodes.get(rank, "?") for rank in range(max(nodes) + 1)]
    rows = []
    for state in hang.states:
        dump = hang.dumps.get(state.rank)
        rows.append((*_row(state, names), _events(dump.events) if dump is not None else "wrote nothing"))
    lines = [escaped(f"hang      {hang.folder}"), escaped(hang.line), "", table(HEADINGS, rows, left=9)]
    dump = hang.dumps.get(behind.rank)
    if dump is not None and dump.stack:
        stack = [line for entry in dump.stack for line in entry.split("\n")][-STACK_LINES:]
        lines += ["", f"rank {behind.rank} stands at", *map(escaped, stack)]
    return "\n".join(lines)


def _row(state: State, nodes: Sequence[str]) -> tuple[str, ...]:
    def counted_from_1(number: int, of: int) -> str:
        return f"{number + 1}/{of}" if number >= 0 else "-"

    does = state.doing(nodes)
    if state.left:
        does = f"left: {state.left}"
    elif state.silent_s is not None:
        does = f"no sign of life for {duration(state.silent_s)}; {does} before"
    return (
        str(state.rank), state.node, state.name or "-", counted_from_1(state.layer, state.layers),
        counted_from_1(state.round, state.rounds), str(state.seq), does, duration(state.since_s),
    )  # fmt: skip


def _events(events: Sequence[Event]) -> str:
    """The last events, the latest first."""
    return ", ".join(map(_event, reversed(events[-LAST_EVENTS:])))


def _event(event: Event) -> str:
    size = f" {human_bytes(event.n_bytes)}" if event.n_bytes else ""
    peer = f" ({event.peer})" if event.peer >= 0 else ""
    return f"{event.kind}{size}{peer}"
