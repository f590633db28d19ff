"""What public sources say about machines that descriptions can be generated for.

Bandwidths are of one direction: half of the figure where a data sheet adds both up. GPU latencies are those that NCCL
plans with for a ring with its Simple protocol (``hwLat`` in its ``src/graph/tuning.cc``): NVLink 3.4 us, PCIe 5.7 us,
network 14 us.
"""

from __future__ import annotations

from dataclasses import dataclass

NVLINK_US, PCIE_US, NETWORK_US = 3.4, 5.7, 14.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of node.

    Attributes:
        source: where the figures come from.
        sockets, numa_domains, cores: processor sockets, NUMA domains with cores, physical cores of a node.
        gpus: GPUs of a node, spread evenly over the first ``gpu_numas`` NUMA domains.
        nvlink_groups: GPUs that reach each other by NVLink; others by PCIe.
        nvlink_kind: ``nvlink`` or ``nvswitch``, at ``nvlink_gb_per_s`` for a pair.
        pcie_gb_per_s: between two GPUs without NVLink.
        networks: NUMA domain of each network device by name, each ``network_gb_per_s`` fast.
        fabric_nodes: how many nodes one NVLink domain spans.
        leaf_nodes: nodes under one leaf switch where nothing else is asked for.
        ranks: ranks on a node without GPUs where nothing else is asked for.
        classes: (GB/s, latency in us) by kind of pair, for what GPU links do not tell.
    """

    source: str
    sockets: int
    numa_domains: int
    cores: int
    gpus: int = 0
    gpu_name: str | None = None
    gpu_numas: int = 2
    nvlink_groups: tuple[tuple[int, ...], ...] = ()
    nvlink_kind: str = "nvlink"
    nvlink_gb_per_s: float | None = None
    pcie_gb_per_s: float | None = None
    networks: tuple[tuple[str, int], ...] = ()
    network_kind: str = "infiniband"
    network_gb_per_s: float
    fabric_nodes: int = 1
    leaf_nodes: int
    ranks: int = 1
    classes: tuple[tuple[str, float, float], ...]


MACHINES = {
    "dgx-h100": Machine(
        source="NVIDIA DGX H100 user guide: 18 NVLinks of 25 GB/s a GPU through NVSwitch, 8 ConnectX-7 at 400 Gb/s, "
        "their place by table 6, 32 nodes to a scalable unit",
        sockets=2,
        numa_domains=2,
        cores=112,
        gpus=8,
        gpu_name="NVIDIA H100 80GB HBM3",
        nvlink_groups=(tuple(range(8)),),
        nvlink_kind="nvswitch",
        nvlink_gb_per_s=450,
        networks=tuple((f"mlx5_{i}", 0 if i < 6 else 1) for i in (0, 3, 4, 5, 6, 9, 10, 11)),
        network_gb_per_s=50,
        leaf_nodes=32,
        classes=(("node", 450, NVLINK_US), ("leaf", 50, NETWORK_US), ("spine", 50, NETWORK_US)),
    ),
    "a100-pcie-4": Machine(
        source="NVIDIA A100 PCIe product brief: a bridged pair has 12 NVLinks of 25 GB/s, PCIe 4.0 x16 otherwise; two "
        "AMD EPYC 7543; one ConnectX-6 at 200 Gb/s",
        sockets=2,
        numa_domains=2,
        cores=64,
        gpus=4,
        gpu_name="NVIDIA A100 80GB PCIe",
        nvlink_groups=((0, 1), (2, 3)),
        nvlink_gb_per_s=300,
        pcie_gb_per_s=31.5,
        networks=(("mlx5_0", 1),),
        network_gb_per_s=25,
        leaf_nodes=20,
        classes=(("node", 31.5, PCIE_US), ("leaf", 25, NETWORK_US), ("spine", 25, NETWORK_US)),
    ),
    "gb200-nvl72": Machine(
        source="NVIDIA GB200 NVL72 and its multi-node tuning guide: 18 trays of 4 GPUs and 2 Grace processors in one "
        "NVLink domain, 1.8 TB/s a GPU both ways, a ConnectX-7 at 400 Gb/s for each GPU",
        sockets=2,
        numa_domains=2,
        cores=144,
        gpus=4,
        gpu_name="NVIDIA GB200",
        nvlink_groups=(tuple(range(4)),),
        nvlink_kind="nvswitch",
        nvlink_gb_per_s=900,
        networks=tuple((f"mlx5_{i}", i // 2) for i in range(4)),
        network_gb_per_s=50,
        fabric_nodes=18,
        leaf_nodes=18,
        classes=(
            ("node", 900, NVLINK_US),
            ("fabric", 900, NVLINK_US),
            ("leaf", 50, NETWORK_US),
            ("spine", 50, NETWORK_US),
        ),
    ),
    "cpu-2s": Machine(
        source="LUMI-C: two AMD EPYC 7763 of 64 cores, 4 NUMA domains each, Slingshot at 200 Gb/s with 1.6 us expected "
        "by its regression tests; within a node what cpmpi itself measures between two ranks, 5 GB/s and 3.5 us",
        sockets=2,
        numa_domains=8,
        cores=128,
        networks=(("hsn0", 3),),
        network_kind="ethernet",
        network_gb_per_s=25,
        leaf_nodes=16,
        ranks=8,
        classes=(("node", 5, 3.5), ("leaf", 25, 1.6), ("spine", 25, 1.6)),
    ),
}
