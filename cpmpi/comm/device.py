"""This rank's share of its node: device, compute threads, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpmpi.comm.control_groups import node_cpus, node_memory_bytes
from cpmpi.comm.ranks import Ranks, node_name
from cpmpi.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI


def choose_device(ranks: Ranks, wanted: str) -> torch.device:
    """The device for this rank: ``cpu``, ``cuda`` (the node's devices dealt over its ranks), or ``auto``. Collective.

    Raises:
        UserError: CUDA is asked for and some rank has none, or some ranks have it and others have not.
    """
    with node_of(ranks) as node:
        local_rank = node.rank
    everyone = ranks.comm.allgather((node_name(), torch.cuda.is_available()))
    lacking = dict.fromkeys(name for name, available in everyone if not available)
    if wanted == "cpu" or (wanted == "auto" and all(not available for _, available in everyone)):
        return torch.device("cpu")
    if lacking:
        without = f"torch finds no CUDA device on {', '.join(lacking)}"
        raise UserError(f"--device {wanted}: {without}; choose {'cpu or auto' if wanted == 'cuda' else 'cpu'}")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_threads(ranks: Ranks) -> int:
    """Give this rank its share of the node's cores as threads, unless OMP_NUM_THREADS says how many. Collective."""
    cores = os.sched_getaffinity(0)
    with node_of(ranks) as node:
        sharers = sum(not cores.isdisjoint(others) for others in node.allgather(cores))  # one where ranks are bound
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() and int(asked) else max(1, node_cpus(len(cores)) // sharers)
    torch.set_num_threads(threads)
    return threads


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory that a rank can have in all, what it holds already included, in bytes.

    Attributes:
        bytes: where it computes: its share of the node's memory, or of its device's.
        host_bytes: its share of the node's, where a device has memory of its own; else None.
        program_bytes: of the node's memory, what this process holds now.
    """

    bytes: int
    host_bytes: int | None = None
    program_bytes: int = 0


def room_of(ranks: Ranks, device: torch.device) -> Room:
    """What this rank can have of its node's memory, and of its device's. Collective."""
    cuda = device.type == "cuda"
    mine = str(torch.cuda.get_device_properties(device).uuid) if cuda else ""
    reserved = int(torch.cuda.memory_reserved(device)) if cuda else 0
    with node_of(ranks) as node:
        beside = node.allgather((private_bytes(), mine, reserved))
    host = node_memory_bytes(held=sum(held for held, *_ in beside)) // len(beside)
    if not cuda:
        return Room(bytes=host, program_bytes=resident_set_bytes())
    shared = [taken for _, name, taken in beside if name == mine]
    free = int(torch.cuda.mem_get_info(device)[0])
    return Room(
        bytes=(free + sum(shared)) // len(shared), host_bytes=host, program_bytes=resident_set_bytes()
    )  # fmt: skip


@contextmanager
def node_of(ranks: Ranks) -> Iterator[MPI.Intracomm]:
    """The ranks of this node. Collective."""
    from mpi4py import MPI

    node: Any = ranks.comm.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        yield node
    finally:
        node.Free()


def resident_set_bytes() -> int:
    """What this process holds in memory now, pages of files that it has mapped included."""
    return _pages()[0]


def private_bytes() -> int:
    """What this process holds in memory and nobody can take from it: files that it has mapped are not among it, which
    the system counts as available."""
    resident, shared = _pages()
    return resident - shared


def _pages() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that are files' or shared."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0, 0
    resident, shared = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in statm.read_text().split()[1:3])
    return resident, shared
