"""Rings and trees: the properties they promise, on recorded machines and on random ones."""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.topology import spanning
from cpmpi.topology.derive import leaders, node_order, rank_order, rings, tree
from cpmpi.topology.describe import Measurement, Topology
from cpmpi.topology.node import NetworkDevice
from cpmpi.topology.ring_search import best_ring, grade
from cpmpi.topology.synthetic import synthetic

from .work import calls

FOLDER = Path(__file__).parent / "machines"
MACHINES = sorted(path.stem for path in FOLDER.glob("*.json"))


def machine(name: str) -> Topology:
    return Topology.load(FOLDER / f"{name}.json")


def width(topology: Topology, a: int, b: int) -> float:
    gpus = topology.gpu_link(a, b)
    known = gpus.gb_per_s if gpus is not None else topology.link(a, b).gb_per_s
    assert known is not None
    return known


def narrowest(topology: Topology, order) -> float:
    return min(width(topology, a, b) for a, b in zip(order, (*order[1:], order[0])))


def widest_by_brute_force(topology: Topology, ranks) -> float:
    first, *rest = ranks
    return max(narrowest(topology, (first, *order)) for order in permutations(rest))


@pytest.mark.parametrize("name", MACHINES)
def test_rings_hold_every_rank_once_and_have_the_widest_narrowest_link(name):
    topology = machine(name)
    found = rings(topology)
    assert sorted(rank for ring in found for rank in ring) == list(range(topology.world))
    proven = {}
    for node, ring in zip(topology.nodes, found):
        assert sorted(ring) == sorted(place.rank for place in node.ranks)
        assert ring[0] == min(ring)
        if len(ring) > 1:
            widths = tuple(width(topology, a, b) for a, b in combinations(sorted(ring), 2))
            if widths not in proven:
                proven[widths] = widest_by_brute_force(topology, sorted(ring))
            assert narrowest(topology, ring) == proven[widths]
    assert rings(Topology.from_json(topology.to_json())) == found


@pytest.mark.parametrize("name", MACHINES)
def test_trees_span_the_nodes_leave_each_switch_once_and_are_shallow(name):
    topology = machine(name)
    leaves = Counter(node.leaf for node in topology.nodes)
    rounds = math.ceil(math.log2(max(leaves.values()))) + math.ceil(math.log2(len(leaves)))
    spanned = tree(topology)
    assert len(spanned.edges) == len(topology.nodes) - 1
    for node in range(len(topology.nodes)):  # everyone reaches the root
        steps = 0
        while (up := spanned.parent[node]) is not None:
            node, steps = up, steps + 1
        assert node == spanned.root
        assert steps <= len(spanned.rounds()) <= rounds
    out: Counter[tuple[str, ...]] = Counter()
    for child, parent in spanned.edges:
        mine, other = (topology.nodes[i].switches for i in (child, parent))
        for level in range(1, len(mine) + 1):
            if mine[:level] != other[:level]:
                out[mine[:level]] += 1
    root = topology.nodes[spanned.root].switches
    switches = {n.switches[:level] for n in topology.nodes for level in range(1, len(n.switches) + 1)}
    assert out == {path: 1 for path in switches if path != root[: len(path)]}


@pytest.mark.parametrize("name", MACHINES)
def test_leaders_stand_beside_a_network_device(name):
    topology = machine(name)
    for node, lead in zip(topology.nodes, leaders(topology), strict=True):
        assert lead in [place.rank for place in node.ranks]
        beside = {device.numa for device in node.networks}
        if any(topology.numa_of(place.rank) in beside for place in node.ranks):
            assert topology.numa_of(lead) in beside
    if name == "a100-pcie-4":
        assert leaders(topology)[0] == 2


