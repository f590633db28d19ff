"""What the flight recorder and the watchdog cost in a small job: every event and every sign of life, timed there.

    python -m benchmarks.watchdog [--tokens 512] [--ranks 2] [--rounds 5]

The model and the document are those of ``benchmarks.main_job``; keys and values are kept. Half a percent of a small job
is less than two runs of it differ by, so the calls themselves are counted and timed (with the timing's own cost, which
makes the figure an upper bound), and set against the job's processor time; the job with and without takes turns, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.main_job import emit, in_ranks, summary

WAYS = ("without", "with", "timed")


class Clock:
    """Counts and times the calls of functions."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its processor time added here."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls += 1
                self.seconds += time.thread_time() - began

        return call


def measure(folder: Path, tokens: int, rounds: int) -> None:
    """Run all ways in turn on the ranks of this launch; rank 0 prints the seconds of each job."""
    from contextlib import contextmanager

    from mpi4py import MPI

    from cpmpi.comm.flight import Flight
    from cpmpi.comm.watchdog import Watchdog
    from cpmpi.engine.options import JobOptions
    from cpmpi.engine.run import run

    @contextmanager
    def nothing(*_: Any, **__: Any) -> Any:
        yield

    notes, beats = Clock(), Clock()
    note, waits, beat = Flight.note, Flight.waits, Watchdog._beat
    found: dict[str, float] = {}
    for i in range(rounds + 1):
        for way in WAYS:
            Flight.note = (lambda *_, **__: None) if way == "without" else note  # type: ignore[method-assign]
            Flight.waits = nothing if way == "without" else waits  # type: ignore[method-assign]
            if way == "timed":
                Flight.note = notes.timed(note)  # type: ignore[method-assign]
                Watchdog._beat = beats.timed(beat)  # type: ignore[method-assign]
            options = JobOptions(
                model=folder / "model", inputs=(str(folder / f"{tokens}.npy"),), output=folder / "run",
                attention="ring", overwrite=True, quiet=True, hang_timeout="off" if way == "without" else "auto",
            )  # fmt: skip
            MPI.COMM_WORLD.Barrier()
            began = time.process_time()
            run(options)
            if i:
                found[f"{way} {i}"] = time.process_time() - began
            else:  # the first is to warm up
                notes.calls = notes.seconds = beats.calls = beats.seconds = 0  # type: ignore[assignment]
            Watchdog._beat = beat  # type: ignore[method-assign]
    if MPI.COMM_WORLD.rank == 0:
        emit(
            **found, notes=notes.calls / rounds, note_s=notes.seconds / rounds, beats=beats.calls / rounds,
            beat_s=beats.seconds / rounds,
        )  # fmt: skip


def main() -> None:
    """Start the ranks and print what they found."""
    answer = in_ranks("benchmarks.watchdog", __doc__, measure, tokens=512, rounds=5)
    if answer is None:
        return
    asked, found = answer
    seconds = {way: [found[f"{way} {i}"] for i in range(1, asked.rounds + 1)] for way in WAYS}
    print(f"{asked.tokens} tokens on {asked.ranks} ranks, {asked.rounds} rounds; processor time of rank 0")
    for way, values in seconds.items():
        ratios = summary([a / b for a, b in zip(values, seconds["without"], strict=True)])
        print(f"  {way:8} {summary(values)} s, {ratios} of without")
    job_s = min(seconds["without"])
    for what, one in (("notes", "note_s"), ("beats", "beat_s")):
        print(
            f"  {found[what]:.0f} {what} a job, {found[one] / max(found[what], 1) * 1e6:.1f} us each: "
            f"{found[one] / job_s:.2%} of it"
        )


if __name__ == "__main__":
    main()
