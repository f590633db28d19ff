"""A command under mpirun with all its processes in sight, for tests that stop and kill some of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.conftest import ROOT, clean_environment, mpirun_path

TOKEN = "CPMPI_LAUNCHED"


class Launched:
    """``python -m cpmpi WORDS`` on so many ranks, its output in a file. Use it as a context manager."""

    def __init__(self, words: list[str], out: Path, ranks: int = 2, **environment: str) -> None:
        self.out, self.token = out, f"{out}-{time.monotonic_ns()}"
        line = [mpirun_path(), "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        with out.open("w") as file:
            self.launcher = subprocess.Popen(
                [*line, sys.executable, "-m", "cpmpi", *words], cwd=ROOT, start_new_session=True, stdout=file,
                stderr=subprocess.STDOUT, env=clean_environment(**{TOKEN: self.token}, **environment),
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave nothing behind."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def processes(self) -> list[int]:
        """All that live, the launcher among them, by a variable in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"{TOKEN}={self.token}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        want = f"OMPI_COMM_WORLD_RANK={number}\0".encode()
        return next(pid for pid in self.processes() if want in Path(f"/proc/{pid}/environ").read_bytes())

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 120) -> None:
        """Return when something is so; fail where the job ends, or that takes too long."""
        ends_s = time.monotonic() + timeout_s
        while not ready():
            assert self.launcher.poll() is None, self.said()
            assert time.monotonic() < ends_s, self.said()
            time.sleep(0.02)

    def end(self, timeout_s: float = 120) -> tuple[int, list[int]]:
        """The launcher's exit status, and the processes that are left ten seconds later; where it has none, fail."""
        try:
            status = self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.said()}") from None
        ends_s = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < ends_s:
            time.sleep(0.1)
        return status, left

    def said(self) -> str:
        """What it printed."""
        return self.out.read_text()
