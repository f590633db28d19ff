"""The cost model: byte counts and times against closed forms, the choice against every forced schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.attention.execute import Heads, Rule
from cpmpi.attention.grid import Grid
from cpmpi.cost import price as cost
from cpmpi.cost.choose import ALIKE, ALL_PRICED, NothingFitsError, candidates, choose, least_seconds, schedule_on
from cpmpi.cost.links import Links
from cpmpi.cost.lockstep import in_step, play_ring
from cpmpi.cost.price import price
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.cost.simulate import Sizes, attend_seconds, play
from cpmpi.cost.workload import Workload
from cpmpi.errors import UserError
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.select import named
from cpmpi.model.probe import Layer
from cpmpi.topology.describe import LinkClass, Measurement, Topology, UnknownBandwidthError
from cpmpi.topology.node import Node, RankPlace
from cpmpi.topology.synthetic import synthetic

FAST = Rates(attention_flops=1e18, memory_gb_per_s=1e6, call_s=0, message_s=0)
SLOW = Rates(attention_flops=1e9, memory_gb_per_s=1e6, call_s=0, message_s=0)
GPU = Rates(attention_flops=4e14, memory_gb_per_s=2500)


def shape(new=4096, stored=0, heads=8, kv=8, dim=64, **more) -> AttentionShape:
    return AttentionShape(
        new=new, stored=stored, query_heads=heads, kv_heads=kv, key_dim=dim, value_dim=dim, itemsize=4, **more
    )


def cluster(uplink_gb_per_s=0.025, node_gb_per_s=0.125, measured=True) -> Topology:
    """Four nodes of two ranks, two under each leaf, as measured or as given."""
    nodes = tuple(
        Node(name=f"n{i}", leaf=f"leaf{i // 2}", ranks=(RankPlace(rank=2 * i), RankPlace(rank=2 * i + 1)))
        for i in range(4)
    )
    rates = {(0, 1): 5.0, (2, 3): 5.0, (4, 5): 5.0, (6, 7): 5.0, (0, 2): node_gb_per_s, (4, 6): node_gb_per_s}
    rates[0, 4] = uplink_gb_per_s
    if measured:
        return Topology(nodes=nodes, measured=tuple(Measurement(a=a, b=b, gb_per_s=g) for (a, b), g in rates.items()))
    figures = {"node": 5.0, "leaf": node_gb_per_s, "spine": uplink_gb_per_s}
    return Topology(nodes=nodes, classes=tuple(LinkClass(kind=k, gb_per_s=g) for k, g in figures.items()))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 30), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3),
    st.none() | st.integers(1, 12), st.sets(st.integers(1, 60), max_size=2),
)  # fmt: skip
def test_pairs_of_ranks_are_those_of_the_mask(new, stored, world, segments, stored_segments, window, starts):
    mask = Mask(window=window, documents=tuple(sorted(starts)))
    s = shape(new, stored, mask=mask, segments=segments, stored_segments=stored_segments)
    pairs, blocks, read = s.pairs(world)
    for a in range(world):
        for b in range(world):
            counts = [
                (mask.pairs(q, k), k.size)
                for q in s.query_layout(world).pieces(a)
                for layout in s.key_layouts(world)
                for k in layout.pieces(b)
            ]
            assert (pairs[a, b], blocks[a, b]) == (sum(n for n, _ in counts), sum(n > 0 for n, _ in counts))
            assert read[a, b] == sum(size for n, size in counts if n)


def test_too_many_segments_to_count_get_the_mean(monkeypatch):
    s = shape(4096, 8192, segments=16, stored_segments=16)
    exact, *_ = s.pairs(8)
    monkeypatch.setattr("cpmpi.cost.shape.MOST_BLOCKS", 100)
    mean, *_ = s.pairs(8)
    assert abs(mean.sum() / exact.sum() - 1) < 1e-4
    assert abs(mean / exact - 1).max() < 0.05


def test_a_ring_that_waits_for_its_links():
    """N - 1 rounds move a shard over every link at once: (N - 1) * shard / rate, and the last round computes."""
    topology = synthetic("nodes=1,ranks=8,node_gb_per_s=2,node_latency_us=3")
    p = price(schedule_on("ring", topology), topology, shape(), FAST)
    shard = 4096 // 8 * shape().key_bytes
    assert p.total_s == pytest.approx(7 * (shard / 2e9 + 3e-6), rel=1e-3)
    assert p.exposed_s == pytest.approx(p.total_s, rel=1e-3)
    assert p.link_bytes == {f"rank {r} {way}": 7 * shard for r in range(8) for way in ("out", "in")}


def test_a_ring_that_waits_for_its_kernel():
    topology = synthetic("nodes=1,ranks=8,node_gb_per_s=1000")
    p = price(schedule_on("ring", topology), topology, shape(), SLOW)
    pairs, *_ = shape().pairs(8)
    assert p.compute_s == pytest.approx(pairs.sum(axis=1).max() * shape().pair_flops / 1e9)
    assert p.exposed_s < 0.01 * p.total_s


def test_a_two_level_ring_crosses_each_boundary_once():
    topology = cluster()
    p = price(schedule_on("ring", topology), topology, shape(), FAST)
    node = 4096 // 4 * shape().key_bytes
    assert p.link_bytes["n0 out"] == p.link_bytes["leaf0 up"] == p.link_bytes["leaf1 down"] == 3 * node
    assert p.total_s == pytest.approx(3 * node / 0.025e9, rel=0.02)


def test_a_tree_moves_queries_one_way_and_partials_the_other():
    topology, s = cluster(), shape(new=32, stored=16384)
    p = price(schedule_on("tree", topology), topology, s, FAST)
    # 16 of 32 queries lie under each leaf: their queries go up, the other 16's partials come back, and both ways so.
    assert p.link_bytes["leaf0 up"] == p.link_bytes["leaf1 up"] == 16 * (s.query_bytes + s.partial_bytes)
    ring = price(schedule_on("ring", topology), topology, s, FAST)
    assert ring.total_s > 8 * p.total_s


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(1, 300), st.integers(0, 300), st.integers(1, 3))
def test_bytes_over_node_boundaries_follow_the_formulas(sizes, new, stored, segments):
    """A ring: each shard into each other node. Trees: queries and partials of the far side of each edge."""
    topology = synthetic(f"machine=cpu-2s,ranks={'/'.join(map(str, sizes))}")
    world, s = topology.world, shape(new, stored, segments=segments)
    tokens = Sizes(s, world)
    for schedule in candidates(topology, s.asking(world)):
        p = price(schedule, topology, s, GPU)
        entering = {
            name.split()[0]: n for name, n in p.link_bytes.items() if name.endswith(" in") and "rank" not in name
        }
        if schedule.kind == "ring":
            for node, ranks in zip(topology.nodes, schedule.nodes):
                foreign = sum(tokens.keys[r] for r in range(world) if r not in ranks)
                assert entering.get(node.name, 0) == foreign * s.key_bytes
        else:
            crossings = len(schedule.nodes) - 1
            assert sum(entering.values()) == crossings * new * (s.query_bytes + s.partial_bytes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3000), st.integers(0, 9000), st.booleans())
def test_no_price_is_below_the_bound_and_none_is_clearly_below_the_choice(sizes, new, stored, fast):
    topology, rates = synthetic(f"machine=cpu-2s,ranks={'/'.join(map(str, sizes))}"), FAST if fast else GPU
    s, links = shape(new, stored), Links(topology)
    choice = choose(topology, s, rates)
    for schedule in candidates(topology, s.asking(topology.world)):
        p = price(schedule, topology, s, rates)
        assert p == choice.prices[schedule.kind]
        assert p.total_s >= least_seconds(schedule, s, rates, links, attend_seconds(s, rates, topology.world)) * (
            1 - 1e-9
        )
        chosen = choice.prices[choice.schedule.kind]
        assert chosen.total_s <= ALIKE * p.total_s
        assert chosen.total_s <= p.total_s or chosen.busiest_bytes <= p.busiest_bytes
        assert p.total_s >= p.compute_s > 0
        waits = sum(i.seconds for i in p.intervals if i.what == "wait")
        assert p.exposed_s <= waits + 1e-12 or waits == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3000), st.integers(0, 9000), st.sampled_from([FAST, GPU]))
def test_no_price_is_below_the_bound_where_nodes_share_an_nvlink_domain(nodes, gpus, new, stored, rates):
    topology, s = synthetic(f"machine=gb200-nvl72,nodes={nodes},gpus={gpus}"), shape(new, stored)
    links, seconds = Links(topology), attend_seconds(s, rates, topology.world)
    for schedule in candidates(topology, s.asking(topology.world)):
        p = price(schedule, topology, s, rates)
        assert p.total_s >= least_seconds(schedule, s, rates, links, seconds) * (1 - 1e-9)


def test_a_long_ring_is_priced_by_its_first_steps(monkeypatch):
    topology, s = synthetic("nodes=12,gpus=4"), shape(1 << 16, 5)
    for rates in (FAST, GPU, SLOW):
        exact = price(schedule_on("ring", topology), topology, s, rates)
        monkeypatch.setattr(cost, "MOST_ROUNDS", 100)
        stepped = price(schedule_on("ring", topology), topology, s, rates)
        monkeypatch.setattr(cost, "MOST_STEPPED", 10)
        quick = price(schedule_on("ring", topology), topology, s, rates)
        monkeypatch.undo()
        assert replace(stepped, intervals=()) == replace(exact, intervals=())  # in step, to the last bit
        assert quick.extrapolated
        assert not exact.extrapolated
        assert quick.total_s == pytest.approx(exact.total_s, rel=0.04)
        assert quick.compute_s == pytest.approx(exact.compute_s, rel=0.04)
        for name, n_bytes in exact.link_bytes.items():
            assert quick.link_bytes[name] == pytest.approx(n_bytes, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3000), st.integers(0, 900),
    st.sampled_from([FAST, GPU, SLOW]), st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_in_step_a_ring_takes_the_same_times_to_the_last_bit(nodes, ranks, leaf, new, stored, rates, taper):
    topology = synthetic(f"machine=cpu-2s,nodes={nodes},ranks={ranks},leaf={leaf},taper={taper}")
    s, links, again = shape(new, stored), Links(topology), Links(topology)
    ring, seconds = schedule_on("ring", topology), attend_seconds(s, rates, topology.world)
    slow = play(ring, s, rates, links, seconds)
    assert in_step(ring, again)
    quick = play_ring(ring, Sizes(s, topology.world), rates, again, seconds)
    assert quick.round_ends == slow.round_ends
    assert quick.busy_s == slow.busy_s
    assert by_name(quick, again) == by_name(slow, links)
    assert sorted(quick.intervals, key=str) == sorted((i for i in slow.intervals if i.rank in shown(quick)), key=str)
    assert len(shown(quick)) <= 32


def by_name(played, links):
    return {links.names[wire]: n for wire, n in played.wire_bytes.items()}


def shown(played):
    return {i.rank for i in played.intervals}


def test_only_rings_of_nodes_that_are_alike_go_in_step():
    uneven, even = synthetic("machine=cpu-2s,ranks=2/3"), synthetic("machine=cpu-2s,nodes=2,ranks=3")
    assert not in_step(schedule_on("ring", uneven), Links(uneven))
    assert not in_step(schedule_on("hybrid", even), Links(even))
    fabric = synthetic("machine=gb200-nvl72,nodes=2,gpus=4")  # what crosses goes over the ranks' own ports
    assert not in_step(schedule_on("ring", fabric), Links(fabric))


def test_resident_bytes():
    topology, s = synthetic("nodes=4,gpus=4"), shape(1 << 14)
    token = (1 << 14) // 16
    own = token * (s.key_bytes + s.query_bytes + s.partial_bytes)
    ring, tree, hybrid = (price(schedule_on(k, topology), topology, s, GPU) for k in ("ring", "tree", "hybrid"))
    # Attended to, sent ahead to the next node, arriving from the ring and from the node before.
    assert ring.resident_bytes <= own + 4 * token * s.key_bytes * 1.01
    assert tree.resident_bytes > (1 << 14) * s.partial_bytes  # an accumulator for every query there is
    assert hybrid.resident_bytes < tree.resident_bytes


def test_two_ranks_of_a_tree_by_hand():
    """Both hold the other's partial: while the other's queries are here, and then with its copy for the message."""
    topology = synthetic("machine=cpu-2s,nodes=1,ranks=2,node_gb_per_s=2,node_latency_us=5")
    s = shape(2048, heads=4, kv=2, dim=16)
    query, key, partial = (1024 * n for n in (4 * 16 * 4, 2 * 2 * 16 * 4, 4 * 17 * 4))
    p = price(schedule_on("tree", topology), topology, s, FAST)
    own = query + key + partial
    meeting = own + query + partial  # the other's queries, and the accumulator for them
    parting = own + partial + 2 * partial  # the accumulator, its copy that leaves, and the one that comes
    assert p.resident_bytes == max(meeting, parting)


def test_what_keeps_two_ranks_busy_with_one_asker_by_hand():
    """Rank 0 asks and rank 1 answers: each computes with its own keys, and the one that asked merges the answer."""
    topology = synthetic("machine=cpu-2s,nodes=1,ranks=2,node_gb_per_s=1,node_latency_us=7")
    s = shape(1, 999, heads=4, kv=2, dim=16)
    rates = Rates(attention_flops=1e6, memory_gb_per_s=1e9, merge_gb_per_s=1e-3, call_s=0.01, message_s=0.002)
    assert s.asking(2) == frozenset({0})
    schedule = schedule_on("tree", topology, s.asking(2))
    played = play(schedule, s, rates, Links(topology), attend_seconds(s, rates, 2))
    sizes = Sizes(s, 2)
    flops = 2 * 4 * (16 + 16)
    pieces = [sum(len(layout.pieces(rank)) for layout in s.key_layouts(2)) for rank in range(2)]
    attending = [sizes.keys[rank] * flops / 1e6 + pieces[rank] * 0.01 for rank in range(2)]
    merging = s.partial_bytes / 1e6
    assert played.busy_s == pytest.approx([attending[0] + merging, attending[1]], rel=1e-6)
    query = s.query_bytes / 1e9 + 7e-6 + 0.002
    answer = s.partial_bytes / 1e9 + 7e-6 + 0.002
    assert played.total_s == pytest.approx(max(query + attending[1], attending[0]) + answer + merging, rel=1e-6)


def test_a_bug_while_pricing_is_no_schedule_that_was_not_priced(monkeypatch):
    """Only a bandwidth that nobody knows leaves a ring unpriced; any other error is one."""
    from cpmpi.cost import choose as module

    class Alone:
        size, rank, comm = 4, 0, None

        def on_root(self, work):
            return work()

    heads = Heads(query_heads=2, kv_heads=2, key_dim=8, value_dim=8, dtype=torch.float32)
    layer = Layer(heads, Rule(mask=Mask(), scale=1.0), "")
    monkeypatch.setattr(module, "measure_together", lambda *_: GPU)

    def chosen(topology):
        work = Workload(
            layers=(layer,), backends=(named("reference"),), tokens=100, segments=2, device=torch.device("cpu"),
            grid=Grid(),
        )  # fmt: skip
        return module.choose_schedule(Alone(), topology, "auto", work)

    known = synthetic("machine=cpu-2s,nodes=2,ranks=2")
    assert chosen(known)[1].endswith("(expected for each layer)")
    schedule, reason = chosen(replace(known, classes=()))
    assert schedule.kind == "ring"
    assert reason.startswith("ring: not priced, the bandwidth between ranks ")

    def broken(*_, **__):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(module, "price", broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        chosen(known)


def test_choice_within_memory():
    topology, s = cluster(), shape(new=1024, stored=16384)
    free = choose(topology, s, FAST)
    assert free.schedule.kind in ("tree", "hybrid")
    assert free.reason.startswith(f"{free.schedule.kind}: ")
    assert "of it" in free.reason
    assert "ring: " in free.reason
    least = min(p.resident_bytes for p in free.prices.values())
    tight = choose(topology, s, FAST, memory=least)
    assert tight.prices[tight.schedule.kind].resident_bytes == least
    with pytest.raises(NothingFitsError, match=r"no schedule fits into 1e-09 GB for a layer's attention: .*ring .* GB"):
        choose(topology, s, FAST, memory=1)


@pytest.mark.parametrize(("heads", "kv"), [(16, 8), (64, 8)])
def test_on_uniform_links_the_choice_changes_near_metas_rule(heads, kv):
    """Where links are uniform and transfers are all that counts, keys travel above the rule and queries below.

    The rule: queries are the smaller message iff T / (T + P) <= 2 G / H (arXiv 2411.01783), T new and P stored tokens.

    Our partials travel back in float32, so queries win once T H (D + E + 1) is less than (T + P) G (D + E): Meta's
    rule with its threshold divided by 2 (for float32 keys and D = E).
    """
    topology = synthetic("nodes=2,ranks=1,leaf_gb_per_s=1,leaf_latency_us=0.001")
    rule = 2 * kv / heads
    for stored in (4096, 65536):
        for share in (rule / 2.5, rule / 1.6):
            new = round(share * stored / (1 - share))
            choice = choose(topology, shape(new, stored, heads=heads, kv=kv), FAST)
            assert choice.schedule.kind == ("tree" if share < rule / 2 else "ring")


def test_a_pair_that_fills_the_uplink_shares_it_and_a_figure_is_a_share():
    measured, given = Links(cluster()), Links(cluster(measured=False))
    assert measured.narrowest(0, 4) == 0.025e9
    assert given.narrowest(0, 4) == pytest.approx(2 * 0.025e9)
    assert Links(cluster(uplink_gb_per_s=0.12)).narrowest(0, 4) == 0.125e9


def test_more_ranks_than_tokens():
    topology = synthetic("nodes=4,gpus=4")
    for new, stored in ((1, 0), (1, 5000), (3, 2)):
        choice = choose(topology, shape(new, stored), GPU)
        assert choice.schedule.askers is not None
        assert choice.prices
        assert all(p.total_s > 0 for p in choice.prices.values())


def test_a_thousand_ranks():
    topology = synthetic("nodes=128,gpus=8")
    assert topology.world > ALL_PRICED
    choice = choose(topology, shape(1 << 20, heads=32), GPU)
    assert choice.schedule.kind == "ring"
    assert "tree: at least" in choice.reason


def test_what_does_not_fit_is_refused():
    topology = cluster()
    with pytest.raises(ValueError, match="unknown schedule 'star': choose one of ring, tree, hybrid"):
        choose(topology, shape(), GPU, kinds=["star"])
    with pytest.raises(ValueError, match="the topology describes 8 ranks, but 4 were launched"):
        price(schedule_on("ring", synthetic("nodes=1,ranks=4")), topology, shape(), GPU)
    with pytest.raises(
        UnknownBandwidthError, match=r"bandwidth between ranks 0 and 2 \(leaf\) is unknown: measure it, or give"
    ):
        choose(Topology(nodes=topology.nodes), shape(), GPU)
    with pytest.raises(UserError, match=r"segments \(0\) must be at least 1"):
        shape(segments=0)
    with pytest.raises(UserError, match=r"query heads \(9\) must be a multiple of the KV heads \(8\)"):
        shape(heads=9)
    with pytest.raises(UserError, match=r"new \(0\) must be at least 1"):
        shape(new=0)
    with pytest.raises(ValueError, match=r"attention_flops \(0\) must be positive"):
        Rates(attention_flops=0, memory_gb_per_s=1)
