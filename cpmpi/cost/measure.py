"""Measure how fast a rank computes attention, merges partials and sends small messages, on the spot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from cpmpi.attention.execute import Heads, flat, unpack
from cpmpi.comm.carrier import Carrier
from cpmpi.cost.rates import Rates
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.partial import Partial

if TYPE_CHECKING:
    from mpi4py import MPI

MEASURED_FLOPS = {"cpu": 2e9, "cuda": 1e12}  # at most, of the large call by which a kernel is measured
MEASURED_QUERIES = 1024  # at most in it: more go through a model in several chunks
MEASURED_BYTES = 4 << 20  # of the keys that few queries read
MESSAGE_BYTES, MESSAGE_ROUNDS = 1024, 20  # small messages by which their overhead is measured
MERGED_BYTES = 1 << 20  # of a partial
MEASURED_S = 0.06  # for each of the four calls: several time slices, so that ranks that share a core show it


def measure_together(
    comm: MPI.Intracomm,
    carrier: Carrier,
    backend: Backend,
    heads: Heads,
    device: torch.device,
    block: tuple[int, int],
) -> Rates:
    """The median of each rate over ranks that all compute, then all talk, at once. Collective; see `measure`."""
    mine = measure(backend, heads, device, comm.Barrier, block)
    call = _attending(backend, heads, device, 1, 1)
    mine = replace(mine, message_s=max(0.0, message_seconds(comm, carrier, device, call) - mine.call_s))
    everyone: list[Rates] = comm.allgather(mine)
    return Rates(**{f.name: statistics.median(getattr(r, f.name) for r in everyone) for f in fields(Rates)})


def message_seconds(comm: MPI.Intracomm, carrier: Carrier, device: torch.device, call: Callable[[], object]) -> float:
    """Median seconds of a round in which each rank sends a little to the next and calls the kernel once. Collective.

    With the call, since messages of a schedule travel beside calls: where ranks share cores, they take turns with them.
    """
    if comm.size == 1:
        return 0.0
    transport = carrier.connect(comm)
    payload_B = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(MESSAGE_ROUNDS):
        begun = time.perf_counter()
        with transport.batch():
            incoming = transport.receive(MESSAGE_BYTES, (comm.rank - 1) % comm.size, 0, device)
            leaving = transport.send(payload_B, (comm.rank + 1) % comm.size, 0)
        call()
        incoming.wait()
        leaving.wait()
        seconds.append(time.perf_counter() - begun)
    transport.close()
    return statistics.median(seconds)


def measure(
    backend: Backend, heads: Heads, device: torch.device, together: Callable[[], object], block: tuple[int, int]
) -> Rates:
    """The rates of this rank's kernel for a layer of these shapes, in a quarter of a second.

    Args:
        backend: the kernel.
        heads: the layer's shapes.
        device: of the tensors.
        together: a barrier: ranks that share cores measure at the same time, as they will compute at the same time.
        block: queries and keys that a call typically gets: kernels are slower for few of either.
    """
    flops_a_pair = 2 * heads.query_heads * (heads.key_dim + heads.value_dim)
    key_bytes = heads.kv_heads * (heads.key_dim + heads.value_dim) * heads.dtype.itemsize
    rows = max(2, min(MEASURED_QUERIES, block[0]))
    columns = max(64, min(block[1], int(MEASURED_FLOPS[device.type] / flops_a_pair / rows)))
    many = max(256, min(1 << 17, MEASURED_BYTES // key_bytes))
    calls = [_attending(backend, heads, device, *size) for size in ((1, 1), (1, many), (rows, columns))]
    partial_bytes = heads.query_heads * (heads.value_dim + 1) * torch.float32.itemsize
    tokens = max(1, MERGED_BYTES // partial_bytes)
    seconds = []
    for call in (*calls, _merging(heads, device, tokens)):
        together()
        seconds.append(mean_seconds(call, device))
    call_s, reading_s, computing_s, merging_s = seconds
    read_s = max(reading_s - call_s, 1e-9) / (key_bytes * many)  # of a byte
    # What the model counts as reading is no computing; at least half of a large call is.
    multiplying_s = max(computing_s - call_s - columns * key_bytes * read_s, computing_s / 2)
    return Rates(
        attention_flops=flops_a_pair * rows * columns / multiplying_s,
        memory_gb_per_s=1 / read_s / 1e9,
        merge_gb_per_s=partial_bytes * tokens / merging_s / 1e9,
        call_s=call_s,
    )


def _attending(backend: Backend, heads: Heads, device: torch.device, queries: int, keys: int) -> Callable[[], object]:
    """A call where every query sees every key."""
    q_THD = torch.randn(queries, heads.query_heads, heads.key_dim, device=device).to(heads.dtype)
    k_SGD = torch.randn(keys, heads.kv_heads, heads.key_dim, device=device).to(heads.dtype)
    v_SGE = torch.randn(keys, heads.kv_heads, heads.value_dim, device=device).to(heads.dtype)
    scale = heads.key_dim**-0.5
    return lambda: backend.attend(q_THD, k_SGD, v_SGE, q_start=keys, k_start=0, mask=Mask(), scale=scale)


def _merging(heads: Heads, device: torch.device, tokens: int) -> Callable[[], object]:
    """A call that packs the partial of so many tokens as for a message and merges it into another."""
    mine, other = (Partial(tokens, heads.query_heads, heads.value_dim, device=device) for _ in range(2))
    shapes = (other.out_THE.shape, other.lse_TH.shape)

    def call() -> None:
        out_THE, lse_TH = unpack(flat([other.out_THE, other.lse_TH]), shapes, torch.float32)
        mine.merge_(out_THE, lse_TH)

    return call


def mean_seconds(call: Callable[[], object], device: torch.device, least_s: float = MEASURED_S) -> float:
    """Mean seconds of a call over at least so many seconds."""
    calls, begun = -1, time.perf_counter()  # the first call warms up
    while calls < 1 or time.perf_counter() - begun < least_s:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
        begun = time.perf_counter() if calls == 0 else begun
    return (time.perf_counter() - begun) / calls
