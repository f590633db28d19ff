"""What one layer's attention costs by a schedule on a described machine: time, bytes on every wire, memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpmpi.attention.schedule import Item, Program, Schedule, releases
from cpmpi.cost.links import Links
from cpmpi.cost.lockstep import OutOfStepError, in_step, play_ring
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.cost.simulate import Played, Seconds, Sizes, attend_seconds, play
from cpmpi.text import seconds_text
from cpmpi.timeline.intervals import Interval
from cpmpi.topology.describe import Topology

MOST_ROUNDS = 50_000  # rounds of all ranks that are played through one by one
MOST_STEPPED, MOST_CROSSING = 20_000, 300_000  # rounds of a rank, and messages between nodes, played through in step
FEW_STEPS = 4  # outer steps of a ring that is longer
SAMPLED_RANKS = 16  # whose memory is followed where there are more


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one layer's attention takes.

    Attributes:
        total_s: until the last rank is done.
        compute_s: what the busiest rank computes and merges.
        exposed_s: the rest of ``total_s``: waiting for messages, and for ranks that have more to do.
        link_bytes: bytes over each wire by its name (see `Links`).
        resident_bytes: the most that a rank holds of this layer: queries, keys, partials, and messages under way.
        intervals: what ranks do when, for a timeline: all of them, or 32 of many; none of very long rings.
        extrapolated: whether a long ring was priced by its first steps.
    """

    total_s: float
    compute_s: float
    exposed_s: float
    link_bytes: dict[str, int]
    resident_bytes: int
    intervals: tuple[Interval, ...] = field(default=(), repr=False)
    extrapolated: bool = False

    @property
    def busiest_bytes(self) -> int:
        """Bytes over the wire that carries the most."""
        return max(self.link_bytes.values(), default=0)

    def __str__(self) -> str:
        waits = self.exposed_s >= 1e-3 * self.total_s
        return f"{seconds_text(self.total_s)}, {seconds_text(self.exposed_s) if waits else 'none'} of it waiting"


def price(
    schedule: Schedule, topology: Topology, shape: AttentionShape, rates: Rates, *, links: Links | None = None,
    seconds: Seconds | None = None,
) -> Price:  # fmt: skip
    """What ``schedule`` takes on ``topology``, whose ranks are its positions in `topology.derive.rank_order`.

    All ranks are played through round by round (`simulate`); those of a ring with more than ``MOST_ROUNDS`` rounds in
    all in step (`lockstep`), which gives the same times, where its nodes are alike. Of a ring too long for either,
    ``FEW_STEPS`` outer steps are played, and the others are taken to last as long as the inner ones of these: the steps
    of a ring repeat themselves, as long as the layout gives all ranks the same work. Memory is followed on all ranks up
    to ``SAMPLED_RANKS``, else on so many evenly spread ones.

    Args:
        schedule: what to price.
        topology: the machine.
        shape: of the attention.
        rates: of a rank.
        links, seconds: the machine's `Links`, and what `attend_seconds` gives, where several prices share them.

    Raises:
        ValueError: the schedule is for another number of ranks.
        UnknownBandwidthError: a bandwidth is not known.
    """
    topology.require(schedule.world)
    links = links or Links(topology)
    seconds = attend_seconds(shape, rates, schedule.world) if seconds is None else seconds
    resident = resident_bytes(schedule, shape)
    played, steps = _played(schedule, shape, rates, links, seconds)
    if steps is not None:
        return _extrapolated(schedule, played, links, resident)
    compute_s = max(played.busy_s)
    return Price(
        total_s=played.total_s, compute_s=compute_s, exposed_s=max(0.0, played.total_s - compute_s),
        link_bytes={links.names[wire]: n for wire, n in sorted(played.wire_bytes.items())},
        resident_bytes=resident, intervals=tuple(played.intervals),
    )  # fmt: skip


def _played(
    schedule: Schedule, shape: AttentionShape, rates: Rates, links: Links, seconds: Seconds
) -> tuple[Played, int | None]:
    """A schedule played through, and how many of its outer steps were; None for all."""
    outer = len(schedule.nodes)
    rounds = sum(len(node) ** 2 for node in schedule.nodes) * outer
    if schedule.kind != "ring" or rounds <= MOST_ROUNDS:
        return play(schedule, shape, rates, links, seconds), None
    if in_step(schedule, links):
        few = outer * schedule.world > MOST_CROSSING or outer * len(schedule.nodes[0]) > MOST_STEPPED
        steps = FEW_STEPS if few and outer > FEW_STEPS else None
        try:
            return play_ring(schedule, Sizes(shape, schedule.world), rates, links, seconds, steps), steps
        except OutOfStepError:
            pass
    steps = FEW_STEPS if outer > FEW_STEPS else None
    return play(schedule, shape, rates, links, seconds, steps), steps


def _extrapolated(schedule: Schedule, played: Played, links: Links, resident: int) -> Price:
    """The price of a ring from its first `FEW_STEPS` steps."""
    sizes = {rank: len(node) for node in schedule.nodes for rank in node}
    ends = [max(played.round_ends[r][n * step - 1] for r, n in sizes.items()) for step in range(1, FEW_STEPS)]
    outer = len(schedule.nodes)
    total_s = played.total_s + (outer - FEW_STEPS) * (ends[-1] - ends[0]) / (FEW_STEPS - 2)
    compute_s = max(played.busy_s) * outer / FEW_STEPS
    link_bytes = {}
    for wire, n_bytes in sorted(played.wire_bytes.items()):
        name = links.names[wire]  # shards go round a node in each step, and on to the next node between steps
        often = outer / FEW_STEPS if name.startswith("rank ") else (outer - 1) / (FEW_STEPS - 1)
        link_bytes[name] = round(n_bytes * often)
    return Price(
        total_s=total_s, compute_s=min(compute_s, total_s), exposed_s=max(0.0, total_s - compute_s),
        link_bytes=link_bytes, resident_bytes=resident, extrapolated=True,
    )  # fmt: skip


def resident_bytes(schedule: Schedule, shape: AttentionShape) -> int:
    """The most bytes of a layer's queries, keys, partials and messages that a rank holds, over ranks and rounds."""
    world = schedule.world
    count = min(world, SAMPLED_RANKS)
    sample = sorted({round(i * (world - 1) / max(1, count - 1)) for i in range(count)})
    steps = FEW_STEPS if schedule.kind == "ring" else None
    sizes = Sizes(shape, world)
    return max(_peak(schedule.program(rank, steps), rank, sizes) for rank in sample)


def _peak(program: Program, rank: int, sizes: Sizes) -> int:
    """The most bytes of queries, keys, partials and copies under way that a rank holds in one of its rounds."""
    peak = own = sum(sizes.of[kind][rank] for kind in sizes.of)
    foreign: set[Item] = set()
    under_way = 0
    landing: list[list[Item]] = [[] for _ in program]  # what is complete at the end of each round
    for now, arrived, released in zip(program, landing, releases(program), strict=True):
        leaving = [(t.due, item) for t in now.sends for item in t.items if item.kind == "partial"]
        coming = [(t.due, item) for t in now.receives for item in t.items]
        for due, item in (*leaving, *coming):
            landing[due].append(item)
        under_way += sizes.bytes([item for _, item in (*leaving, *coming)])
        foreign |= {Item("partial", query) for query, _ in now.attends}
        peak = max(peak, own + sizes.bytes([item for item in foreign if item.owner != rank]) + under_way)
        under_way -= sizes.bytes(arrived)
        foreign |= set(arrived)
        foreign -= {*released, *(item for _, item in leaving)}
    return peak
