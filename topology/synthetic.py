"""Descriptions of machines that are not at hand, for planning: ``nodes=128,gpus=8,leaf=16,machine=dgx-h100``."""

from __future__ import annotations

from itertools import combinations

from cpmpi.topology.describe import LINK_KINDS, LinkClass, Topology
from cpmpi.topology.machines import MACHINES, Machine
from cpmpi.topology.node import Gpu, GpuLink, NetworkDevice, Node, RankPlace

KEYS = {
    "machine": f"one of {', '.join(MACHINES)}; dgx-h100 with gpus, cpu-2s without",
    "nodes": "how many",
    "gpus": "GPUs used on each node, a rank each",
    "ranks": "ranks on each node, or on one node after the other: 3/8/1/8/2",
    "leaf": "nodes under one leaf switch",
    "taper": "how many times slower than a node's link its share of the leaf uplink is",
}
FIGURES = tuple(f"{kind}_{unit}" for kind in LINK_KINDS[1:] for unit in ("gb_per_s", "latency_us"))


def synthetic(spec: str) -> Topology:
    """The description of a machine that is not at hand.

    Args:
        spec: ``key=value`` pairs with commas between them. Keys: ``machine``, ``nodes``, ``gpus`` or ``ranks`` of each
            node, ``leaf`` (nodes under a leaf switch), ``taper`` (oversubscription of the leaf uplinks), and any
            figure to put in the place of a built-in one, such as ``spine_gb_per_s=12.5`` or ``leaf_latency_us=3``.

    Raises:
        ValueError: an unknown key or machine, or a number out of range; the choices are named.
    """
    words = _words(spec)
    name = words.get("machine", "cpu-2s" if "gpus" not in words else "dgx-h100")
    if name not in MACHINES:
        raise ValueError(f"machine {name!r} is unknown; the choices are {', '.join(MACHINES)}")
    machine = MACHINES[name]
    ranks = _ranks(words, machine, name)
    leaf = _count(words, "leaf", machine.leaf_nodes)
    taper = _figure("taper", words.get("taper", "1"))
    classes: dict[str, list[float | None]] = {kind: [rate, latency] for kind, rate, latency in machine.classes}
    classes["spine"][0] = machine.network_gb_per_s / taper
    for figure in FIGURES:
        if figure in words:
            kind, unit = figure.split("_", 1)
            classes.setdefault(kind, [None, None])[unit == "latency_us"] = _figure(figure, words[figure])
    first, nodes = 0, []
    for i, count in enumerate(ranks):
        nodes.append(_node(machine, i, len(ranks), first, count, leaf))
        first += count
    return Topology(
        nodes=tuple(nodes),
        classes=tuple(LinkClass(kind=k, gb_per_s=rate, latency_us=latency) for k, (rate, latency) in classes.items()),
        origin=f"synthetic: {spec} ({machine.source})",
    )


def _node(machine: Machine, index: int, nodes: int, first: int, ranks: int, leaf: int) -> Node:
    gpus = tuple(
        Gpu(index=g, name=machine.gpu_name, numa=g * machine.gpu_numas // machine.gpus) for g in range(machine.gpus)
    )
    places = []
    for local in range(ranks):
        cores = _cores(machine, local, ranks)
        places.append(
            RankPlace(
                rank=first + local,
                cores=cores,
                socket=_only({core * machine.sockets // machine.cores for core in cores}),
                numa=_only({core * machine.numa_domains // machine.cores for core in cores}),
                gpu=local if gpus else None,
            )
        )
    leaves = -(-nodes // leaf)
    digits = len(str(nodes))
    spans = machine.fabric_nodes > 1
    return Node(
        name=f"n{index + 1:0{digits}}",
        ranks=tuple(places),
        leaf=f"leaf{index // leaf + 1:0{len(str(leaves))}}",
        fabric=f"rack{index // machine.fabric_nodes + 1}" if spans else None,
        fabric_gb_per_s=machine.nvlink_gb_per_s if spans else None,
        sockets=machine.sockets,
        numa_domains=machine.numa_domains,
        cores=machine.cores,
        gpus=gpus,
        gpu_links=tuple(_gpu_link(machine, a, b) for a, b in combinations(range(machine.gpus), 2)),
        networks=tuple(
            NetworkDevice(name=name, kind=machine.network_kind, gb_per_s=machine.network_gb_per_s, numa=numa)
            for name, numa in machine.networks
        ),
    )


def _cores(machine: Machine, local: int, ranks: int) -> tuple[int, ...]:
    """An even share of the node's cores; with GPUs, of those in the GPU's NUMA domain."""
    low, cores = 0, machine.cores
    if machine.gpus:
        ranks = machine.gpus // machine.gpu_numas
        cores //= machine.gpu_numas
        low, local = local // ranks * cores, local % ranks
    return tuple(range(low + local * cores // ranks, low + (local + 1) * cores // ranks))


def _only(found: set[int]) -> int | None:
    return found.pop() if len(found) == 1 else None


def _gpu_link(machine: Machine, a: int, b: int) -> GpuLink:
    if any(a in group and b in group for group in machine.nvlink_groups):
        return GpuLink(a=a, b=b, kind=machine.nvlink_kind, gb_per_s=machine.nvlink_gb_per_s)
    same = a * machine.gpu_numas // machine.gpus == b * machine.gpu_numas // machine.gpus
    return GpuLink(a=a, b=b, kind="node" if same else "sys", gb_per_s=machine.pcie_gb_per_s)


def _words(spec: str) -> dict[str, str]:
    words: dict[str, str] = {}
    for word in filter(None, (part.strip() for part in spec.split(","))):
        key, equals, value = word.partition("=")
        if key not in KEYS and key not in FIGURES:
            raise ValueError(
                f"unknown key {key!r} in {spec!r}; the keys are {', '.join(KEYS)} and {', '.join(FIGURES)}"
            )
        if not equals or not value or key in words:
            raise ValueError(f"expected {key}=VALUE once in {spec!r}")
        words[key] = value
    return words


def _ranks(words: dict[str, str], machine: Machine, name: str) -> list[int]:
    """Ranks of each node."""
    if "gpus" in words and "ranks" in words:
        raise ValueError("give gpus (a rank each) or ranks, not both")
    if "/" in words.get("ranks", ""):
        counts = [_whole("ranks", part) for part in words["ranks"].split("/")]
        if "nodes" in words and _whole("nodes", words["nodes"]) != len(counts):
            raise ValueError(f"nodes ({words['nodes']}) differs from the {len(counts)} nodes of ranks={words['ranks']}")
    else:
        each = _count(words, "gpus", _count(words, "ranks", machine.gpus or machine.ranks))
        counts = [each] * _count(words, "nodes", 1)
    if "gpus" in words and not machine.gpus:
        raise ValueError(f"{name} has no GPUs; give ranks")
    if machine.gpus and max(counts) > machine.gpus:
        raise ValueError(f"{max(counts)} ranks a node, but {name} has {machine.gpus} GPUs")
    if max(counts) > machine.cores:
        raise ValueError(f"{max(counts)} ranks a node, but {name} has {machine.cores} cores")
    return counts


def _count(words: dict[str, str], key: str, otherwise: int) -> int:
    return _whole(key, words[key]) if key in words else otherwise


def _whole(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{key} ({text}) must be a whole number of at least 1")
    return int(text)


def _figure(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{key} ({text}) must be a positive number")
    return value
