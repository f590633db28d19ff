"""A description in a few lines, for logs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from cpmpi.topology.derive import node_order, rings, tree
from cpmpi.topology.describe import LinkClass, Topology
from cpmpi.topology.node import Node

T = TypeVar("T")
MOST = 8  # lines about one thing
SAID = {
    "numa": "between ranks in a NUMA domain",
    "node": "between ranks in a node",
    "fabric": "between nodes of an NVLink domain",
    "leaf": "between nodes under a leaf switch",
    "spine": "across leaves",
    "network": "between nodes",
}


def summary(topology: Topology) -> str:
    """A few lines however many nodes: what there is, what was measured, the ring and the tree that follow."""
    nodes = [topology.nodes[i] for i in node_order(topology)]
    leaves = {node.leaf for node in nodes if node.leaf is not None}
    head = [counted(topology.world, "rank"), counted(len(nodes), "node")]
    if leaves:
        head.append(counted(len(leaves), "leaf switch", "leaf switches"))
    lines = [f"topology: {', '.join(head)} ({(topology.origin or 'of unknown origin').partition(' (')[0]})"]
    order = {node.name: ring for node, ring in zip(topology.nodes, rings(topology))}
    alike: dict[str, list[Node]] = {}
    for node in nodes:
        alike.setdefault(_contents(node), []).append(node)
    for contents, members in _first(list(alike.items()), "kinds of node", lines):
        shown = list(dict.fromkeys(_ring(order[node.name]) for node in members))
        ring = f", ring {shown[0]}" if shown[0] else ""
        others = f" ({counted(len(shown) - 1, 'other order')} elsewhere)" if len(shown) > 1 else ""
        lines.append(f"  {folded([node.name for node in members])}: {contents}{ring}{others}")
    for leaf, under in _first(_by_leaf(nodes) if leaves else [], "leaves", lines):
        lines.append(f"  {leaf or 'leaf unknown'}: {folded(under)}")
    kinds = kinds_shown(topology)
    for kind, figure in topology.figures.items():
        if kind in kinds and (figure.gb_per_s is not None or figure.latency_us is not None):
            lines.append(f"  {SAID[kind]}: {_figures(figure)} ({how_known(topology, kind)})")
    if len(nodes) > 1:
        spanning = tree(topology)
        root = topology.nodes[spanning.root].name
        lines.append(f"  tree: root {root}, {counted(len(spanning.rounds()), 'round')}")
    return "\n".join([*lines, *(f"  note: {note}" for note in topology.notes)])


def kinds_shown(topology: Topology) -> set[str]:
    """The kinds of link that the rings and the tree go over; one of two that say the same."""
    spanning = tree(topology)
    pairs = [(spanning.leaders[a], spanning.leaders[b]) for a, b in spanning.edges]
    for ring in rings(topology):
        pairs += zip(ring, (*ring[1:], ring[0]))
    used = {topology.kind(a, b) for a, b in pairs}
    near, far = (topology.figures[kind] for kind in ("numa", "node"))
    same = (near.gb_per_s, near.latency_us) == (far.gb_per_s, far.latency_us)
    return used - {"numa"} if same and "node" in used else used


def how_known(topology: Topology, kind: str) -> str:
    """Where the figures of a kind of link come from, in words."""
    samples = [m for m in topology.measured if topology.kind(m.a, m.b) == kind]
    bounds = sum(m.at_most for m in samples)
    if not samples:
        return "given"
    words = f"median of {counted(len(samples), 'measured pair')}"
    if not bounds:
        return words
    return f"{words}, at most" if bounds == len(samples) else f"{words}, {bounds} of them at most"


def rate(gb_per_s: float | None) -> str:
    """A bandwidth in GB/s or, below one, MB/s."""
    if gb_per_s is None:
        return "? GB/s"
    return f"{gb_per_s * 1000:.3g} MB/s" if gb_per_s < 0.9995 else f"{gb_per_s:.3g} GB/s"


def lag(latency_us: float | None, micro: str = "us") -> str:
    """A latency in microseconds or, from a thousand on, milliseconds."""
    if latency_us is None:
        return f"? {micro}"
    return f"{latency_us / 1000:.3g} ms" if latency_us >= 999.5 else f"{latency_us:.3g} {micro}"


def folded(names: Sequence[str]) -> str:
    """Names with their runs of numbers folded: n1, n2, n3, x is ``n[1-3], x``."""
    runs: list[tuple[str, str, str]] = []  # stem, first number, last number
    for name in names:
        found = re.fullmatch(r"(.*?)(\d+)", name)
        stem, number = (found[1], found[2]) if found else (name, "")
        last = runs[-1] if runs else ("", "", "")
        follows = number and last[2] and int(number) == int(last[2]) + 1 and len(number) >= len(last[2])
        if last[0] == stem and follows and (len(number) == len(last[2]) or not number.startswith("0")):
            runs[-1] = (stem, last[1], number)
        else:
            runs.append((stem, number, number))
    return ", ".join(f"{s}{a}" if a == b else f"{s}[{a}-{b}]" for s, a, b in runs)


def _contents(node: Node) -> str:
    parts = [counted(len(node.ranks), "rank")]
    if node.gpus:
        parts.append(f"{counted(len(node.gpus), 'GPU')} {node.gpus[0].name or ''}".rstrip())
    if node.sockets:
        parts.append(counted(node.sockets, "socket"))
    if node.numa_domains:
        parts.append(counted(node.numa_domains, "NUMA domain"))
    if node.cores:
        parts.append(counted(node.cores, "core"))
    if node.networks:
        parts.append(f"network {folded([device.name for device in node.networks])}")
    return ", ".join(parts)


def _ring(ring: Sequence[int]) -> str:
    """The order of a ring in local ranks, so that like nodes read alike; nothing where there is no choice."""
    local = {rank: str(i) for i, rank in enumerate(sorted(ring))}
    shown = [local[rank] for rank in ring]
    return "" if len(ring) <= 2 else " ".join(shown if len(shown) <= 16 else [*shown[:15], "..."])


def _by_leaf(nodes: Sequence[Node]) -> list[tuple[str | None, list[str]]]:
    return [(leaf, [node.name for node in under]) for leaf, under in groupby(nodes, key=lambda node: node.leaf)]


def _first(items: Sequence[T], what: str, lines: list[str]) -> Iterator[T]:
    """The first items, and a line that counts the rest."""
    yield from items[:MOST]
    if len(items) > MOST:
        lines.append(f"  ... and {len(items) - MOST} more {what}")


def _figures(figure: LinkClass) -> str:
    return f"{rate(figure.gb_per_s)}, {lag(figure.latency_us)}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """How many of what: 1 rank, 2 ranks."""
    return f"{count} {one if count == 1 else many or one + 's'}"
