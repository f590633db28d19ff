"""Schedules: who sends what to whom and who attends to what, in which round. Plain data, no communication.

A rank's *program* is a list of rounds. In a round a rank posts its sends and receives, attends while they travel, then
waits for the transfers that are due and merges the partials among them. The same programs are executed (`execute.py`),
checked, priced and drawn.

Two builders give all three kinds:

* `ring_program`: keys travel, queries stay. With several nodes the ring has two levels: the shards of one node go round
  the ring of another, while the next node's shards cross the boundary, sent one whole inner ring ahead.
* `hybrid_program`: keys travel round the ring of a node, queries and partials along a tree over the nodes. A *tree*
  schedule is this with every rank a node of its own; a flat ring is this with a single node.

Ranks are positions: the communicator is ordered along the rings (node by node) before a schedule is built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from cpmpi.choices import SCHEDULES

Kind = Literal["key", "query", "partial"]
Nodes = Sequence[Sequence[int]]  # the ranks of each node, in ring order
Parents = Sequence[int | None]  # the parent of each node (or rank) in a tree, None for the root
INNER, OUTER = 0, 1  # channels: a communicator each, so that slow links never queue before fast ones


class Item(NamedTuple):
    """What a message carries: the keys and values, the queries, or partials for the queries, of rank ``owner``."""

    kind: Kind
    owner: int


class Transfer(NamedTuple):
    """One message of a rank, to or from ``peer``; complete at the end of round ``due``."""

    peer: int
    items: tuple[Item, ...]
    channel: int
    due: int


class Attend(NamedTuple):
    """The queries of rank ``query`` attend to the keys of rank ``key``."""

    query: int
    key: int


@dataclass
class Round:
    """What one rank does in one round."""

    sends: list[Transfer] = field(default_factory=list)
    receives: list[Transfer] = field(default_factory=list)
    attends: list[Attend] = field(default_factory=list)


Program = list[Round]


def ring_program(nodes: Nodes, rank: int, steps: int | None = None) -> Program:
    """The program of ``rank`` when keys travel.

    With M nodes there are M outer steps. In outer step j the ring of node m circulates the shards of node m - j, dealt
    over its ranks where node sizes differ; meanwhile the same shards cross to node m + 1 on the outer channel. A rank
    holds at most the shards it attends to and the ones arriving on each channel.

    Args:
        nodes: the ranks of each node, in ring order.
        rank: whose program.
        steps: outer steps to go before stopping short; None for all. They are alike, so a price needs only a few.
    """
    m, place = _place(nodes, rank)
    ring = nodes[m]
    size = len(ring)
    outer = len(nodes) if steps is None else min(steps, len(nodes))
    program = [Round() for _ in range(outer * size)]

    def entry(node: int, step: int, at: int) -> tuple[int, ...]:
        """Shards that the rank at place ``at`` of ``node`` brings into the ring of outer step ``step``."""
        return tuple(nodes[(node - step) % len(nodes)][at % len(nodes[node]) :: len(nodes[node])])

    for step in range(outer):
        first = step * size
        last = first + size - 1
        for i in range(size):
            held, coming = entry(m, step, place - i), entry(m, step, place - i - 1)
            now = program[first + i]
            now.attends = [Attend(rank, key) for key in held]
            if i < size - 1:
                now.sends = _messages([(ring[(place + 1) % size], Item("key", o)) for o in held], INNER, first + i)
                now.receives = _messages([(ring[place - 1], Item("key", o)) for o in coming], INNER, first + i)
        if step < outer - 1:
            origin, succ, pred = nodes[(m - step) % len(nodes)], nodes[(m + 1) % len(nodes)], nodes[m - 1]
            ahead = [(succ[origin.index(o) % len(succ)], Item("key", o)) for o in entry(m, step, place)]
            origin = nodes[(m - step - 1) % len(nodes)]
            behind = [(pred[origin.index(o) % len(pred)], Item("key", o)) for o in entry(m, step + 1, place)]
            program[first].sends += _messages(ahead, OUTER, last)
            program[first].receives += _messages(behind, OUTER, last)
    return program


def hybrid_program(nodes: Nodes, parents: Parents, askers: Iterable[int], rank: int) -> Program:
    """The program of ``rank`` when keys travel inside nodes, and queries and partials along a tree over the nodes.

    A tree edge carries one message each way with queries (those of the ranks on its near side) and one with partials
    (for the ranks on its far side), for each rank of a node ("lane": a rank's place in its node, modulo the size of
    smaller nodes). Queries attend in the ``len(ring)`` rounds after they arrived: all keys of the node pass in them.

    Args:
        nodes: the ranks of each node, in ring order.
        parents: the parent of each node in the tree, None for the root.
        askers: the ranks that have queries.
        rank: whose program.
    """
    m, place = _place(nodes, rank)
    ring, size = nodes[m], len(nodes[m])
    hop = max(1, size // 2)  # rounds that a query may take along one tree edge, hidden behind the node's own queries
    home = {owner: (node, lane) for node, ranks in enumerate(nodes) for lane, owner in enumerate(ranks)}
    edges = _Edges(nodes, home, m, parents[m], [c for c, p in enumerate(parents) if p == m])
    subtrees = _subtrees(tuple(parents))
    below = {c: subtrees[c] for c in [m, *edges.children]}
    asking = sorted(askers)
    mine = [o for o in asking if home[o][1] % size == place]
    inside = {c: [o for o in mine if home[o][0] in below[c]] for c in below}
    outside = {c: [o for o in mine if home[o][0] not in below[c]] for c in below}

    # Rounds by which queries are here: own ones, those from the children, those from the parent (same for all lanes).
    up = hop if edges.children else 0
    arrival = {o: 0 if o == rank else hop if o in inside[m] else up + hop for o in mine}
    foreign = [o for o in asking if home[o][0] != m]
    turns = size + (0 if not foreign else up + hop if any(home[o][0] not in below[m] for o in foreign) else hop)
    turn_back = max(turns, edges.legs * hop)
    program = [Round() for _ in range(turn_back + edges.legs if len(nodes) > 1 else turns)]

    for i in range(turns):
        key = ring[(place - i) % size]
        program[i].attends = [Attend(o, key) for o in mine if arrival[o] <= i < arrival[o] + size]
        if i < turns - 1 and size > 1:
            succ, pred, coming = ring[(place + 1) % size], ring[place - 1], ring[(place - i - 1) % size]
            if succ != key:
                program[i].sends += _messages([(succ, Item("key", key))], INNER, i)
            if coming != rank:
                program[i].receives += _messages([(pred, Item("key", coming))], INNER, i)

    if len(nodes) > 1:
        edges.move(program, "query", 0, hop, inside, outside)
        edges.move(program, "partial", turn_back, 1, outside, inside)
    return program


class _Edges(NamedTuple):
    """The tree edges of one node, as each of its lanes goes along them; ``home``: the node and lane of each rank."""

    nodes: Nodes
    home: Mapping[int, tuple[int, int]]
    node: int
    parent: int | None
    children: list[int]

    @property
    def passes_on(self) -> bool:
        """Whether the node passes on what comes from above or beside; a root of one child has both ways go at once."""
        return self.parent is not None or len(self.children) > 1

    @property
    def legs(self) -> int:
        """Of a way up and down: from the children, to and from the parent, to the children."""
        return 1 + (self.parent is not None) + self.passes_on if self.children else 1

    def move(
        self, program: Program, kind: Kind, first: int, length: int, near: dict[int, list[int]],
        far: dict[int, list[int]],
    ) -> None:  # fmt: skip
        """Up from the children, to and from the parent, down to the children; each leg takes ``length`` rounds."""
        at = first
        for c in self.children:
            program[at].receives += self._along(c, kind, near[c], at + length - 1)
        if self.parent is not None:
            at += length if self.children else 0
            program[at].sends += self._along(self.parent, kind, near[self.node], at + length - 1)
            program[at].receives += self._along(self.parent, kind, far[self.node], at + length - 1)
        at += length if self.passes_on else 0
        for c in self.children:
            program[at].sends += self._along(c, kind, far[c], at + length - 1)

    def _along(self, other: int, kind: Kind, owners: list[int], due: int) -> list[Transfer]:
        """Messages of this lane to or from another node: with the rank there that has the owner's lane."""
        ring = self.nodes[other]
        return _messages([(ring[self.home[o][1] % len(ring)], Item(kind, o)) for o in owners], OUTER, due)


