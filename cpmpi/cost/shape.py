"""The shape of one layer's attention, as a cost model needs it: how many tokens attend to how many, and their bytes.

Legend: N ranks, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from cpmpi.attention.layout import Layout, Piece
from cpmpi.errors import UserError
from cpmpi.kernels.mask import Mask

PARTIAL_ITEMSIZE = 4  # partials travel in float32
MOST_BLOCKS, MOST_DOCUMENT_BLOCKS = 1 << 24, 1 << 14  # pairs of pieces that are counted one by one

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """``new`` tokens that attend to ``stored`` ones and causally to themselves, in one layer.

    Raises:
        UserError: a number is out of range, or the query heads are no multiple of the KV heads.
    """

    new: int
    """Tokens whose queries are computed."""
    stored: int = 0
    """Tokens before them whose keys are there already."""
    query_heads: int
    """H"""
    kv_heads: int
    """G"""
    key_dim: int
    """D"""
    value_dim: int
    """E"""
    itemsize: int = 2
    """Bytes of a number of a query, key or value."""
    segments: int = 2
    """Segments that the new tokens are cut into."""
    stored_segments: int = 2
    """Segments that the stored tokens were cut into."""
    mask: Mask = field(default_factory=Mask)
    """Who sees whom."""
    copies: int = 1
    """Neighbouring ranks with queries of the same tokens, of different heads (see `cpmpi.attention.grid`)."""

    def __post_init__(self) -> None:
        for name in ("new", "query_heads", "kv_heads", "key_dim", "value_dim", "itemsize"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("segments", "stored_segments", "copies"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} ({getattr(self, name)}) must be at least 1")
        if self.stored < 0:
            raise UserError(f"stored tokens ({self.stored}) must not be negative")
        if self.query_heads % self.kv_heads:
            raise UserError(f"query heads ({self.query_heads}) must be a multiple of the KV heads ({self.kv_heads})")

    @property
    def tokens(self) -> int:
        """Tokens with keys, stored and new."""
        return self.stored + self.new

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries."""
        return self.query_heads * self.key_dim * self.itemsize

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """Bytes of one token's partial: out and lse in float32."""
        return self.query_heads * (self.value_dim + 1) * PARTIAL_ITEMSIZE

    @property
    def pair_flops(self) -> int:
        """Floating point operations for one (query, key) pair over all heads: q . k, and the weight times v."""
        return 2 * self.query_heads * (self.key_dim + self.value_dim)

    def query_layout(self, world: int) -> Layout:
        """Which rank holds which queries."""
        return Layout(n_tokens=self.new, world=world, segments=self.segments, start=self.stored, copies=self.copies)

    def key_layouts(self, world: int) -> tuple[Layout, ...]:
        """Which rank holds which keys: the stored ones, if any, then the new ones."""
        stored = Layout(n_tokens=self.stored, world=world, segments=self.stored_segments)
        return (*([stored] if self.stored else []), replace(self.query_layout(world), copies=1))

    def asking(self, world: int) -> frozenset[int] | None:
        """The ranks that have queries, None for all: with fewer tokens than ranks some have none."""
        layout = self.query_layout(world)
        askers = frozenset(rank for rank in range(world) if layout.size(rank))
        return None if len(askers) == world else askers

    def block(self, world: int) -> tuple[int, int]:
        """Queries and keys of a block of this attention on so many ranks: a piece of each."""
        pieces = max(world // self.copies, 1) * self.segments
        keys = self.stored // (world * self.stored_segments) if self.stored else self.new // (world * self.segments)
        return max(1, self.new // pieces), max(1, keys)

    def pairs(self, world: int) -> tuple[Counts, Counts, Counts]:
        """Visible (query, key) pairs, blocks with any, and keys read by these, for each two ranks: (N, N) each.

        The query's rank comes first. A block is a piece of queries with a piece of keys.

        Exact, but where ranks times segments are so many that it would take seconds (``MOST_BLOCKS``): then every two
        ranks get the mean, which a layout of so many segments is close to.
        """
        queries, keys = _pieces((self.query_layout(world),)), _pieces(self.key_layouts(world))
        blocks = len(queries) * len(keys) * world**2
        if blocks > (MOST_DOCUMENT_BLOCKS if self.mask.documents else MOST_BLOCKS):
            total = self.copies * self.mask.pairs(range(self.stored, self.tokens), range(self.tokens))
            means = total // world**2, len(queries) * len(keys), len(queries) * (self.tokens // world)
            return tuple(np.full((world, world), mean, np.int64) for mean in means)  # type: ignore[return-value]
        pairs_NN, blocks_NN, read_NN = (np.zeros((world, world), np.int64) for _ in range(3))
        for q in queries:
            for k in keys:
                counts = _visible(self.mask, q, k)
                pairs_NN += counts
                blocks_NN += counts > 0
                read_NN += (counts > 0) * (k[:, 1] - k[:, 0])
        return pairs_NN, blocks_NN, read_NN


def _pieces(layouts: tuple[Layout, ...]) -> list[Counts]:
    """The n-th pieces of all ranks, as (N, 2) of start and stop; empty ones for ranks that have fewer."""
    dealt = [[p for layout in layouts for p in layout.pieces(rank)] for rank in range(layouts[0].world)]
    return [np.array(nth, np.int64) for nth in zip_longest(*dealt, fillvalue=Piece(0, 0))]


def _visible(mask: Mask, queries: Counts, keys: Counts) -> Counts:
    """Visible pairs (N, N) of each piece of queries with each piece of keys; see `Mask.pairs` for the two series."""
    if mask.documents:
        counts = [[mask.pairs(range(*q), range(*k)) for k in keys.tolist()] for q in queries.tolist()]
        return np.array(counts, np.int64)
    a, b = queries[:, :1], queries[:, 1:]
    c, d = keys[None, :, 0], keys[None, :, 1]
    count = _sum_clipped(a + 1, b + 1, c, d)
    if mask.window is None:
        return count - (b - a) * c
    return count - _sum_clipped(a + 1 - mask.window, b + 1 - mask.window, c, d)


def _sum_clipped(start: Counts, stop: Counts, low: Counts, high: Counts) -> Counts:
    """The sum of ``min(max(x, low), high)`` over ``start <= x < stop``, elementwise."""
    below = np.maximum(0, np.minimum(stop, low) - start)
    above = np.maximum(0, stop - np.maximum(start, high))
    first, last = np.maximum(start, low), np.minimum(stop, high)
    summed: Counts = below * low + above * high + (first + last - 1) * np.maximum(0, last - first) // 2
    return summed
