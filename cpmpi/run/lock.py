"""The lock of a run folder: one process writes a run, or several share it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpmpi.errors import UserError
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, saying


class HeldError(UserError):
    """Another process writes the run."""


@contextmanager
def only_writer(
    folder: Path, *, shared: bool = False, instead: str = "choose another --output"
) -> Iterator[None]:  # fmt: skip
    """Hold the run folder for this process, so that a second job does not write the same run. On rank 0.

    The lock goes with the process however it ends, and holds across the nodes of a network file system. Where the file
    system has no locks, none is taken.

    Args:
        folder: of the run.
        shared: hold it together with all others that share it.
        instead: what can be done where another process holds it.

    Raises:
        HeldError: another process holds it.
        UserError: the folder cannot be written.
    """
    lock = RunPaths(folder).lock
    make_folder(lock.parent)
    with saying(lock, "cannot be made"):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in (errno.EACCES, errno.EAGAIN):
                raise HeldError(f"{folder}: another process is writing this run; wait for it or {instead}") from problem
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool | None:
    """Whether a process writes the run in a folder, and is not this one; None where the file system has no locks."""
    lock = RunPaths(folder).lock
    if not lock.exists():
        return False
    try:
        with lock.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return True if problem.errno in (errno.EACCES, errno.EAGAIN) else None
    return False
