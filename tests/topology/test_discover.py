# mypy: allow-untyped-calls
"""Discovery and measurement on real ranks of this machine."""

from dataclasses import replace

import pytest

from cpmpi.topology.describe import Topology
from cpmpi.topology.synthetic import synthetic


@pytest.mark.mpi(6)
def test_discovery_is_the_same_everywhere_and_measures_all_pairs_of_a_node():
    from mpi4py import MPI

    from cpmpi.topology.discover import discover, require_match
    from cpmpi.topology.measure import measure

    comm = MPI.COMM_WORLD
    bare = discover(comm, measure=False)
    assert (bare.world, len(bare.nodes), bare.measured) == (6, 1, ())
    assert all(place.cores for place in bare.nodes[0].ranks)

    topology = measure(comm, bare)
    assert len(set(comm.allgather(topology.to_json()))) == 1
    assert Topology.from_json(topology.to_json()) == topology
    assert [(m.a, m.b) for m in topology.measured] == [(a, b) for a in range(6) for b in range(a + 1, 6)]
    assert all((m.gb_per_s or 0) > 0.05 and 0 < (m.latency_us or 0) < 1e5 for m in topology.measured)
    assert topology.notes == ()

    again = measure(comm, topology)  # on demand: fresh figures in place of the old ones
    assert len(again.measured) == 15
    require_match(comm, topology)


@pytest.mark.mpi(4)
def test_a_description_of_other_ranks_is_refused():
    from mpi4py import MPI

    from cpmpi.topology.discover import require_match, shared_groups

    comm = MPI.COMM_WORLD
    assert shared_groups(comm) == ((0, 1, 2, 3),)
    with pytest.raises(ValueError, match="describes 2 nodes, but ranks were launched on 1"):
        require_match(comm, synthetic("ranks=1/3,leaf=1"))
    with pytest.raises(ValueError, match="the topology describes 6 ranks, but 4 were launched"):
        require_match(comm, synthetic("nodes=1,ranks=6"))


class FakeTalk:
    """A conversation over a wire of known latency and rate, on a clock of its own; each size is slow the first time."""

    def __init__(self, latency_s, bytes_per_s, stuck_at=None):
        self.latency_s, self.bytes_per_s, self.stuck_at = latency_s, bytes_per_s, stuck_at
        self.now, self.sizes, self.finished = 100.0, [], False

    def perf_counter(self):
        return self.now

    def trips(self, size, count, *, both_ways=False):
        if size == self.stuck_at:
            from cpmpi.topology.measure import StuckError

            raise StuckError(7, 0.001)
        first = both_ways and size not in self.sizes
        self.sizes.append(size)
        one = size / self.bytes_per_s if both_ways else 2 * self.latency_s
        seconds = [one * (1.5 if first else 1.0)] * count
        self.now += sum(seconds)
        return seconds

    def finish(self):
        self.finished = True


def test_latency_and_bandwidth_of_a_known_wire(monkeypatch):
    """Latency is half a round trip; bandwidth is that of one way; the first exchange of a size only warms up."""
    from cpmpi.topology import measure

    def led(budget_s, **wire):
        talk = FakeTalk(**wire)
        monkeypatch.setattr(measure, "time", talk)
        return measure.lead(talk, budget_s), talk

    found, talk = led(1.0, latency_s=3e-6, bytes_per_s=5e9)
    assert found.gb_per_s == pytest.approx(5.0, rel=1e-12)
    assert found.latency_us == pytest.approx(3.0, rel=1e-12)
    assert not found.at_most
    assert talk.finished
    assert [s for s in talk.sizes if s > measure.SMALL] == [*measure.SIZES, measure.SIZES[-1]]
    assert talk.now < 101.0
    # 256 KiB take 31 ms the first time, and four times that is not left.
    slow, talk = led(0.2, latency_s=1e-3, bytes_per_s=12.5e6)
    assert slow.gb_per_s == pytest.approx(0.0125, rel=1e-12)
    assert slow.latency_us == pytest.approx(1000.0, rel=1e-12)
    assert max(talk.sizes) == 256 << 10
    assert talk.now < 100.2 + measure.GRACE_S
    stuck, talk = led(1.0, latency_s=3e-6, bytes_per_s=5e9, stuck_at=1 << 20)
    assert stuck == (0.001, pytest.approx(3.0), True)
    assert not talk.finished


