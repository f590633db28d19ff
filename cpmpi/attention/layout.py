"""Which rank holds which tokens: segments dealt in snake order.

T tokens are cut into S segments, each segment into one contiguous piece per rank, as equal as possible. Rank r holds
piece r of even segments and piece N-1-r of odd ones, so that every rank gets its share of the early tokens, which are
cheap under a causal mask, and of the late ones, which are expensive. S = 2 is the *zigzag* of the ring-attention
literature, S large is *striped* attention. No divisibility rule, no padding: pieces may differ by one token or be
empty.

With ``copies`` above 1, that many neighbouring ranks all hold the same tokens: what a single rank would hold if there
were only one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """A contiguous run of token positions, ``start <= position < stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Tokens in the piece."""
        return self.stop - self.start


class Holding(Protocol):
    """Which rank holds which tokens, as far as running a schedule asks: runs of positions, which may overlap."""

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The non-empty pieces of ``rank``."""

    def size(self, rank: int) -> int:
        """Tokens that ``rank`` holds."""


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """Runs of tokens that were dealt to ranks one by one, such as the continuations of one context.

    Args:
        runs: of each holder.
        copies: neighbouring ranks that hold the same.
    """

    runs: tuple[tuple[Piece, ...], ...]
    copies: int = 1

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The runs of ``rank``."""
        return self.runs[rank // self.copies]

    def size(self, rank: int) -> int:
        """Tokens that ``rank`` holds."""
        return sum(run.size for run in self.pieces(rank))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ``n_tokens`` tokens at positions ``start, start + 1, ...`` lie on ``world`` ranks.

    Raises:
        ValueError: a count is out of range.
    """

    n_tokens: int
    world: int
    segments: int = 2
    start: int = 0
    copies: int = 1

    def __post_init__(self) -> None:
        if self.n_tokens < 0 or self.start < 0:
            raise ValueError(f"tokens ({self.n_tokens}) and start ({self.start}) must not be negative")
        if self.world < 1:
            raise ValueError(f"ranks ({self.world}) must be at least 1")
        if self.segments < 1:
            raise ValueError(f"segments ({self.segments}) must be at least 1")
        if self.copies < 1 or self.world % self.copies:
            raise ValueError(f"copies ({self.copies}) must divide the ranks ({self.world})")

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The non-empty pieces of ``rank``, in position order."""
        assert 0 <= rank < self.world
        holder, holders = rank // self.copies, self.world // self.copies
        pieces = []
        for segment in range(self.segments):
            first, last = (self.n_tokens * s // self.segments for s in (segment, segment + 1))
            place = holder if segment % 2 == 0 else holders - 1 - holder
            start, stop = (self.start + first + (last - first) * p // holders for p in (place, place + 1))
            if stop > start:
                pieces.append(Piece(start, stop))
        return tuple(pieces)

    def size(self, rank: int) -> int:
        """Tokens that ``rank`` holds."""
        return sum(piece.size for piece in self.pieces(rank))
