"""Choose the schedule: build the candidates for a machine, price them, take the cheapest, and say why in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpmpi.attention.grid import Grid
from cpmpi.attention.schedule import Schedule
from cpmpi.choices import SCHEDULES
from cpmpi.comm.ranks import Ranks
from cpmpi.cost.links import Links
from cpmpi.cost.measure import measure_together
from cpmpi.cost.price import Price, price
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.cost.simulate import Seconds, attend_seconds
from cpmpi.cost.workload import Workload
from cpmpi.errors import UserError
from cpmpi.kernels.mask import Mask
from cpmpi.text import seconds_text
from cpmpi.topology.derive import node_order, rings, tree
from cpmpi.topology.describe import Node, Topology, UnknownBandwidthError

ALIKE = 1.05  # up to this times the least price, prices count as equal; networks vary most, so the fewest bytes win
ALL_PRICED = 64  # ranks up to which all candidates are priced; beyond, only those that could be the cheapest


class NothingFitsError(UserError):
    """No schedule fits into the memory that there is; the text names what each needs."""


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
        for kind in SCHEDULES
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
        NothingFitsError: nothing fits the memory.
        UnknownBandwidthError: a bandwidth that the price needs is not known.
        ValueError: an unknown kind.
    """
    askers = shape.asking(topology.world)
    schedules = candidates(topology, askers) if kinds is None else [schedule_on(k, topology, askers) for k in kinds]
    links = Links(topology)
    prices: dict[str, Price] = {}
    seconds = attend_seconds(shape, rates, topology.world)
    bounds = {s.kind: least_seconds(s, shape, rates, links, seconds) for s in schedules}
    for schedule in sorted(schedules, key=lambda s: bounds[s.kind]):
        affordable = [p.total_s for p in prices.values() if memory is None or p.resident_bytes <= memory]
        if topology.world <= ALL_PRICED or not affordable or bounds[schedule.kind] < min(affordable):
            prices[schedule.kind] = price(schedule, topology, shape, rates, links=links, seconds=seconds)
    fitting = [kind for kind, p in prices.items() if memory is None or p.resident_bytes <= memory]
    if not fitting:
        needs = ", ".join(f"{kind} {p.resident_bytes / 1e9:.3g} GB" for kind, p in prices.items())
        raise NothingFitsError(f"no schedule fits into {(memory or 0) / 1e9:.3g} GB for a layer's attention: {needs}")
    least = min(prices[kind].total_s for kind in fitting)
    alike = [kind for kind in fitting if prices[kind].total_s <= ALIKE * least]
    best = min(alike, key=lambda kind: (prices[kind].busiest_bytes, prices[kind].total_s))
    words = [reason(best, prices, memory)]
    words += [f"{kind}: at least {seconds_text(bound)}" for kind, bound in bounds.items() if kind not in prices]
    return Choice(next(s for s in schedules if s.kind == best), "; ".join(words), prices)


def least_seconds(schedule: Schedule, shape: AttentionShape, rates: Rates, links: Links, seconds: Seconds) -> float:
    """A time that one layer's attention takes at least, from arithmetic and the bytes that must enter a node.

    A ring brings every key from elsewhere into each node. Of a tree, an outer node's one edge first brings the queries
    of all others in and, once they have met its keys, takes their partials out: one message, or a lane for each rank.
    ``seconds`` is what `attend_seconds` gives.
    """
    world = schedule.world
    pairs = shape.mask.pairs(range(shape.stored, shape.tokens), range(shape.tokens))
    computing = shape.copies * pairs * shape.pair_flops / rates.attention_flops / world
    if schedule.kind != "ring":
        computing = max(computing, _least_of_a_leaf(schedule, shape, links, seconds))
    if len(schedule.nodes) == 1:
        return computing
    outer = [m for m in range(len(schedule.nodes)) if m not in schedule.parents]
    node = max(outer, key=lambda m: len(schedule.nodes[m]))
    ranks, up = schedule.nodes[node], schedule.parents[node]
    assert up is not None
    elsewhere = 1 - len(ranks) / world
    if schedule.kind == "ring":
        before = schedule.nodes[node - 1]
        rate = links.together(before[0], ranks[0], max(len(before), len(ranks)))
        return max(computing, shape.tokens * elsewhere * shape.key_bytes / rate)
    lanes = 1 if schedule.kind == "tree" else len(ranks)
    out, into = (ranks[0], schedule.nodes[up][0]), (schedule.nodes[up][0], ranks[0])
    rate_out, rate_in = (links.together(*way, lanes) for way in (out, into))
    moving = shape.query_bytes / rate_in + shape.partial_bytes / rate_out
    return max(computing, shape.copies * shape.new * elsewhere * moving)


