"""What carries messages between the ranks of a job, and why: MPI, or torch.distributed with NCCL or gloo."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cpmpi.choices import AUTO
from cpmpi.comm.flight import Flight
from cpmpi.comm.ranks import AgreedError, Ranks
from cpmpi.comm.torch_transport import Log, Network, TorchTransport
from cpmpi.comm.transport import MPITransport
from cpmpi.errors import UserError
from cpmpi.topology.describe import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

ASK_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
NAMES = {"mpi": "MPI", "nccl": "NCCL", "gloo": "gloo"}


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """What carries messages.

    Attributes:
        kind: ``mpi``, ``nccl`` or ``gloo``.
        reason: why, in words.
        device: whose data it carries.
        address: of this rank's node, where torch.distributed needs one.
    """

    kind: str = "mpi"
    reason: str = "as asked for"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    address: str = ""

    def connect(
        self, comm: MPI.Intracomm, flight: Flight | None = None, names: Sequence[int] | None = None
    ) -> MPITransport | TorchTransport:
        """Messages among these ranks; ``flight`` and ``names`` as in `MPITransport`. Collective."""
        log = Log(flight or Flight(), names or range(comm.size))
        if self.kind == "mpi":
            return MPITransport(comm, *log)
        return TorchTransport(comm, Network(self.kind, self.address, self.device), log)

    def __str__(self) -> str:
        return f"messages: {NAMES[self.kind]}: {self.reason}"


def choose_carrier(ranks: Ranks, topology: Topology, device: torch.device, wanted: str) -> Carrier:
    """The carrier that is wanted; ``auto``: NCCL where every rank has a GPU of its own, else MPI. Collective.

    Raises:
        AgreedError: NCCL or gloo cannot carry this job's data; the reason and what can.
    """
    reason = "as asked for"
    if wanted == "mpi" or (wanted == AUTO and device.type == "cpu"):
        return Carrier(reason=reason if wanted == "mpi" else "the data is in the host's memory", device=device)
    problem = ranks.together(_problem, wanted, device) or (_shared_gpu(ranks, device) if wanted != "gloo" else "")
    if problem and wanted != AUTO:
        raise AgreedError(f"--transport {wanted}: {problem}; choose auto{', gloo' * (wanted != 'gloo')} or mpi")
    if problem:
        return Carrier(reason=f"through the host's memory, not NCCL: {problem}", device=device)
    address = ranks.together(address_of, topology, ranks.rank)
    kind, reason = ("nccl", "every rank has a GPU of its own") if wanted == AUTO else (wanted, reason)
    return Carrier(kind=kind, reason=reason, device=device, address=address)


def _problem(wanted: str, device: torch.device) -> str:
    """Why this process cannot have the backend, the same on all ranks; or nothing."""
    import torch.distributed as dist

    if wanted == "gloo":
        return "" if dist.is_available() and dist.is_gloo_available() else "this torch was built without gloo"
    if device.type != "cuda":
        return f"NCCL carries the data of GPUs, and the job computes on {device.type}"
    return "" if dist.is_available() and dist.is_nccl_available() else "this torch was built without NCCL"


def _shared_gpu(ranks: Ranks, device: torch.device) -> str:
    """Which ranks have one GPU together, which NCCL refuses; or nothing. Collective."""
    everyone = ranks.comm.allgather(str(torch.cuda.get_device_properties(device).uuid))
    for rank, uuid in enumerate(everyone):
        if (first := everyone.index(uuid)) < rank:
            return f"ranks {first} and {rank} share a GPU"
    return ""


def address_of(topology: Topology, rank: int) -> str:
    """The IPv4 address at which the other ranks reach this one: within one machine its own, else that of the first
    network device that has one, the fast ones first, else what the host's name stands for.

    Raises:
        UserError: there is none that another node could reach.
    """
    if len(topology.nodes) == 1:
        return "127.0.0.1"
    node = topology.nodes[topology.node_of(rank)]
    for device in (*node.fast_networks, *node.networks):
        if address := _interface_address(device.name):
            return address
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if address.startswith("127."):
        raise UserError(f"--transport: node {node.name} has no network address that others reach; choose mpi")
    return address


def _interface_address(name: str) -> str:
    """The IPv4 address of a network interface; nothing where it has none, or is no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            told = fcntl.ioctl(asking.fileno(), ASK_ADDRESS, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(told[20:24])
