"""What jobs did to a run: a line for each submission, start and end in ``log/jobs.jsonl``, and how far the one is that
runs now in ``log/status.json``. Anyone can read them without Slurm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

JOBS = "jobs.jsonl"
STATUS = "status.json"
STATUS_INTERVAL_S = 1.0

Entry = Mapping[str, Any]


def note(folder: Path, **entry: Any) -> None:
    """Add a line to the record in a log folder; a single write, so that lines of two writers do not mix."""
    descriptor = os.open(folder / JOBS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(entry) + "\n").encode())
    finally:
        os.close(descriptor)


def entries(folder: Path) -> list[Entry]:
    """The lines of a record, the oldest first; none where there is no record. A half-written line is left out."""
    try:
        lines = (folder / JOBS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: list[Entry] = []
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) else []
    return found


def starts_in_vain(record: Sequence[Entry]) -> int:
    """How many of the last starts were told to stop before they had finished a document, or saved a part of one."""
    count = 0
    for entry in reversed([entry for entry in record if "ended" in entry]):
        if entry.get("how") != "stopped" or entry.get("finished_here") or entry.get("saved"):
            break
        count += 1
    return count


class StatusFile:
    """``status.json``: replaced at once, at most once a second, so that a look at it costs the job nothing.

    What cannot be written is left: no job fails for want of a status.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATUS
        self._next = 0.0

    def due(self) -> bool:
        """Whether a second has passed."""
        return time.monotonic() >= self._next

    def write(self, **facts: Any) -> None:
        """Replace what the file says."""
        self._next = time.monotonic() + STATUS_INTERVAL_S
        temporary = self.path.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps({**facts, "at": round(time.time(), 1)}) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What ``status.json`` says; None where there is none."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
