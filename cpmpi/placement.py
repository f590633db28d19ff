"""Where the ranks of a job sit, in which order they are numbered, and which schedule suits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cpmpi import rates
from cpmpi.auto import choose, schedule_on
from cpmpi.kernels.backend import Backend
from cpmpi.probe import Layer
from cpmpi.ranks import Ranks
from cpmpi.schedule import Schedule
from cpmpi.shape import AttentionShape
from cpmpi.topology.derive import rank_order
from cpmpi.topology.describe import Topology

if TYPE_CHECKING:
    from mpi4py import MPI


def place(ranks: Ranks, *, measure: bool) -> tuple[Ranks, Topology]:
    """Discover the machine and number the ranks along its rings, leaf by leaf and node by node. Collective.

    Args:
        ranks: as the launcher numbered them.
        measure: whether links are measured, which takes up to two seconds.

    Returns:
        The ranks in their new order, and the description that counts them so.
    """
    from cpmpi.topology.discover import discover

    topology = discover(ranks.comm, measure=measure and ranks.size > 1)
    order = rank_order(topology)
    if order == tuple(range(ranks.size)):
        return ranks, topology
    reordered: MPI.Intracomm = ranks.comm.Split(0, key=order.index(ranks.rank))  # type: ignore[assignment]
    ranks = Ranks(reordered)
    return ranks, discover(ranks.comm, measure=measure)


def choose_schedule(
    ranks: Ranks, topology: Topology, kind: str, layers: tuple[Layer, ...], backends: tuple[Backend, ...], *,
    tokens: int, segments: int, device: torch.device,
) -> tuple[Schedule, str]:  # fmt: skip
    """The schedule for documents of up to ``tokens`` tokens, and one line that says why. Collective.

    ``auto`` prices every kind with this machine's measured links and kernel and takes the cheapest. Where a link's
    bandwidth could not be measured nothing can be priced, and it is the ring.
    """
    heads, rule = layers[0]
    if kind != "auto":
        return schedule_on(kind, topology), f"{kind}: as asked for"
    if ranks.size == 1:
        return schedule_on("ring", topology), "ring: one rank"
    shape = AttentionShape(
        new=tokens, query_heads=heads.query_heads, kv_heads=heads.kv_heads, key_dim=heads.key_dim,
        value_dim=heads.value_dim, itemsize=heads.dtype.itemsize, segments=segments, mask=rule.mask,
    )  # fmt: skip
    measured = rates.measure_together(ranks.comm, backends[0], heads, device)

    def decide() -> tuple[str, str]:
        try:
            choice = choose(topology, shape, measured)
        except ValueError as problem:
            return "ring", f"ring: not priced, {problem}"
        return choice.schedule.kind, f"{choice.reason} (predicted, a layer)"

    kind, reason = ranks.on_root(decide)
    return schedule_on(kind, topology), reason
