"""Where the ranks of a job sit, in which order they are numbered, and how they are split into groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpmpi.attention.grid import Grid
from cpmpi.comm.ranks import Ranks
from cpmpi.errors import UserError
from cpmpi.topology.derive import rank_order
from cpmpi.topology.describe import Topology

if TYPE_CHECKING:
    from mpi4py import MPI


def number_ranks(ranks: Ranks, *, measure: bool) -> tuple[Ranks, Topology]:
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


def check_grid(topology: Topology, tp: int) -> None:
    """Refuse tensor parallelism that the ranks cannot be dealt to: those that share weights stay inside a node.

    Raises:
        UserError: a node's ranks are no multiple of ``tp``; the values that fit are listed.
    """
    sizes = {node.name: len(node.ranks) for node in topology.nodes}
    for name, size in sizes.items():
        if size % tp:
            fitting = [n for n in range(1, min(sizes.values()) + 1) if not any(s % n for s in sizes.values())]
            raise UserError(
                f"--tp {tp}: node {name} has {size} ranks, and ranks that share weights stay inside a node; "
                f"choose one of {', '.join(map(str, fitting))}"
            )


def split(ranks: Ranks, grid: Grid) -> tuple[MPI.Intracomm, MPI.Intracomm]:
    """The ranks of this rank's head group, by position, and those that share the weights with it. Collective."""
    with ranks.flight.waits("split"):
        group: Any = ranks.comm.Split(grid.group(ranks.rank), key=grid.position(ranks.rank))
        sharers: Any = ranks.comm.Split(ranks.rank // grid.tp, key=grid.tp_index(ranks.rank))
    return group, sharers