@pytest.mark.mpi(4)
def test_a_node_whose_measurements_fail_stays_unknown_and_hinders_nobody():
    from mpi4py import MPI

    from cpmpi.topology import measure
    from cpmpi.topology.discover import discover

    comm = MPI.COMM_WORLD
    follow = measure.follow

    def broken(talk):
        if comm.rank == 3:
            raise RuntimeError("no route to host")
        follow(talk)

    measure.follow = broken
    topology = discover(comm)
    assert [(m.a, m.b) for m in topology.measured] == [(0, 1), (0, 2), (1, 2)]
    node = topology.nodes[0].name
    assert len(topology.notes) == 6
    assert f"{node}: rank 3 could not measure with rank 0 (no route to host)" in topology.notes
    assert f"{node}: rank 0 could not measure with rank 3 (no answer from rank 3)" in topology.notes
    assert topology.link(0, 3).gb_per_s == topology.figures[topology.kind(0, 3)].gb_per_s  # what the others got

    def silent(talk, size):
        raise TimeoutError("the wire is full")

    measure.follow = follow
    if comm.rank == 3:  # answers, but no large message gets through in the time
        measure._Talk._exchange = silent
    stuck = measure.measure(comm, topology)
    bounds = {(m.a, m.b): m for m in stuck.measured if m.at_most}
    assert sorted(bounds) == [(0, 3), (1, 3), (2, 3)]
    a_part = measure.SIZES[0] / measure.PARTS
    for m in bounds.values():  # less than a part got through in more than the grace
        assert m.gb_per_s is not None
        assert 0 < m.gb_per_s < a_part / measure.GRACE_S / 1e9
        assert m.latency_us is not None
    assert len(stuck.measured) == 6
    assert Topology.from_json(stuck.to_json()) == stuck
    assert stuck.link(3, 0).gb_per_s == bounds[0, 3].gb_per_s
    said = f"{node}: rank 0 could not measure with rank 3 (no answer from rank 3 in time; at most "
    assert any(note.startswith(said) for note in stuck.notes)


@pytest.mark.mpi(2)
def test_bad_leaf_files_and_broken_hardware():
    from mpi4py import MPI

    from cpmpi.topology import discover, sysfs

    comm = MPI.COMM_WORLD
    with pytest.raises(ValueError, match=r"^/nowhere/topology.conf: .*No such file"):
        discover.discover(comm, leaf_file="/nowhere/topology.conf")

    def broken():
        raise KeyError("odd hardware")

    for probe in ("processors", "networks", "allowed_cpus"):
        setattr(sysfs, probe, broken)
    topology = discover.discover(comm, measure=False)
    node = topology.nodes[0]
    assert (node.sockets, node.networks, node.ranks[0].cores) == (None, (), None)
    assert f"{node.name}: processors unknown (KeyError: 'odd hardware')" in topology.notes


def test_the_sample_grows_like_the_nodes_and_rounds_do_not_collide():
    from cpmpi.topology.measure import sample

    for spec, ranks in (("nodes=2,ranks=8", 16), ("nodes=128,gpus=8,leaf=16", 1024), ("nodes=33,ranks=40", 1320)):
        topology = synthetic(spec)
        rounds = sample(topology)
        pairs = [pair for pairs in rounds for pair in pairs]
        assert topology.world == ranks
        assert len(pairs) <= 41 * len(topology.nodes)
        assert len(rounds) <= 15
        assert len(set(pairs)) == len(pairs)
        assert pairs
        assert all(a < b for a, b in pairs)
        for at_once in rounds:
            busy = [rank for pair in at_once for rank in pair]
            assert len(set(busy)) == len(busy)
            crossing = [pair for pair in at_once if topology.kind(*pair) == "spine"]
            uplinks = [topology.nodes[topology.node_of(rank)].leaf for pair in crossing for rank in pair]
            assert len(set(uplinks)) == len(uplinks)
    assert sample(synthetic("nodes=1,ranks=1")) == ()


def test_slurm_is_asked_only_in_a_job_and_never_believed_blindly(monkeypatch, tmp_path):
    from cpmpi.topology import discover, sysfs
    from cpmpi.topology.decide import NodeFacts, RankFacts
    from cpmpi.topology.leaves import SlurmPlace

    unknown = sysfs.Processors(numa_of={}, socket_of={}, core_of={})
    probe = NodeFacts(hostname="n1", ranks=(RankFacts(rank=0),), processors=unknown, slurm=SlurmPlace())
    other = replace(probe, hostname="n9", ranks=(RankFacts(rank=1),))
    scontrol = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def answer(script):
        scontrol.write_text(f"#!/bin/sh\n{script}\n")
        scontrol.chmod(0o755)

    answer("echo SwitchName=leaf1 Level=0 LinkSpeed=1 'Nodes=n[1-2]'")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert discover._decide([probe], None).nodes[0].leaf is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert discover._decide([probe], None).nodes[0].leaf == "leaf1"
    partly = discover._decide([probe, other], None)
    assert [node.leaf for node in partly.nodes] == [None, None]
    assert "no switch for node n9" in partly.notes[0]
    answer("echo slurm_load_topology error >&2; exit 1")
    assert discover._decide([probe], None).notes == ()
    answer("exec sleep 9")
    slow = discover._decide([probe], None)
    assert "timed out after 0.7 seconds" in slow.notes[0]
