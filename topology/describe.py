"""What the machine is, as plain data: nodes under leaf switches, ranks, GPUs, network devices, links, measurements.

A description is discovered (``discover.py``), generated for planning (``synthetic.py``) or written by hand, is saved
with every run, and is all that rings, trees, cost models and drawings look at. ``None`` always means *unknown*.

Units: ``gb_per_s`` is 10^9 bytes per second **in one direction**; ``latency_us`` is microseconds one way.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpmpi.topology import codec

FORMAT = "cpmpi-topology"
VERSION = 1

# What lies between two ranks, nearest first: the same rank; the same NUMA domain; the same node; one NVLink domain
# over several nodes; one leaf switch; different leaf switches; a network of which at least one leaf is unknown.
KINDS = ("self", "numa", "node", "fabric", "leaf", "spine", "network")
GPU_LINK_KINDS = ("nvlink", "nvswitch", "pix", "pxb", "phb", "node", "sys")


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} ({value}) must be positive, or null where unknown")


def _choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; the choices are {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where a rank runs. ``cores``: the logical CPUs it may use; ``gpu``: the ``index`` of its GPU in the node."""

    rank: int
    cores: tuple[int, ...] | None = None
    socket: int | None = None
    numa: int | None = None
    gpu: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank ({self.rank}) must not be negative")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of a node. ``pci`` is its bus id, ``numa`` the NUMA domain it hangs on."""

    index: int
    name: str | None = None
    pci: str | None = None
    numa: int | None = None


@dataclass(frozen=True, kw_only=True)
class GpuLink:
    """The link between two GPUs of a node: NVLink (direct or through a switch), or the PCIe path as NVML names it."""

    a: int
    b: int
    kind: str
    gb_per_s: float | None = None

    def __post_init__(self) -> None:
        _choice("GPU link kind", self.kind, GPU_LINK_KINDS)
        _positive(gb_per_s=self.gb_per_s)


@dataclass(frozen=True, kw_only=True)
class NetworkDevice:
    """A network interface or InfiniBand device that is up. ``kind``: infiniband, roce or ethernet."""

    name: str
    kind: str | None = None
    gb_per_s: float | None = None
    numa: int | None = None

    def __post_init__(self) -> None:
        _positive(gb_per_s=self.gb_per_s)


