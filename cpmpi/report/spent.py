"""Where a run's time went: what the ranks wrote into their logs for each document, and a trace where there is one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpmpi.run.reader import Document, Run
from cpmpi.timeline.intervals import ACTIVITIES, Interval

# As `cpmpi.engine.report.log_document` writes it.
LINE = re.compile(r"\S+ \S+ (?P<rank>\d+)/\d+ INFO document (?P<name>.+): \d+ tokens here; (?P<parts>[^;]+)\n?")
PART = re.compile(r"(?P<what>[^,]+?) (?P<seconds>\d+\.\d+) s(?:, |$)")
MOST_INTERVALS = 500_000


def spent(run: Run, documents: Sequence[Document]) -> dict[str, Any]:
    """Seconds of each rank by what they went into, as its log says: of each document, the last time it was done."""
    wanted = {repr(document.id) for document in documents}
    found: dict[tuple[int, str], dict[str, float]] = {}
    for file in sorted(run.paths.log.glob("rank-*.log")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                said = LINE.fullmatch(line)
                if said and said["name"] in wanted:
                    parts = {part["what"]: float(part["seconds"]) for part in PART.finditer(said["parts"])}
                    found[int(said["rank"]), said["name"]] = parts
    ranks = sorted({rank for rank, _ in found})
    names = list(dict.fromkeys(what for parts in found.values() for what in parts))
    sums = {rank: dict.fromkeys(names, 0.0) for rank in ranks}
    for (rank, _), parts in found.items():
        for what, seconds in parts.items():
            sums[rank][what] += seconds
    return {
        "ranks": ranks, "parts": names,
        "seconds": [[round(sums[rank][what], 3) for what in names] for rank in ranks],
        "documents": len({name for _, name in found}),
    }  # fmt: skip


def timeline(intervals: Sequence[Interval]) -> dict[str, Any]:
    """What every rank did when, as arrays for a page; the shortest intervals are left out where there are very many."""
    known = sorted(intervals, key=lambda i: i.seconds, reverse=True)[:MOST_INTERVALS]
    known.sort(key=lambda i: (i.rank, i.start_s))
    return {
        "kinds": list(ACTIVITIES), "left_out": len(intervals) - len(known),
        "rank": np.array([i.rank for i in known], np.uint32),
        "what": np.array([ACTIVITIES.index(i.what) for i in known], np.uint8),
        "start": np.array([i.start_s for i in known], np.float32),
        "seconds": np.array([i.seconds for i in known], np.float32),
        "layer": np.array([i.layer for i in known], np.uint16),
        "round": np.array([i.round for i in known], np.uint16),
    }  # fmt: skip
