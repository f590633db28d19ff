"""How fast one rank computes attention: a few numbers, measured on the spot (`cpmpi.cost.measure`) or from a table."""

from __future__ import annotations

from dataclasses import dataclass


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
    """At which keys are read for few queries."""
    merge_gb_per_s: float | None = None
    """Of partials that are packed and merged; None: each is read twice and written once at ``memory_gb_per_s``."""
    call_s: float = 1e-5
    """Seconds that a call of the kernel takes beside its work."""
    message_s: float = 1e-5
    """Seconds from posting a small message to noticing its end, beside the link's latency."""

    def __post_init__(self) -> None:
        for name in ("attention_flops", "memory_gb_per_s", "merge_gb_per_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        for name in ("call_s", "message_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")

    def merge_seconds(self, n_bytes: int) -> float:
        """What partials of so many bytes take to merge."""
        return n_bytes / ((self.merge_gb_per_s or self.memory_gb_per_s / 3) * 1e9)
