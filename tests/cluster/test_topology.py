"""Discovery and measurement on four nodes under two leaves with a slow uplink between them."""

import pytest

from cpmpi.topology.derive import rank_order, tree
from cpmpi.topology.describe import Topology

from .emulated import NODES, UPLINK_MBIT, Cluster

pytestmark = pytest.mark.cluster

DISCOVER = """
import sys, time
from mpi4py import MPI
from cpmpi.topology.discover import discover, require_match
comm = MPI.COMM_WORLD
comm.Barrier(); begin = time.perf_counter()
topology = discover(comm, measure=False, leaf_file=sys.argv[2] if len(sys.argv) > 2 else None)
comm.Barrier(); looked = time.perf_counter()
for _ in range(3):  # a machine that stalls for a moment may make an exchange late, which the notes tell
    comm.Barrier(); middle = time.perf_counter()
    topology = discover(comm, leaf_file=sys.argv[2] if len(sys.argv) > 2 else None)
    comm.Barrier(); end = time.perf_counter()
    if not topology.notes:
        break
require_match(comm, topology)
assert len(set(comm.allgather(topology.to_json()))) == 1
if comm.rank == 0:
    topology.save(sys.argv[1])
    print("TIMES", looked - begin, end - middle)
"""


def check(topology: Topology) -> None:
    assert [(node.name, node.leaf) for node in topology.nodes] == list(zip(NODES, ["leaf1", "leaf1", "leaf2", "leaf2"]))
    assert [[place.rank for place in node.ranks] for node in topology.nodes] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.notes == ()
    assert rank_order(topology) == tuple(range(8))

    crossings = [(a, b) for a, b in tree(topology).edges if topology.nodes[a].leaf != topology.nodes[b].leaf]
    assert crossings == [(2, 0)]
    assert len(tree(topology).rounds()) == 2

    spine = [m for m in topology.measured if topology.kind(m.a, m.b) == "spine"]
    assert [(m.a, m.b) for m in spine] == [(0, 4)]
    set_gb_per_s = UPLINK_MBIT / 8000
    uplink, leaf, node = (rate(topology, *kinds) for kinds in (("spine",), ("leaf",), ("numa", "node")))
    assert 0.75 < uplink / set_gb_per_s < 1.1, f"uplink {uplink} GB/s, set {set_gb_per_s}"
    assert uplink < leaf < node


def rate(topology: Topology, *kinds: str) -> float:
    return max(topology.figures[kind].gb_per_s or 0 for kind in kinds)


def times(output: str) -> tuple[float, float]:
    words = next(line for line in output.splitlines() if line.startswith("TIMES")).split()
    return float(words[1]), float(words[2])


def test_mpirun_with_a_leaf_file(cluster: Cluster, tmp_path, capsys):
    out = cluster.mpirun("-m", "mpi4py", "-c", DISCOVER, str(tmp_path / "topology.json"), str(cluster.leaf_file))
    look_s, measured_s = times(out)
    topology = Topology.load(tmp_path / "topology.json")
    check(topology)
    with capsys.disabled():
        shown = {kind: figure.gb_per_s for kind, figure in topology.figures.items() if figure.gb_per_s}
        print(f"\ndiscovery {look_s:.2f} s, with measurement {measured_s:.2f} s; GB/s: {shown}")


def test_slurm_tells_the_leaves(slurm_cluster: Cluster, tmp_path):
    slurm_cluster.srun("-m", "mpi4py", "-c", DISCOVER, str(tmp_path / "topology.json"))
    check(Topology.load(tmp_path / "topology.json"))


def test_mpirun_without_a_word_about_leaves(cluster: Cluster, tmp_path):
    cluster.mpirun("-m", "cpmpi", "topology", "--json", str(tmp_path / "topology.json"))
    topology = Topology.load(tmp_path / "topology.json")
    assert [node.leaf for node in topology.nodes] == [None] * 4
    assert {topology.kind(m.a, m.b) for m in topology.measured} <= {"numa", "node", "network"}
    assert tree(topology).parent == (None, 0, 0, 2)


def test_a_leaf_file_without_a_node_ends_in_one_line(cluster: Cluster, tmp_path):
    short = tmp_path / "topology.conf"
    short.write_text("SwitchName=leaf1 Nodes=n[1-3]\n")
    with pytest.raises(RuntimeError) as failure:
        cluster.mpirun("-m", "cpmpi", "topology", "--leaf-file", str(short))
    lines = [line for line in str(failure.value).splitlines() if line.startswith("error:")]
    assert lines == [f"error: {short}: no switch for node n4; the file names n1, n2, n3"]
