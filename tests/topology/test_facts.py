# mypy: allow-untyped-calls
"""What ranks see of made-up hardware, and deciding over it."""

import sys
from types import SimpleNamespace

import pytest

from cpmpi.topology import leaves, nvml, sysfs
from cpmpi.topology.decide import NodeFacts, RankFacts, topology_of
from cpmpi.topology.leaves import SlurmPlace
from cpmpi.topology.node import NetworkDevice
from cpmpi.topology.nvml import GpuFacts


def write(root, **files):
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")


@pytest.fixture
def machine(tmp_path):
    """Two sockets of two cores with two threads each, an InfiniBand, a RoCE and an idle device, four interfaces."""
    for cpu in range(8):
        folder = f"devices/system/cpu/cpu{cpu}/topology"
        socket, core = cpu % 4 // 2, cpu % 2
        write(tmp_path, **{f"{folder}/physical_package_id": str(socket), f"{folder}/core_id": str(core)})
    write(tmp_path, **{"devices/system/node/node0/cpulist": "0-1,4-5", "devices/system/node/node1/cpulist": "2-3,6-7"})
    write(tmp_path, **{"devices/system/node/node2/cpulist": ""})  # memory without cores
    for name, state, layer, numa in [
        ("mlx5_0", "4: ACTIVE", "InfiniBand", "1"),
        ("mlx5_1", "4: ACTIVE", "Ethernet", "-1"),
        ("mlx5_2", "1: DOWN", "InfiniBand", "0"),
    ]:
        folder = f"class/infiniband/{name}"
        write(tmp_path, **{f"{folder}/ports/1/state": state, f"{folder}/ports/1/link_layer": layer})
        write(tmp_path, **{f"{folder}/ports/1/rate": "400 Gb/sec (4X NDR)", f"{folder}/device/numa_node": numa})
    (tmp_path / "class/infiniband/mlx5_0/device/net/ib0").mkdir(parents=True)
    for name, kind, state, speed in [
        ("ib0", "32", "up", "400000"),
        ("eth0", "1", "up", "25000"),
        ("eth1", "1", "down", "-1"),
        ("veth0", "1", "up", "10000"),
        ("lo", "772", "unknown", ""),
        ("br0", "1", "up", "10000"),
    ]:
        folder = f"class/net/{name}"
        write(tmp_path, **{f"{folder}/type": kind, f"{folder}/operstate": state, f"{folder}/speed": speed})
    write(tmp_path, **{"class/net/eth0/device/numa_node": "0", "class/net/br0/bridge/bridge_id": "1"})
    write(tmp_path, **{"bus/pci/devices/0000:1b:00.0/numa_node": "1", "bus/pci/devices/0000:1c:00.0/numa_node": "-1"})
    return tmp_path


def test_processors_by_socket_core_and_numa_domain(machine, tmp_path):
    found = sysfs.processors(machine)
    assert {cpu: found.numa_of[cpu] for cpu in (0, 5, 2, 7)} == {0: 0, 5: 0, 2: 1, 7: 1}
    assert found.socket_of[3] == 1
    assert len(set(found.core_of.values())) == 4
    nothing = sysfs.processors(tmp_path / "none")
    assert (nothing.numa_of, nothing.socket_of, nothing.core_of) == ({}, {}, {})


def test_network_devices_that_are_up(machine, tmp_path):
    assert sysfs.networks(machine) == (
        NetworkDevice(name="mlx5_0", kind="infiniband", gb_per_s=50, numa=1),
        NetworkDevice(name="mlx5_1", kind="roce", gb_per_s=50),
        NetworkDevice(name="eth0", kind="ethernet", gb_per_s=3.125, numa=0),
        NetworkDevice(name="veth0", kind="ethernet"),
    )
    assert sysfs.networks(tmp_path / "none") == ()


def test_numa_domain_of_a_pci_device(machine):
    assert sysfs.pci_numa("00000000:1B:00.0", machine) == 1
    assert sysfs.pci_numa("0000:1c:00.0", machine) is None
    assert sysfs.pci_numa("0000:99:00.0", machine) is None


