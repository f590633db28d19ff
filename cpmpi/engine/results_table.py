"""The results of a run as a table: all documents, or of many the most and the least surprising."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from cpmpi.text import counted, duration, shown, table

MOST_DOCUMENTS = 40  # that are listed one by one
ENDS = 10  # documents of each end, where there are more
NAME_WIDTH = 50
HEADINGS = ("document", "tokens", "nll", "perplexity", "time", "tokens/s")


class Result(Protocol):
    """What is known of a finished document; ``cpmpi.run.reader.Document`` is one."""

    @property
    def id(self) -> str: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def nll(self) -> float: ...
    @property
    def perplexity(self) -> float: ...


def results_text(documents: Sequence[Result], seconds: Mapping[int, float]) -> str:
    """The table, in lines. Beyond ``MOST_DOCUMENTS`` it has the ``ENDS`` most and least surprising, by perplexity.

    Args:
        documents: all of the run.
        seconds: what each took, by its place; those without were done before.
    """
    if len(documents) <= MOST_DOCUMENTS:
        return table(HEADINGS, [_row(d, seconds.get(i)) for i, d in enumerate(documents)], left=1)
    numbers = [(d.perplexity, i) for i, d in enumerate(documents)]
    ranked = sorted((-p, i) for p, i in numbers if not math.isnan(p))
    places = [i for _, i in ranked]
    ends = (places[:ENDS], places[max(ENDS, len(places) - ENDS) :])
    lines = table(HEADINGS, [_row(documents[i], seconds.get(i)) for end in ends for i in end], left=1).split("\n")
    between = len(places) - len(ends[0]) - len(ends[1])
    lines.insert(2 + len(ends[0]), f"... {counted(between, 'document')} between the most and the least surprising ...")
    before = len(documents) - len(seconds)
    done = f" ({before:,} of them done before)" if before else ""
    lines.append(f"{counted(len(documents), 'document')}{done}; all of them are in summary.csv")
    return "\n".join(lines)


def _row(document: Result, seconds: float | None) -> tuple[str, ...]:
    took = duration(seconds) if seconds else ""
    rate = f"{document.n_tokens / seconds:,.0f}" if seconds else "(was done)"
    name, tokens = shown(document.id, NAME_WIDTH), f"{document.n_tokens:,}"
    return name, tokens, f"{document.nll:.6g}", f"{document.perplexity:.4f}", took, rate