def test_the_leader_stands_beside_the_faster_of_two_devices():
    """Whichever is named first; and beside the first by name of those that are as fast."""
    (node,) = synthetic("nodes=1,ranks=8").nodes
    numas = {place.numa: place.rank for place in reversed(node.ranks)}  # the lowest rank of each domain

    def leader(*speeds):
        devices = [NetworkDevice(name=f"eth{i}", gb_per_s=speed, numa=numa) for i, (speed, numa) in enumerate(speeds)]
        return leaders(Topology(nodes=(replace(node, networks=tuple(devices)),)))

    assert leader((1.0, 2), (25.0, 5)) == (numas[5],)
    assert leader((25.0, 5), (1.0, 2)) == (numas[5],)
    assert leader((25.0, 6), (25.0, 3)) == (numas[6],)
    assert leader((25.0, None), (1.0, 3)) == (0,)


def test_a_ring_uses_both_nvlink_bridges():
    ring = rings(machine("a100-pcie-4"))[0]
    links = {frozenset(pair) for pair in zip(ring, (*ring[1:], ring[0]))}
    assert {frozenset({0, 2}), frozenset({1, 3})} <= links


def test_a_ring_changes_sockets_twice():
    topology = machine("cpu-2s")
    for ring in rings(topology):
        sockets = [topology.place(rank).socket for rank in ring]
        assert sum(a != b for a, b in zip(sockets, (*sockets[1:], sockets[0]))) == 2


def test_a_slow_measured_link_is_avoided():
    plain = synthetic("nodes=1,ranks=8")
    slow = {(0, 1), (3, 4), (0, 7)}
    measured = tuple(
        Measurement(a=a, b=b, gb_per_s=0.5 if (a, b) in slow else 5.0) for a, b in combinations(range(8), 2)
    )
    topology = replace(plain, measured=measured)
    ring = rings(topology)[0]
    assert narrowest(topology, ring) == 5.0
    assert not {(min(p), max(p)) for p in zip(ring, (*ring[1:], ring[0]))} & slow