class FakeNvml:
    """Four GPUs; 0-1 have four NVLinks, 2 and 3 hang on a switch; answers as pynvml does, in its mixed types."""

    NVML_NVLINK_MAX_LINKS = 6
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = 90

    class NVMLError(Exception):
        pass

    def __init__(self, **broken):
        self.broken = broken

    def __getattribute__(self, name):
        broken = object.__getattribute__(self, "__dict__").get("broken", {})
        if name in broken:
            raise broken[name]
        return object.__getattribute__(self, name)

    def nvmlInit(self):
        pass

    nvmlShutdown = nvmlInit

    def nvmlDeviceGetCount(self):
        return 4

    def nvmlDeviceGetHandleByIndex(self, i):
        return i

    def nvmlDeviceGetName(self, h):
        return b"NVIDIA Test"

    def nvmlDeviceGetUUID(self, h):
        return f"GPU-{h}aaa-bbb"

    def nvmlDeviceGetPciInfo(self, h):
        return SimpleNamespace(busId=f"00000000:{h + 1}b:00.0".encode())

    def nvmlDeviceGetNvLinkState(self, h, link):
        if link >= 4:
            raise self.NVMLError("not supported")
        return 1

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, h, link):
        return 0 if h < 2 else 2

    def nvmlDeviceGetNvLinkRemotePciInfo(self, h, link):
        return self.nvmlDeviceGetPciInfo(1 - h)

    def nvmlDeviceGetFieldValues(self, h, fields):
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=25000))]

    def nvmlDeviceGetTopologyCommonAncestor(self, a, b):
        return 50 if a // 2 != b // 2 else 20

    def nvmlDeviceGetMaxPcieLinkGeneration(self, h):
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, h):
        return 16


def seen_with(monkeypatch, fake):
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return nvml.gpus(notes.append), notes


UNKNOWN = sysfs.Processors(numa_of={}, socket_of={}, core_of={})


def test_gpus_and_their_links_become_a_node(monkeypatch):
    gpus, notes = seen_with(monkeypatch, FakeNvml())
    assert notes == []
    assert [gpu.name for gpu in gpus] == ["NVIDIA Test"] * 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ranks = tuple(RankFacts(rank=r, gpus=gpus, visible=nvml.visible(gpus)) for r in range(5))
    probe = NodeFacts(
        hostname="a", ranks=ranks, processors=UNKNOWN, slurm=SlurmPlace(), gpu_numa={"00000000:1B:00.0": 1}
    )
    node = topology_of([probe], None, ()).nodes[0]
    assert [place.gpu for place in node.ranks] == [0, 1, 2, 3, 0]
    assert [gpu.numa for gpu in node.gpus] == [1, None, None, None]
    links = {(link.a, link.b): (link.kind, link.gb_per_s) for link in node.gpu_links}
    assert links[0, 1] == ("nvlink", 100)
    assert links[2, 3] == ("nvswitch", 100)
    assert links[0, 2] == ("sys", 1.969 * 16)


def test_one_visible_gpu_each_is_put_together(monkeypatch):
    """A job step with one GPU per task: every rank sees another GPU as its first."""
    gpus, _ = seen_with(monkeypatch, FakeNvml())
    ranks = tuple(RankFacts(rank=r, gpus=(gpus[3 - r],), visible=(gpus[3 - r],)) for r in range(4))
    probe = NodeFacts(hostname="a", ranks=ranks, processors=UNKNOWN, slurm=SlurmPlace())
    node = topology_of([probe], None, ()).nodes[0]
    assert [place.gpu for place in node.ranks] == [3, 2, 1, 0]
    assert {link.kind for link in node.gpu_links} == {"nvlink", "nvswitch", "sys"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("GPU-1aaa,GPU-3aaa-bbb", [1, 3]),
        ("1,9,2", [1]),
        ("", []),
        ("MIG-1", None),
    ],
)
def test_visible_devices(monkeypatch, value, expected):
    gpus, _ = seen_with(monkeypatch, FakeNvml())
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    found = nvml.visible(gpus)
    assert (None if found is None else [gpu.index for gpu in found]) == expected


def test_nvml_that_is_broken_is_a_note_and_one_that_is_missing_is_not(monkeypatch):
    error = FakeNvml.NVMLError("Driver/library version\nmismatch")
    assert seen_with(monkeypatch, FakeNvml(nvmlInit=error)) == (
        (),
        ["NVML is installed but does not answer (NVMLError: Driver/library version mismatch): GPUs unknown"],
    )
    assert seen_with(monkeypatch, FakeNvml(nvmlDeviceGetCount=error))[0] == ()
    missing = type("NVMLError_LibraryNotFound", (Exception,), {})()
    assert seen_with(monkeypatch, FakeNvml(nvmlInit=missing)) == ((), [])
    assert seen_with(monkeypatch, None) == ((), [])  # import pynvml raises


def test_an_old_nvml_leaves_single_facts_unknown(monkeypatch):
    error = AttributeError("no such function")
    old = FakeNvml(nvmlDeviceGetNvLinkRemoteDeviceType=error, nvmlDeviceGetMaxPcieLinkWidth=error)
    gpus, notes = seen_with(monkeypatch, old)
    assert notes == []
    assert (gpus[0].nvlinks, gpus[0].pcie_gb_per_s, gpus[0].pcie_paths["00000000:2B:00.0"]) == ({}, None, "pxb")


