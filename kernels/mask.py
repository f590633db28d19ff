"""Which query sees which key, said by positions.

Legend: T query tokens, S key tokens. Positions are places in the whole document, whichever rank holds the token.

Always causal. A query at position i sees one unbroken run of keys, ``first_key(i) <= j <= i``, and ``first_key`` never
decreases. All answers below follow from these two facts by integer arithmetic, so a block of 10^7 x 10^7 positions
costs as little as a small one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Sight = Literal["none", "full", "some"]


class Span(Protocol):
    """A run of positions, ``start <= position < stop``: a ``range``, or a named tuple with these two fields."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A causal mask, with an optional sliding window and document boundaries.

    The query at position i sees the key at position j iff ``j <= i``, and ``i - j < window`` where a window is given
    (the convention of transformers: ``masking_utils.sliding_window_overlay`` keeps ``j > i - sliding_window``), and i
    and j lie in the same document. Chunked attention, as in Llama 4, is ``documents`` at every multiple of the chunk.

    Raises:
        ValueError: the window is not positive, or the documents are not strictly increasing positions.
    """

    window: int | None = None
    """Keys that a query sees, itself included; None: no limit."""
    documents: tuple[int, ...] = ()
    """Sorted positions at which a new document starts; position 0 needs no mention."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, or None for no window")
        for before, start in zip((-1, *self.documents), self.documents):
            if start <= before:
                raise ValueError(f"document starts must increase from 0 on: {start} follows {before}")

    def first_key(self, i: int) -> int:
        """The smallest position that the query at position ``i`` sees."""
        place = bisect_right(self.documents, i)
        start = self.documents[place - 1] if place else 0
        return start if self.window is None else max(start, i - self.window + 1)

    def queries(self, q: Span, k: Span) -> range:
        """The queries of ``q`` that see at least one key of ``k``: always one unbroken run, maybe empty."""
        if k.stop <= k.start:
            return range(q.start, q.start)
        start, stop = max(q.start, k.start), q.stop
        if self.window is not None:
            stop = min(stop, k.stop + self.window - 1)
        later = bisect_left(self.documents, k.stop)
        if later < len(self.documents):
            stop = min(stop, self.documents[later])
        return range(start, max(start, stop))

    def keys(self, q: Span, k: Span) -> range:
        """The shortest run of keys of ``k`` that holds every key which some query of ``q`` sees, maybe empty."""
        queries = self.queries(q, k)
        if not queries:
            return range(k.start, k.start)
        return range(max(k.start, self.first_key(queries.start)), min(k.stop, queries.stop))

    def sight(self, q: Span, k: Span) -> Sight:
        """Whether ``q`` sees ``none`` of ``k``, every query every key (``full``), or ``some`` pairs are visible."""
        if q.stop <= q.start or not self.queries(q, k):
            return "none"
        return "full" if k.stop <= q.start + 1 and self.first_key(q.stop - 1) <= k.start else "some"

    def within_documents(self, q: Span, k: Span) -> Iterator[tuple[range, range]]:
        """The parts of ``q`` and ``k`` that lie in one document, for each document with tokens in both."""
        queries = self.queries(q, k)
        start = queries.start
        while start < queries.stop:
            place = bisect_right(self.documents, start)
            first = self.documents[place - 1] if place else 0
            stop = min(queries.stop, self.documents[place]) if place < len(self.documents) else queries.stop
            yield range(start, stop), range(max(k.start, first), min(k.stop, stop))
            start = stop

    def pairs(self, q: Span, k: Span) -> int:
        """How many (query, key) pairs are visible; costs a few operations for each document in the range.

        Query i of a document that starts at s sees ``clip(i + 1, c, d) - clip(max(s, i + 1 - window), c, d)`` keys
        of c..d-1; both terms are arithmetic series over i.
        """
        count = 0
        for queries, keys in self.within_documents(q, k):
            count += _sum_clipped(queries.start + 1, queries.stop + 1, keys.start, keys.stop)
            # Without a window, a shift so large that every term of the second series is c.
            shift = 1 - (queries.stop if self.window is None else self.window)
            count -= _sum_clipped(queries.start + shift, queries.stop + shift, keys.start, keys.stop)
        return count

    def dense(self, q: Span, k: Span, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask itself, (T, S), True where the query sees the key."""
        i = torch.arange(q.start, q.stop, device=device)[:, None]
        j = torch.arange(k.start, k.stop, device=device)[None, :]
        visible = j <= i
        if self.window is not None:
            visible &= i - j < self.window
        if self.documents:
            starts = torch.tensor(self.documents, device=device)
            visible &= torch.bucketize(i, starts, right=True) == torch.bucketize(j, starts, right=True)
        return visible


def _sum_clipped(start: int, stop: int, low: int, high: int) -> int:
    """The sum of ``min(max(x, low), high)`` over ``start <= x < stop``, with ``low <= high``."""
    below = max(0, min(stop, low) - start)
    above = max(0, stop - max(start, high))
    first, last = max(start, low), min(stop, high)
    between = (first + last - 1) * (last - first) // 2 if last > first else 0
    return below * low + above * high + between
