"""This rank's share of its node: device, compute threads, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def available_bytes(ranks: Ranks, device: torch.device) -> int:
    """What this rank can have of its device's memory, or of its node's where ranks compute on the CPU. Collective."""
    cuda = device.type == "cuda"
    mine = str(torch.cuda.get_device_properties(device).uuid) if cuda else "the node's"
    with node_of(ranks) as node:
        sharers = node.allgather(mine).count(mine)
    return (int(torch.cuda.mem_get_info(device)[0]) if cuda else node_memory_bytes()) // sharers


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
    """What this process holds in memory now."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
