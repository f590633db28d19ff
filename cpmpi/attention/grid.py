"""Ranks as a grid: which share the weights, which share the sequence, and who holds which heads of which tokens.

``tp`` neighbouring ranks (tensor parallelism) compute the same tokens, each with its share of the heads and of the
weights. Their KV heads are split ``head_groups`` ways. Where tp exceeds the KV heads, ``copies`` ranks would hold the
same KV head: they hold different pieces of the sequence instead, so no key is kept twice.

A head group is a world of its own for attention: its ranks, by *position*, hold the keys of different tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpmpi.attention.layout import Layout


def shares_heads(tp: int, query_heads: int, kv_heads: int) -> bool:
    """Whether ``tp`` ranks can share a layer's heads evenly, each head whole."""
    return not query_heads % tp and not (kv_heads % tp and tp % kv_heads)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where a rank stands.

    Args:
        tp: ranks that compute the same tokens.
        head_groups: parts into which the KV heads are split; divides ``tp``.
    """

    tp: int = 1
    head_groups: int = 1

    def __post_init__(self) -> None:
        assert self.tp >= 1, self
        assert self.tp % self.head_groups == 0, self

    @property
    def copies(self) -> int:
        """Ranks with queries of the same tokens in a head group."""
        return self.tp // self.head_groups

    def tp_index(self, rank: int) -> int:
        """The place of a rank among those that compute the same tokens."""
        return rank % self.tp

    def group(self, rank: int) -> int:
        """The head group of a rank."""
        return self.tp_index(rank) // self.copies

    def position(self, rank: int) -> int:
        """The place of a rank in its head group."""
        return rank // self.tp * self.copies + rank % self.copies

    def computed(self, layout: Layout) -> Layout:
        """Which position computes which tokens, given which position keeps the keys of which."""
        return replace(layout, copies=self.copies)

    def __str__(self) -> str:
        words = f"tensor parallelism: {self.tp} ranks share the weights, the KV heads in {self.head_groups} parts"
        return words + (f", each by tokens among {self.copies} ranks" if self.copies > 1 else "")

    def rank(self, group: int, position: int) -> int:
        """The rank at a position of a head group."""
        return position // self.copies * self.tp + group * self.copies + position % self.copies
