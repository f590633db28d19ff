"""How much memory a rank needs for a document, part by part, and whether its weights can all stay there.

Legend: T tokens of the rank, C tokens of a chunk, H query heads, G KV heads, D key head dim, E value head dim,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpmpi.attention.schedule import Schedule
from cpmpi.comm.device import Room
from cpmpi.cost.price import resident_bytes
from cpmpi.cost.shape import PARTIAL_ITEMSIZE, AttentionShape
from cpmpi.cost.workload import TokenSizes, Workload
from cpmpi.errors import UserError
from cpmpi.model.weights import WeightBytes

HEAD_TOKENS = 256  # tokens whose logits exist at a time, see `cpmpi.model.forward.Head`
KV_WRITER, CHECKPOINT = "KV writer", "checkpoint"
ON_HOST = (KV_WRITER, CHECKPOINT)  # parts that are in the node's memory whatever computes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a rank needs at most, in bytes by part, whether weights are streamed, and what the rank can have in all.

    Attributes:
        parts: of the memory of what computes: of the node where that is the CPU, else of the device.
        host_parts: of the node, where a device has memory of its own.
        stream: whether weights are streamed.
        room: what the rank can have.
    """

    parts: dict[str, int]
    host_parts: dict[str, int]
    stream: bool
    room: Room

    @property
    def total(self) -> int:
        """All parts together where it computes, bytes."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> int:
        """All parts together of the node's memory, where a device has its own; bytes."""
        return sum(self.host_parts.values())

    def __str__(self) -> str:
        how = f"weights {'a layer at a time' if self.stream else 'all in memory'}; "
        text = _words("memory per rank", self.parts, self.room.bytes, how)
        if self.host_parts:
            assert self.room.host_bytes is not None
            text += "; " + _words("of the node's", self.host_parts, self.room.host_bytes)
        return text


def _words(of: str, parts: dict[str, int], available: int, first: str = "") -> str:
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size >= 5e6)
    text = f"{of}: about {total / 1e9:.2f} GB ({first}{listed or 'little'})"
    if total > available:
        text += f"; warning: a rank can have {available / 1e9:.2f} GB here, use more ranks or nodes"
    return text


def parts_of(shape: AttentionShape, sizes: TokenSizes, *, tokens: int, resident: int) -> dict[str, int]:
    """Bytes that a document takes on a rank, by part; weights and the program itself are not among them.

    All chunks meet at an attention with what their layer goes on with: the embeddings, the residual and the normed
    state, rotary factors, and queries, keys and values. The latter are laid out once more as one shard, and the
    attention's output exists twice: a kernel's own, and the one that it is merged into. Keys and values,
    and the hidden states of a checkpoint, are written while the next layer's are made.

    Args:
        shape: of the attention of the largest layer.
        sizes: of what else there is of a token.
        tokens: that the rank computes.
        resident: bytes of the attention of a layer, from `cpmpi.cost.price.resident_bytes`.
    """
    size, chunk = shape.itemsize, min(tokens, sizes.chunk_tokens)
    kept = -(-tokens // shape.copies)
    stored = shape.kv_heads * (shape.key_dim + shape.value_dim) * sizes.stored_itemsize
    return {
        "hidden states": tokens * (3 * sizes.hidden + 2 * shape.key_dim) * size,
        "attention of a layer": resident,
        "chunks' keys, values and outputs": tokens * (shape.key_bytes + shape.partial_bytes),
        KV_WRITER: kept * (shape.key_bytes + stored) if stored else 0,
        CHECKPOINT: tokens * sizes.checkpoint_bytes,
        "kept scores": tokens * sizes.kept_bytes,
        "one chunk": chunk * (3 * sizes.inner + 4 * sizes.hidden) * size,
        "logits": min(tokens, HEAD_TOKENS) * sizes.vocabulary * (size + 2 * PARTIAL_ITEMSIZE),
    }


def apart(parts: dict[str, int], *, on_device: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Parts of the memory of what computes, and of the node's where that is another."""
    if not on_device:
        return parts, {}
    return {n: s for n, s in parts.items() if n not in ON_HOST}, {n: s for n, s in parts.items() if n in ON_HOST}


def choose_residence(
    parts: dict[str, int], weights: WeightBytes, *, choice: str, limit: int | None, room: Room
) -> Memory:
    """How to hold the weights, and what a rank needs then.

    Args:
        parts: bytes by part, without weights and the program.
        weights: theirs.
        choice: resident, stream, or auto: resident where that fits.
        limit: bytes that the user allows where it computes; None: what the rank can have, which then only decides.
        room: what this rank can have.

    Raises:
        UserError: the limit is below what is needed at least; the number is named.
    """
    on_device = room.host_bytes is not None
    rest, host_parts = apart({"program": room.program_bytes, **parts}, on_device=on_device)
    if on_device:
        host_parts = {"program": rest.pop("program"), **host_parts}
    held, streamed = (
        Memory(parts={**rest, "weights": size}, host_parts=host_parts, stream=stream, room=room)
        for size, stream in ((weights.total, False), (weights.lasting + weights.streamed, True))
    )
    fits = held.total <= (room.bytes if limit is None else limit)
    chosen = streamed if choice == "stream" or (choice == "auto" and not fits) else held
    if limit is not None and chosen.total > limit:
        least = f"--weights {'stream' if chosen.stream else 'resident'} needs at least {chosen.total / 1e9:.2f} GB"
        more = "" if chosen.stream else f", --weights stream {streamed.total / 1e9:.2f} GB"
        raise UserError(f"--memory-limit {limit / 1e9:.2f} GB per rank is too little: {least}{more}; or use more ranks")
    return chosen


def document_memory(work: Workload, schedule: Schedule, sizes: TokenSizes) -> dict[str, int]:
    """Bytes that a document takes on the fullest rank, by part; see `parts_of`."""
    shapes = {work.shape(layer._replace(module="")) for layer in work.layers}
    resident, shape = max(((resident_bytes(schedule, s), s) for s in shapes), key=lambda entry: entry[0])
    layout = shape.query_layout(schedule.world)
    return parts_of(shape, sizes, tokens=max(map(layout.size, range(schedule.world))), resident=resident)
