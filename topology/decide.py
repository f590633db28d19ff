"""From what the ranks saw to a description: pure functions over plain data, no hardware, no MPI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from cpmpi.topology.describe import Topology
from cpmpi.topology.leaves import SlurmPlace, short
from cpmpi.topology.node import Gpu, GpuLink, NetworkDevice, Node, RankPlace
from cpmpi.topology.nvml import GpuFacts
from cpmpi.topology.sysfs import Processors


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank saw of itself.

    Attributes:
        cpus: the logical CPUs it may run on, None if unknown.
        gpus: all GPUs that it can see; ``visible``: those it may use, in order, None if unknown.
        notes: what it could not find out.
    """

    rank: int
    cpus: tuple[int, ...] | None = None
    gpus: tuple[GpuFacts, ...] = ()
    visible: tuple[GpuFacts, ...] | None = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What the ranks that share memory saw, put together by the lowest of them.

    Attributes:
        gpu_numa: the NUMA domain of each GPU by bus id, None if unknown.
        notes: what could not be found out.
    """

    hostname: str
    ranks: tuple[RankFacts, ...]
    processors: Processors
    networks: tuple[NetworkDevice, ...] = ()
    gpu_numa: dict[str, int | None] | None = None
    slurm: SlurmPlace
    notes: tuple[str, ...] = ()


def topology_of(
    facts: Sequence[NodeFacts], switches: Sequence[tuple[str, ...]] | None, notes: Sequence[str]
) -> Topology:
    """The description of the machine.

    Args:
        facts: one per shared-memory group.
        switches: the switches over each node, top first, as a file or ``scontrol`` gave them; None to take each
            node's own word (``SLURM_TOPOLOGY_ADDR``).
        notes: what is already known to be unknown.
    """
    order = sorted(range(len(facts)), key=lambda i: min(r.rank for r in facts[i].ranks))
    names = _names([node.hostname for node in facts])
    nodes = []
    for i in order:
        own = facts[i].slurm.switches(facts[i].hostname) or ()
        path = switches[i] if switches is not None else own
        node = node_from(names[i], facts[i])
        nodes.append(replace(node, leaf=path[-1], above=path[:-1]) if path else node)
    said = []
    for i in order:
        of_node = [*facts[i].notes, *(note for rank in facts[i].ranks for note in rank.notes)]
        said += [f"{names[i]}: {note}" for note in of_node]
    return Topology(nodes=tuple(nodes), origin="discovered", notes=tuple(dict.fromkeys([*notes, *said])))


def node_from(name: str, node: NodeFacts) -> Node:
    """One node, its switches left unknown.

    Several ranks of a node may see different GPUs (a job step with one GPU per task): the node has the union, in bus
    order. A rank that may use several GPUs takes the one at its local rank modulo their number.
    """
    gpu_facts = {gpu.pci: gpu for rank in node.ranks for gpu in rank.gpus if gpu.pci is not None}
    pcis = sorted(gpu_facts)
    index_of = {pci: i for i, pci in enumerate(pcis)}
    numa = node.gpu_numa or {}
    places = []
    for local, rank in enumerate(sorted(node.ranks, key=lambda r: r.rank)):
        mine = rank.visible[local % len(rank.visible)] if rank.visible else None
        places.append(
            RankPlace(
                rank=rank.rank,
                cores=rank.cpus,
                socket=_common(rank.cpus, node.processors.socket_of),
                numa=_common(rank.cpus, node.processors.numa_of),
                gpu=index_of.get(mine.pci) if mine is not None and mine.pci is not None else None,
            )
        )
    fabrics = {gpu.fabric for gpu in gpu_facts.values()}
    fabric = fabrics.pop() if len(fabrics) == 1 else None
    speeds = [_switched(gpu) for gpu in gpu_facts.values()]
    return Node(
        name=name,
        ranks=tuple(places),
        fabric=fabric,
        fabric_gb_per_s=min((s for s in speeds if s is not None), default=None) if fabric else None,
        sockets=len(set(node.processors.socket_of.values())) or None,
        numa_domains=len(set(node.processors.numa_of.values())) or None,
        cores=len(set(node.processors.core_of.values())) or None,
        gpus=tuple(Gpu(index=i, name=gpu_facts[p].name, pci=p, numa=numa.get(p)) for i, p in enumerate(pcis)),
        gpu_links=tuple(
            link
            for a, b in combinations(range(len(pcis)), 2)
            if (link := _gpu_link(a, b, gpu_facts[pcis[a]], gpu_facts[pcis[b]])) is not None
        ),
        networks=node.networks,
    )


def _gpu_link(a: int, b: int, one: GpuFacts, two: GpuFacts) -> GpuLink | None:
    """Direct NVLinks before a switch before PCIe; None if nobody saw a path."""
    direct = one.nvlinks.get(two.pci or "?", 0)
    if direct:
        speed = one.nvlink_gb_per_s
        return GpuLink(a=a, b=b, kind="nvlink", gb_per_s=direct * speed if speed else None)
    if one.nvlinks.get("") and two.nvlinks.get(""):
        return GpuLink(a=a, b=b, kind="nvswitch", gb_per_s=_least(_switched(one), _switched(two)))
    path = one.pcie_paths.get(two.pci or "?")
    return GpuLink(a=a, b=b, kind=path, gb_per_s=_least(one.pcie_gb_per_s, two.pcie_gb_per_s)) if path else None


def _switched(gpu: GpuFacts) -> float | None:
    """GB/s of one GPU into its NVSwitches."""
    links = gpu.nvlinks.get("", 0)
    return links * gpu.nvlink_gb_per_s if links and gpu.nvlink_gb_per_s else None


def _least(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else min(one, two)


def _common(cpus: tuple[int, ...] | None, group_of: dict[int, int]) -> int | None:
    """The one group that holds all ``cpus``; None if they span several or it is unknown."""
    groups = {group_of.get(cpu) for cpu in cpus or ()}
    return groups.pop() if len(groups) == 1 else None


def _names(hostnames: Sequence[str]) -> list[str]:
    """Unique node names: host names without their domain, in full where that is not enough, numbered as a last resort
    (containers may all have one host name)."""
    shorts = [short(name) for name in hostnames]
    names = shorts if len(set(shorts)) == len(shorts) else list(hostnames)
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
