"""Which job works on what: claims as lock files of ``job_lock`` (slurm-python-utils), one for each thing to be claimed.

A claim names its job. The library takes it from a job that Slurm does not know any more, or that waits in the queue
again; without Slurm, from a process of this machine that is gone. What it leaves open is settled here:

- its squeue, one for each claim, is asked only where one squeue for all of the user's jobs does not know the owner;
- a job that was requeued, or starts a second program, finds its own number on claims of the start that died: a file
  lock, which goes with its process, tells whether somebody still works there;
- a claim without an owner, of a job that was killed while it wrote it, is taken after a minute instead of an hour;
- no claim is ever old enough to be taken from a job that lives, instead of after seven days;
- nothing is listed in ``outputfiles``, which the library deletes when it takes a claim from a dead job.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from pathlib import Path

import job_lock
from job_lock import JobLock

from cpmpi.slurm.commands import SlurmError, slurm

SUFFIX = ".claim"
NEVER = timedelta(days=36_500)
CORRUPT_S = 60.0
YOUNG_S = 10.0  # the library's: a younger claim is not looked into
ASKED_AGAIN_S = 20.0  # between two questions to Slurm
Owner = tuple[str, str, str]  # batch system or platform, machine, job or process
Held = Callable[[str], bool | None]


class State(Enum):
    """What is known of a claim."""

    MINE = "mine"
    LIVES = "its job lives, or nobody here can tell"
    YOUNG = "too young to be judged"
    DEAD = "its job seems to be gone"


class Claims:
    """The claims in a folder, as one process makes and sees them. At its end as a context manager they are dropped.

    Args:
        folder: where the lock files are; it may not exist yet.
        held: whether a process on any machine holds the file lock of the thing that a claim is for, which goes with
            its process; None where the file system has no such locks.
        restarts: how often this job was requeued.
    """

    def __init__(self, folder: Path, held: Held, restarts: int = 0) -> None:
        self.folder, self._held, self._restarts = folder, held, restarts
        self._mine: dict[str, JobLock] = {}
        self._began = time.time()
        self._living: frozenset[str] | None = None
        self._asked_s = -ASKED_AGAIN_S

    def take(self, name: str) -> bool:
        """Whether the claim is ours now: nobody had it, or one who is gone.

        Raises:
            OSError: the folder cannot be written to, or has no room for the owner's name.
        """
        self._drop_own(name)
        job_lock.clear_running_jobs_cache()  # an error of squeue would else silence the library for good
        lock = JobLock(
            self._path(name), mkdir=True, timeout=NEVER, corruptfiletimeout=timedelta(seconds=CORRUPT_S),
            minimumtimeforiterativelocks=timedelta(seconds=YOUNG_S), cachesqueue=False,
        )  # fmt: skip
        try:
            taken = lock.__enter__()
        except (FileNotFoundError, subprocess.CalledProcessError):  # the folder was just removed; squeue refused
            return False
        if not taken:
            return False
        self._mine[name] = lock
        if self.owner(name) != me():  # the library does not say where it could not write
            self.drop(name)
            raise OSError(f"{self._path(name)}: cannot be written; is the disk or the quota full?")
        return True

    def drop(self, name: str) -> None:
        """Give a claim of ours back."""
        self._mine.pop(name).__exit__(None, None, None)

    def owner(self, name: str) -> Owner | None:
        """Who has a claim; None where nobody has, or the file does not say."""
        try:
            system, machine, number = self._path(name).read_text().split("\n")[0].split()
        except (OSError, ValueError):
            return None
        return system, machine, number

    def look(self) -> dict[str, State]:
        """All claims, and what is known of each."""
        with suppress(FileNotFoundError):
            names = [path.name for path in os.scandir(self.folder) if path.name.endswith(SUFFIX)]
            return {name.removesuffix(SUFFIX): self._state(name.removesuffix(SUFFIX)) for name in names}
        return {}

    def _state(self, name: str) -> State:
        if name in self._mine:
            return State.MINE
        owner, age_s = self.owner(name), self._age_s(name)
        if age_s < (YOUNG_S if owner is not None else CORRUPT_S):
            return State.YOUNG
        if owner is None or (owner[:2] == me()[:2] and self._is_left_over(name, owner)):
            return State.DEAD
        alive = self._slurm_knows(owner, age_s) if owner[0] == "SLURM" else _process_lives(owner)
        return State.LIVES if alive else State.DEAD

    def _age_s(self, name: str) -> float:
        try:
            return time.time() - self._path(name).stat().st_mtime
        except OSError:
            return 0.0

    def _is_left_over(self, name: str, owner: Owner) -> bool:
        """Whether a claim with our own number, or of our own machine, is of a process that died.

        The library sees the number of this job, which runs, or of a process that has that number by now.
        """
        if owner[0] == "SLURM" and owner != me():
            return False
        held = self._held(name)
        if held is None:
            return owner == me() and self._restarts > 0 and self._path(name).stat().st_mtime < self._began
        return not held

    def _drop_own(self, name: str) -> None:
        owner = self.owner(name)
        if name in self._mine or owner is None or owner[:2] != me()[:2] or self._age_s(name) < YOUNG_S:
            return
        with suppress(FileNotFoundError):
            if self._is_left_over(name, owner):
                self._path(name).unlink()

    def _slurm_knows(self, owner: Owner, age_s: float) -> bool:
        """Whether a job runs, or Slurm cannot be asked. Other users' jobs are not known here: the library asks."""
        since_s = time.monotonic() - self._asked_s
        if since_s >= min(age_s, ASKED_AGAIN_S):
            self._asked_s = time.monotonic()
            self._living = _running_jobs()
        return self._living is None or owner[2] in self._living

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._mine):
            with suppress(OSError):
                self.drop(name)


def me() -> Owner:
    """This job or process, as the library writes it."""
    system, machine, number = job_lock.jobinfo()
    return str(system), str(machine), str(number)


def _running_jobs() -> frozenset[str] | None:
    """The numbers of this user's jobs that have nodes, each task of an array by its own; None without an answer."""
    try:
        printed = slurm("squeue", "--me", "--noheader", "--format", "%A %T")
    except SlurmError:
        return None
    pairs = (line.split() for line in printed.splitlines() if line.strip())
    return frozenset(number for number, state in pairs if state != "PENDING")


def _process_lives(owner: Owner) -> bool:
    """Whether a process runs; also said of those of other machines, which cannot be asked."""
    if owner[:2] != me()[:2]:
        return True
    try:
        os.kill(int(owner[2]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def time_left_s(end_time: int | None, job: int) -> float | None:
    """Seconds until the time limit of a job; None where there is none, or nobody tells.

    Args:
        end_time: as Slurm told it to the job, seconds since 1970; None where it did not.
        job: its number.
    """
    if end_time is not None:
        return end_time - time.time()
    try:
        text = slurm("squeue", "--noheader", "--jobs", str(job), "--format", "%L").strip()
        return float(_seconds(text))
    except (SlurmError, ValueError):
        return None


def _seconds(text: str) -> int:
    """Seconds of squeue's own way to write a time: ``1-02:03:04``, ``2:03:04``, ``3:04``."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = [0, 0, *parts][-3:]
    return int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + seconds
