"""This rank's share of its node: device and compute threads."""

from __future__ import annotations

import os

import torch

from cpmpi.errors import UserError
from cpmpi.ranks import Ranks


def choose_device(ranks: Ranks, wanted: str) -> torch.device:
    """The device for this rank: ``cpu``, ``cuda`` (the node's devices dealt over its ranks), or ``auto``. Collective.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device on this node; choose cpu or auto")
    device = torch.device("cuda", local_rank(ranks)[0] % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_threads(ranks: Ranks) -> int:
    """Give this rank its share of the node's cores as threads, unless OMP_NUM_THREADS says how many. Collective."""
    _, ranks_here = local_rank(ranks)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    # A rank bound to its own cores sees only these; one that is not bound sees the whole node.
    bound = cores * ranks_here <= (os.cpu_count() or cores)
    threads = int(asked) if asked.isdigit() and int(asked) else max(1, cores if bound else cores // ranks_here)
    torch.set_num_threads(threads)
    return threads


def local_rank(ranks: Ranks) -> tuple[int, int]:
    """This rank's place among the ranks of its node, and their number. Collective."""
    from mpi4py import MPI

    node = ranks.comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = node.rank, node.size
    node.Free()
    return place
