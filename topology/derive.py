"""Rings, trees and the order of ranks that follow from a description. Deterministic: the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cpmpi.topology import spanning
from cpmpi.topology.describe import Measurement, Topology
from cpmpi.topology.node import GpuLink, Node, RankPlace
from cpmpi.topology.ring_search import Table, best_ring

# Breaks ties between links of one bandwidth: how far apart two GPUs are on PCIe, or the cores of two ranks.
DISTANCE = {"nvlink": 0.0, "nvswitch": 0.0, "pix": 1.0, "pxb": 2.0, "phb": 3.0, "node": 4.0, "sys": 5.0}
OTHER_NUMA, OTHER_SOCKET = 2.0, 5.0


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A spanning tree over the nodes of a description.

    Attributes:
        parent: of each node, by index into ``Topology.nodes``; None for the root.
        leaders: the rank of each node that sends and receives for it.
    """

    parent: tuple[int | None, ...]
    leaders: tuple[int, ...]

    @property
    def root(self) -> int:
        """The node everything is reduced to."""
        return self.parent.index(None)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(child, parent) of every node but the root, by child."""
        return tuple((child, up) for child, up in enumerate(self.parent) if up is not None)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The nodes below each node, in index order."""
        below: list[list[int]] = [[] for _ in self.parent]
        for child, up in self.edges:
            below[up].append(child)
        return tuple(map(tuple, below))

    def rounds(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The (child, parent) edges of a reduction by round: a node receives one message a round, and sends its own
        once all its children have sent theirs; read backwards and turned round, a broadcast."""
        missing = [len(below) for below in self.children]
        waiting, rounds = list(self.edges), []
        while waiting:
            by_receiver: dict[int, tuple[int, int]] = {}
            for child, up in waiting:
                if missing[child] == 0:
                    by_receiver.setdefault(up, (child, up))
            for up in by_receiver:
                missing[up] -= 1
            rounds.append(tuple(by_receiver.values()))
            done = set(rounds[-1])
            waiting = [edge for edge in waiting if edge not in done]
        return tuple(rounds)


def rings(topology: Topology) -> tuple[tuple[int, ...], ...]:
    """The ranks of each node in ring order: the ring with the widest narrowest link.

    Exact up to 8 ranks, a heuristic beyond (``ring_search.py``). A link is as wide as the one between the ranks' GPUs
    where that is known, else as the measurement or the figure for its kind; an unknown link counts as the narrowest.
    Ties go to the ring with more bandwidth in all, then to nearer links (PCIe path, socket, NUMA domain). Starts at the
    lowest rank of the node.
    """
    inside: dict[int, list[Measurement]] = {}
    for m in topology.measured:
        if topology.node_of(m.a) == topology.node_of(m.b):
            inside.setdefault(topology.node_of(m.a), []).append(m)
    found = []
    for index, node in enumerate(topology.nodes):
        places = sorted(node.ranks, key=lambda place: place.rank)
        order = best_ring(_widths(topology, node, places, inside.get(index, [])), _distances(topology, node, places))
        found.append(tuple(places[i].rank for i in order))
    return tuple(found)


def rank_order(topology: Topology) -> tuple[int, ...]:
    """All ranks, leaf by leaf, node by node, in ring order inside a node."""
    by_node = rings(topology)
    return tuple(rank for node in node_order(topology) for rank in by_node[node])


def node_order(topology: Topology) -> tuple[int, ...]:
    """Node indices with the nodes under one switch next to each other, switches and nodes by first appearance."""
    first: dict[tuple[str, ...], int] = {}
    keys = []
    for i, path in enumerate(_paths(topology)):
        keys.append([first.setdefault(path[:depth], i) for depth in range(1, len(path) + 1)] or [i])
    return tuple(sorted(range(len(keys)), key=lambda i: (keys[i], i)))


def tree(topology: Topology) -> Tree:
    """The tree for small messages: the least number of rounds, one edge out of each leaf switch.

    Binomial among the nodes of a leaf, and again among the leaves, so its depth is at most
    ``log2(nodes under a leaf) + log2(leaves)``, each rounded up. Nodes whose leaf is unknown stand alone.
    """
    parents = spanning.span(_paths(topology))
    return Tree(parent=tuple(parents), leaders=leaders(topology))


def leaders(topology: Topology) -> tuple[int, ...]:
    """The rank of each node that stands next to its fastest network device: the lowest in the device's NUMA domain."""
    return tuple(_leader(topology, node) for node in topology.nodes)


def _paths(topology: Topology) -> list[spanning.Path]:
    """What stands over each node, top first: its switches and, below them, an NVLink domain that spans nodes."""
    return [(*node.switches, f"fabric {node.fabric}") if node.fabric else node.switches for node in topology.nodes]


def _widths(topology: Topology, node: Node, places: Sequence[RankPlace], measured: Sequence[Measurement]) -> Table:
    """GB/s between the ranks of a node: of their GPUs' link, else as measured, else typical, else 0.

    By table rather than by ``Topology.link``: a node may have 128 ranks, a machine thousands of nodes."""
    figures = topology.figures
    near, far = (figures[kind].gb_per_s or 0.0 for kind in ("numa", "node"))
    numas = [topology.numa_of(place.rank) for place in places]
    table = [[near if one is not None and one == two else far for two in numas] for one in numas]
    at = {place.rank: i for i, place in enumerate(places)}
    for m in measured:
        if m.gb_per_s is not None:
            table[at[m.a]][at[m.b]] = table[at[m.b]][at[m.a]] = m.gb_per_s
    for i, j, link in _gpu_links(node, places):
        if link.gb_per_s is not None:
            table[i][j] = link.gb_per_s
    for i in range(len(places)):
        table[i][i] = 0.0
    return tuple(map(tuple, table))


def _distances(topology: Topology, node: Node, places: Sequence[RankPlace]) -> Table:
    numas = [topology.numa_of(place.rank) for place in places]
    sides = [(place.socket, numa) for place, numa in zip(places, numas)]
    table = [
        [OTHER_SOCKET if _differ(s, t) else OTHER_NUMA if _differ(m, n) else 0.0 for t, n in sides] for s, m in sides
    ]
    for i, j, link in _gpu_links(node, places):
        table[i][j] = DISTANCE[link.kind]
    return tuple(map(tuple, table))


def _gpu_links(node: Node, places: Sequence[RankPlace]) -> list[tuple[int, int, GpuLink]]:
    """The known GPU link of each ordered pair of ranks, by index into ``places``."""
    users = [(i, place.gpu) for i, place in enumerate(places) if place.gpu is not None]
    return [(i, j, node.gpu_link_of[a, b]) for i, a in users for j, b in users if (a, b) in node.gpu_link_of]


def _differ(one: int | None, two: int | None) -> bool:
    return one is not None and two is not None and one != two


def _leader(topology: Topology, node: Node) -> int:
    """The lowest rank in the NUMA domain of the first of the fastest devices; where that is unknown, of all."""
    top = max((device.gb_per_s or 0.0 for device in node.networks), default=0.0)
    beside = [d.numa for d in sorted(node.networks, key=lambda d: d.name) if (d.gb_per_s or 0.0) == top]
    numa = next((n for n in beside if n is not None), None)
    ranks = sorted(place.rank for place in node.ranks)
    near = [rank for rank in ranks if numa is not None and topology.numa_of(rank) == numa]
    return (near or ranks)[0]
