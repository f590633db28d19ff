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
DOCUMENTS = "documents.jsonl"
STATUS_INTERVAL_S = 1.0

Entry = Mapping[str, Any]


def note(folder: Path, **entry: Any) -> None:
    """Add a line to the record in a log folder; a single write, so that lines of two writers do not mix."""
    _add(folder / JOBS, entry)


def note_document(folder: Path, **entry: Any) -> None:
    """Add a line for a document that one of several jobs has done, which share them."""
    _add(folder / DOCUMENTS, entry)


def _add(file: Path, entry: Entry) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(dict(entry)) + "\n").encode())
    finally:
        os.close(descriptor)


def entries(folder: Path) -> list[Entry]:
    """The lines of a record, the oldest first; none where there is no record. A half-written line is left out."""
    return _lines(folder / JOBS)


def documents(folder: Path) -> list[Entry]:
    """The documents that jobs which share them have done, each with what it took."""
    return _lines(folder / DOCUMENTS)


def _lines(file: Path) -> list[Entry]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
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

    def __init__(self, folder: Path, job: str | None = None) -> None:
        """The file in a log folder; that of one of several jobs that share the documents is called after it."""
        self.path = folder / (STATUS if job is None else f"status-{job}.json")
        self._next = 0.0

    def due(self) -> bool:
        """Whether a second has passed."""
        return time.monotonic() >= self._next

    def write(self, **facts: Any) -> None:
        """Replace what the file says."""
        self._next = time.monotonic() + STATUS_INTERVAL_S
        temporary = self.path.with_suffix(f"{self.path.suffix}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps({**facts, "at": round(time.time(), 1)}) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)

    def remove(self) -> None:
        """Of one of several jobs: it has ended."""
        self.path.unlink(missing_ok=True)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What ``status.json`` says; None where there is none."""
    return _status(folder / STATUS)


def shared_statuses(folder: Path) -> list[dict[str, Any]]:
    """What the jobs say that share the documents of a run, also those that have ended."""
    found = (_status(file) for file in sorted(folder.glob("status-*.json")))
    return [status for status in found if status is not None]


def _status(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
