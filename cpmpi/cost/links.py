"""The wires under a schedule: which of them a message from one rank to another goes over, and what each carries.

A wire is one direction of one thing that messages share: a rank's port inside its node, a node's network devices, the
uplink of a leaf switch. Bytes on a wire queue behind each other; the directions do not meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from cpmpi.topology.derive import rank_order
from cpmpi.topology.describe import Topology

SATURATED = 0.75  # a pair that gets less than this across leaves than under one leaf fills the uplink on its own


class Route(NamedTuple):
    """The way of a message: its wires, the rate of the pair on an idle machine (bytes/s), and the latency (s)."""

    wires: tuple[int, ...]
    bytes_per_s: float
    latency_s: float


class Links:
    """The wires of a machine, whose ranks are named by their positions (see `topology.derive.rank_order`).

    What a wire carries follows from the description:

    * a rank's port in its node: its fastest link there;
    * a node's network: what one pair of ranks gets between nodes, times the node's network devices;
    * a leaf's uplink: where one measured pair alone got clearly less across leaves than under one leaf, that (the pair
      filled the uplink); otherwise a figure is taken as one device's share, and the uplink carries all its devices'.

    Attributes:
        names: of each wire, in words.
        capacity: of each wire, in bytes/s.

    Raises:
        UnknownBandwidthError: on use, for a pair of ranks between which no bandwidth is known.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.order = rank_order(topology)
        self.names: list[str] = []
        self.capacity: list[float] = []
        self._wires: dict[str, int] = {}
        self._routes: dict[tuple[int, int], Route] = {}

    def route(self, source: int, target: int) -> Route:
        """The way from one position to another."""
        if (source, target) not in self._routes:
            self._routes[source, target] = self._find(self.order[source], self.order[target])
        return self._routes[source, target]

    def narrowest(self, source: int, target: int) -> float:
        """Bytes/s of the narrowest wire from one position to another, for all messages on it together."""
        return min(self.capacity[wire] for wire in self.route(source, target).wires)

    def together(self, source: int, target: int, lanes: int) -> float:
        """Bytes/s, at most, of so many pairs of ranks at once, one of them these two and all between the same nodes."""
        route = self.route(source, target)
        own = all(self.names[wire].startswith("rank ") for wire in route.wires)  # each pair has ports of its own
        return min(self.narrowest(source, target) * (lanes if own else 1), lanes * route.bytes_per_s)

    def _find(self, a: int, b: int) -> Route:
        t = self.topology
        rate, latency_s = t.known_link(a, b)
        i, j, kind = t.node_of(a), t.node_of(b), t.kind(a, b)
        if kind in ("numa", "node", "fabric"):
            wires = [self._wire(f"rank {a} out", self._port(a)), self._wire(f"rank {b} in", self._port(b))]
            return Route(tuple(wires), rate, latency_s)
        one, two = t.nodes[i], t.nodes[j]
        wires = [self._wire(f"{one.name} out", self._device(i)), self._wire(f"{two.name} in", self._device(j))]
        if kind == "spine":
            assert one.leaf is not None
            assert two.leaf is not None
            wires.append(self._wire(f"{one.leaf} up", self._uplink[one.leaf]))
            wires.append(self._wire(f"{two.leaf} down", self._uplink[two.leaf]))
        return Route(tuple(wires), rate, latency_s)

    def _wire(self, name: str, bytes_per_s: float) -> int:
        if name not in self._wires:
            self._wires[name] = len(self.names)
            self.names.append(name)
            self.capacity.append(bytes_per_s)
        return self._wires[name]

    def _port(self, rank: int) -> float:
        """Bytes/s of a rank's fastest link in its node or NVLink domain."""
        t = self.topology
        node = t.nodes[t.node_of(rank)]
        peers = self._peers(rank)
        if not peers:  # alone in its node, in a domain over several nodes
            return (node.fabric_gb_per_s or t.figures["fabric"].gb_per_s or float("inf")) * 1e9
        return max(t.known_link(rank, peer)[0] for peer in peers)

    def _peers(self, rank: int) -> Iterable[int]:
        """The other ranks of a rank's node; where it has no links of its own there, one of each NUMA domain."""
        t = self.topology
        peers = [place.rank for place in t.nodes[t.node_of(rank)].ranks if place.rank != rank]
        if t.place(rank).gpu is not None or rank in self._measured_inside:
            return peers
        return {t.numa_of(peer): peer for peer in peers}.values()

    @cached_property
    def _measured_inside(self) -> set[int]:
        """The ranks with a measured link in their node."""
        t = self.topology
        return {rank for m in t.measured if t.node_of(m.a) == t.node_of(m.b) for rank in (m.a, m.b)}

    def _device(self, node: int) -> float:
        """Bytes/s of all network devices of a node."""
        return self._pair[node] * max(1, len(self.topology.nodes[node].fast_networks))

    @cached_property
    def _pair(self) -> list[float]:
        """For each node, the bytes/s of the best pair of ranks with one end there and the other on another node."""
        t = self.topology
        general = max((t.figures[kind].gb_per_s or 0.0 for kind in ("leaf", "spine", "network")), default=0.0)
        best = [0.0] * len(t.nodes)
        for m in t.measured:
            for node in {t.node_of(m.a), t.node_of(m.b)}:
                if t.kind(m.a, m.b) in ("leaf", "spine", "network"):
                    best[node] = max(best[node], m.gb_per_s or 0.0)
        return [(pair if pair and t.figures["leaf"].gb_per_s is None else max(pair, general)) * 1e9 for pair in best]

    @cached_property
    def _uplink(self) -> dict[str, float]:
        """Bytes/s of each leaf's uplink."""
        t = self.topology
        across, under = t.figures["spine"].gb_per_s, t.figures["leaf"].gb_per_s
        share = min(1.0, across / under) if across and under else 1.0
        devices: dict[str, float] = defaultdict(float)
        for i, node in enumerate(t.nodes):
            if node.leaf is not None:
                devices[node.leaf] += self._device(i) * share
        alone: dict[str, float] = defaultdict(float)
        for m in t.measured:
            if t.kind(m.a, m.b) == "spine" and m.gb_per_s and under and m.gb_per_s < SATURATED * under:
                for rank in (m.a, m.b):
                    leaf = str(t.nodes[t.node_of(rank)].leaf)
                    alone[leaf] = max(alone[leaf], m.gb_per_s * 1e9)
        typical = max(alone.values(), default=0.0)
        return {leaf: alone[leaf] or typical or total for leaf, total in devices.items()}
