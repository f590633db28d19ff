"""One node of a description: its ranks, GPUs, network devices and switches. ``None`` always means *unknown*."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

GPU_LINK_KINDS = ("nvlink", "nvswitch", "pix", "pxb", "phb", "node", "sys")


def positive(**values: float | None) -> None:
    """Check figures: ValueError for one that is known and not a positive number."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} ({value}) must be positive, or null where unknown")


def choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Check a word: ValueError with the choices if it is none of them."""
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
        choice("GPU link kind", self.kind, GPU_LINK_KINDS)
        positive(gb_per_s=self.gb_per_s)


@dataclass(frozen=True, kw_only=True)
class NetworkDevice:
    """A network interface or InfiniBand device that is up. ``kind``: infiniband, roce or ethernet."""

    name: str
    kind: str | None = None
    gb_per_s: float | None = None
    numa: int | None = None

    def __post_init__(self) -> None:
        positive(gb_per_s=self.gb_per_s)


ABOUT = 0.8  # of a speed


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
        positive(fabric_gb_per_s=self.fabric_gb_per_s)
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
    def fast_networks(self) -> tuple[NetworkDevice, ...]:
        """The network devices that carry large messages: about as fast as the fastest, or one if no speed is known."""
        top = max((device.gb_per_s or 0.0 for device in self.networks), default=0.0)
        fast = tuple(device for device in self.networks if (device.gb_per_s or 0.0) >= ABOUT * top)
        return fast if top else fast[:1]

    @property
    def switches(self) -> tuple[str, ...]:
        """The known switches over the node, top first: ``above``, then ``leaf``."""
        return (*self.above, self.leaf) if self.leaf is not None else ()
