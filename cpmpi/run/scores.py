"""``scores.csv``: a line for each continuation of a run of continuations."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """The scores of a continuation, or of one of several answers: a line of ``scores.csv``.

    Attributes:
        id: its name.
        question: id of the line that it is an answer of, and ``answer`` which one; else empty and 0.
        document: that it follows.
        n_tokens: its own.
        logprob: of all its tokens given the context, in nats; ``per_token`` and ``per_byte`` (of UTF-8; NaN where token
            ids were given) are what evaluation harnesses compare answers of unlike lengths by.
        greedy: whether every token is the most probable one.
        best, best_per_byte: of an answer, whether no other of its question has a higher score.
    """

    id: str
    question: str
    answer: int
    document: str
    n_tokens: int
    logprob: float
    per_token: float
    per_byte: float
    greedy: bool
    best: bool
    best_per_byte: bool


def scores_text(rows: Sequence[Row]) -> str:
    """``scores.csv``."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow(Row._fields)
    for row in rows:
        table.writerow([("yes" if value else "no") if isinstance(value, bool) else value for value in row])
    return text.getvalue()
