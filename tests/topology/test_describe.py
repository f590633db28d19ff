"""Descriptions: JSON and back, what bad ones say, and the link between any two ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.topology.codec import numbers, ranges
from cpmpi.topology.describe import LinkClass, Measurement, Topology, UnknownBandwidthError
from cpmpi.topology.node import Node, RankPlace
from cpmpi.topology.synthetic import synthetic

from .work import calls

MACHINES = sorted((Path(__file__).parent / "machines").glob("*.json"))


def nodes_of(*counts: int, leaves: tuple[str | None, ...] | None = None) -> tuple[Node, ...]:
    first, nodes = 0, []
    for i, count in enumerate(counts):
        ranks = tuple(RankPlace(rank=first + k) for k in range(count))
        nodes.append(Node(name=f"n{i + 1}", ranks=ranks, leaf=leaves[i] if leaves else None))
        first += count
    return tuple(nodes)


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_a_recorded_machine_reads_back_as_written(path, tmp_path):
    topology = Topology.load(path)
    assert topology.to_json() == path.read_text(encoding="utf-8")
    topology.save(tmp_path / "again.json")
    assert Topology.load(tmp_path / "again.json") == topology
    assert [item.name for item in tmp_path.iterdir()] == ["again.json"]


figure = st.none() | st.floats(min_value=1e-3, max_value=1e3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_any_description_survives_json(counts, data):
    nodes = nodes_of(*counts)
    world = sum(counts)
    pairs = [(a, b) for b in range(world) for a in range(b)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    measured = tuple(Measurement(a=a, b=b, gb_per_s=data.draw(figure), latency_us=data.draw(figure)) for a, b in chosen)
    cores = data.draw(st.none() | st.lists(st.integers(0, 300), unique=True).map(lambda c: tuple(sorted(c))))
    places = (replace(nodes[0].ranks[0], cores=cores), *nodes[0].ranks[1:])
    notes = tuple(data.draw(st.lists(st.text())))
    classes = (LinkClass(kind="spine", gb_per_s=data.draw(figure)),)
    nodes = (replace(nodes[0], ranks=places), *nodes[1:])
    topology = Topology(nodes=nodes, classes=classes, measured=measured, notes=notes)
    assert Topology.from_json(topology.to_json()) == topology


def test_core_lists_are_written_as_linux_writes_them():
    assert ranges((0, 1, 2, 3, 8, 10, 11)) == "0-3,8,10-11"
    assert numbers("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert numbers("") == ()


def changed(**changes: object) -> str:
    """A small good description with other values put in by their path: ``nodes_0_ranks_1_rank=0``."""
    data = json.loads(synthetic("nodes=2,ranks=2,leaf=1").to_json())
    for path, value in changes.items():
        *steps, last = path.replace("gb_per_s", "gb-per-s").split("__")
        place = data
        for step in steps:
            place = place[int(step) if step.isdigit() else step]
        last = last.replace("-", "_")
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "not a topology: Expecting"),
        ("[]", "not a topology: format is 'list', not 'cpmpi-topology'"),
        (changed(version=7), "topology version 7 is unknown; this program reads 1"),
        (changed(nodes__0__ranks__1__rank=0), "rank 0 is placed 2 times"),
        (changed(nodes__1__ranks__1__rank=4), "rank 3 is on no node, yet there is a rank 4 (4 ranks in all)"),
        (changed(nodes__1__ranks__1__rank=-1), "topology.nodes[1].ranks[1]: rank (-1) must not be negative"),
        (changed(nodes__1__name="n1"), "2 nodes are called n1"),
        (changed(nodes__1__ranks=[]), "topology.nodes[1]: node n2 has no rank"),
        (changed(nodes=[]), "a description needs at least one node"),
        (changed(classes__0__gb_per_s=-5), "topology.classes[0]: gb_per_s (-5.0) must be positive"),
        (changed(classes__0__kind="rack"), "link class 'rack' is unknown; the choices are numa, node, fabric, leaf"),
        (changed(classes__0__kind="leaf"), "link class leaf is given 2 times"),
        (changed(measured=[{"a": 0, "b": 9}]), "measured pair 0-9: needs 0 <= a < b < ranks (4)"),
        (changed(measured=[{"a": 0, "b": 1}] * 2), "measured pair 0-1 is listed twice"),
        (changed(measured=[{"a": 0, "b": 1, "gb_per_s": 0}]), "gb_per_s (0.0) must be positive, or null where unknown"),
        (changed(measured=[{"a": 0}]), "topology.measured[0]: missing field 'b'"),
        (changed(nodes__0__ranks__0__gpu=3), "rank 0 on node n1 names GPU 3; the node has GPUs []"),
        (changed(nodes__0__gpus=[{"index": 0}, {"index": 0}]), "node n1 lists GPU 0 2 times"),
        (changed(nodes__0__colour="red"), "topology.nodes[0]: unknown field 'colour'; the fields are name, ranks"),
        (changed(nodes__0__name=5), "topology.nodes[0].name: expected str, found 5"),
        (changed(nodes__0__cores=True), "topology.nodes[0].cores: expected int, found True"),
        (changed(nodes__0__ranks__0__cores="a-b"), "expected numbers such as '0-3,8', found 'a-b'"),
        (changed(nodes__0__ranks=3), "topology.nodes[0].ranks: expected a list, found 3"),
        (changed(nodes__0=3), "topology.nodes[0]: expected an object, found 3"),
    ],
)
def test_a_bad_description_is_one_clear_line(text, message, tmp_path):
    path = tmp_path / "topology.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="topology") as failure:
        Topology.load(path)
    assert str(failure.value).startswith(f"{path}: ")
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_another_number_of_ranks_is_refused_with_both_counts():
    topology = synthetic("nodes=2,ranks=4")
    topology.require(8)
    with pytest.raises(ValueError, match=r"^the topology describes 8 ranks, but 6 were launched$"):
        topology.require(6)


def test_links_are_measured_then_typical_of_their_kind_then_unknown():
    leaves = ("a", "a", "b", None)
    nodes = nodes_of(2, 2, 2, 1, leaves=leaves)
    measured = (
        Measurement(a=0, b=1, gb_per_s=5.0, latency_us=3.0),
        Measurement(a=2, b=3, gb_per_s=7.0, latency_us=5.0),
        Measurement(a=0, b=2),
    )
    topology = Topology(nodes=nodes, measured=measured, classes=(LinkClass(kind="spine", gb_per_s=0.5),))
    assert topology.link(1, 0) == topology.link(0, 1)
    assert (topology.link(0, 1).gb_per_s, topology.link(0, 1).measured) == (5.0, True)
    assert (topology.link(4, 5).kind, topology.link(4, 5).gb_per_s, topology.link(4, 5).measured) == (
        "node",
        6.0,
        False,
    )
    assert topology.link(4, 5).latency_us == 4.0
    assert (topology.link(0, 2).kind, topology.link(0, 2).gb_per_s) == ("leaf", None)
    assert (topology.link(0, 4).kind, topology.link(0, 4).gb_per_s) == ("spine", 0.5)
    assert (topology.link(0, 6).kind, topology.link(0, 6).gb_per_s) == ("network", None)
    assert topology.link(3, 3).kind == "self"


def test_the_link_between_two_gpus_is_better_known_than_its_kind():
    bridged = Topology.load(MACHINES[0].with_name("a100-pcie-4.json"))
    assert (bridged.link(0, 2).gb_per_s, bridged.link(0, 1).gb_per_s) == (300, 31.5)
    measured = replace(bridged, measured=(Measurement(a=0, b=1, gb_per_s=4.0),))  # messages between hosts: not NVLink
    assert (measured.link(4, 5).kind, measured.link(4, 5).gb_per_s) == ("numa", 4.0)


def test_gpu_links_reach_over_nodes_in_one_nvlink_domain():
    topology = Topology.load(MACHINES[0].with_name("gb200-nvl72.json"))
    assert topology.kind(0, 71) == "fabric"
    link = topology.gpu_link(0, 71)
    assert link is not None
    assert link.gb_per_s == 900
    assert topology.kind(0, 72) == "spine"
    assert topology.gpu_link(0, 72) is None
    assert topology.link(0, 72).gb_per_s == 50
    assert topology.link(0, 1).gb_per_s == 900


def test_the_link_between_any_two_of_thousands_of_ranks_is_as_much_work_as_of_a_few():
    few, many = synthetic("nodes=4,gpus=8,leaf=2"), synthetic("nodes=1024,gpus=8,leaf=32")
    for topology in (few, many):
        topology.link(0, 1)  # makes the tables
    for a, b in ((0, 1), (0, 8), (7, 24)):
        assert calls(lambda a=a, b=b: few.link(a, b)) + 2 >= calls(lambda a=a, b=b: many.link(a, b))


def test_a_bound_is_kept_as_one():
    nodes = nodes_of(1, 1, 1, 1)
    measured = (
        Measurement(a=0, b=1, gb_per_s=0.1, latency_us=3.0),
        Measurement(a=0, b=2, gb_per_s=0.025, latency_us=9.0, at_most=True),
    )
    topology = Topology(nodes=nodes, measured=measured)
    text = topology.to_json()
    assert text.count("at_most") == 1
    assert Topology.from_json(text) == topology
    link = topology.link(2, 0)
    assert (link.gb_per_s, link.measured, link.at_most) == (0.025, True, True)
    assert not topology.link(0, 1).at_most
    assert topology.known_link(0, 2) == (0.025e9, 9e-6)
    assert topology.link(1, 2).gb_per_s == 0.0625  # the median of its kind, with the bound in it
    with pytest.raises(ValueError, match="at_most needs gb_per_s"):
        Measurement(a=0, b=1, at_most=True)


def test_a_bandwidth_that_nobody_knows_is_an_error_of_its_own():
    topology = Topology(nodes=nodes_of(2, 1))
    with pytest.raises(UnknownBandwidthError, match=r"bandwidth between ranks 0 and 2 \(network\) is unknown: measure"):
        topology.known_link(0, 2)
