"""A masked block of queries and keys, cut into blocks that need no mask.

The region that a causal mask with a window leaves visible is bounded by two parallel diagonals. It is cut exactly into
rectangles that are wholly visible, squares of which the lower triangle is visible (``causal``), and squares of which
the upper triangle is visible (``anticausal``: the far edge of a window). An anticausal square is a causal one with both
its queries and its keys in reverse order, so a kernel that knows only "every key" and "causal" serves every mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .mask import Mask, Span

Kind = Literal["full", "causal", "anticausal"]


@dataclass(frozen=True)
class Block:
    """``repeat`` equal blocks, the n-th of them at ``q`` and ``k`` shifted by ``n * step`` positions.

    Kind ``full``: every query sees every key. ``causal``: as many queries as keys, the m-th query sees keys 0..m.
    ``anticausal``: as many queries as keys, the m-th query sees the keys from m on. Every query sees at least one key.
    """

    q: range
    k: range
    kind: Kind
    repeat: int = 1
    step: int = 0


def blocks(mask: Mask, q: Span, k: Span) -> Iterator[Block]:
    """Cut ``q`` x ``k`` into blocks that hold every visible pair exactly once, and no other pair."""
    for queries, keys in mask.within_documents(q, k):
        if mask.window is None:
            yield from _causal(queries.start, queries.stop, keys.start, keys.stop)
        else:
            yield from _windowed(queries.start, queries.stop, keys.start, keys.stop, mask.window)


def _windowed(a: int, b: int, c: int, d: int, window: int) -> Iterator[Block]:
    """Cut queries a..b-1 x keys c..d-1 where ``i - window < j <= i``."""
    near = min(max(a, c + window - 1), b)  # queries before this one are too early for the window to matter
    far = max(near, min(b, d))  # queries from this one on are later than every key
    yield from _causal(a, near, c, d)
    count = (far - near) // window
    if count:
        own = range(near, near + window)
        yield Block(own, own, "causal", count, window)
        if window > 1:
            earlier = range(near - window + 1, near)
            yield Block(range(near, near + window - 1), earlier, "anticausal", count, window)
    rest = near + count * window
    yield from _causal(rest, far, rest, far)
    yield from _anticausal(rest, far, max(c, rest - window + 1), rest, window)
    yield from _anticausal(far, b, c, d, window)


def _causal(a: int, b: int, c: int, d: int) -> Iterator[Block]:
    """Cut queries a..b-1 x keys c..d-1 where ``j <= i``."""
    a, d = max(a, c), min(d, b)
    middle = max(a, min(b, d))
    if a < middle:
        if c < a:
            yield Block(range(a, middle), range(c, a), "full")
        yield Block(range(a, middle), range(a, middle), "causal")
    if middle < b and c < d:
        yield Block(range(middle, b), range(c, d), "full")


def _anticausal(a: int, b: int, c: int, d: int, window: int) -> Iterator[Block]:
    """Cut queries a..b-1 x keys c..d-1 where ``j > i - window``: the causal rule for -i and -(j + window - 1)."""
    for block in _causal(1 - b, 1 - a, 2 - window - d, 2 - window - c):
        q = range(1 - block.q.stop, 1 - block.q.start)
        k = range(2 - window - block.k.stop, 2 - window - block.k.start)
        yield Block(q, k, "full" if block.kind == "full" else "anticausal")
