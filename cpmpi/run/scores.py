"""``scores.csv``: a line for each continuation of a run of continuations."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from cpmpi.errors import UserError, one_line


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
        best, best_per_token, best_per_byte: of an answer, whether no other of its question has a higher score.
        unconditional: log-probability of the same tokens after a few words instead of the context (NaN: not asked for).
        mutual_info: ``logprob - unconditional``, what the context says for it, and ``best_mutual_info`` accordingly.
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
    best_per_token: bool = False
    unconditional: float = math.nan
    mutual_info: float = math.nan
    best_mutual_info: bool = False


SCORES = {"best": "logprob", "best_per_token": "per_token", "best_per_byte": "per_byte",
          "best_mutual_info": "mutual_info"}  # fmt: skip
"""Which score says which answer is best."""


def compared(rows: Sequence[Row], alone: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows with what is found by comparing them.

    Args:
        rows: of all that was scored.
        alone: for the id of each that was scored without its context, that of the one with it; it loses its own row.
    """
    without = {alone[row.id]: row.logprob for row in rows if row.id in alone}
    found = []
    for row in rows:
        if row.id not in alone:
            unconditional = without.get(row.id, math.nan)
            found.append(row._replace(unconditional=unconditional, mutual_info=row.logprob - unconditional))
    most: dict[tuple[str, str], float] = {}
    for row in found:
        for best, score in SCORES.items():
            value = getattr(row, score)
            if not math.isnan(value):
                most[row.question, best] = max(value, most.get((row.question, best), -math.inf))
    return tuple(_with_best(row, most) for row in found)


def _with_best(row: Row, most: Mapping[tuple[str, str], float]) -> Row:
    """The row with what it is best by, given the highest scores of each question."""
    is_best: dict[str, Any] = {
        best: row.question != "" and getattr(row, score) == most.get((row.question, best))
        for best, score in SCORES.items()
    }
    return row._replace(**is_best)


def read_scores(path: Path) -> list[Row]:
    """The rows of a ``scores.csv``, also of an earlier version.

    Raises:
        UserError: it cannot be read, or is none.
    """
    kinds = get_type_hints(Row)
    take: dict[Any, Callable[[str], Any]] = {
        int: int,
        float: float,
        str: str,
        bool: {"yes": True, "no": False}.__getitem__,
    }
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return [Row(**{name: take[kinds[name]](text) for name, text in line.items()}) for line in lines]
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from problem
    except (ValueError, KeyError, TypeError, csv.Error) as problem:
        raise UserError(f"{path}: damaged: {one_line(problem)}") from problem


def scores_text(rows: Sequence[Row]) -> str:
    """``scores.csv``."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow(Row._fields)
    for row in rows:
        table.writerow([("yes" if value else "no") if isinstance(value, bool) else value for value in row])
    return text.getvalue()
