"""Which documents of two runs are the same, token by token; and, where that is not all, what differs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpmpi.errors import UserError, some
from cpmpi.run.reader import Document, Run
from cpmpi.text import counted, shown

DIGITS = 12  # of a digest, where somebody is to compare two
NAME_WIDTH = 60


def same_documents(a: Run, b: Run, *, matching: bool = False) -> list[tuple[Document, Document]]:
    """The documents that both runs have finished, with the same name and the same tokens, in A's order.

    Args:
        a, b: the runs.
        matching: take those that are, where others, or the tokenizers, are not.

    Raises:
        UserError: something differs, unless that is allowed; or nothing is the same.
    """
    ids = {document.id for document in b.documents}
    pairs = [(document, b.documents[document.id]) for document in a.documents if document.id in ids]
    problems = {pair[0].id: problem for pair in pairs if (problem := _problem(*pair))}
    same = [pair for pair in pairs if pair[0].id not in problems]
    found = [*_differences(a, b), *(f"'{shown(id, NAME_WIDTH)}' {problem}" for id, problem in problems.items())]
    if same and (matching or not found):
        return same
    match = f"{len(same)} of {counted(max(len(a.documents), len(b.documents)), 'document')} match"
    hint = f"; --matching compares {'these' if len(same) > 1 else 'this one'}" if same else ""
    raise UserError(f"{a.paths.folder} (A) and {b.paths.folder} (B): {match}: {some(found)}{hint}")


def _differences(a: Run, b: Run) -> Iterator[str]:
    """What differs between two runs beside their documents' tokens."""
    then, now = (str(run.attributes["tokenizer_sha256"]) for run in (a, b))
    if then != now:
        yield f"their tokenizers differ (sha256 {then[:DIGITS] or 'of none'} in A, {now[:DIGITS] or 'of none'} in B)"
    names = [[document.id for document in run.documents] for run in (a, b)]
    for where, own, other in (("A", names[0], {*names[1]}), ("B", names[1], {*names[0]})):
        if alone := [f"'{shown(id, NAME_WIDTH)}'" for id in own if id not in other]:
            yield f"only {where} has {some(alone)}"


def _problem(a: Document, b: Document) -> str:
    """Why a document cannot be compared with its namesake; empty where it can be."""
    for where, document in (("A", a), ("B", b)):
        if not document.complete:
            return f"failed in {where}" if document.failed else f"is not complete in {where}"
        if not document.scored:
            return f"was imported without log-probabilities in {where}"
    if a.n_tokens != b.n_tokens:
        return f"has {a.n_tokens:,} tokens in A and {b.n_tokens:,} in B"
    ids_a, ids_b = a.token_ids, b.token_ids
    if not np.array_equal(ids_a, ids_b):
        at = int((ids_a != ids_b).argmax())
        return f"has other tokens: at position {at:,} token {ids_a[at]} in A and {ids_b[at]} in B"
    return ""
