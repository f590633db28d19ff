"""How much memory a rank needs for a document, part by part, and whether its weights can all stay there.

Legend: T tokens of the rank, C tokens of a chunk, H query heads, G KV heads, D key head dim, E value head dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpmpi.attention.grid import Grid
from cpmpi.attention.schedule import Schedule
from cpmpi.cost.choose import shape_of
from cpmpi.cost.price import resident_bytes
from cpmpi.cost.shape import PARTIAL_ITEMSIZE, AttentionShape
from cpmpi.errors import UserError
from cpmpi.model.probe import Layer
from cpmpi.model.size import inner_width
from cpmpi.model.weights import WeightBytes

HEAD_TOKENS = 256  # tokens whose logits exist at a time, see `cpmpi.model.forward.Head`


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a rank needs at most, in bytes by part, whether weights are streamed, and what the rank can have."""

    parts: dict[str, int]
    stream: bool
    available: int

    @property
    def total(self) -> int:
        """All parts together, bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items() if size >= 5e6)
        how = "a layer at a time" if self.stream else "all in memory"
        text = f"memory per rank: about {self.total / 1e9:.2f} GB (weights {how}; {listed})"
        if self.total > self.available:
            text += f"; warning: a rank can have {self.available / 1e9:.2f} GB here, use more ranks or nodes"
        return text


def parts_of(
    shape: AttentionShape, *, tokens: int, resident: int, hidden: int, inner: int, vocabulary: int,
    chunk_tokens: int, stored_itemsize: int, checkpoint_token_bytes: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes that a document takes on a rank, by part; weights and the program itself are not among them.

    All chunks meet at an attention with what their layer goes on with: the embeddings, the residual and the normed
    state, rotary factors, and queries, keys and values. The latter are laid out once more as one shard, and the
    attention's output exists twice: a kernel's own, and the one that it is merged into.

    Args:
        shape: of the attention of the largest layer.
        tokens: that the rank computes.
        resident: bytes of the attention of a layer, from `cpmpi.cost.price.resident_bytes`.
        hidden: numbers of a token's state.
        inner: numbers of its widest state within a layer.
        vocabulary: token ids.
        chunk_tokens: tokens that go through the model at a time.
        stored_itemsize: bytes of a number of the keys and values that are written, while the next layer's are made; 0
            where they are not.
        checkpoint_token_bytes: bytes of a token's hidden state that is written as a checkpoint, while the next layer's
            are made; 0 without checkpoints.
    """
    size, chunk = shape.itemsize, min(tokens, chunk_tokens)
    kept = -(-tokens // shape.copies)
    stored = shape.kv_heads * (shape.key_dim + shape.value_dim) * stored_itemsize
    return {
        "hidden states": tokens * (3 * hidden + 2 * shape.key_dim) * size,
        "attention of a layer": resident,
        "chunks' keys, values and outputs": tokens * (shape.key_bytes + shape.partial_bytes),
        "KV writer": kept * (shape.key_bytes + stored) if stored else 0,
        "checkpoint": tokens * checkpoint_token_bytes,
        "one chunk": chunk * (3 * inner + 4 * hidden) * size,
        "logits": min(tokens, HEAD_TOKENS) * vocabulary * (size + 2 * PARTIAL_ITEMSIZE),
    }


def choose_residence(
    parts: dict[str, int], weights: WeightBytes, *, choice: str, limit: int | None, available: int, program: int = 0
) -> Memory:
    """How to hold the weights, and what a rank needs then.

    Args:
        parts: bytes by part, without weights.
        weights: theirs.
        choice: resident, stream, or auto: resident where that fits.
        limit: bytes that the user allows; None: ``available``, which then only decides.
        available: bytes that this rank can have.
        program: bytes that it has already; 0 where the program is elsewhere, on the host of a device.

    Raises:
        UserError: the limit is below what is needed at least; the number is named.
    """
    rest = {"program": program, **parts}
    held, streamed = (
        Memory(parts={**rest, "weights": size}, stream=stream, available=available)
        for size, stream in ((weights.total, False), (weights.lasting + weights.streamed, True))
    )
    fits = held.total <= (available if limit is None else limit)
    chosen = streamed if choice == "stream" or (choice == "auto" and not fits) else held
    if limit is not None and chosen.total > limit:
        least = f"--weights {'stream' if chosen.stream else 'resident'} needs at least {chosen.total / 1e9:.2f} GB"
        more = "" if chosen.stream else f", --weights stream {streamed.total / 1e9:.2f} GB"
        raise UserError(f"--memory-limit {limit / 1e9:.2f} GB per rank is too little: {least}{more}; or use more ranks")
    return chosen


def document_memory(
    model: torch.nn.Module, layers: Sequence[Layer], schedule: Schedule, *, tokens: int, segments: int, grid: Grid,
    vocabulary: int, hidden: int, chunk_tokens: int, stored_itemsize: int, checkpoint_token_bytes: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes that a document of ``tokens`` tokens takes on the fullest rank, by part; see `parts_of`."""
    shapes = {shape_of(layer._replace(module=""), tokens, segments, grid) for layer in layers}
    resident, shape = max(((resident_bytes(schedule, s), s) for s in shapes), key=lambda entry: entry[0])
    layout = shape.query_layout(schedule.world)
    return parts_of(
        shape, tokens=max(map(layout.size, range(schedule.world))), resident=resident, hidden=hidden,
        inner=inner_width(model), vocabulary=vocabulary, chunk_tokens=chunk_tokens, stored_itemsize=stored_itemsize,
        checkpoint_token_bytes=checkpoint_token_bytes,
    )  # fmt: skip