@given(st.integers(2, 7), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_exact_search_finds_the_best_of_all_rings(n, seed):
    pick = random.Random(seed)
    table = [[0.0] * n for _ in range(n)]
    far = [[0.0] * n for _ in range(n)]
    for a, b in combinations(range(n), 2):
        table[a][b] = table[b][a] = float(pick.choice([0, 1, 2, 5, 10]))
        far[a][b] = far[b][a] = float(pick.choice([0, 5]))
    width, distance = (tuple(map(tuple, t)) for t in (table, far))
    found = best_ring(width, distance)
    best = max(grade((0, *order), width, distance) for order in permutations(range(1, n)))
    assert sorted(found) == list(range(n))
    assert grade(found, width, distance) == best
    assert n < 3 or found[1] < found[-1]


@given(st.integers(9, 40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_heuristic_is_good_where_a_wide_ring_is_hidden(n, seed):
    """A hidden ring of wide links among narrow ones: the heuristic's narrowest link is never below the narrow ones,
    and members in groups (NUMA domains) stay together."""
    pick = random.Random(seed)
    group = [pick.randrange(4) for _ in range(n)]
    width = tuple(tuple(0.0 if a == b else 10.0 if group[a] == group[b] else 4.0 for b in range(n)) for a in range(n))
    distance = tuple(tuple(0.0 if group[a] == group[b] else 5.0 for b in range(n)) for a in range(n))
    found = best_ring(width, distance)
    assert sorted(found) == list(range(n))
    crossings = sum(group[a] != group[b] for a, b in zip(found, (*found[1:], found[0])))
    groups = len(set(group))
    assert crossings == (groups if groups > 1 else 0)


def test_the_heuristic_gets_round_a_broken_link():
    n = 12
    width = [[5.0] * n for _ in range(n)]
    for a, b in [(0, 1), (0, 2), (0, 3), (0, 11), (1, 2), (10, 11)]:
        width[a][b] = width[b][a] = 0.1
    table = tuple(map(tuple, width))
    none = tuple(tuple(0.0 for _ in range(n)) for _ in range(n))
    assert grade(best_ring(table, none), table, none).narrowest == 5.0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_any_grouping_is_spanned(groups, unknown):
    """Leaves in any order and size, some unknown: one root, and one edge out of each leaf but the root's."""
    paths = [() if g == unknown else ("spine", f"leaf{g}") for g in groups]
    parents = spanning.span(paths)
    assert parents.count(None) == 1
    root = parents.index(None)
    for node in range(len(paths)):
        seen = set()
        while (up := parents[node]) is not None:
            assert node not in seen
            seen.add(node)
            node = up
        assert node == root
    leaving = Counter(paths[child] for child, up in enumerate(parents) if up is not None and paths[child] != paths[up])
    assert all(count == 1 for path, count in leaving.items() if path)


def test_members_of_a_binomial_tree_hang_under_lower_ones():
    for n in range(1, 70):
        assert all(parent is None or parent < child for child, parent in enumerate(spanning.binomial(n)))


def test_a_reduction_takes_log2_rounds():
    for nodes in (1, 2, 3, 5, 16, 31):
        spanned = tree(synthetic(f"nodes={nodes},ranks=1,leaf=64"))
        rounds = spanned.rounds()
        assert len(rounds) == math.ceil(math.log2(nodes))
        assert sorted(edge for edges in rounds for edge in edges) == sorted(spanned.edges)
        sent: set[int] = set()
        for edges in rounds:
            assert len({node for edge in edges for node in edge}) == 2 * len(edges)
            for child, _ in edges:
                assert not set(spanned.children[child]) - sent
            sent |= {child for child, _ in edges}


def test_ranks_are_ordered_leaf_by_leaf():
    topology = machine("uneven")
    shuffled = replace(topology, nodes=tuple(topology.nodes[i] for i in (0, 3, 1, 4, 2)))
    assert node_order(shuffled) == (0, 2, 4, 1, 3)
    order = rank_order(shuffled)
    assert sorted(order) == list(range(22))
    leaves = [shuffled.nodes[shuffled.node_of(rank)].leaf for rank in order]
    assert leaves == ["leaf1"] * 12 + ["leaf2"] * 10
    nodes = [shuffled.node_of(rank) for rank in order]
    assert len(set(nodes)) == 1 + sum(a != b for a, b in pairwise(nodes))


def test_the_first_leader_does_not_depend_on_measurements_or_order():
    topology = machine("dgx-h100")
    turned = replace(topology, nodes=tuple(replace(n, ranks=n.ranks[::-1]) for n in topology.nodes))
    assert leaders(turned) == leaders(topology)
    assert rings(turned) == rings(topology)


def test_deriving_for_a_thousand_nodes_is_little_work():
    topology = synthetic("nodes=1024,gpus=8,leaf=32,machine=dgx-h100")
    found = []
    assert calls(lambda: found.extend((rank_order(topology), tree(topology)))) < 300 * topology.world
    assert len(found[0]) == 8192
    assert len(found[1].rounds()) == 10


def test_deriving_for_nodes_with_many_ranks_is_little_work():
    plain = synthetic("nodes=16,ranks=128")
    ring = tuple(Measurement(a=r, b=r + 1, gb_per_s=4.0 + r % 7 / 10) for r in range(plain.world - 1) if r % 128 != 127)
    for topology in (plain, replace(plain, measured=ring)):
        found = []
        assert calls(lambda topology=topology, found=found: found.extend(rank_order(topology))) < 3000 * plain.world
        assert sorted(found) == list(range(plain.world))


def test_rings_of_noisy_measurements_are_found_with_little_work():
    pick = random.Random(1)
    plain = synthetic("nodes=8,ranks=8")
    measured = tuple(
        Measurement(a=8 * n + a, b=8 * n + b, gb_per_s=pick.uniform(4, 6))
        for n in range(8)
        for a, b in combinations(range(8), 2)
    )
    noisy = replace(plain, measured=measured)
    assert calls(lambda: rings(noisy)) < 8 * 50_000  # all 5,040 orders of eight would be many times that
