"""Schedules as data: every causal pair once, matched messages, no deadlock, bounded memory, closed-form traffic."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.attention.layout import Layout
from cpmpi.attention.schedule import Item, Schedule, rank_tree, releases
from cpmpi.choices import SCHEDULES


@st.composite
def machines(draw, max_nodes=6, max_ring=5):
    """Nodes of uneven sizes and any tree over them, as (nodes, parents)."""
    sizes = draw(st.lists(st.integers(1, max_ring), min_size=1, max_size=max_nodes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    nodes = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
    order = draw(st.permutations(range(len(sizes))))
    parents = [None] * len(sizes)
    for i, node in enumerate(order[1:], start=1):
        parents[node] = order[draw(st.integers(0, i - 1))]
    return nodes, parents


def run(schedule):
    """Run all programs on sets: who attended to what, and the traffic; fails on a deadlock or a missing item.

    A transfer completes when both ends have posted it, as in a rendezvous; messages between two ranks on one channel
    match in order. Posting never undoes anything, so if one order of the ranks gets through, every order does.
    """
    world = schedule.world
    programs = [schedule.program(r) for r in range(world)]
    posted = defaultdict(list)  # (source, target, channel, end) -> items in order
    at = [0] * world
    entered = [False] * world
    held = [{Item("key", r), Item("query", r)} for r in range(world)]
    attended = [defaultdict(Counter) for _ in range(world)]  # [rank][query owner] -> Counter of key owners
    pending = [[] for _ in range(world)]
    traffic = Counter()
    resident = [0] * world
    released = [releases(p) for p in programs]

    def post(r, i):
        now = programs[r][i]
        for end, transfers in (("send", now.sends), ("receive", now.receives)):
            for t in transfers:
                assert t.due >= i
                way = (r, t.peer, t.channel) if end == "send" else (t.peer, r, t.channel)
                payload = []
                if end == "send":
                    for item in t.items:
                        if item.kind == "partial":
                            payload.append((item, attended[r].pop(item.owner, Counter())))
                        else:
                            assert item in held[r], f"rank {r} sends {item} in round {i} without holding it"
                            payload.append((item, None))
                        traffic[(r, t.peer, item)] += 1
                posted[(*way, end)].append((t.items, payload))
                pending[r].append((t.due, way, end, len(posted[(*way, end)]) - 1))
        for query, key in now.attends:
            assert {Item("query", query), Item("key", key)} <= held[r], f"rank {r} round {i}: {query} {key}"
            attended[r][query][key] += 1
        coming = sum(item.kind == "key" for t in now.receives for item in t.items)
        resident[r] = max(resident[r], coming + sum(i.kind == "key" and i.owner != r for i in held[r]))

    progress = True
    while progress:
        progress = False
        for r in range(world):
            while at[r] < len(programs[r]):
                if not entered[r]:
                    post(r, at[r])
                    entered[r] = progress = True
                due = [p for p in pending[r] if p[0] == at[r]]
                other = {"send": "receive", "receive": "send"}
                if any(len(posted[(*way, other[end])]) <= n for _, way, end, n in due):
                    break
                for p in due:
                    _, way, end, n = p
                    pending[r].remove(p)
                    if end == "receive":
                        items, payload = posted[(*way, "send")][n]
                        assert items == posted[(*way, "receive")][n][0], "the two ends disagree on what travels"
                        for item, counts in payload:
                            if item.kind == "partial":
                                attended[r][item.owner].update(counts)
                            else:
                                held[r].add(item)
                held[r] -= {item for item in released[r][at[r]] if item.owner != r}
                at[r] += 1
                entered[r] = False
                progress = True
    assert at == [len(p) for p in programs], f"deadlock: {at}"
    assert not any(pending)
    for (s, t, c, end), messages in posted.items():
        assert end == "receive" or len(messages) == len(posted[(s, t, c, "receive")])
    return attended, traffic, resident


@settings(max_examples=150, deadline=None)
@given(machines(), st.sampled_from(SCHEDULES), st.data())
def test_every_query_meets_every_key_once(machine, kind, data):
    nodes, parents = machine
    world = sum(map(len, nodes))
    askers = None if kind == "ring" else data.draw(st.none() | st.frozensets(st.integers(0, world - 1), min_size=1))
    schedule = Schedule(kind=kind, nodes=nodes, parents=parents, askers=askers)
    attended, traffic, resident = run(schedule)
    for owner in range(world) if askers is None else askers:
        assert attended[owner][owner] == Counter(range(world)), f"queries of rank {owner}"
    if kind == "ring":
        largest = max(-(-len(a) // len(b)) for a in nodes for b in nodes)
        assert max(resident) <= (2 if len(nodes) == 1 else 3) * largest
        for m, ring in enumerate(nodes):  # each shard crosses into each other node once
            into = Counter(
                item.owner for (s, t, item), n in traffic.items() for _ in range(n) if s not in ring and t in ring
            )
            assert into == Counter(r for n, other in enumerate(nodes) if n != m for r in other)
    if kind == "hybrid":
        assert max(resident) <= 2
    if kind == "tree":
        assert max(resident) == 0


@settings(max_examples=60, deadline=None)
@given(machines(), st.sampled_from(["ring", "hybrid"]))
def test_what_crosses_nodes_has_a_channel_of_its_own(machine, kind):
    """So that a message over a slow link never stands before one inside a node."""
    nodes, parents = machine
    home = {r: m for m, ring in enumerate(nodes) for r in ring}
    schedule = Schedule(kind=kind, nodes=nodes, parents=parents)
    for rank in range(schedule.world):
        for now in schedule.program(rank):
            for transfer in (*now.sends, *now.receives):
                assert transfer.channel == (0 if home[transfer.peer] == home[rank] else 1)


@settings(max_examples=100, deadline=None)
@given(machines(), st.sampled_from(["tree", "hybrid"]), st.data())
def test_each_tree_edge_carries_queries_one_way_and_partials_the_other(machine, kind, data):
    nodes, parents = machine
    world = sum(map(len, nodes))
    askers = data.draw(st.frozensets(st.integers(0, world - 1), min_size=1))
    schedule = Schedule(kind=kind, nodes=nodes, parents=parents, askers=askers)
    _, traffic, _ = run(schedule)
    home = {r: m for m, ring in enumerate(nodes) for r in ring}
    for m, above in enumerate(parents):
        if above is None:
            continue
        below = {n for n in range(len(nodes)) if _reaches(parents, n, m)}
        for up in (True, False):
            side = {r for r in range(world) if (home[r] in below) == up}
            crossing = Counter(
                item for (s, t, item), n in traffic.items() for _ in range(n)
                if item.kind != "key" and {home[s], home[t]} == {m, above} and (home[s] == m) == up
            )  # fmt: skip
            queries = Counter(Item("query", o) for o in askers if o in side)
            assert crossing == queries + Counter(Item("partial", o) for o in askers if o not in side)


def _reaches(parents, node, top):
    while node is not None and node != top:
        node = parents[node]
    return node == top


@settings(max_examples=100, deadline=None)
@given(machines())
def test_rank_tree_joins_all_ranks_with_short_chains(machine):
    nodes, parents = machine
    tree = rank_tree(nodes, parents)
    assert tree.count(None) == 1
    for ring in nodes:
        for rank in ring:
            steps = 0
            while rank != ring[0]:
                rank, steps = tree[rank], steps + 1
                assert rank in ring
            assert steps <= len(ring) // 2


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
def test_layout_covers_every_token_once(n_tokens, world, segments, start):
    layout = Layout(n_tokens=n_tokens, world=world, segments=segments, start=start)
    covered = sorted(i for r in range(world) for a, b in layout.pieces(r) for i in range(a, b))
    assert covered == list(range(start, start + n_tokens))
    for s in range(segments):  # pieces of a segment differ by at most a token
        first, last = (start + n_tokens * x // segments for x in (s, s + 1))
        sizes = [sum(p.size for p in layout.pieces(r) if first <= p.start < last) for r in range(world)]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(
    machines(max_nodes=3, max_ring=3),
    st.integers(1, 30),
    st.integers(0, 20),
    st.integers(1, 5),
    st.sampled_from(SCHEDULES),
)
def test_every_causal_pair_is_attended_exactly_once(machine, new, stored, segments, kind):
    """From owners down to single positions: new tokens after a stored context, each (query, key) pair once."""
    nodes, parents = machine
    world = sum(map(len, nodes))
    context = Layout(n_tokens=stored, world=world, segments=segments)
    grown = Layout(n_tokens=new, world=world, segments=segments, start=stored)
    attended, _, _ = run(Schedule(kind=kind, nodes=nodes, parents=parents))
    pairs = Counter()
    for owner in range(world):
        for key_owner, times in attended[owner][owner].items():
            for a, b in grown.pieces(owner):
                for c, d in (*context.pieces(key_owner), *grown.pieces(key_owner)):
                    pairs.update({(i, j): times for i in range(a, b) for j in range(c, d) if j <= i})
    assert pairs == Counter((i, j) for i in range(stored, stored + new) for j in range(i + 1))


def test_what_does_not_fit_is_refused_with_the_numbers_and_choices():
    with pytest.raises(ValueError, match="unknown schedule 'star': choose one of ring, tree, hybrid"):
        Schedule(kind="star", nodes=[[0]], parents=[None])
    with pytest.raises(ValueError, match="a tree over 2 nodes needs as many parents, one of them None"):
        Schedule(kind="tree", nodes=[[0], [1]], parents=[None])
    with pytest.raises(ValueError, match=r"the nodes must hold the ranks 0..1 once each"):
        Schedule(kind="ring", nodes=[[0], [0]], parents=[None, 0])
    with pytest.raises(ValueError, match=r"segments \(0\) must be at least 1"):
        Layout(n_tokens=4, world=1, segments=0)
