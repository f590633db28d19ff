"""What every rank did when, predicted or measured: plain intervals, and the trace file that browsers show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACTIVITIES = ("layers", "compute", "merge", "wait", "transfer", "io")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A stretch of a rank's time.

    Attributes:
        rank: whose; of a transfer, the receiver's.
        what: ``layers`` (all but attention), ``compute`` (attention), ``merge`` (of partials), ``wait`` (for a
            transfer: what was not hidden), ``transfer`` (a message under way), ``io`` (writing keys and values).
        start_s, stop_s: from the start of the whole.
        round: of the schedule.
        layer: of the model.
        peer: of a transfer, the sender.
        n_bytes: of a transfer or of io.
    """

    rank: int
    what: str
    start_s: float
    stop_s: float
    round: int = 0
    layer: int = 0
    peer: int | None = None
    n_bytes: int = 0

    def __post_init__(self) -> None:
        if self.what not in ACTIVITIES:
            raise ValueError(f"unknown activity {self.what!r}: choose one of {', '.join(ACTIVITIES)}")
        if self.stop_s < self.start_s:
            raise ValueError(f"interval ends ({self.stop_s} s) before it starts ({self.start_s} s)")

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.stop_s - self.start_s


@dataclass(kw_only=True)
class Recorder:
    """Notes what one rank does, for `Interval` by `Interval`; times are ``time.perf_counter`` after ``epoch_s``."""

    rank: int
    epoch_s: float
    layer: int = 0
    intervals: list[Interval] = field(default_factory=list)

    def note(
        self, what: str, i: int, start_s: float, stop_s: float, peer: int | None = None, n_bytes: int = 0,
        layer: int | None = None,
    ) -> None:  # fmt: skip
        """Something that took place in round ``i`` of the schedule, in the present layer unless one is given."""
        start_s, stop_s = start_s - self.epoch_s, stop_s - self.epoch_s
        self.intervals.append(
            Interval(
                rank=self.rank, what=what, start_s=start_s, stop_s=stop_s, round=i, peer=peer, n_bytes=n_bytes,
                layer=self.layer if layer is None else layer,
            )
        )  # fmt: skip


def waiting_share(intervals: Iterable[Interval]) -> float:
    """The part of the ranks' time, from the start to when the last is done, in which they wait for messages."""
    known = list(intervals)
    ranks, until_s = {i.rank for i in known}, max((i.stop_s for i in known), default=0.0)
    waited = sum(i.seconds for i in known if i.what == "wait")
    return waited / (until_s * len(ranks)) if until_s else 0.0


def chrome_trace(intervals: Iterable[Interval]) -> str:
    """The intervals in the Trace Event Format, which chrome://tracing and ui.perfetto.dev show.

    A process is a rank; its threads are what it computes, what arrives and what is written.
    """
    tracks = {"layers": 0, "compute": 0, "merge": 0, "wait": 0, "transfer": 1, "io": 2}
    names = ("compute", "arriving", "writing")
    events: list[dict[str, Any]] = []
    seen: set[tuple[int, int]] = set()
    for interval in sorted(intervals, key=lambda i: (i.rank, i.start_s)):
        track = tracks[interval.what]
        if (interval.rank, track) not in seen:
            seen.add((interval.rank, track))
            where = {"ph": "M", "pid": interval.rank, "tid": track}
            events.append({**where, "name": "process_name", "args": {"name": f"rank {interval.rank}"}})
            events.append({**where, "name": "thread_name", "args": {"name": names[track]}})
        arguments: dict[str, Any] = {"layer": interval.layer, "round": interval.round}
        if interval.peer is not None:
            arguments["from"] = interval.peer
        if interval.n_bytes:
            arguments["bytes"] = interval.n_bytes
        events.append(
            {
                "ph": "X", "pid": interval.rank, "tid": track, "name": interval.what, "args": arguments,
                "ts": round(interval.start_s * 1e6, 3), "dur": round(interval.seconds * 1e6, 3),
            }
        )  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def save_trace(intervals: Iterable[Interval], path: str | Path) -> None:
    """Write `chrome_trace` to a file."""
    Path(path).write_text(chrome_trace(intervals), encoding="utf-8")


def from_chrome_trace(text: str) -> list[Interval]:
    """The intervals that `chrome_trace` wrote.

    Raises:
        ValueError: it is no such text.
    """
    try:
        events = [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X"]
        return [
            Interval(
                rank=int(event["pid"]), what=str(event["name"]), start_s=event["ts"] / 1e6,
                stop_s=(event["ts"] + event["dur"]) / 1e6, layer=int(event["args"]["layer"]),
                round=int(event["args"]["round"]), peer=event["args"].get("from"),
                n_bytes=int(event["args"].get("bytes", 0)),
            )
            for event in events
        ]  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a trace of cpmpi ({type(error).__name__}: {error})") from error
