"""A wish to stop: SIGTERM and SIGUSR1 set a flag, and the job stops where nothing is lost.

Batch systems ask a job to leave before they kill it. The handlers return at once; the engine looks at the flag where
all ranks meet. A job that stopped so exits with status 75, by which a batch script knows that the same command goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from cpmpi.comm.progress import end_line

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PROMISE = "the job stops where nothing is lost, and the same command goes on"
LAUNCHERS = ("prterun", "mpirun", "orterun")  # Open MPI's


class Stop:
    """Whether this process was asked to stop, and until when it may go on.

    Args:
        grace_s: seconds from the first signal until it will be killed.
    """

    heard = 0
    """The signal that this process was last asked by."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.asked_s: float | None = None
        self.signal = 0

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """A signal handler; only the first signal counts."""
        if self.asked_s is None:
            self.asked_s, self.signal = time.monotonic(), number
            Stop.heard = number

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.asked_s is not None

    @property
    def left_s(self) -> float:
        """Seconds that are left; endless where nobody asked."""
        return float("inf") if self.asked_s is None else self.asked_s + self.grace_s - time.monotonic()


@contextmanager
def listening(grace_s: float, *, speaks: bool = False) -> Iterator[Stop]:
    """Within it the signals ask to stop; the handlers are as before at its end.

    Python gives signals to its main thread alone: in another one, none is heard.

    Args:
        grace_s: seconds from the first signal until the process will be killed.
        speaks: whether this process says at once that it was asked, also in the middle of a long computation.
    """
    stop, Stop.heard = Stop(grace_s), 0  # a process may run one job after another
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in SIGNALS}
    try:
        with _saying_so() if speaks else nullcontext():
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _saying_so() -> Iterator[None]:
    """Within it a thread says that a signal came. Handlers run between two steps of the main thread, minutes apart."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while told := os.read(reading, 1):
            if told[0] in SIGNALS:
                Stop.heard = told[0]
                last_words(f"told to stop ({signal.Signals(told[0]).name}): {PROMISE}")
                return

    thread = threading.Thread(target=watch, name="cpmpi-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def last_words(text: str) -> None:
    """A line on standard error that is read even when the launcher was told to stop.

    Open MPI's launcher passes nothing on once it has a SIGTERM, which it hands down to its ranks: then the line goes to
    its own standard error.
    """
    end_line()
    parent = Path("/proc", str(os.getppid()))
    with suppress(OSError):
        if Stop.heard == signal.SIGTERM and parent.joinpath("comm").read_text().strip() in LAUNCHERS:
            os.write(os.open(parent / "fd" / "2", os.O_WRONLY | os.O_APPEND), f"{text}\n".encode())
            return
    print(text, file=sys.stderr, flush=True)
