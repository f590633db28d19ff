"""Measure one layer's attention across ranks by a schedule: the whole, its computing alone, and its transfers alone.

Legend: T this rank's query tokens, S its key tokens, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cpmpi.execute import Execution, Heads, Keys, Queries, Rule
from cpmpi.kernels.backend import Backend, Contribution
from cpmpi.layout import Piece
from cpmpi.rates import Rates, measure_together
from cpmpi.schedule import Schedule
from cpmpi.shape import AttentionShape
from cpmpi.timeline import Interval, Recorder
from cpmpi.topology.derive import rank_order
from cpmpi.topology.describe import Topology
from cpmpi.transport import MPITransport, Pending, Transport

if TYPE_CHECKING:
    from mpi4py import MPI


class Done:
    """A message that was never sent: complete at once, its bytes zero."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self.posted_s = self.complete_s = 0.0
        self.payload_B = torch.zeros(n_bytes, dtype=torch.uint8, device=device)

    def wait(self) -> torch.Tensor:
        """The zeros."""
        return self.payload_B


class NoTransport:
    """A network that takes no time and carries nothing, to measure computing alone."""

    def send(self, payload_B: torch.Tensor, peer: int, channel: int) -> Pending:
        """Drop it."""
        return Done(0, payload_B.device)

    def receive(self, n_bytes: int, peer: int, channel: int, device: torch.device) -> Pending:
        """Zeros."""
        return Done(n_bytes, device)

    def close(self) -> None:
        """Nothing to give back."""


