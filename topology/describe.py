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
from cpmpi.topology.node import GpuLink, RankPlace, choice, positive
from cpmpi.topology.node import Node as Node

FORMAT = "cpmpi-topology"
VERSION = 1

# What lies between two ranks, nearest first: the same rank; the same NUMA domain; the same node; one NVLink domain
# over several nodes; one leaf switch; different leaf switches; a network of which at least one leaf is unknown.
LINK_KINDS = ("self", "numa", "node", "fabric", "leaf", "spine", "network")


class UnknownBandwidthError(ValueError):
    """A bandwidth that somebody needs was neither measured nor given."""


@dataclass(frozen=True, kw_only=True)
class LinkClass:
    """What a pair of ranks of this ``kind`` gets where it was not measured: given by hand or by a synthetic machine."""

    kind: str
    gb_per_s: float | None = None
    latency_us: float | None = None

    def __post_init__(self) -> None:
        choice("link class", self.kind, LINK_KINDS[1:])
        positive(gb_per_s=self.gb_per_s, latency_us=self.latency_us)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What ranks ``a`` < ``b`` got talking with each other; bandwidth one way, with as much the other way.

    ``at_most``: the time ran out while bytes were under way, and ``gb_per_s`` is what the link had at most.
    """

    a: int
    b: int
    gb_per_s: float | None = None
    latency_us: float | None = None
    at_most: bool = False

    def __post_init__(self) -> None:
        positive(gb_per_s=self.gb_per_s, latency_us=self.latency_us)
        if self.at_most and self.gb_per_s is None:
            raise ValueError("at_most needs gb_per_s: a bound of what?")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between two ranks: its kind (one of ``LINK_KINDS``), its figures, and whether it was measured."""

    kind: str
    gb_per_s: float | None = None
    latency_us: float | None = None
    measured: bool = False
    at_most: bool = False


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
        missing = next((rank for rank in range(self.world) if rank not in ranks), None)
        if missing is not None:
            raise ValueError(
                f"rank {missing} is on no node, yet there is a rank {max(ranks)} ({self.world} ranks in all)"
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
        """What lies between two ranks: one of ``LINK_KINDS``."""
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
    def _medians(self) -> dict[str, LinkClass]:
        samples: dict[str, list[Measurement]] = defaultdict(list)
        for m in self.measured:
            samples[self.kind(m.a, m.b)].append(m)
        return {
            kind: LinkClass(
                kind=kind,
                gb_per_s=_median(m.gb_per_s for m in found),
                latency_us=_median(m.latency_us for m in found),
            )
            for kind, found in samples.items()
        }

    @cached_property
    def _given(self) -> dict[str, LinkClass]:
        return {entry.kind: entry for entry in self.classes}

    @cached_property
    def figures(self) -> dict[str, LinkClass]:
        """Bandwidth and latency by kind of pair: the median of what was measured, else what ``classes`` says.

        Where nothing is known of pairs in one NUMA domain, they get the figures of pairs in a node."""
        figures = {}
        for kind in LINK_KINDS[1:]:
            near = (kind, "node") if kind == "numa" else (kind,)
            sources = [table[k] for table in (self._medians, self._given) for k in near if k in table]
            figures[kind] = LinkClass(
                kind=kind,
                gb_per_s=_first(source.gb_per_s for source in sources),
                latency_us=_first(source.latency_us for source in sources),
            )
        return figures

    def link(self, a: int, b: int) -> Link:
        """The link between two ranks as messages see it, in constant time: what was measured of the pair, if only as an
        upper bound, else the median of what was measured of its kind (bounds among it: without them it would be too
        high), else the link between their GPUs, else what ``classes`` says.

        A figure that nobody knows is None."""
        kind = self.kind(a, b)
        if kind == "self":
            return Link(kind=kind)
        mine, figure = self._measured.get((min(a, b), max(a, b))), self.figures[kind]
        gpus = None if kind in self._medians else self.gpu_link(a, b)
        return Link(
            kind=kind,
            gb_per_s=_first((mine.gb_per_s if mine else None, gpus.gb_per_s if gpus else None, figure.gb_per_s)),
            latency_us=_first((mine.latency_us if mine else None, figure.latency_us)),
            measured=mine is not None and mine.gb_per_s is not None,
            at_most=mine is not None and mine.at_most,
        )

    def known_link(self, a: int, b: int) -> tuple[float, float]:
        """Bandwidth (bytes/s) and latency (s, 0 where nobody knows it) between two ranks, as :meth:`link` has them.

        Raises:
            UnknownBandwidthError: nobody knows the bandwidth.
        """
        link = self.link(a, b)
        if link.gb_per_s is None:
            raise UnknownBandwidthError(
                f"the bandwidth between ranks {a} and {b} ({link.kind}) is unknown: measure it, or give a link class"
            )
        return link.gb_per_s * 1e9, (link.latency_us or 0.0) * 1e-6

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


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)