def rank_tree(nodes: Nodes, parents: Parents) -> Parents:
    """A tree over the ranks from one over the nodes: the parent of each rank, None for the root.

    The first rank of a node is its leader and joins the leaders' tree; from it two chains run along the ring, one each
    way, so that only neighbours in the ring talk and the depth is half the ring.
    """
    parent: list[int | None] = [None] * sum(map(len, nodes))
    for ring, above in zip(nodes, parents, strict=True):
        parent[ring[0]] = None if above is None else nodes[above][0]
        half = len(ring) // 2 + 1
        for chain in ([*ring[:half]], [ring[0], *reversed(ring[half:])]):
            for near, far in pairwise(chain):
                parent[far] = near
    return parent


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One of the three kinds on a machine: the ranks of each node in ring order, and the tree over the nodes.

    Args:
        kind: ``ring`` (keys travel), ``tree`` (queries travel) or ``hybrid`` (keys inside nodes, queries between).
        nodes: the ranks of each node, in ring order, its leader first.
        parents: the parent of each node in the tree, None for the root.
        askers: the ranks that have queries; None for all.

    Raises:
        ValueError: an unknown kind, or nodes and parents that do not fit.
    """

    kind: str
    nodes: Nodes
    parents: Parents
    askers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}: choose one of {', '.join(SCHEDULES)}")
        if len(self.nodes) != len(self.parents) or list(self.parents).count(None) != 1:
            raise ValueError(
                f"a tree over {len(self.nodes)} nodes needs as many parents, one of them None: {self.parents}"
            )
        if sorted(r for node in self.nodes for r in node) != list(range(self.world)):
            raise ValueError(f"the nodes must hold the ranks 0..{self.world - 1} once each: {self.nodes}")

    @property
    def world(self) -> int:
        """Ranks on all nodes."""
        return sum(map(len, self.nodes))

    @cached_property
    def tree(self) -> tuple[Nodes, Parents]:
        """What queries and partials travel along: the nodes and their parents or, of a tree, the ranks and theirs."""
        if self.kind == "tree":
            return [[rank] for rank in range(self.world)], rank_tree(self.nodes, self.parents)
        return self.nodes, self.parents

    def of(self, places: Mapping[int, int]) -> Schedule:
        """The same kind on the same nodes for some of the ranks, under other numbers.

        Args:
            places: the new number of each rank that takes part; every node has one that does.
        """
        nodes = [[places[rank] for rank in node if rank in places] for node in self.nodes]
        askers = self.askers and frozenset(places[rank] for rank in self.askers if rank in places)
        return Schedule(kind=self.kind, nodes=nodes, parents=self.parents, askers=askers)

    def program(self, rank: int, steps: int | None = None) -> Program:
        """What ``rank`` does, round by round; of a ring the first outer ``steps`` only, where given."""
        askers = range(self.world) if self.askers is None else self.askers
        if self.kind == "ring":
            return ring_program(self.nodes, rank, steps)
        return hybrid_program(*self.tree, askers, rank)


def releases(program: Program) -> list[list[Item]]:
    """Per round, the items that were received and are read for the last time in it, before they possibly come again."""
    uses: list[set[Item]] = [set() for _ in program]
    for i, now in enumerate(program):
        uses[i] |= {Item("query", q) for q, _ in now.attends} | {Item("key", k) for _, k in now.attends}
        for transfer in (*now.sends, *now.receives):
            uses[transfer.due] |= {item for item in transfer.items if item.kind != "partial"}
    released: list[list[Item]] = [[] for _ in program]
    needed: set[Item] = set()
    for i in reversed(range(len(program))):
        released[i] = sorted(uses[i] - needed)
        needed |= uses[i]
        needed -= {item for transfer in program[i].receives for item in transfer.items}
    return released


def _place(nodes: Nodes, rank: int) -> tuple[int, int]:
    """The node of a rank and its place in the node's ring."""
    return next((m, list(ring).index(rank)) for m, ring in enumerate(nodes) if rank in ring)


@lru_cache(maxsize=8)
def _subtrees(parents: tuple[int | None, ...]) -> list[frozenset[int]]:
    """For each node, the nodes at and below it."""
    below: list[set[int]] = [set() for _ in parents]
    for node in range(len(parents)):
        path, top = 0, node
        while True:
            below[top].add(node)
            above, path = parents[top], path + 1
            if above is None:
                break
            top = above
            assert path <= len(parents), f"the tree has a cycle: {parents}"
    return [frozenset(nodes) for nodes in below]


def _messages(pairs: Iterable[tuple[int, Item]], channel: int, due: int) -> list[Transfer]:
    """One transfer per peer, with all the items for it."""
    items: dict[int, list[Item]] = defaultdict(list)
    for peer, item in pairs:
        items[peer].append(item)
    return [Transfer(peer, tuple(items[peer]), channel, due) for peer in sorted(items)]
