"""Messages over torch.distributed: NCCL between GPUs; gloo on the CPU, which every line here but its name runs on.

The process groups are made here and not by ``torch.distributed.init_process_group``, which makes one for the whole
process: a program that calls cpmpi may have its own. torchft makes them the same way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cpmpi.comm.flight import NOBODY, Flight
from cpmpi.comm.transport import CHANNELS, LARGEST_MESSAGE, OVER

if TYPE_CHECKING:
    from mpi4py import MPI

# Of torch's own: a rank may compute for hours before it answers.
NEVER = timedelta(days=30)
MEETING = timedelta(minutes=5)  # until all ranks have met


class Network(NamedTuple):
    """The backend's name, this rank's address as the others reach it, and the device whose data NCCL carries.

    Gloo carries all data through the host's memory.
    """

    backend: str
    address: str
    device: torch.device

    @property
    def carries(self) -> torch.device:
        """Where data must lie to be carried."""
        return self.device if self.backend == "nccl" else torch.device("cpu")


class Log(NamedTuple):
    """Records what is posted and waited for, under these numbers of the ranks."""

    flight: Flight
    names: Sequence[int]


@dataclass(eq=False)
class TorchMessage:
    """One message: its bytes where the network takes them, torch's handles, and when it was posted and complete.

    NCCL's messages are complete on the host once they are ordered before what the GPU computes next; the host does not
    wait for the bytes, and ``complete_s`` is no time of arrival.
    """

    transport: TorchTransport
    flat: torch.Tensor
    device: torch.device
    kind: str
    start: Callable[[], list[Any]]
    peer: int = NOBODY
    works: list[Any] = field(default_factory=list)
    posted_s: float = field(default_factory=time.perf_counter)
    complete_s: float = 0.0

    def wait(self) -> torch.Tensor:
        """Block until complete; the bytes on the receiver's device."""
        assert self.works, "a message is waited for after the batch in which it was posted"
        started = time.perf_counter()
        over = OVER[self.kind]
        with self.transport.log.flight.waits(self.kind, self.peer, self.flat.nbytes, over=over):
            try:
                for work in self.works:
                    work.wait()
            except RuntimeError as problem:
                raise RuntimeError(f"{self}: {str(problem).splitlines()[0]}") from problem
        self.complete_s = time.perf_counter()
        self.transport.exposed_s += self.complete_s - started
        return self.flat.view(-1).view(torch.uint8).to(self.device)

    def __str__(self) -> str:
        what = {"send": f" to rank {self.peer}", "receive": f" from rank {self.peer}"}.get(self.kind, "")
        return f"{self.kind} {self.flat.nbytes:,} bytes{what} over {self.transport.network.backend}"


class TorchTransport:
    """Messages between the ranks of a communicator, a process group for each channel; see `transport.Transport`.

    Args:
        comm: the ranks; MPI tells them where to meet, and carries nothing afterwards.
        network: ``nccl`` or ``gloo``, and where.
        log: of what is posted and waited for. What NCCL carries, the host does not wait for.
    """

    def __init__(self, comm: MPI.Intracomm, network: Network, log: Log) -> None:
        self.network, self.log = network, log
        self.exposed_s = 0.0
        self.sent_bytes = self.sums = self.summed_bytes = 0
        self._batch: list[list[TorchMessage]] | None = None
        self._numbers: Counter[tuple[str, int, int]] = Counter()  # messages to or from a rank on a channel
        with log.flight.waits("open"):
            store = _meet(comm, network.address)
            self.groups = [_group(network, _prefixed(store, str(i)), comm) for i in range(CHANNELS)]

    @contextmanager
    def batch(self) -> Iterator[list[list[TorchMessage]]]:
        """Messages posted inside, by channel, are started together at its end: NCCL's would wait for each other."""
        batch: list[list[TorchMessage]] = [[] for _ in self.groups]
        self._batch = batch
        try:
            yield batch
        finally:
            self._batch = None
        for group, messages in zip(self.groups, batch, strict=True):  # in the same order on all ranks
            if messages and group.supports_coalescing:
                group._start_coalescing()
                for message in messages:
                    message.start()
                work = group._end_coalescing()
                for message in messages:
                    message.works = [work]
            else:
                for message in messages:
                    message.works = message.start()

    def send(self, payload_B: torch.Tensor, peer: int, channel: int) -> TorchMessage:
        """Start to send; see `Transport`."""
        self.sent_bytes += payload_B.numel()
        return self._post("send", payload_B.to(self.network.carries), payload_B.device, peer, channel)

    def receive(self, n_bytes: int, peer: int, channel: int, device: torch.device) -> TorchMessage:
        """Start to receive; see `Transport`."""
        pinned = device.type == "cuda" and self.network.carries.type == "cpu"
        flat_B = torch.empty(n_bytes, dtype=torch.uint8, device=self.network.carries, pin_memory=pinned)
        return self._post("receive", flat_B, device, peer, channel)

    def sum(self, partial: torch.Tensor) -> TorchMessage:
        """Start to add up a tensor of every rank, in float32; the bytes of the sum come from the wait. Collective.

        A float32 tensor that lies where the network takes it is added to in place.
        """
        flat = partial.to(self.network.carries, torch.float32).contiguous()
        self.sums += 1
        self.summed_bytes += flat.nbytes
        message = TorchMessage(self, flat, partial.device, "sum", lambda: [self.groups[0].allreduce([flat])])
        self.log.flight.note("sum", NOBODY, flat.nbytes)
        message.works = message.start()
        return message

    def _post(self, kind: str, flat_B: torch.Tensor, device: torch.device, peer: int, channel: int) -> TorchMessage:
        group = self.groups[channel]
        call = group.send if kind == "send" else group.recv
        parts = torch.split(flat_B, LARGEST_MESSAGE)
        first = self._numbers[kind, peer, channel]  # gloo finds messages by number; NCCL takes them in order
        self._numbers[kind, peer, channel] += len(parts)

        def start() -> list[Any]:
            return [call([part], peer, first + i) for i, part in enumerate(parts)]

        message = TorchMessage(self, flat_B, device, kind, start, self.log.names[peer])
        self.log.flight.note(kind, message.peer, flat_B.numel())
        with nullcontext(self._batch) if self._batch is not None else self.batch() as batch:
            batch[channel].append(message)
        return message

    def close(self) -> None:
        """Give the process groups back. Collective."""
        with self.log.flight.waits("close"):
            for group in self.groups:
                group.shutdown()
        self.groups = []


def _meet(comm: MPI.Intracomm, address: str) -> Any:
    """A store that all ranks reach, on a port that is free where rank 0 is. Collective."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store, where = None, None
    if comm.rank == 0:
        store = TCPStore(address, 0, comm.size, is_master=True, timeout=MEETING, wait_for_workers=False)
        where = address, store.port
    host, port = comm.bcast(where)
    if store is None:
        store = TCPStore(host, port, comm.size, is_master=False, timeout=MEETING, wait_for_workers=False)
    return store


def _prefixed(store: Any, name: str) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(name, store)


def _group(network: Network, store: Any, comm: MPI.Intracomm) -> Any:
    import torch.distributed as torch_distributed

    dist: Any = torch_distributed  # its types leave the options out
    if network.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        return dist.ProcessGroupNCCL(store, comm.rank, comm.size, options)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=network.address)]
    options._timeout = NEVER
    return dist.ProcessGroupGloo(store, comm.rank, comm.size, options)
