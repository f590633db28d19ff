"""How fast all ranks together are at each of several ways to compute the same, kept for the user between jobs.

Ranks have to agree on a way, and two starts on the same machine should: noise must not decide twice. So rank 0 looks
up what an earlier job measured on machines like these (`cpmpi.kernels.rate_cache`); else all ranks measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from cpmpi.comm.ranks import Ranks
from cpmpi.kernels import rate_cache
from cpmpi.kernels.select import slowest

KEPT = ", measured by an earlier job"  # said of rates that were found


def rates_of(
    ranks: Ranks, device: torch.device, subject: str, names: Sequence[str], measure: Callable[[], Mapping[str, float]]
) -> tuple[dict[str, float], str]:
    """FLOP/s of each way on the rank where it is slowest, and words on where they come from. Collective.

    Args:
        ranks: who computes.
        device: of this rank.
        subject: what is computed, with its shapes: rates are kept under it.
        names: of the ways.
        measure: times them all on this rank; called on all ranks or on none.
    """
    machines = ranks.comm.gather(rate_cache.machine(device)) or []
    kept: dict[str, float] | None = ranks.on_root(rate_cache.load, machines, subject, names)
    if kept is not None:
        return kept, KEPT
    measured = ranks.comm.gather(measure()) or []

    def keep() -> dict[str, float]:
        flops = slowest(measured)
        rate_cache.save(machines, subject, flops)
        return flops

    return ranks.on_root(keep), ""
