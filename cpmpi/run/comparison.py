"""Two runs of the same documents, by two models or in two settings: where and by how much one is less surprised.

All numbers are of B against A: a difference below 0 says that B is less surprised. Tokens that only one of the two has
scored are left out.

Legend: T tokens of a document that both have scored, B bins of positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.errors import UserError
from cpmpi.run.divergence import Divergence, divergence
from cpmpi.run.paired import NOTHING, Interval, block_length, over_blocks, over_documents
from cpmpi.run.reader import Document, Run
from cpmpi.run.same_documents import same_documents

Floats = npt.NDArray[np.float64]
# A mean difference of less, in nats, may be that of the order in which numbers were added up.
ROUNDING = 1e-4


class Change(NamedTuple):
    """The mean negative log-likelihood of some tokens in both runs, in nats, and the interval of its difference."""

    n_tokens: int
    nll_a: float
    nll_b: float
    interval: Interval = NOTHING

    @property
    def difference(self) -> float:
        """Below 0: B is less surprised."""
        return self.nll_b - self.nll_a

    @property
    def sign(self) -> int:
        """-1: B is less surprised, 1: A is, as far as the interval tells; 0: it does not, or they are as good as
        equal."""
        low, high = self.interval
        if math.isnan(low) or abs(self.difference) < ROUNDING or low <= 0 <= high:
            return 0
        return -1 if high < 0 else 1


class Named(NamedTuple):
    """A change with what it is of: a document, or tokens ``start`` to ``stop - 1`` of one, or of all."""

    change: Change
    document: str = ""
    start: int = 0
    stop: int = 0
    id: str = ""
    """Of a span that a file named."""
    divergence: Divergence | None = None


@dataclass(kw_only=True)
class Comparison:
    """What two runs say of the same documents.

    Attributes:
        corpus: all tokens of all documents; ``documents`` one by one, in A's order.
        positions: tokens that have ``start`` to ``stop - 1`` tokens before them, of all documents.
        tokens, passages, spans: where the two differ most, the largest difference (of sums) first; all spans, where
            both runs have the same.
        block: tokens of a block, where there is one document: then the intervals are over blocks, else over documents.
        seed: of the draws.
    """

    corpus: Named = field(default_factory=lambda: Named(Change(0, math.nan, math.nan)))
    documents: list[Named] = field(default_factory=list)
    positions: list[Named] = field(default_factory=list)
    tokens: list[Named] = field(default_factory=list)
    passages: list[Named] = field(default_factory=list)
    spans: list[Named] = field(default_factory=list)
    block: int = 0
    seed: int = 0


def compare(
    a: Run, b: Run, *, matching: bool = False, most: int = 10, passage: int = 32, seed: int = 0
) -> Comparison:  # fmt: skip
    """Compare two runs, token by token.

    Args:
        a, b: the runs.
        matching: compare what is the same in both, where other documents, or the tokenizers, are not.
        most: how many tokens and passages are named.
        passage: tokens of one.
        seed: of the bootstrap's draws.

    Raises:
        UserError: the runs do not hold the same, or something is damaged.
    """
    pairs = list(map(_Pair, *zip(*same_documents(a, b, matching=matching), strict=True)))
    pairs = [pair for pair in pairs if pair.n_tokens]
    if not pairs:
        raise UserError(f"{a.paths.folder} and {b.paths.folder}: no token is scored in both")
    found, binned = Comparison(seed=seed), _Binned(pairs)
    for i, pair in enumerate(pairs):  # one document at a time is in memory
        nll_a_T, nll_b_T = pair.nll()
        binned.add(i, pair, nll_a_T, nll_b_T)
        change = _change(nll_a_T, nll_b_T, over_blocks(nll_b_T - nll_a_T, seed))
        found.documents.append(Named(change, pair.id, pair.start, pair.stop, divergence=pair.divergence()))
        found.tokens = _largest([*found.tokens, *_singles(pair, nll_a_T, nll_b_T, most)], most)
        found.passages = _largest([*found.passages, *_passages(pair, nll_a_T, nll_b_T, most, passage)], most)
        found.spans += _spans(pair)
        found.block = block_length(nll_b_T - nll_a_T) if len(pairs) == 1 else 0
    found.spans = _largest(found.spans, len(found.spans))
    found.positions = list(binned.named(seed))
    found.corpus = found.positions.pop()._replace(divergence=_mean(found.documents))
    return found


class _Binned:
    """The sums of all documents over bins of positions, and at last over all of them.

    The intervals are over blocks of the tokens, where there is one document, else over documents.
    """

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        self.bounds = _bins(max(pair.stop for pair in pairs))
        self.edges = [*pairwise(self.bounds), (0, self.bounds[-1])]
        self.counts_DB, self.a_DB, self.b_DB = (np.zeros((len(pairs), len(self.edges))) for _ in range(3))
        self.only: tuple[_Pair, Floats] | None = None

    def add(self, i: int, pair: _Pair, nll_a_T: Floats, nll_b_T: Floats) -> None:
        """The tokens of document ``i``."""
        for j, here in enumerate(map(pair.rows, self.edges)):
            values_a, values_b = nll_a_T[here], nll_b_T[here]
            self.counts_DB[i, j], self.a_DB[i, j], self.b_DB[i, j] = len(values_a), values_a.sum(), values_b.sum()
        self.only = (pair, nll_b_T - nll_a_T) if len(self.counts_DB) == 1 else None

    def named(self, seed: int) -> Iterator[Named]:
        """The bins that have tokens, then all tokens."""
        if self.only is not None:
            pair, difference_T = self.only
            parts = [difference_T[pair.rows(edges)] for edges in self.edges]
            intervals = [over_blocks(part, seed) if len(part) else NOTHING for part in parts]
        else:
            intervals = over_documents(self.b_DB - self.a_DB, self.counts_DB, seed)
        for j, (start, stop) in enumerate(self.edges):
            if n := int(self.counts_DB[:, j].sum()):
                change = Change(n, self.a_DB[:, j].sum() / n, self.b_DB[:, j].sum() / n, intervals[j])
                yield Named(change, start=start, stop=stop)


class _Pair:
    """A document in both runs, and the tokens that both have scored: ``start`` to ``stop - 1``."""

    def __init__(self, a: Document, b: Document) -> None:
        self.a, self.b, self.id = a, b, a.id
        self.start, self.stop = max(a.first_scored, b.first_scored), a.n_tokens

    @property
    def n_tokens(self) -> int:
        return max(0, self.stop - self.start)

    def rows(self, positions: tuple[int, int]) -> slice:
        """Which of the tokens are at some positions, from the first to before the last."""
        first, last = (min(max(at, self.start), self.stop) - self.start for at in positions)
        return slice(first, last)

    def nll(self) -> tuple[Floats, Floats]:
        """The negative log-likelihoods (T,) in A and in B."""
        a_T, b_T = (-document.logprobs[self.start :].astype(np.float64) for document in (self.a, self.b))
        return a_T, b_T

    def divergence(self) -> Divergence | None:
        """The mean over the tokens, where both kept their best tokens."""
        if any("topk" not in document.kept_names for document in (self.a, self.b)):
            return None
        a, b = (tuple(x[self.start :] for x in document.kept("topk")) for document in (self.a, self.b))
        return Divergence(*(float(np.mean(x)) for x in divergence(a, b)))


def _change(nll_a_T: Floats, nll_b_T: Floats, interval: Interval = NOTHING) -> Change:
    return Change(len(nll_a_T), float(nll_a_T.mean()), float(nll_b_T.mean()), interval)


def _mean(documents: Sequence[Named]) -> Divergence | None:
    """Over the tokens of all documents; None unless all have one."""
    if any(one.divergence is None for one in documents):
        return None
    weights = [one.change.n_tokens for one in documents]
    return Divergence(*np.average([one.divergence for one in documents], axis=0, weights=weights).tolist())


def _bins(stop: int) -> list[int]:
    """Bounds of runs of positions: 0, 1, 2, 4, 8 and so on, until all before ``stop`` are in one."""
    return [0, *(1 << k for k in range((stop - 1).bit_length() + 1))]


def _largest(found: Iterable[Named], most: int) -> list[Named]:
    """The ones with the largest differences of sums, in order."""
    return sorted(found, key=lambda one: -abs(one.change.difference) * one.change.n_tokens)[:most]


def _singles(pair: _Pair, nll_a_T: Floats, nll_b_T: Floats, most: int) -> Iterator[Named]:
    size = np.abs(nll_b_T - nll_a_T)
    for i in np.argsort(-size, kind="stable")[:most].tolist():
        at = pair.start + i
        yield Named(Change(1, float(nll_a_T[i]), float(nll_b_T[i])), pair.id, at, at + 1)


def _passages(pair: _Pair, nll_a_T: Floats, nll_b_T: Floats, most: int, size: int) -> Iterator[Named]:
    """The runs of ``size`` tokens whose sums differ most, none over another."""
    size = min(size, pair.n_tokens)
    total = np.concatenate([[0.0], np.cumsum(nll_b_T - nll_a_T)])
    left = np.abs(total[size:] - total[:-size])
    for _ in range(most):
        i = int(left.argmax())
        if left[i] < 0:
            return
        at = pair.start + i
        yield Named(_change(nll_a_T[i : i + size], nll_b_T[i : i + size]), pair.id, at, at + size)
        left[max(0, i - size + 1) : i + size] = -1.0


def _spans(pair: _Pair) -> Iterator[Named]:
    """The spans of a document, where both runs have the same; ``start`` and ``stop`` are characters."""
    a, b = pair.a.spans, pair.b.spans
    if a is None or b is None or any(not _equal(a, b, name) for name in ("characters", "n_tokens", "id")):
        return
    for i, (start, stop) in enumerate(a["characters"].tolist()):
        if n := int(a["n_tokens"][i]):
            change = Change(n, -float(a["logprob"][i]) / n, -float(b["logprob"][i]) / n)
            yield Named(change, pair.id, start, stop, id=str(a["id"][i]) if "id" in a else "")


def _equal(a: dict[str, Any], b: dict[str, Any], name: str) -> bool:
    return (name in a) == (name in b) and (name not in a or np.array_equal(a[name], b[name]))
