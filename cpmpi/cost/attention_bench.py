"""Measure one layer's attention across ranks by a schedule: the whole, its computing alone, and its transfers alone.

Legend: T this rank's query tokens, S its key tokens, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cpmpi.attention.execute import Execution, Heads, Keys, Queries, Rule
from cpmpi.attention.schedule import Schedule
from cpmpi.comm.carrier import Carrier
from cpmpi.comm.transport import Pending, Transport
from cpmpi.cost.measure import measure_together
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.kernels.backend import Backend, Contribution
from cpmpi.timeline.intervals import Interval, Recorder
from cpmpi.topology.derive import rank_order
from cpmpi.topology.describe import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

PAUSE_S = 0.0002
FAR = 2.0  # times the least after one turn: more turns would not make up for that
CLOSE = 1.25  # times the least after a few turns: with more turns, the order may turn out to be another


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

    def batch(self) -> AbstractContextManager[None]:
        """Nothing to start."""
        return nullcontext()

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
        carrier: of the messages, and its device, where the tensors live.
    """

    def __init__(self, comm: MPI.Intracomm, topology: Topology, backend: Backend, carrier: Carrier) -> None:
        topology.require(comm.size)
        self.comm = ordered(comm, topology)
        self.topology, self.backend, self.carrier, self.device = topology, backend, carrier, carrier.device
        self.transport = carrier.connect(self.comm)

    def close(self) -> None:
        """Give everything back. Collective."""
        self.transport.close()
        self.comm.Free()

    def rates(self, shape: AttentionShape, dtype: torch.dtype) -> Rates:
        """The rates of a typical rank while all compute, for blocks of a shape. Collective."""
        block = shape.block(self.comm.size)
        return measure_together(self.comm, self.carrier, self.backend, heads_of(shape, dtype), self.device, block)

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
        trial = Trial(self, schedule, shape, dtype)
        silent = Backend(name="none", reason="transfers alone", contributions=no_contributions)
        ways: list[tuple[Transport, Backend]] = [
            (self.transport, self.backend), (NoTransport(), self.backend), (self.transport, silent),
        ]  # fmt: skip
        seconds: list[list[float]] = [[], [], []]
        sent = 0
        recorder = Recorder(rank=self.comm.rank, epoch_s=0.0)
        for repetition in range(repeat + 1):  # the first one warms up
            for way, (transport, backend) in enumerate(ways[: 3 if alone else 1]):
                before = self.transport.sent_bytes
                took, notes = trial.once(transport, backend)
                if repetition:
                    seconds[way].append(took)
                if way == 0:
                    sent, recorder = self.transport.sent_bytes - before, notes
        gathered = self.comm.gather(recorder.intervals)
        pairs = shape.mask.pairs(range(shape.stored, shape.tokens), range(shape.tokens))
        return Measured(
            total_s=tuple(seconds[0]), compute_s=tuple(seconds[1] or [0.0]), move_s=tuple(seconds[2] or [0.0]),
            flops=float(pairs * shape.pair_flops), sent_bytes=max(self.comm.allgather(sent)),
            intervals=tuple(i for intervals in gathered or () for i in intervals),
        )  # fmt: skip

    def race(
        self, schedules: Sequence[Schedule], shape: AttentionShape, dtype: torch.dtype, repeat: int = 3, most: int = 9
    ) -> dict[str, tuple[float, ...]]:
        """Seconds of the whole by each schedule, which take turns, so that a machine that drifts is fair. Collective.

        Args:
            schedules: of different kinds, for the ranks of this launch.
            shape: of the attention.
            dtype: of queries, keys and values.
            repeat: turns, after one that warms up; a schedule that took more than ``FAR`` times the least drops out.
            most: turns of those schedules whose medians are within ``CLOSE`` of the least one.
        """
        trials = {schedule.kind: Trial(self, schedule, shape, dtype) for schedule in schedules}
        for trial in trials.values():
            trial.once(self.transport, self.backend)
        seconds: dict[str, list[float]] = {kind: [] for kind in trials}
        runners = list(trials)
        for turn in range(max(repeat, most)):
            if turn:
                medians = {kind: statistics.median(times) for kind, times in seconds.items()}
                limit = (CLOSE if turn >= repeat else FAR) * min(medians.values())
                runners = [kind for kind in trials if medians[kind] < limit]
            if len(runners) == 1 and turn >= repeat:
                break
            for kind in runners:
                seconds[kind].append(trials[kind].once(self.transport, self.backend)[0])
        return {kind: tuple(times) for kind, times in seconds.items()}