@dataclass(frozen=True, kw_only=True)
class Node:
    """The ranks that share memory, and what their machine holds.

    Attributes:
        name: unique in the description.
        ranks: the ranks on the node.
        leaf: the network switch the node hangs on; ``above``: the switches above that one, top first.
        fabric: the NVLink domain that spans nodes, and ``fabric_gb_per_s`` of one GPU into it.
        sockets, numa_domains, cores: processor sockets, NUMA domains that have cores, physical cores.
    """

    name: str
    ranks: tuple[RankPlace, ...]
    leaf: str | None = None
    above: tuple[str, ...] = ()
    fabric: str | None = None
    fabric_gb_per_s: float | None = None
    sockets: int | None = None
    numa_domains: int | None = None
    cores: int | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_links: tuple[GpuLink, ...] = ()
    networks: tuple[NetworkDevice, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError(f"node {self.name} has no rank")
        _positive(fabric_gb_per_s=self.fabric_gb_per_s)
        if self.above and self.leaf is None:
            raise ValueError(f"node {self.name} names switches above ({', '.join(self.above)}) but no leaf")
        indices = [gpu.index for gpu in self.gpus]
        for twice, count in Counter(indices).items():
            if count > 1:
                raise ValueError(f"node {self.name} lists GPU {twice} {count} times")
        used = [(f"rank {r.rank}", r.gpu) for r in self.ranks if r.gpu is not None]
        used += [("a GPU link", end) for link in self.gpu_links for end in (link.a, link.b)]
        for who, gpu in used:
            if gpu not in indices:
                raise ValueError(f"{who} on node {self.name} names GPU {gpu}; the node has GPUs {indices}")

    @cached_property
    def gpu_link_of(self) -> dict[tuple[int, int], GpuLink]:
        """GPU links by their two ends, in both orders."""
        ends = {(link.a, link.b): link for link in self.gpu_links}
        return ends | {(b, a): link for (a, b), link in ends.items()}

    @property
    def switches(self) -> tuple[str, ...]:
        """The known switches over the node, top first: ``above``, then ``leaf``."""
        return (*self.above, self.leaf) if self.leaf is not None else ()


@dataclass(frozen=True, kw_only=True)
class LinkClass:
    """What a pair of ranks of this ``kind`` gets where it was not measured: given by hand or by a synthetic machine."""

    kind: str
    gb_per_s: float | None = None
    latency_us: float | None = None

    def __post_init__(self) -> None:
        _choice("link class", self.kind, KINDS[1:])
        _positive(gb_per_s=self.gb_per_s, latency_us=self.latency_us)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a ping-pong between ranks ``a`` < ``b`` gave."""

    a: int
    b: int
    gb_per_s: float | None = None
    latency_us: float | None = None

    def __post_init__(self) -> None:
        _positive(gb_per_s=self.gb_per_s, latency_us=self.latency_us)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between two ranks: its kind (one of ``KINDS``), its figures, and if this very pair was measured."""

    kind: str
    gb_per_s: float | None = None
    latency_us: float | None = None
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The machine under a job: every rank on exactly one node.

    Attributes:
        nodes: in the order of their lowest rank, as far as discovery builds it.
        classes: figures for pairs that were not measured.
        measured: what was measured, each pair once.
        origin: where the description comes from, in words.
        notes: what could not be found out, and why.

    Raises:
        ValueError: a rank twice or missing, two nodes of one name, a measurement of a rank that is not there.
    """

    nodes: tuple[Node, ...]
    classes: tuple[LinkClass, ...] = ()
    measured: tuple[Measurement, ...] = ()
    origin: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, count in Counter(node.name for node in self.nodes).items():
            if count > 1:
                raise ValueError(f"{count} nodes are called {name}")
        if not self.nodes:
            raise ValueError("a description needs at least one node")
        ranks = Counter(place.rank for node in self.nodes for place in node.ranks)
        for rank, count in sorted(ranks.items()):
            if count > 1:
                raise ValueError(f"rank {rank} is placed {count} times")
        missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
        if missing:
            raise ValueError(
                f"rank {missing[0]} is on no node, yet there is a rank {max(ranks)} ({self.world} ranks in all)"
            )
        for kind, count in Counter(entry.kind for entry in self.classes).items():
            if count > 1:
                raise ValueError(f"link class {kind} is given {count} times")
        seen = set()
        for m in self.measured:
            if not 0 <= m.a < m.b < self.world:
                raise ValueError(f"measured pair {m.a}-{m.b}: needs 0 <= a < b < ranks ({self.world})")
            if (m.a, m.b) in seen:
                raise ValueError(f"measured pair {m.a}-{m.b} is listed twice")
            seen.add((m.a, m.b))

    @cached_property
    def world(self) -> int:
        """Ranks in all."""
        return sum(len(node.ranks) for node in self.nodes)

    @cached_property
    def _places(self) -> dict[int, tuple[int, RankPlace]]:
        return {place.rank: (i, place) for i, node in enumerate(self.nodes) for place in node.ranks}

    @cached_property
    def _measured(self) -> dict[tuple[int, int], Measurement]:
        return {(m.a, m.b): m for m in self.measured}

    def node_of(self, rank: int) -> int:
        """The index in ``nodes`` of the node that holds ``rank``."""
        return self._places[rank][0]

    def place(self, rank: int) -> RankPlace:
        """Where ``rank`` runs."""
        return self._places[rank][1]

    def numa_of(self, rank: int) -> int | None:
        """The NUMA domain of a rank's cores or, where those span several, of its GPU."""
        index, place = self._places[rank]
        if place.numa is not None or place.gpu is None:
            return place.numa
        return next(gpu.numa for gpu in self.nodes[index].gpus if gpu.index == place.gpu)

    def kind(self, a: int, b: int) -> str:
        """What lies between two ranks: one of ``KINDS``."""
        if a == b:
            return "self"
        i, j = self.node_of(a), self.node_of(b)
        if i == j:
            numa = self.numa_of(a)
            return "numa" if numa is not None and numa == self.numa_of(b) else "node"
        one, two = self.nodes[i], self.nodes[j]
        if one.fabric is not None and one.fabric == two.fabric:
            return "fabric"
        if one.leaf is None or two.leaf is None:
            return "network"
        return "leaf" if one.leaf == two.leaf else "spine"

    @cached_property
    def figures(self) -> dict[str, LinkClass]:
        """Bandwidth and latency by kind of pair: the median of what was measured, else what ``classes`` says."""
        samples: dict[str, list[Measurement]] = defaultdict(list)
        for m in self.measured:
            samples[self.kind(m.a, m.b)].append(m)
        given = {entry.kind: entry for entry in self.classes}
        figures = {}
        for kind in KINDS[1:]:
            declared = given.get(kind, LinkClass(kind=kind))
            figures[kind] = LinkClass(
                kind=kind,
                gb_per_s=_median((m.gb_per_s for m in samples[kind]), declared.gb_per_s),
                latency_us=_median((m.latency_us for m in samples[kind]), declared.latency_us),
            )
        return figures

    def link(self, a: int, b: int) -> Link:
        """The link between two ranks as MPI sees it, in constant time: the pair's measurement, else the figure of its
        kind, else the GPUs' link; a figure that nobody knows is None."""
        kind = self.kind(a, b)
        if kind == "self":
            return Link(kind=kind)
        mine = self._measured.get((min(a, b), max(a, b)))
        by_kind = self.figures["node" if kind == "numa" and not _known(self.figures["numa"]) else kind]
        gpus = self.gpu_link(a, b)
        candidates = [mine.gb_per_s if mine else None, by_kind.gb_per_s, gpus.gb_per_s if gpus else None]
        latencies = [mine.latency_us if mine else None, by_kind.latency_us]
        return Link(
            kind=kind,
            gb_per_s=next((x for x in candidates if x is not None), None),
            latency_us=next((x for x in latencies if x is not None), None),
            measured=mine is not None and mine.gb_per_s is not None,
        )

    def gpu_link(self, a: int, b: int) -> GpuLink | None:
        """The link between the GPUs of two ranks: in their node, or through an NVLink domain that spans nodes.

        None where a rank has no GPU, both use one, or nothing is known of the path."""
        (i, one), (j, two) = self._places[a], self._places[b]
        if one.gpu is None or two.gpu is None:
            return None
        left, right = self.nodes[i], self.nodes[j]
        if i == j:
            return left.gpu_link_of.get((one.gpu, two.gpu))
        if left.fabric is None or left.fabric != right.fabric:
            return None
        speeds = [node.fabric_gb_per_s for node in (left, right)]
        known = [speed for speed in speeds if speed is not None]
        return GpuLink(a=one.gpu, b=two.gpu, kind="nvswitch", gb_per_s=min(known) if len(known) == 2 else None)

    def require(self, world: int) -> None:
        """Check that the description is of a job of ``world`` ranks.

        Raises:
            ValueError: it is not; both counts are named.
        """
        if world != self.world:
            raise ValueError(f"the topology describes {self.world} ranks, but {world} were launched")

    def to_json(self) -> str:
        """JSON text, one node or measurement a line; fields that are unknown or empty are left out."""
        head = {"format": FORMAT, "version": VERSION}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, value in codec.plain(self).items():
            if isinstance(value, list):
                items = ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in value)
                lines.append(f"  {json.dumps(key)}: [\n    {items}\n  ]")
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def from_json(text: str) -> Topology:
        """The description in a JSON text.

        Raises:
            ValueError: not JSON, another format, an unknown version, or bad data: one line that says where.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a topology: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not a topology: format is {found!r}, not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ValueError(f"topology version {data.get('version')!r} is unknown; this program reads {VERSION}")
        body: dict[str, Any] = {key: value for key, value in data.items() if key not in ("format", "version")}
        topology: Topology = codec.build(Topology, body, "topology")
        return topology

    @staticmethod
    def load(path: str | Path) -> Topology:
        """The description in a file; errors name the file.

        Raises:
            ValueError: the file cannot be read, or as :meth:`from_json`.
        """
        try:
            return Topology.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the description so that a reader sees all of it or none."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, target)


def _known(figure: LinkClass) -> bool:
    return figure.gb_per_s is not None or figure.latency_us is not None


def _median(values: Iterable[float | None], otherwise: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else otherwise
