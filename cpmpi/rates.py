"""How fast one rank computes attention: four numbers, measured on the spot or taken from a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from cpmpi.execute import Heads
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.mask import Mask

if TYPE_CHECKING:
    from mpi4py import MPI

MEASURED_FLOPS = 5e8  # of the large call by which a kernel is measured
MEASURED_BYTES = 4 << 20  # of the keys that few queries read
MESSAGE_S = 2e-4  # posting, noticing and unpacking a message, with the progress thread's pauses
MEASURED_S = 0.06  # for each of the three calls: several time slices, so that ranks that share a core show it


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a rank needs for its part of a schedule; a call of the kernel takes

        ``call_s + key bytes / memory_gb_per_s + FLOPs / attention_flops``

    where the second term counts with few queries and the third with many.

    Raises:
        ValueError: a rate is not positive.
    """

    attention_flops: float
    """FLOP/s of attention over long blocks, of one rank while all compute."""
    memory_gb_per_s: float
    """At which keys are read for few queries, and partials merged."""
    call_s: float = 1e-5
    """Seconds that a call of the kernel takes beside its work."""
    message_s: float = 1e-5
    """Seconds that posting a message and noticing its end take a rank, beside the link's latency."""

    def __post_init__(self) -> None:
        for name in ("attention_flops", "memory_gb_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        for name in ("call_s", "message_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")


def measure_together(comm: MPI.Intracomm, backend: Backend, heads: Heads, device: torch.device) -> Rates:
    """The median of each rate over ranks that all compute at once. Collective."""
    everyone: list[Rates] = comm.allgather(measure(backend, heads, device, comm.Barrier))
    return Rates(**{f.name: statistics.median(getattr(r, f.name) for r in everyone) for f in fields(Rates)})


def measure(backend: Backend, heads: Heads, device: torch.device, together: Callable[[], object]) -> Rates:
    """The rates of this rank's kernel for a layer of these shapes, in a fifth of a second.

    Args:
        backend: the kernel.
        heads: the layer's shapes.
        device: of the tensors.
        together: a barrier: ranks that share cores measure at the same time, as they will compute at the same time.
    """
    flops_a_pair = 2 * heads.query_heads * (heads.key_dim + heads.value_dim)
    key_bytes = heads.kv_heads * (heads.key_dim + heads.value_dim) * heads.dtype.itemsize
    side = max(64, min(2048, int((MEASURED_FLOPS / flops_a_pair) ** 0.5)))
    many = max(256, min(1 << 17, MEASURED_BYTES // key_bytes))
    seconds = []
    for queries, keys in ((1, 1), (1, many), (side, side)):
        together()
        seconds.append(_mean_seconds(backend, heads, device, queries, keys))
    call_s, reading_s, computing_s = seconds
    return Rates(
        attention_flops=flops_a_pair * side * side / max(computing_s - call_s, 1e-9),
        memory_gb_per_s=key_bytes * many / max(reading_s - call_s, 1e-9) / 1e9,
        call_s=call_s,
        message_s=MESSAGE_S,
    )


def _mean_seconds(backend: Backend, heads: Heads, device: torch.device, queries: int, keys: int) -> float:
    """Mean seconds of a call where every query sees every key, over ``MEASURED_S``."""
    q_THD = torch.randn(queries, heads.query_heads, heads.key_dim, device=device).to(heads.dtype)
    k_SGD = torch.randn(keys, heads.kv_heads, heads.key_dim, device=device).to(heads.dtype)
    v_SGE = torch.randn(keys, heads.kv_heads, heads.value_dim, device=device).to(heads.dtype)
    calls, begun = -1, time.perf_counter()  # the first call warms up
    while calls < 1 or time.perf_counter() - begun < MEASURED_S:
        backend.attend(q_THD, k_SGD, v_SGE, q_start=keys, k_start=0, mask=Mask(), scale=heads.key_dim**-0.5)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
        begun = time.perf_counter() if calls == 0 else begun
    return (time.perf_counter() - begun) / calls
