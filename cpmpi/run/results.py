"""The results of a document in ``run.h5``, and the checksums that hold them together.

``outputs_xxh3`` is of the outputs, the checksums of all other datasets among them; ``result_xxh3`` is of everything
else that is written when a document is done: that checksum, the digests of the shards, ``nll``, ``perplexity`` and
``failed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from cpmpi.run.extras import CHECKSUMS
from cpmpi.run.hdf5 import RawArray

OUTPUTS = ("token_ids", "logprobs", "last_hidden")
GREEDY = "greedy"  # of continuations alone; of documents it is a score that is kept
SOME = (GREEDY, CHECKSUMS)  # outputs that not every document has
DIGESTS = "kv/shard_digest"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is written when a document is done, or has failed."""

    arrays: Mapping[str, RawArray]
    """The outputs, and the digests of the shards where KV is kept."""
    nll: float
    perplexity: float
    failed: bytes = b""


def read_results(group: Any) -> Results:
    """The results in the group of a document."""
    names = [*OUTPUTS, *(name for name in (*SOME, DIGESTS) if name in group)]
    return Results(
        arrays={name: np.asarray(group[name]) for name in names},
        nll=float(group.attrs["nll"]),
        perplexity=float(group.attrs["perplexity"]),
        failed=bytes(group.attrs.get("failed", b"")),
    )


def read_outputs(group: Any) -> dict[str, RawArray]:
    """The outputs in the group of a document."""
    return {name: np.asarray(group[name]) for name in (*OUTPUTS, *SOME) if name in group or name in OUTPUTS}


def outputs_digest(outputs: Mapping[str, RawArray]) -> int:
    """xxh3_64 of the bytes of a document's outputs as they are stored."""
    return xxhash.xxh3_64_intdigest(b"".join(outputs[name].tobytes() for name in (*OUTPUTS, *SOME) if name in outputs))


def result_digest(results: Results, outputs: int | None = None) -> int:
    """xxh3_64 of all results, with ``outputs`` for the arrays (default: their ``outputs_digest``)."""
    outputs = outputs_digest(results.arrays) if outputs is None else outputs
    digests = np.asarray(results.arrays.get(DIGESTS, ()), "<u8")
    numbers = np.array([results.nll, results.perplexity], "<f8")
    start = np.array([outputs], "<u8").tobytes()
    return xxhash.xxh3_64_intdigest(start + digests.tobytes() + numbers.tobytes() + results.failed)


def predicted(logprobs_T: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The log-probabilities that are known: all but those at the beginning, which hold NaN.

    That is the first token, unless a continuation or a prefix token has something before it, or all before ``--from``,
    or all that were imported without log-probabilities.
    """
    known_T = ~np.isnan(logprobs_T)
    return logprobs_T[known_T.argmax() if known_T.any() else len(logprobs_T) :]


def sum_nll(logprobs_T: npt.NDArray[Any], *, scored: bool = True) -> float:
    """The negative log-likelihood of the predicted tokens, summed in float64; 0, and not -0, where there are none.

    NaN where it is not known of all that could be predicted (`DocumentSpec.scored`).
    """
    if not scored:
        return float("nan")
    return 0.0 - float(np.sum(predicted(logprobs_T), dtype=np.float64))


def perplexity(nll: float, n_predicted: int) -> float:
    """exp(nll / predicted tokens); NaN where nothing is predicted."""
    return float(np.exp(np.float64(nll) / n_predicted)) if n_predicted else float("nan")