def no_contributions(*_: Any, **__: Any) -> Iterator[Contribution]:
    """A kernel that sees no key, to measure transfers alone."""
    return iter(())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of one layer's attention, of the slowest rank in each repetition, and what moved.

    Attributes:
        total_s: the whole.
        compute_s: with a network that takes no time.
        move_s: with a kernel that does nothing.
        flops: of all ranks together.
        sent_bytes: that left the busiest rank.
        intervals: of the last repetition, all ranks; on the first rank only.
    """

    total_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    move_s: tuple[float, ...]
    flops: float
    sent_bytes: int
    intervals: tuple[Interval, ...] = field(default=(), repr=False)

    @property
    def seconds(self) -> float:
        """Median of the whole."""
        return statistics.median(self.total_s)

    @property
    def compute(self) -> float:
        """Median of computing alone."""
        return statistics.median(self.compute_s)

    @property
    def move(self) -> float:
        """Median of moving alone."""
        return statistics.median(self.move_s)

    @property
    def hidden(self) -> float:
        """How much of what could overlap did: (compute + move - whole) / min(compute, move), within 0 and 1."""
        if not self.sent_bytes:
            return 1.0
        return min(1.0, max(0.0, (self.compute + self.move - self.seconds) / min(self.compute, self.move)))

    @property
    def bound_share(self) -> float:
        """What the whole would take if everything overlapped, over what it took."""
        return max(self.compute, self.move) / self.seconds


class AttentionBench:
    """One rank's part in measuring attention on a machine; every rank has one and calls it alike.

    Args:
        comm: all ranks.
        topology: the machine.
        backend: the kernel.
        device: where the tensors live.
    """

    def __init__(self, comm: MPI.Intracomm, topology: Topology, backend: Backend, device: torch.device) -> None:
        topology.require(comm.size)
        self.comm = ordered(comm, topology)
        self.topology, self.backend, self.device = topology, backend, device
        self.transport = MPITransport(self.comm)

    def close(self) -> None:
        """Give everything back. Collective."""
        self.transport.close()
        self.comm.Free()

    def rates(self, heads: Heads) -> Rates:
        """The rates of a typical rank while all compute. Collective."""
        return measure_together(self.comm, self.backend, heads, self.device)

    def run(
        self, schedule: Schedule, shape: AttentionShape, dtype: torch.dtype, repeat: int = 3, alone: bool = True
    ) -> Measured:
        """Measure one layer of random queries, keys and values. Collective.

        Args:
            schedule: for the ranks of this launch.
            shape: of the attention.
            dtype: of queries, keys and values.
            repeat: repetitions, after one that warms up.
            alone: whether computing and moving are measured on their own too; else these count as nothing.
        """
        rank, world = self.comm.rank, self.comm.size
        heads = Heads(
            query_heads=shape.query_heads, kv_heads=shape.kv_heads, key_dim=shape.key_dim, value_dim=shape.value_dim,
            dtype=dtype,
        )  # fmt: skip
        silent = Backend(name="none", reason="transfers alone", contributions=no_contributions)
        real: Transport = self.transport
        free: Transport = NoTransport()
        ways = [(real, self.backend), (free, self.backend), (real, silent)][: 3 if alone else 1]
        seconds: list[list[float]] = [[], [], []]
        pieces = shape.query_layout(world).pieces(rank)
        keys = Keys.empty(tuple(p for lay in shape.key_layouts(world) for p in lay.pieces(rank)), heads, self.device)
        for x in (keys.k_SGD, keys.v_SGE):
            x.normal_()
        queries = self._queries(pieces, heads)
        program = schedule.program(rank)
        rule = Rule(mask=shape.mask, scale=shape.key_dim**-0.5)
        sent, recorder = 0, Recorder(rank=rank, epoch_s=0.0)
        for repetition in range(repeat + 1):  # the first one warms up
            for way, (transport, backend) in enumerate(ways):
                before = self.transport.sent_bytes
                self.comm.Barrier()
                begun = time.perf_counter()
                recorder = recorder if way else Recorder(rank=rank, epoch_s=begun)
                Execution(
                    rank=rank, program=program, transport=transport, backend=backend, heads=heads, rule=rule,
                    query_layout=shape.query_layout(world), key_layouts=shape.key_layouts(world), device=self.device,
                    recorder=None if way else recorder,
                ).run(queries, keys)  # fmt: skip
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                took = max(self.comm.allgather(time.perf_counter() - begun))
                if repetition:
                    seconds[way].append(took)
                sent = sent if way else self.transport.sent_bytes - before
        gathered = self.comm.gather(recorder.intervals)
        pairs = shape.mask.pairs(range(shape.stored, shape.tokens), range(shape.tokens))
        return Measured(
            total_s=tuple(seconds[0]), compute_s=tuple(seconds[1] or [0.0]), move_s=tuple(seconds[2] or [0.0]),
            flops=float(pairs * shape.pair_flops), sent_bytes=max(self.comm.allgather(sent)),
            intervals=tuple(i for intervals in gathered or () for i in intervals),
        )  # fmt: skip

    def _queries(self, pieces: tuple[Piece, ...], heads: Heads) -> Queries:
        tokens = [torch.randn(p.size, heads.query_heads, heads.key_dim, device=self.device) for p in pieces]
        return Queries(tuple((p.start, q_THD.to(heads.dtype)) for p, q_THD in zip(pieces, tokens, strict=True)))


def ordered(comm: MPI.Intracomm, topology: Topology) -> MPI.Intracomm:
    """The same ranks in the order of their positions, as schedules name them. Collective."""
    split: Any = comm.Split(0, key=rank_order(topology).index(comm.rank))
    reordered: MPI.Intracomm = split
    return reordered


@dataclass(frozen=True)
class Overlap:
    """Messages of so many bytes from every rank to the next, alone and beside computing that takes longer.

    Attributes:
        n_bytes: of a message.
        move_s, compute_s: seconds of moving alone and of computing alone.
        both_s: seconds of both at once.
    """

    n_bytes: int
    move_s: float
    compute_s: float
    both_s: float

    @property
    def hidden(self) -> float:
        """The part of the moving that takes no time of its own, within 0 and 1."""
        return min(1.0, max(0.0, (self.compute_s + self.move_s - self.both_s) / self.move_s))


def overlap(comm: MPI.Intracomm, transport: Transport, n_bytes: int, device: torch.device, repeat: int) -> Overlap:
    """Measure `Overlap`: medians over ``repeat``, each of the slowest rank. Collective."""
    payload_B = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    a_NN = torch.randn(512, 512, device=device)

    def once(calls: int, moving: bool) -> float:
        comm.Barrier()
        begun = time.perf_counter()
        if moving:
            incoming = transport.receive(n_bytes, (comm.rank - 1) % comm.size, 0, device)
            leaving = transport.send(payload_B, (comm.rank + 1) % comm.size, 0)
        for _ in range(calls):
            torch.mm(a_NN, a_NN)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if moving:
            incoming.wait()
            leaving.wait()
        return float(max(comm.allgather(time.perf_counter() - begun)))

    def median(calls: int, moving: bool) -> float:
        once(calls, moving)
        return statistics.median(once(calls, moving) for _ in range(repeat))

    move_s = median(0, True)
    calls = max(10, int(10 * 1.5 * move_s / median(10, False)))
    return Overlap(n_bytes, move_s, median(calls, False), median(calls, True))
