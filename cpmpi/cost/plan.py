"""What a job will take on an allocation: time by phase, memory, disk, the schedule, and whether it fits.

The model of a job, layer-major as it is run: for each layer every rank multiplies its tokens (chunk by chunk), attends
across ranks by the chosen schedule, and hands the layer's keys and values to a writer that works beside it. With
tensor parallelism of ``tp``, that many neighbouring ranks of a node act as one with as many times the arithmetic, each
with its share of the heads, and sum their results twice a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cpmpi.attention.grid import Grid, shares_heads
from cpmpi.choices import AUTO, check_segments
from cpmpi.cost.choose import Choice, NothingFitsError, choose, head_group
from cpmpi.cost.hardware import Hardware
from cpmpi.cost.memory import apart, parts_of
from cpmpi.cost.price import Price
from cpmpi.cost.shape import AttentionShape
from cpmpi.cost.workload import TokenSizes
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import DTYPES
from cpmpi.model.size import LayerKind, ModelSize
from cpmpi.text import counted, human_bytes, seconds_text
from cpmpi.topology.describe import Topology

DEVICE_SPARE = 0.05  # of a device's memory, for its runtime


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned.

    Raises:
        UserError: a number is out of range.
    """

    tokens: int
    """Length of the document."""
    dtype: str = "bfloat16"
    """To compute in."""
    kv_dtype: str | None = "bfloat16"
    """To store keys and values in; None to store none."""
    segments: int = 2
    """Segments that the document is cut into."""
    chunk_tokens: int = 1024
    """Tokens that go through a layer at a time."""
    tp: int = 1
    """Ranks that share the weights."""
    attention: str = AUTO
    """The schedule."""

    def __post_init__(self) -> None:
        check_segments(self.segments)
        for name in ("tokens", "chunk_tokens", "tp"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} ({getattr(self, name)}) must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What came out; seconds of one document, bytes of one rank.

    Attributes:
        schedule, reason: the chosen schedule, and one line that says why.
        seconds: by phase: ``attention`` (computing), ``matmul``, ``head``, ``exposed transfer``, ``tensor-parallel
            sums`` and ``KV writing`` (what of it is not hidden).
        weights_s: reading the weights, once for all documents.
        writing_s: writing keys and values, hidden or not.
        memory: of the fullest rank by what it is for, where it computes.
        host_memory: of the node, for such a rank, where a device has memory of its own.
        kv_bytes, disk_bytes: of the document's keys and values; of all that is written.
        memory_bytes: what a rank has.
        flops: of the document's arithmetic.
        ranks: of the job.
        price: of one layer of the costliest kind.
    """

    schedule: str
    reason: str
    seconds: dict[str, float]
    weights_s: float
    writing_s: float
    memory: dict[str, int]
    host_memory: dict[str, int]
    kv_bytes: int
    disk_bytes: int
    memory_bytes: int
    flops: float
    ranks: int
    price: Price

    @property
    def total_s(self) -> float:
        """The document, without reading the weights."""
        return sum(self.seconds.values())

    @property
    def needed_bytes(self) -> int:
        """Memory of the fullest rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a rank has that much."""
        return self.needed_bytes <= self.memory_bytes


def make_plan(model: ModelSize, request: Request, topology: Topology, hardware: Hardware) -> Plan:
    """Plan one document.

    Args:
        model: its size.
        request: what is to be done.
        topology: the allocation, a rank for each device.
        hardware: of a rank, computing in the request's type.

    Raises:
        UserError: tensor parallelism that does not divide the node's ranks or the heads.
        UnknownBandwidthError: nobody knows the bandwidth of a link.
        ValueError: an unknown schedule.
    """
    choice, prices = _choose_for_all(model, request, topology, hardware)
    available = int(hardware.memory_bytes * (1 - DEVICE_SPARE))
    resident = max(p.resident_bytes for p, _ in prices)
    kv_itemsize = 0 if request.kv_dtype is None else DTYPES[request.kv_dtype].itemsize
    kv_bytes = model.kv_numbers() * request.tokens * kv_itemsize
    largest = max(len(node.ranks) for node in topology.nodes)
    writing_s = kv_bytes * largest / topology.world / (hardware.disk_gb_per_s * 1e9)
    seconds = _seconds(model, request, topology, hardware, prices)
    last_layer = 1 / model.n_layers
    if kv_bytes:
        seconds["KV writing"] = max(writing_s * last_layer, writing_s - sum(seconds.values()) * (1 - last_layer))
    memory, host_memory = _memory(model, request, hardware, _rank_tokens(request, topology), resident)
    shapes = [(attention_shape(kind, request), count) for kind, count in model.layers]
    pairs = sum(s.mask.pairs(range(request.tokens), range(request.tokens)) * s.pair_flops * n for s, n in shapes)
    return Plan(
        schedule=choice.schedule.kind, reason=choice.reason, seconds=seconds, writing_s=writing_s, kv_bytes=kv_bytes,
        memory=memory, host_memory=host_memory,
        weights_s=model.parameters * DTYPES[request.dtype].itemsize / (hardware.disk_gb_per_s * 1e9),
        disk_bytes=kv_bytes + request.tokens * 8, memory_bytes=available, ranks=topology.world,
        flops=2.0 * (model.active + model.head) * request.tokens + pairs * request.tp, price=prices[0][0],
    )  # fmt: skip


def _choose_for_all(
    model: ModelSize, request: Request, topology: Topology, hardware: Hardware
) -> tuple[Choice, list[tuple[Price, int]]]:
    """The schedule that suits the costliest kind of layer, and the price of every kind by it, with their numbers."""
    grids = [grid_of(kind, request.tp) for kind, _ in model.layers]
    groups = head_group(topology, grids[0])
    shapes = [(attention_shape(kind, request), count) for kind, count in model.layers]
    kinds = None if request.attention == AUTO else [request.attention]
    taken, _ = _memory(model, request, hardware, _rank_tokens(request, topology), resident=0)
    room = max(int(hardware.memory_bytes * (1 - DEVICE_SPARE)) - sum(taken.values()), 1)
    try:
        choice = choose(groups, shapes[0][0], hardware.rates, memory=room, kinds=kinds)
    except NothingFitsError:  # the plan says so, and what it would take
        choice = choose(groups, shapes[0][0], hardware.rates, kinds=kinds)
    chosen = choice.schedule.kind
    prices = [(choice.prices[chosen], shapes[0][1])]
    prices += [(choose(groups, s, hardware.rates, kinds=[chosen]).prices[chosen], n) for s, n in shapes[1:]]
    return choice, prices


def _seconds(
    model: ModelSize, request: Request, topology: Topology, hardware: Hardware, prices: Sequence[tuple[Price, int]]
) -> dict[str, float]:
    """Seconds of a document by phase, but for writing keys and values."""
    tokens, products = _rank_tokens(request, topology), hardware.matmul_flops * request.tp
    seconds = {
        "attention": sum(p.compute_s * n for p, n in prices),
        "matmul": 2 * model.active * tokens / products,
        "head": 2 * model.head * tokens / products,
        "exposed transfer": sum(p.exposed_s * n for p, n in prices),
    }
    if request.tp > 1:
        summed = tokens * model.hidden * DTYPES[request.dtype].itemsize * 2 * (request.tp - 1) / request.tp
        one, two, *_ = topology.nodes[0].ranks
        rate, _ = topology.known_link(one.rank, two.rank)
        seconds["tensor-parallel sums"] = 2 * model.n_layers * summed / rate
    return seconds


def _rank_tokens(request: Request, topology: Topology) -> int:
    """Tokens of the fullest rank."""
    return -(-request.tokens // (topology.world // request.tp))


def attention_shape(kind: LayerKind, request: Request) -> AttentionShape:
    """A layer's attention as one of ``tp`` ranks has it: with its share of the query heads and of the KV heads."""
    grid = grid_of(kind, request.tp)
    return AttentionShape(
        new=request.tokens, query_heads=kind.query_heads // grid.tp, kv_heads=kind.kv_heads // grid.head_groups,
        key_dim=kind.key_dim, value_dim=kind.value_dim, itemsize=DTYPES[request.dtype].itemsize,
        segments=request.segments, mask=kind.mask, copies=grid.copies,
    )  # fmt: skip


