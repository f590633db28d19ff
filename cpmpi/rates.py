"""How fast one rank computes attention: four numbers, measured on the spot or taken from a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpmpi.execute import Heads
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.mask import Mask

MEASURED_FLOPS = 2e9  # of the large call by which a kernel is measured
MEASURED_BYTES = 4 << 20  # of the keys that few queries read
REPEATS = 3


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


def measure(backend: Backend, heads: Heads, device: torch.device) -> Rates:
    """The rates of this rank's kernel for a layer of these shapes, in some tens of milliseconds.

    Ranks that share cores should measure at the same time, behind a barrier, since they will compute at the same time.
    """
    flops_a_pair = 2 * heads.query_heads * (heads.key_dim + heads.value_dim)
    key_bytes = heads.kv_heads * (heads.key_dim + heads.value_dim) * heads.dtype.itemsize
    side = max(64, min(2048, int((MEASURED_FLOPS / flops_a_pair) ** 0.5)))
    many = max(256, min(1 << 17, MEASURED_BYTES // key_bytes))
    call_s = _seconds(backend, heads, device, 1, 1)
    reading_s = _seconds(backend, heads, device, 1, many) - call_s
    computing_s = _seconds(backend, heads, device, side, side) - call_s
    return Rates(
        attention_flops=flops_a_pair * side * side / max(computing_s, 1e-9),
        memory_gb_per_s=key_bytes * many / max(reading_s, 1e-9) / 1e9,
        call_s=call_s,
        message_s=1e-4 if device.type == "cpu" else 5e-5,
    )


def _seconds(backend: Backend, heads: Heads, device: torch.device, queries: int, keys: int) -> float:
    """Median seconds of one call where every query sees every key."""
    q_THD = torch.randn(queries, heads.query_heads, heads.key_dim, device=device).to(heads.dtype)
    k_SGD = torch.randn(keys, heads.kv_heads, heads.key_dim, device=device).to(heads.dtype)
    v_SGE = torch.randn(keys, heads.kv_heads, heads.value_dim, device=device).to(heads.dtype)

    def call() -> None:
        backend.attend(q_THD, k_SGD, v_SGE, q_start=keys, k_start=0, mask=Mask(), scale=heads.key_dim**-0.5)

    return median_seconds(call, device, REPEATS)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of ``repeats`` calls after one that warms up; waits for the device."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
