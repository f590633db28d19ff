"""Where the ranks of a job sit, in which order they are numbered, and which schedule suits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cpmpi import rates
from cpmpi.auto import choose, schedule_on
from cpmpi.cost import resident_bytes
from cpmpi.errors import UserError
from cpmpi.grid import Grid
from cpmpi.kernels.backend import Backend
from cpmpi.kernels.mask import Mask
from cpmpi.memory import parts_of
from cpmpi.model_size import inner_width
from cpmpi.probe import Layer
from cpmpi.ranks import Ranks
from cpmpi.schedule import Schedule
from cpmpi.shape import AttentionShape
from cpmpi.topology.derive import rank_order
from cpmpi.topology.describe import Node, Topology

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
    group: Any = ranks.comm.Split(grid.group(ranks.rank), key=grid.position(ranks.rank))
    sharers: Any = ranks.comm.Split(ranks.rank // grid.tp, key=grid.tp_index(ranks.rank))
    return group, sharers


def head_group(topology: Topology, grid: Grid) -> Topology:
    """The machine as the ranks of one head group see it, by their positions.

    The other groups send as much at the same time: a node's network devices are shared out among them, or the bandwidth
    of one is.

    Raises:
        ValueError: ``tp`` does not divide a node's ranks.
    """
    if grid.tp == 1:
        return topology
    nodes: list[Node] = []
    for node in topology.nodes:
        if len(node.ranks) % grid.tp:
            count = len(node.ranks)
            raise ValueError(f"tensor parallelism ({grid.tp}) must divide the {count} ranks of node {node.name}")
        kept = [replace(place, rank=grid.position(place.rank)) for place in node.ranks if not grid.group(place.rank)]
        networks = node.fast_networks[:: min(grid.head_groups, len(node.fast_networks) or 1)]
        nodes.append(replace(node, ranks=tuple(kept), networks=networks))
    devices = min(max(1, len(node.fast_networks)) for node in topology.nodes)
    share = min(1.0, devices / grid.head_groups)
    measured = []
    for m in topology.measured:
        if not (grid.group(m.a) or grid.group(m.b)):
            outside = topology.node_of(m.a) != topology.node_of(m.b)
            rate = m.gb_per_s * share if outside and m.gb_per_s is not None else m.gb_per_s
            measured.append(replace(m, a=grid.position(m.a), b=grid.position(m.b), gb_per_s=rate))
    return replace(topology, nodes=tuple(nodes), measured=tuple(measured))


def choose_schedule(
    ranks: Ranks, topology: Topology, kind: str, layers: tuple[Layer, ...], backends: tuple[Backend, ...], *,
    tokens: int, segments: int, device: torch.device, grid: Grid,
) -> tuple[Schedule, str]:  # fmt: skip
    """The schedule of a head group for documents of up to ``tokens`` tokens, and one line that says why. Collective.

    ``auto`` prices every kind with this machine's measured links and kernel and takes the cheapest. Where a link's
    bandwidth could not be measured nothing can be priced, and it is the ring.
    """
    places = {grid.rank(0, position): position for position in range(ranks.size // grid.head_groups)}
    if kind != "auto":
        return schedule_on(kind, topology).of(places), f"{kind}: as asked for"
    if len(places) == 1:
        return schedule_on("ring", topology).of(places), f"ring: one rank{' a head group' * (grid.tp > 1)}"
    priced = min(range(len(layers)), key=lambda i: layers[i].rule.mask != Mask())  # one that sees all, where one does
    shape = shape_of(layers[priced], tokens, segments, grid)
    measured = rates.measure_together(
        ranks.comm, backends[priced], layers[priced].heads, device, shape.block(len(places))
    )

    def decide() -> tuple[str, str]:
        try:
            choice = choose(head_group(topology, grid), shape, measured)
        except ValueError as problem:
            return "ring", f"ring: not priced, {problem}"
        return choice.schedule.kind, f"{choice.reason} (predicted, a layer)"

    kind, reason = ranks.on_root(decide)
    return schedule_on(kind, topology).of(places), reason


def shape_of(layer: Layer, tokens: int, segments: int, grid: Grid) -> AttentionShape:
    """A layer's attention over a document of ``tokens`` tokens, as a rank of a head group has it."""
    heads, rule, _ = layer
    return AttentionShape(
        new=tokens, query_heads=heads.query_heads, kv_heads=heads.kv_heads, key_dim=heads.key_dim,
        value_dim=heads.value_dim, itemsize=heads.dtype.itemsize, segments=segments, mask=rule.mask,
        copies=grid.copies,
    )  # fmt: skip


def document_memory(
    model: torch.nn.Module, layers: Sequence[Layer], schedule: Schedule, *, tokens: int, segments: int, grid: Grid,
    vocabulary: int, hidden: int, chunk_tokens: int, stored_itemsize: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes that a document of ``tokens`` tokens takes on the fullest rank, by part; see `cpmpi.memory.parts_of`."""
    shapes = {shape_of(layer._replace(module=""), tokens, segments, grid) for layer in layers}
    resident, shape = max(((resident_bytes(schedule, s), s) for s in shapes), key=lambda entry: entry[0])
    layout = shape.query_layout(schedule.world)
    return parts_of(
        shape, tokens=max(map(layout.size, range(schedule.world))), resident=resident, hidden=hidden,
        inner=inner_width(model), vocabulary=vocabulary, chunk_tokens=chunk_tokens, stored_itemsize=stored_itemsize,
    )  # fmt: skip
