"""Choose the schedule: build the candidates for a machine, price them, take the cheapest, and say why in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cpmpi.cost import Price, price, seconds_text
from cpmpi.links import Links
from cpmpi.rates import Rates
from cpmpi.schedule import KINDS, Schedule
from cpmpi.shape import AttentionShape
from cpmpi.topology.derive import node_order, rings, tree
from cpmpi.topology.describe import Topology

ALIKE = 1.05  # times the least price: not told apart; of these, the one that sends the least: networks vary the most
ALL_PRICED = 64  # ranks up to which every candidate is priced; beyond, those that might be the cheapest


class Choice(NamedTuple):
    """The cheapest schedule, why it was chosen, and the prices of all that were looked at."""

    schedule: Schedule
    reason: str
    prices: dict[str, Price]


def schedule_on(kind: str, topology: Topology, askers: frozenset[int] | None = None) -> Schedule:
    """A schedule on a machine. Its ranks are positions: place p stands for rank ``rank_order(topology)[p]``.

    Args:
        kind: ring, tree or hybrid.
        topology: the machine.
        askers: the positions that have queries, None for all.

    Raises:
        ValueError: an unknown kind; the choices are listed.
    """
    by_node, spanning, order = rings(topology), tree(topology), node_order(topology)
    nodes: list[list[int]] = []
    first = 0
    for node in order:
        size = len(by_node[node])
        lead = by_node[node].index(spanning.leaders[node])
        nodes.append([first + (lead + i) % size for i in range(size)])
        first += size
    place = {node: i for i, node in enumerate(order)}
    above = (spanning.parent[node] for node in order)
    parents = [None if up is None else place[up] for up in above]
    return Schedule(kind=kind, nodes=nodes, parents=parents, askers=askers)


def candidates(topology: Topology, askers: frozenset[int] | None = None) -> list[Schedule]:
    """The schedules worth a price: hybrid is a ring on a single node, and a tree where every node has one rank."""
    kinds = [
        kind
        for kind in KINDS
        if not (kind == "tree" and topology.world == 1)
        and not (kind == "hybrid" and (len(topology.nodes) == 1 or len(topology.nodes) == topology.world))
    ]
    return [schedule_on(kind, topology, askers) for kind in kinds]


def choose(
    topology: Topology,
    shape: AttentionShape,
    rates: Rates,
    *,
    memory: int | None = None,
    kinds: Sequence[str] | None = None,
) -> Choice:
    """The schedule that takes the least time for one layer's attention; of several that take as good as that, the one
    that sends the least over its busiest wire.

    Args:
        topology: the machine, with its bandwidths.
        shape: of the attention.
        rates: of a rank.
        memory: bytes that one layer's queries, keys, partials and messages may take on a rank; None: any number.
        kinds: the kinds to choose from; None: all that differ on this machine.

    Raises:
        ValueError: nothing fits the memory, an unknown kind, or a bandwidth that the price needs is not known.
    """
    askers = shape.asking(topology.world)
    schedules = candidates(topology, askers) if kinds is None else [schedule_on(k, topology, askers) for k in kinds]
    links = Links(topology)
    prices: dict[str, Price] = {}
    bounds = {s.kind: least_seconds(s, shape, rates, links) for s in schedules}
    for schedule in sorted(schedules, key=lambda s: bounds[s.kind]):
        affordable = [p.total_s for p in prices.values() if memory is None or p.resident_bytes <= memory]
        if topology.world <= ALL_PRICED or not affordable or bounds[schedule.kind] < min(affordable):
            prices[schedule.kind] = price(schedule, topology, shape, rates, links=links)
    fitting = [kind for kind, p in prices.items() if memory is None or p.resident_bytes <= memory]
    if not fitting:
        needs = ", ".join(f"{kind} {p.resident_bytes / 1e9:.3g} GB" for kind, p in prices.items())
        raise ValueError(f"no schedule fits into {(memory or 0) / 1e9:.3g} GB for a layer's attention: {needs}")
    least = min(prices[kind].total_s for kind in fitting)
    alike = [kind for kind in fitting if prices[kind].total_s <= ALIKE * least]
    best = min(alike, key=lambda kind: (prices[kind].busiest_bytes, prices[kind].total_s))
    words = [reason(best, prices, memory)]
    words += [f"{kind}: at least {seconds_text(bound)}" for kind, bound in bounds.items() if kind not in prices]
    return Choice(next(s for s in schedules if s.kind == best), "; ".join(words), prices)


def least_seconds(schedule: Schedule, shape: AttentionShape, rates: Rates, links: Links) -> float:
    """A time that one layer's attention takes at least, from arithmetic and the bytes that must enter a node.

    A ring brings every key from elsewhere into each node. Of a tree, an outer node's one edge first brings the queries
    of all others in and, once they have met its keys, takes their partials out: one message, or a lane for each rank.
    """
    world = schedule.world
    pairs = shape.mask.pairs(range(shape.stored, shape.tokens), range(shape.tokens))
    computing = shape.copies * pairs * shape.pair_flops / rates.attention_flops / world
    if len(schedule.nodes) == 1:
        return computing
    outer = [m for m in range(len(schedule.nodes)) if m not in schedule.parents]
    node = max(outer, key=lambda m: len(schedule.nodes[m]))
    ranks, up = schedule.nodes[node], schedule.parents[node]
    assert up is not None
    elsewhere = 1 - len(ranks) / world
    if schedule.kind == "ring":
        before = schedule.nodes[node - 1][0]
        return max(computing, shape.tokens * elsewhere * shape.key_bytes / links.narrowest(before, ranks[0]))
    lanes = 1 if schedule.kind == "tree" else len(ranks)
    out, into = (ranks[0], schedule.nodes[up][0]), (schedule.nodes[up][0], ranks[0])
    rate_out, rate_in = (min(links.narrowest(*way), lanes * links.route(*way).bytes_per_s) for way in (out, into))
    moving = shape.query_bytes / rate_in + shape.partial_bytes / rate_out
    return max(computing, shape.copies * shape.new * elsewhere * moving)


def reason(best: str, prices: dict[str, Price], memory: int | None = None) -> str:
    """One line: the chosen schedule's time first, then the others' from the fastest on."""
    words = [f"{best}: {prices[best]}"]
    for kind, p in sorted(prices.items(), key=lambda entry: entry[1].total_s):
        if kind != best and memory is not None and p.resident_bytes > memory:
            words.append(f"{kind}: {p.resident_bytes / 1e9:.3g} GB do not fit")
        elif kind != best:
            words.append(f"{kind}: {seconds_text(p.total_s)}")
    return "; ".join(words)
