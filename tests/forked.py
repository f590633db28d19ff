"""Work in a child process that may hang, be killed, or bring the interpreter down, and what became of it.

A fork of a process that has imported everything costs milliseconds, where another Python costs seconds.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended.

    Attributes:
        value: what its work returned, or the traceback.
        error: the type of the exception that its work raised; empty where none.
        text: of that exception.
        signal: that killed it, such as SIGSEGV; SIGKILL where it took too long.
        printed: on standard output and standard error.
    """

    value: Any = None
    error: str = ""
    text: str = ""
    signal: str = ""
    printed: str = ""


def in_child(work: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> Ended:
    """Do ``work(*args)``, whose result must be picklable, in a fork of this process."""
    receive, send = os.pipe()
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _be_child(work, args, send, output.fileno())
        os.close(send)
        data = _read_all(receive, time.monotonic() + timeout_s, child)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    killed = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
    value, error, text = pickle.loads(data) if data and not killed else (None, "", "")
    if not data and not killed:
        error, text = "SystemExit", f"the child left with status {os.WEXITSTATUS(status)}"
    return Ended(value=value, error=error, text=text, signal=killed, printed=printed)


def _be_child(work: Callable[..., Any], args: tuple[Any, ...], send: int, output: int) -> None:
    """Never returns."""
    found: tuple[Any, str, str] = None, "", ""
    try:
        faulthandler.disable()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        try:
            found = work(*args), "", ""
        except BaseException as problem:
            found = traceback.format_exc(), type(problem).__name__, str(problem)
        sys.stdout.flush()
        sys.stderr.flush()
        data = pickle.dumps(found)
        while data:
            data = data[os.write(send, data) :]
    finally:
        os._exit(0)


def _read_all(receive: int, until_s: float, child: int) -> bytes:
    """What the child sends until it ends; it is killed when its time is over."""
    data = b""
    while True:
        ready, _, _ = select.select([receive], [], [], max(0.0, until_s - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.close(receive)
            return b""
        part = os.read(receive, 1 << 20)
        if not part:
            os.close(receive)
            return data
        data += part
