"""Messages between ranks that travel while the rank computes.

MPI moves large messages only inside MPI calls, so a thread tests the pending requests every millisecond while the
main thread sits in a kernel that has released the interpreter lock (a call that waits inside MPI would spin on a core
that a compute thread needs). CUDA tensors go through host memory: MPI libraries from wheels do not know devices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from cpmpi.comm.flight import NOBODY, Flight

if TYPE_CHECKING:
    from mpi4py import MPI

CHANNELS = 2
LARGEST_MESSAGE = 1 << 30  # bytes; counts from 2^31 on fail in some MPI libraries
POLL_S = 0.001
LONGEST_PAUSE_S = 0.001
OVER = {"send": "sent", "receive": "received", "sum": "summed"}  # what is noted when a message is complete


class Pending(Protocol):
    """A transfer under way: posted and complete at these times of ``time.perf_counter``, known after the wait."""

    posted_s: float
    complete_s: float

    def wait(self) -> torch.Tensor:
        """Block until the transfer is complete; the bytes, on the device where they belong."""


class Transport(Protocol):
    """What the executor needs of a network: flat byte tensors to and from peers, on separate channels.

    Messages between two ranks on one channel arrive in the order in which they were posted.
    """

    def send(self, payload_B: torch.Tensor, peer: int, channel: int) -> Pending:
        """Start to send a contiguous uint8 tensor; it must stay untouched until the wait."""

    def receive(self, n_bytes: int, peer: int, channel: int, device: torch.device) -> Pending:
        """Start to receive ``n_bytes``."""

    def batch(self) -> AbstractContextManager[object]:
        """Around the sends and receives of a round, which start together at its end; waits come after it."""

    def close(self) -> None:
        """Give back what the transport holds. Collective."""


@dataclass(eq=False)
class Message:
    """One message over MPI: the host buffer, the requests for its parts, and when it was posted and complete."""

    transport: MPITransport
    host_B: torch.Tensor
    device: torch.device
    requests: list[MPI.Request]
    kind: str
    peer: int = NOBODY
    posted_s: float = field(default_factory=time.perf_counter)
    complete_s: float = 0.0
    problem: Exception | None = None

    def test(self) -> bool:
        """Whether the message is complete; lets MPI make progress. Called with the transport's lock held."""
        if not self.complete_s:
            try:
                self.requests = [r for r in self.requests if not r.Test()]  # every one, so that all make progress
            except Exception as problem:  # for the wait: the thread that makes progress must go on
                self.requests, self.problem = [], problem
            if not self.requests:
                self.complete_s = time.perf_counter()
        return bool(self.complete_s)

    def wait(self) -> torch.Tensor:
        """Block until complete; the bytes on the receiver's device."""
        started = time.perf_counter()
        with self.transport.flight.waits(self.kind, self.peer, self.host_B.numel(), over=OVER[self.kind]):
            while True:
                with self.transport.lock:
                    if self.test():
                        break
                # Asking takes a core that other ranks may need: the longer the wait, the less often, a tenth apart.
                waited_s = time.perf_counter() - started
                time.sleep(min(LONGEST_PAUSE_S, waited_s / 10) if waited_s > 2e-4 else 0.0)
        self.transport.forget(self)
        self.transport.exposed_s += time.perf_counter() - started
        if self.problem is not None:
            raise self.problem
        return self.host_B.to(self.device)


class MPITransport:
    """Messages over MPI between the ranks of a communicator, a duplicate of it for each channel.

    ``exposed_s`` counts the seconds spent waiting, ``sent_bytes`` what was sent to peers, ``sums`` and ``summed_bytes``
    the all-reduces and what of this rank went into them.

    Args:
        comm: of the ranks.
        flight: records what is posted and waited for.
        names: how the flight recorder calls the ranks of ``comm``; by default by their numbers in it.
    """

    def __init__(
        self, comm: MPI.Intracomm, flight: Flight | None = None, names: Sequence[int] | None = None
    ) -> None:  # fmt: skip
        self.flight, self._names = flight or Flight(), names or range(comm.size)
        with self.flight.waits("open"):
            self.channels = [comm.Dup() for _ in range(CHANNELS)]
        self.lock = threading.Lock()
        self.exposed_s = 0.0
        self.sent_bytes = self.sums = self.summed_bytes = 0
        self._pending: list[Message] = []
        self._posted = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._progress, name="cpmpi-transport", daemon=True)
        self._thread.start()

    def batch(self) -> AbstractContextManager[None]:
        """Nothing to do: MPI starts each message as it is posted."""
        return nullcontext()

    def send(self, payload_B: torch.Tensor, peer: int, channel: int) -> Message:
        """Start to send; see `Transport`."""
        self.sent_bytes += payload_B.numel()
        host_B = payload_B.cpu()
        requests = [self.channels[channel].Isend(p, peer) for p in _parts(host_B)]
        return self._post(Message(self, host_B, host_B.device, requests, "send", self._names[peer]))

    def receive(self, n_bytes: int, peer: int, channel: int, device: torch.device) -> Message:
        """Start to receive; see `Transport`."""
        host_B = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        requests = [self.channels[channel].Irecv(p, peer) for p in _parts(host_B)]
        return self._post(Message(self, host_B, device, requests, "receive", self._names[peer]))

    def sum(self, partial: torch.Tensor) -> Message:
        """Start to add up a tensor of every rank, in float32; the bytes of the sum come from the wait. Collective.

        A float32 tensor on the CPU is added to in place.
        """
        from mpi4py import MPI

        host_B = partial.to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8)
        self.sums += 1
        self.summed_bytes += host_B.numel()
        channel = self.channels[0]
        requests = [channel.Iallreduce(MPI.IN_PLACE, [part, MPI.FLOAT], MPI.SUM) for part in _parts(host_B)]
        return self._post(Message(self, host_B, partial.device, requests, "sum"))

    def _post(self, message: Message) -> Message:
        self.flight.note(message.kind, message.peer, message.host_B.numel())
        with self.lock:
            self._pending.append(message)
        self._posted.set()
        return message

    def forget(self, message: Message) -> None:
        """Drop a complete message."""
        with self.lock:
            self._pending.remove(message)

    def _progress(self) -> None:
        while not self._closed:
            self._posted.wait()
            with self.lock:
                if not [message for message in self._pending if not message.test()]:
                    self._posted.clear()
            time.sleep(POLL_S)

    def close(self) -> None:
        """Stop the thread and free the channels. Collective."""
        self._closed = True
        self._posted.set()
        self._thread.join()
        with self.flight.waits("close"):
            for channel in self.channels:
                channel.Free()


def _parts(host_B: torch.Tensor) -> list[MPI.buffer]:
    """The bytes of a host tensor, as buffers that MPI takes."""
    from mpi4py import MPI

    start, size = host_B.data_ptr(), host_B.numel()
    return [
        MPI.buffer.fromaddress(start + offset, min(LARGEST_MESSAGE, size - offset))
        for offset in range(0, size, LARGEST_MESSAGE)
    ]
