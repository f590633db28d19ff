"""What a job says when it is told to stop (SIGTERM): of a batch system, or by a `kill` of its launcher."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

from cpmpi.comm.progress import end_line

LAUNCHERS = ("prterun", "mpirun", "orterun")  # Open MPI's
STATUS = 128 + signal.SIGTERM


def say_when_told_to_stop(text: str, *, speaks: bool) -> None:
    """From now on SIGTERM ends this process with a line, even where the main thread sits in a long computation.

    Nothing is changed where the signal already has a handler.

    Args:
        text: the line.
        speaks: whether this process prints it.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python calls handlers between two of the main thread's steps, which may be minutes apart: the byte comes at once.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        if speaks:
            end_line()
            _print(text)
        os._exit(STATUS)

    threading.Thread(target=watch, name="cpmpi-stop", daemon=True).start()


def _print(text: str) -> None:
    """To standard error: Open MPI's launcher, once it is told to stop, passes nothing on any more; then to its own."""
    with suppress(OSError):
        parent = Path("/proc", str(os.getppid()))
        theirs = parent.joinpath("comm").read_text().strip() in LAUNCHERS
        stream = os.open(parent / "fd" / "2", os.O_WRONLY | os.O_APPEND) if theirs else 2
        os.write(stream, f"{text}\n".encode())
