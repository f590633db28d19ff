"""How surprising tokens are: along one document, by position over many, and where most.

Surprisal is -log2 p(token given those before it), in bits; perplexity is 2 to the power of its mean.

Legend: T tokens, W windows along a document, B bins of positions, D documents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.float64]
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
LEAST_WIDTH = 8  # tokens in the first bins of a logarithmic axis
PASSAGE = 32  # tokens
PASSAGES = 8  # of a document


def bits_of(logprobs_T: npt.NDArray[np.float32]) -> Bits:
    """Surprisal (T,) of natural logarithms; NaN where there is none. Never below 0, whatever the last digit says."""
    return np.maximum(-logprobs_T.astype(np.float64) / math.log(2), 0.0)


def curve(bits_T: Bits, n: int) -> npt.NDArray[np.float64]:
    """(3, W) mean and quartiles of values in W = min(n, T) runs of as equal a length as can be.

    The quartiles are values that occur: no interpolation.
    """
    n = min(n, len(bits_T))
    if not n:
        return np.empty((3, 0))
    bounds = bounds_of(len(bits_T), n)
    lengths = np.diff(bounds)
    ordered = bits_T[np.lexsort((bits_T, np.repeat(np.arange(n), lengths)))]  # within each run
    low, high = (ordered[bounds[:-1] + ((lengths - 1) * q).round().astype(int)] for q in (0.25, 0.75))
    return np.array([np.add.reduceat(bits_T, bounds[:-1]) / lengths, low, high])


def bounds_of(length: int, n: int) -> npt.NDArray[np.int64]:
    """The ends of n runs in ``length`` values; `page/document.js` has the same rule."""
    return np.arange(n + 1, dtype=np.int64) * length // n


class Passage(NamedTuple):
    """Tokens ``start`` to ``stop``, and the mean of their surprisal in bits."""

    start: int
    stop: int
    bits: float


def passages(bits_T: Bits, first: int, most: int = PASSAGES, width: int = PASSAGE) -> list[Passage]:
    """The most surprising stretches of ``width`` scored tokens, which do not overlap, the most surprising first.

    Args:
        bits_T: surprisal of a document's tokens.
        first: the first one that is scored; all after it are.
        most: how many.
        width: of one, in tokens; a document that has fewer is one.
    """
    width = min(width, len(bits_T) - first)
    if width < 1:
        return []
    sums = np.concatenate([[0.0], np.cumsum(bits_T[first:])])
    mean = (sums[width:] - sums[:-width]) / width
    found: list[Passage] = []
    while len(found) < most and np.isfinite(mean[best := int(mean.argmax())]):
        found.append(Passage(first + best, first + best + width, float(mean[best])))
        mean[max(0, best - width + 1) : best + width] = -np.inf
    return found


class ByPosition:
    """The surprisal of many documents by position, bin by bin: their quantiles, and the mean over all tokens."""

    def __init__(self, edges: npt.NDArray[np.int64]) -> None:
        """``edges`` (B + 1,): bin b has the positions from ``edges[b]`` up to ``edges[b + 1]``."""
        self.edges = edges
        self.sums, self.counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
        self.means: list[npt.NDArray[np.float32]] = []  # of each document, (B,)

    def add(self, bits_T: Bits) -> None:
        """Count a document in."""
        known = ~np.isnan(bits_T)
        ends = np.minimum(self.edges, len(bits_T))
        sums, counts = (
            np.diff(np.concatenate([[0.0], np.cumsum(values)])[ends])
            for values in (np.where(known, bits_T, 0.0), known)
        )
        self.sums += sums
        self.counts += counts
        self.means.append(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0).astype(np.float32))

    @property
    def documents(self) -> npt.NDArray[np.int64]:
        """(B,) how many documents have scored tokens in a bin."""
        return np.asarray(np.sum([np.isfinite(means) for means in self.means], axis=0), np.int64)

    @property
    def pooled(self) -> npt.NDArray[np.float64]:
        """(B,) mean over all tokens in a bin; NaN where there is none."""
        return np.asarray(np.divide(self.sums, self.counts, out=np.full(len(self.sums), np.nan), where=self.counts > 0))

    @property
    def quantiles(self) -> npt.NDArray[np.float64]:
        """(len(QUANTILES), B) of the documents' means; NaN where there is none."""
        means_DB = np.sort(np.array(self.means, np.float64), axis=0)  # NaN last
        last = np.maximum(self.documents - 1, 0)
        found = []
        for q in QUANTILES:  # linear interpolation between neighbours, as NumPy's default
            at = last * q
            low = np.floor(at).astype(int)
            a, b = (np.take_along_axis(means_DB, i[None], 0)[0] for i in (low, np.minimum(low + 1, last)))
            found.append(a + (b - a) * (at - low))
        return np.array(found)

    def facts(self) -> dict[str, Any]:
        """As arrays for a page."""
        return {
            "edges": self.edges.astype(np.uint32), "documents": self.documents.astype(np.uint32),
            "pooled": self.pooled.astype(np.float32), "quantiles": self.quantiles.astype(np.float32),
        }  # fmt: skip


def linear_edges(longest: int, n: int = 200) -> npt.NDArray[np.int64]:
    """Bins of one width, for documents of up to ``longest`` tokens."""
    return np.unique(np.linspace(0, max(1, longest), min(n, max(1, longest // LEAST_WIDTH)) + 1).astype(np.int64))


def log_edges(longest: int, n: int = 80) -> npt.NDArray[np.int64]:
    """Bins that get wider with the position, from ``LEAST_WIDTH`` tokens on."""
    if longest <= LEAST_WIDTH:
        return np.array([0, max(1, longest)], np.int64)
    found, ratio = [0, LEAST_WIDTH], (longest / LEAST_WIDTH) ** (1 / n)
    while found[-1] < longest:
        found.append(min(longest, max(found[-1] + LEAST_WIDTH, math.ceil(found[-1] * ratio))))
    return np.array(found, np.int64)