def test_an_nvlink_domain_over_nodes():
    def gpu(pci):
        return GpuFacts(
            index=0, uuid=None, name=None, pci=pci, nvlinks={"": 18}, nvlink_gb_per_s=50.0, pcie_paths={},
            pcie_gb_per_s=None, fabric="cafe.1",
        )  # fmt: skip

    facts = [
        NodeFacts(
            hostname=f"n{i}",
            ranks=(RankFacts(rank=i, gpus=(gpu("a"),), visible=(gpu("a"),)),),
            processors=UNKNOWN,
            slurm=SlurmPlace(),
        )
        for i in range(2)
    ]
    topology = topology_of(facts, None, ())
    assert topology.kind(0, 1) == "fabric"
    link = topology.gpu_link(0, 1)
    assert link is not None
    assert link.gb_per_s == 900


def test_ranks_bound_to_cores_have_a_socket_and_a_numa_domain(machine):
    cpus = [(0, 4), (2, 3, 6, 7), (0, 2), None]
    ranks = tuple(RankFacts(rank=i, cpus=c) for i, c in enumerate(cpus))
    probe = NodeFacts(hostname="a.site", ranks=ranks, processors=sysfs.processors(machine), slurm=SlurmPlace())
    node = topology_of([probe], None, ()).nodes[0]
    assert [(p.numa, p.socket) for p in node.ranks] == [(0, 0), (1, 1), (None, None), (None, None)]
    assert (node.name, node.sockets, node.numa_domains, node.cores) == ("a", 2, 2, 4)


def test_node_names_are_unique():
    def named(*hosts):
        facts = [
            NodeFacts(hostname=h, ranks=(RankFacts(rank=i),), processors=UNKNOWN, slurm=SlurmPlace(), notes=("odd",))
            for i, h in enumerate(hosts)
        ]
        topology = topology_of(facts, None, ("first",))
        assert topology.notes[0] == "first"
        assert topology.notes[1] == f"{topology.nodes[0].name}: odd"
        return [node.name for node in topology.nodes]

    assert named("a.x", "b.x") == ["a", "b"]
    assert named("a.x", "a.y") == ["a.x", "a.y"]
    assert named("box", "box", "box") == ["box", "box#2", "box#3"]


def test_slurm_addresses():
    place = SlurmPlace(address="spine.leaf1.n1", pattern="switch.switch.node")
    assert place.switches("n1.cluster") == ("spine", "leaf1")
    assert place.switches("n2") is None  # mpirun handed on the variables of its own node
    assert SlurmPlace(address="n1", pattern="node").switches("n1") is None
    assert SlurmPlace(address="b1.n1", pattern="block.node").switches("n1") is None
    assert SlurmPlace().switches("n1") is None


def test_host_lists():
    assert leaves.expand("n[1-3,07],login,r[1-2]n[09-10]") == [
        "n1", "n2", "n3", "n07", "login", "r1n09", "r1n10", "r2n09", "r2n10",
    ]  # fmt: skip
    assert leaves.expand("") == []


SCONTROL = """SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n[1-2]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n[3-4]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=n[1-4] Switches=leaf[1-2]
"""


def test_switches_as_slurm_prints_them():
    over = leaves.parse(SCONTROL, "x")
    assert over["n3"] == ("spine", "leaf2")
    assert leaves.look_up(over, ["n1.site", "n4"], "x") == (("spine", "leaf1"), ("spine", "leaf2"))
    two_roots = leaves.parse(SCONTROL + "SwitchName=spine2 Switches=leaf[1-2] # second\n\n", "x")
    assert two_roots["n3"] == ("leaf2",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x: names no leaf switch"),
        ("Nodes=n1", "x: expected SwitchName=..., found 'Nodes=n1'"),
        ("SwitchName=a Nodes=n[1-x]", "x: bad host list in 'SwitchName=a Nodes=n\\[1-x\\]'"),
        ("SwitchName=a Nodes=n1\nSwitchName=b Nodes=n1", "x: node n1 is under two leaves, a and b"),
        (SCONTROL, "x: no switch for node n9 and 1 more; the file names n1, n2, n3, n4"),
    ],
)
def test_a_bad_leaf_file_is_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message):
        leaves.look_up(leaves.parse(text, "x"), ["n9", "n1", "n10"], "x")


def test_a_file_overrules_what_nodes_say_of_themselves():
    probe = NodeFacts(
        hostname="n1",
        ranks=(RankFacts(rank=0),),
        processors=UNKNOWN,
        slurm=SlurmPlace(address="s.l.n1", pattern="switch.switch.node"),
    )
    assert (topology_of([probe], None, ()).nodes[0].leaf, topology_of([probe], None, ()).nodes[0].above) == (
        "l",
        ("s",),
    )
    assert topology_of([probe], [("other",)], ()).nodes[0].switches == ("other",)