def grid_of(kind: LayerKind, tp: int) -> Grid:
    """How ``tp`` ranks share a layer's heads.

    Raises:
        UserError: they cannot share them evenly.
    """
    if not shares_heads(tp, kind.query_heads, kind.kv_heads):
        raise UserError(
            f"tensor parallelism ({tp}) must divide the {kind.query_heads} query heads, and divide the "
            f"{kind.kv_heads} KV heads or be a multiple of them"
        )
    return Grid(tp=tp, head_groups=min(tp, kind.kv_heads))


def _memory(
    model: ModelSize, request: Request, hardware: Hardware, rank_tokens: int, resident: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a rank by what they are for, as a job states them at its start: where it computes, and of the node."""
    shape = max((attention_shape(kind, request) for kind, _ in model.layers), key=lambda s: s.key_bytes)
    sizes = TokenSizes(
        hidden=model.hidden, inner=model.inner // request.tp, vocabulary=model.vocabulary,
        chunk_tokens=request.chunk_tokens,
        stored_itemsize=DTYPES[request.kv_dtype].itemsize if request.kv_dtype else 0,
        checkpoint_bytes=model.hidden * shape.itemsize,
    )  # fmt: skip
    parts = parts_of(shape, sizes, tokens=rank_tokens, resident=resident)
    own, host = apart(parts, on_device=hardware.device != "cpu")
    program = {"program": int(hardware.program_bytes)} if hardware.program_bytes else {}
    return {"weights": _weights(model, request.tp) * shape.itemsize, **program, **own}, host


def _weights(model: ModelSize, tp: int) -> int:
    """Parameters on each of ``tp`` ranks that share them."""
    return (model.parameters - model.outside) // tp + model.outside


def mends(model: ModelSize, request: Request, topology: Topology, hardware: Hardware) -> Iterator[str]:
    """What would make a plan fit that does not: more tensor parallelism, more nodes, or both; as far as it helps."""
    largest = max(len(node.ranks) for node in topology.nodes)
    room = hardware.memory_bytes * (1 - DEVICE_SPARE)
    itemsize = DTYPES[request.dtype].itemsize
    sharing = [
        t
        for t in range(request.tp, largest + 1)
        if largest % t == 0 and all(shares_heads(t, k.query_heads, k.kv_heads) for k, _ in model.layers)
    ]
    for tp in sharing:
        if _weights(model, tp) * itemsize >= room:
            continue
        asked = replace(request, tp=tp)
        factor = 1
        while factor <= 1 << 12:
            tokens = -(-request.tokens * tp // (topology.world * factor))
            # A ring's share of a layer: own queries, partials and keys, and four more shards of keys.
            shape = attention_shape(model.layers[0][0], asked)
            resident = tokens * (shape.query_bytes + shape.partial_bytes + 5 * shape.key_bytes)
            memory = sum(_memory(model, asked, hardware, tokens, resident)[0].values())
            if memory <= room:
                break
            factor *= 2
        else:
            continue
        nodes = len(topology.nodes) * factor
        words = [f"tensor parallelism of {tp}"] if tp > request.tp else []
        words += [f"{nodes:,} nodes instead of {len(topology.nodes)}"] if factor > 1 else []
        if words:
            yield f"{' and '.join(words)}: {human_bytes(memory)} a rank"
    most = max(sharing, default=1)
    if (least := _weights(model, most) * itemsize) >= room:
        weights = human_bytes(model.parameters * itemsize)
        yield (
            f"devices with more than {human_bytes(least)}: the weights are {weights}, and a "
            f"node's {largest} ranks can share them at most {most} ways"
        )


def plan_text(p: Plan, model: ModelSize, request: Request, topology: Topology, hardware: Hardware) -> str:
    """The plan in words, for a terminal."""
    tp = f", {request.tp} ranks to a copy of the weights" if request.tp > 1 else ""
    lines = [
        f"model: {model.name}, {model.parameters / 1e9:.3g} billion parameters, {request.dtype}",
        f"machine: {counted(p.ranks, 'rank')} on {counted(len(topology.nodes), 'node')}{tp}; {hardware.name}",
        f"document: {request.tokens:,} tokens, {p.flops:.3g} FLOPs; "
        + (f"KV {human_bytes(p.kv_bytes)} as {request.kv_dtype}" if request.kv_dtype else "no KV kept"),
        f"attention: {p.reason} (a layer)",
        f"time: {seconds_text(p.total_s)} a document, {p.flops / p.total_s / p.ranks / 1e12:.3g} TFLOP/s a rank",
    ]
    lines += [f"  {name:<21} {seconds_text(s):>9}  {s / p.total_s:4.0%}" for name, s in p.seconds.items()]
    hidden = f" ({seconds_text(p.writing_s)} of writing in all)" if p.kv_bytes else ""
    lines.append(f"  before it: reading the weights {seconds_text(p.weights_s)}{hidden}")
    lines.append(f"memory: {human_bytes(p.needed_bytes)} of {human_bytes(p.memory_bytes)} a rank")
    lines += [f"  {name:<21} {human_bytes(size):>9}" for name, size in p.memory.items()]
    if on_host := sum(p.host_memory.values()):
        lines.append(f"memory of the node: {human_bytes(on_host)} a rank ({', '.join(p.host_memory)}) and the program")
    lines.append(f"disk: {human_bytes(p.disk_bytes)}")
    if model.max_positions is not None and request.tokens > model.max_positions:
        lines.append(f"note: the model was made for {model.max_positions:,} positions; jobs need --allow-longer")
    return "\n".join(lines)
