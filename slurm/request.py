"""What is asked of Slurm: one record, checked when it is made, which site profiles and options fill."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
MEMORY = re.compile(r"\d+[KMGT]?")
DURATION = re.compile(r"(\d+)([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A batch job as Slurm is asked for it. Where nothing is said, the site's defaults hold.

    Raises:
        ValueError: a value that Slurm would not understand; the message names it and says what is expected.
    """

    job_name: str = "cpmpi"
    """As squeue shows it."""
    account: str | None = None
    """Who pays."""
    partition: str | None = None
    """One, or several with commas between them."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """A reservation to run in."""
    nodes: int = 1
    """How many."""
    tasks_per_node: int = 1
    """Ranks on each node."""
    cpus_per_task: int | None = None
    """Cores of each rank."""
    gpus_per_node: int | None = None
    """GPUs of each node."""
    memory: str | None = None
    """Of each node, such as 64G; 0 for all of it."""
    time: str | None = None
    """Time limit: minutes, H:MM:SS, D-HH:MM:SS, or 90m, 12h, 2d."""
    array: str | None = None
    """Indices of an array's tasks, such as 0-99%8."""
    dependency: str | None = None
    """Jobs to wait for, such as afterok:1234."""
    signal_s: int = 120
    """Seconds before the time limit at which the job is told to save its state and stop; 0: it is not told."""
    requeue: bool = True
    """Whether the job goes into the queue again after it was stopped with its state saved."""
    launcher: str = "srun --mpi=pmix -K1"
    """What starts the ranks: srun with the PMI of the MPI library, or mpirun."""
    container: str | None = None
    """Before the command, such as apptainer exec image.sif."""
    command: str = "cpmpi"
    """How cpmpi is called on the nodes."""
    setup: tuple[str, ...] = ()
    """Lines of bash before the job: modules, environments."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as they stand."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} ({value}) must be at least 1")
        if not 0 <= self.signal_s <= 65535:
            raise ValueError(f"signal seconds ({self.signal_s}) must be from 0 to 65535, which is Slurm's limit")
        if self.memory is not None and not MEMORY.fullmatch(self.memory):
            raise ValueError(f"memory {self.memory!r}: not a size of a node such as 64G or 512000M")
        if self.time is not None and seconds_of(self.time) <= self.signal_s:
            raise ValueError(
                f"time limit {self.time} is no longer than the {self.signal_s} s before it at which the job is told to "
                "stop; ask for more time, or a smaller --signal"
            )
        if self.array is not None:
            Array.parse(self.array)
        for field in fields(self):
            _check_lines(field.name, getattr(self, field.name))

    def __or__(self, more: dict[str, Any]) -> BatchRequest:
        """The request with other values for what ``more`` says."""
        return replace(self, **more)

    @property
    def time_s(self) -> int | None:
        """The time limit in seconds; None where the partition's holds."""
        return None if self.time is None else seconds_of(self.time)

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * self.tasks_per_node


def _check_lines(name: str, value: Any) -> None:
    """A batch script is read by lines: a value with two of them would be another option, or another command."""
    for text in value if isinstance(value, tuple) else [value]:
        if isinstance(text, str) and ("\n" in text or "\r" in text or "\0" in text):
            raise ValueError(f"{name.replace('_', ' ')} {text!r}: must be one line")


def seconds_of(time: str) -> int:
    """Seconds of a time limit as Slurm writes it (minutes, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS), or 90m, 12h, 2d.

    Raises:
        ValueError: it is none.
    """
    short = DURATION.fullmatch(time)
    if short:
        return int(short[1]) * SECONDS[short[2]]
    found = TIME.fullmatch(time)
    if not found or (found[3] and int(found[3]) > 59) or (found[4] and int(found[4]) > 59):
        raise ValueError(f"time limit {time!r}: not one; write minutes, H:MM:SS, D-HH:MM:SS, or 90m, 12h, 2d")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    assert first is not None
    if days is not None:
        return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


def slurm_time(seconds: int) -> str:
    """Seconds as Slurm writes a time limit: ``2:00:00``, ``1-12:00:00``."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock:0>8}" if days else clock


@dataclass(frozen=True)
class Array:
    """The indices of an array's tasks, and how many may run at a time (``limit``; None: no limit)."""

    indices: tuple[int, ...]
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> Array:
        """From Slurm's own words: ``0-99``, ``1,3,7-9``, ``0-99:10``, ``1-100%8``.

        Raises:
            ValueError: it is none.
        """
        words, percent, limit = text.partition("%")
        indices: list[int] = []
        for part in words.split(","):
            found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
            if not found or (percent and not limit.isdigit()) or limit == "0" or found[3] == "0":
                raise ValueError(f"array {text!r}: not one; write indices such as 0-99, 1,3,7 or 0-99%8")
            first = int(found[1])
            last = first if found[2] is None else int(found[2])
            if last < first:
                raise ValueError(f"array {text!r}: {part} goes down; write the smaller index first")
            indices += range(first, last + 1, int(found[3] or 1))
        return cls(tuple(sorted(set(indices))), int(limit) if percent else None)

    def split(self, size: int) -> list[tuple[int, Array]]:
        """Arrays whose indices are below ``size``, each with the number to add to them."""
        parts: dict[int, list[int]] = {}
        for index in self.indices:
            parts.setdefault(index // size, []).append(index % size)
        return [(part * size, Array(tuple(indices), self.limit)) for part, indices in parts.items()]

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for index in self.indices:
            if runs and index == runs[-1][1] + 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        words = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        return words + (f"%{self.limit}" if self.limit is not None else "")
