"""The scores that ``--keep`` adds to a document: their datasets, and what each number is.

Row i belongs to token i, as in ``logprobs``: it is about the distribution over the vocabulary that the tokens before it
give, in which token i is looked up. Rows of tokens that are not scored hold NaN, -1 or 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cpmpi.run.extras import Extra

KEPT = "kept/"


class Column(NamedTuple):
    """A score: its stored type, its units, what it is, and what a row has several of."""

    dtype: str
    units: str
    definition: str
    axis: str = ""


COLUMNS = {
    "rank": Column(
        "<i4", "rank", "1 + the number of tokens of the vocabulary with a higher log-probability than token i; tokens "
        "of one log-probability share the best place; -1 where nothing is scored",
    ),
    "greedy": Column(
        "|u1", "0 or 1", "1: token i has the highest log-probability, and the lowest id among those that have it",
    ),
    "entropy": Column("<f4", "nat", "-sum(p(x) log p(x)) over the vocabulary"),
    "moments": Column(
        "<f4", "nat, nat^2", "mean and variance of the surprisal -log p(x) of a token x drawn from p; the mean is the "
        "entropy", "moment",
    ),
    "topk_ids": Column(
        "<i4", "token id", "the most probable tokens, the best first, the lower id first among equal ones", "place"
    ),
    "topk_logprobs": Column("<f4", "nat", "log p(x) of the tokens of topk_ids", "place"),
    "ids_logprobs": Column("<f4", "nat", "log p(x) of the tokens of ids", "id"),
}  # fmt: skip
# What is read together: the tokens, and their log-probabilities.
PAIRS = {"topk": ("topk_ids", "topk_logprobs"), "ids": ("ids", "ids_logprobs")}
IDS = Column("<i4", "token id", "the tokens whose log-probabilities are kept at every position")


def kept_extras(n_tokens: int, widths: Mapping[str, int]) -> tuple[Extra, ...]:
    """The datasets of a document.

    Args:
        n_tokens: of the document.
        widths: for each column that is kept, how many numbers a row has (1 where `COLUMNS` names no axis).
    """
    made = []
    for name, width in widths.items():
        column = COLUMNS[name]
        more, axes = ((width,), (column.axis,)) if column.axis else ((), ())
        made.append(_extra(name, (n_tokens, *more), ("token", *axes), column))
        if name == "ids_logprobs":
            made.append(_extra("ids", (width,), ("id",), IDS))
    return tuple(made)


def _extra(name: str, shape: tuple[int, ...], labels: tuple[str, ...], column: Column) -> Extra:
    return Extra(
        name=KEPT + name, shape=shape, labels=labels, dtype=column.dtype, units=column.units,
        definition=column.definition,
    )  # fmt: skip