def _least_of_a_leaf(schedule: Schedule, shape: AttentionShape, links: Links, seconds: Seconds) -> float:
    """What an outer node of a tree takes: each of its lanes computes, and then its partials go up to its parent."""
    nodes, parents = schedule.tree
    if len(nodes) == 1:
        return 0.0
    leaf = max(m for m in range(len(nodes)) if m not in parents)
    ranks, up = list(nodes[leaf]), parents[leaf]
    assert up is not None
    lanes_N = np.empty(schedule.world, np.int64)
    for node in nodes:
        lanes_N[list(node)] = np.arange(len(node)) % len(ranks)
    asking = np.array(sorted(range(schedule.world) if schedule.askers is None else schedule.askers))
    spent = np.bincount(lanes_N[asking], seconds[asking][:, ranks].sum(axis=1), len(ranks))
    layout = shape.query_layout(schedule.world)
    outside = sum(layout.size(rank) for rank in set(asking.tolist()) - set(ranks))
    rate = links.together(ranks[0], nodes[up][0], len(ranks))
    return float(spent.min()) + outside * shape.partial_bytes / rate


def reason(best: str, prices: dict[str, Price], memory: int | None = None) -> str:
    """One line: the chosen schedule's time first, then the others' from the fastest on."""
    words = [f"{best}: {prices[best]}"]
    for kind, p in sorted(prices.items(), key=lambda entry: entry[1].total_s):
        if kind != best and memory is not None and p.resident_bytes > memory:
            words.append(f"{kind}: {p.resident_bytes / 1e9:.3g} GB do not fit")
        elif kind != best:
            words.append(f"{kind}: {seconds_text(p.total_s)}")
    return "; ".join(words)


def head_group(topology: Topology, grid: Grid) -> Topology:
    """The machine as the ranks of one head group see it, by their positions.

    The other groups send as much at the same time: a node's network devices are shared out among them, or the bandwidth
    of one is.

    Raises:
        UserError: ``tp`` does not divide a node's ranks.
    """
    if grid.tp == 1:
        return topology
    nodes: list[Node] = []
    for node in topology.nodes:
        if len(node.ranks) % grid.tp:
            count = len(node.ranks)
            raise UserError(f"tensor parallelism ({grid.tp}) must divide the {count} ranks of node {node.name}")
        kept = [replace(place, rank=grid.position(place.rank)) for place in node.ranks if not grid.group(place.rank)]
        networks = node.fast_networks[:: min(grid.head_groups, len(node.fast_networks) or 1)]
        nodes.append(replace(node, ranks=tuple(kept), networks=networks))
    devices = min(max(1, len(node.fast_networks)) for node in topology.nodes)
    share = min(1.0, devices / grid.head_groups)
    measured = []
    for m in topology.measured:
        if not (grid.group(m.a) or grid.group(m.b)):
            outside = topology.node_of(m.a) != topology.node_of(m.b)
            rate = m.gb_per_s * share if outside and m.gb_per_s is not None else m.gb_per_s
            measured.append(replace(m, a=grid.position(m.a), b=grid.position(m.b), gb_per_s=rate))
    return replace(topology, nodes=tuple(nodes), measured=tuple(measured))


def choose_schedule(ranks: Ranks, topology: Topology, kind: str, work: Workload) -> tuple[Schedule, str]:
    """The schedule of a head group for a job's work, and one line that says why. Collective.

    ``auto`` prices every kind with this machine's measured links and kernel and takes the cheapest. Where a link's
    bandwidth could not be measured nothing can be priced, and it is the ring.
    """
    grid, layers = work.grid, work.layers
    places = {grid.rank(0, position): position for position in range(ranks.size // grid.head_groups)}
    if kind != "auto":
        return schedule_on(kind, topology).of(places), f"{kind}: as asked for"
    if len(places) == 1:
        return schedule_on("ring", topology).of(places), f"ring: one rank{' a head group' * (grid.tp > 1)}"
    priced = min(range(len(layers)), key=lambda i: layers[i].rule.mask != Mask())  # one that sees all, where one does
    shape = work.shape(layers[priced])
    measured = measure_together(
        ranks.comm, work.carrier, work.backends[priced], layers[priced].heads, work.device, shape.block(len(places))
    )  # fmt: skip

    def decide() -> tuple[str, str]:
        try:
            choice = choose(head_group(topology, grid), shape, measured)
        except UnknownBandwidthError as problem:
            return "ring", f"ring: not priced, {problem}"
        return choice.schedule.kind, f"{choice.reason} (expected for each layer)"

    kind, reason = ranks.on_root(decide)
    return schedule_on(kind, topology).of(places), reason
