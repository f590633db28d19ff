"""What the ranks found for a document goes to rank 0, and into ``run.h5``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.comm.ranks import Ranks
from cpmpi.engine.score import Scores
from cpmpi.errors import UserError
from cpmpi.run.extras import Extra
from cpmpi.run.index import RunIndex
from cpmpi.run.kept import KEPT

PORTION_BYTES = 64 << 20  # of another rank's rows that are on rank 0 at a time
ROWS_TAG = 71


def assemble(everyone: list[Any], n_tokens: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A document's log-probabilities (T,), NaN where there is none, and last hidden state from what all ranks found."""
    logprobs = np.full(n_tokens, np.nan, np.float32)
    for positions, values, *_ in everyone:
        logprobs[positions] = values
    (last_hidden,) = (hidden.numpy() for _, _, hidden, _ in everyone if hidden is not None)
    return logprobs, last_hidden


def write_kept(
    ranks: Ranks, index: RunIndex | None, document: int, extras: Sequence[Extra], scores: Scores,
    everyones: Sequence[npt.NDArray[np.int64]],
) -> None:  # fmt: skip
    """Write the kept scores of all ranks, some rows at a time, so that rank 0 never has all of them. Collective.

    Args:
        ranks: of the job.
        index: of the run, on rank 0.
        document: its place in the run.
        extras: of the document; those that are scores are written.
        scores: of this rank.
        everyones: the positions that each rank scored, on rank 0.

    Raises:
        UserError: on all ranks; they cannot be written.
    """
    columns = [extra for extra in extras if extra.name.startswith(KEPT) and extra.labels[0] == "token"]
    if not columns:
        return
    problem: UserError | None = None
    for extra in columns:
        mine = _rows(scores, extra)
        if index is None:
            for first, stop in _portions(len(mine), extra):
                with ranks.flight.waits("gather"):
                    ranks.comm.Send(mine[first:stop].view(np.uint8), 0, ROWS_TAG)
            continue
        for source, positions in enumerate(everyones):
            for first, stop in _portions(len(positions), extra):
                part = mine[first:stop] if source == 0 else np.empty((stop - first, *extra.shape[1:]), extra.dtype)
                if source:
                    with ranks.flight.waits("gather"):
                        ranks.comm.Recv(part.view(np.uint8), source, ROWS_TAG)
                try:  # the others must not wait for one that has given up
                    if problem is None:
                        index.write_rows(document, extra.name, positions[first:stop], part)
                except UserError as error:
                    problem = error
    ranks.on_root(_raise, problem)


def _portions(rows: int, extra: Extra) -> Iterator[tuple[int, int]]:
    """So many rows of a dataset in parts of at most ``PORTION_BYTES``: start and stop of each."""
    step = max(1, PORTION_BYTES // max(1, extra.n_bytes // extra.shape[0]))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _rows(scores: Scores, extra: Extra) -> npt.NDArray[Any]:
    """This rank's rows of a dataset, in its type."""
    found = scores.kept.get(extra.name.removeprefix(KEPT))
    if found is None:  # nothing is scored here
        return np.empty((0, *extra.shape[1:]), extra.dtype)
    return np.ascontiguousarray(found.numpy().astype(extra.dtype, copy=False))


def _raise(problem: UserError | None) -> None:
    if problem is not None:
        raise problem