class Trial:
    """One layer of random queries, keys and values, attended to by a schedule as often as one likes.

    Args:
        bench: whose ranks, kernel and device.
        schedule: for these ranks.
        shape: of the attention.
        dtype: of queries, keys and values.
    """

    def __init__(self, bench: AttentionBench, schedule: Schedule, shape: AttentionShape, dtype: torch.dtype) -> None:
        self.bench, self.shape = bench, shape
        rank, world = bench.comm.rank, bench.comm.size
        self.heads = heads_of(shape, dtype)
        held = tuple(p for layout in shape.key_layouts(world) for p in layout.pieces(rank))
        self.keys = Keys.empty(held, self.heads, bench.device)
        for x in (self.keys.k_SGD, self.keys.v_SGE):
            x.normal_()
        pieces = shape.query_layout(world).pieces(rank)
        tokens = [torch.randn(p.size, shape.query_heads, shape.key_dim, device=bench.device) for p in pieces]
        self.queries = Queries(tuple((p.start, q_THD.to(dtype)) for p, q_THD in zip(pieces, tokens, strict=True)))
        self.program = schedule.program(rank)

    def once(self, transport: Transport, backend: Backend) -> tuple[float, Recorder]:
        """Seconds of the slowest rank, and what this one did when. Collective."""
        comm, shape = self.bench.comm, self.shape
        quietly(comm.Ibarrier())
        begun = time.perf_counter()
        recorder = Recorder(rank=comm.rank, epoch_s=begun)
        Execution(
            rank=comm.rank, program=self.program, transport=transport, backend=backend, heads=self.heads,
            rule=Rule(mask=shape.mask, scale=shape.key_dim**-0.5), query_layout=shape.query_layout(comm.size),
            key_layouts=shape.key_layouts(comm.size), device=self.bench.device, recorder=recorder,
        ).run(self.queries, self.keys)  # fmt: skip
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)
        return slowest(comm, time.perf_counter() - begun), recorder


def heads_of(shape: AttentionShape, dtype: torch.dtype) -> Heads:
    """The heads of a shape."""
    return Heads(
        query_heads=shape.query_heads, kv_heads=shape.kv_heads, key_dim=shape.key_dim, value_dim=shape.value_dim,
        dtype=dtype,
    )  # fmt: skip


def quietly(request: MPI.Request) -> None:
    """Wait for a collective asleep: where ranks share cores, those that poll slow down those that still compute."""
    while not request.Test():
        time.sleep(PAUSE_S)


def slowest(comm: MPI.Intracomm, seconds: float) -> float:
    """The most seconds of any rank, on all. Collective."""
    from mpi4py import MPI

    mine, most = np.array([seconds]), np.zeros(1)
    quietly(comm.Iallreduce(mine, most, MPI.MAX))
    return float(most[0])


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
        quietly(comm.Ibarrier())
        begun = time.perf_counter()
        if moving:
            with transport.batch():
                incoming = transport.receive(n_bytes, (comm.rank - 1) % comm.size, 0, device)
                leaving = transport.send(payload_B, (comm.rank + 1) % comm.size, 0)
        for _ in range(calls):
            torch.mm(a_NN, a_NN)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if moving:
            incoming.wait()
            leaving.wait()
        return slowest(comm, time.perf_counter() - begun)

    def median(calls: int, moving: bool) -> float:
        once(calls, moving)
        return statistics.median(once(calls, moving) for _ in range(repeat))

    move_s = median(0, True)
    calls = max(10, int(10 * 1.5 * move_s / median(10, False)))
    return Overlap(n_bytes, move_s, median(calls, False), median(calls, True))
