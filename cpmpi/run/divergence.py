"""How far two models' distributions are apart, as far as their best tokens (``--keep topk=K``) tell.

Of the vocabulary, the tokens that both kept are known on both sides; all others, the rest, are put together into one:
its probability is what the known ones leave. Joining tokens never makes a divergence greater (the log sum inequality,
Cover and Thomas, "Elements of Information Theory", 2nd edition, theorem 2.7.1; for the Jensen-Shannon divergence, which
is a sum of two, Lin 1991, "Divergence measures based on the Shannon entropy"). With I the tokens known on both sides,
and p(R), q(R) the probabilities of the rest,

    KL(p || q) >= sum over I of p(x) log(p(x) / q(x)) + p(R) log(p(R) / q(R))

No bound from above follows: a token of the rest may be as improbable as one likes in q, and KL(p || q) as great. The
Jensen-Shannon divergence has one, for it is at most log 2 times the mean of the two probabilities of any set of tokens:

    JS(p, q) = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2
    JS over I and R as one  <=  JS(p, q)  <=  JS over I alone + log 2 (p(R) + q(R)) / 2
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Best = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]

ROWS = 4096  # tokens at a time
ROUNDING = 1e-6  # of a sum of float32 probabilities: no rest is believed to be less


class Divergence(NamedTuple):
    """Of a token, or the mean of some, in nats; numbers or (T,) arrays alike.

    Attributes:
        kl_ab, kl_ba: KL(A || B) and KL(B || A) are at least that.
        js_low, js_high: the Jensen-Shannon divergence lies between.
        known_a, known_b: the probability, in A and in B, of the tokens that both kept.
    """

    kl_ab: Floats | float
    kl_ba: Floats | float
    js_low: Floats | float
    js_high: Floats | float
    known_a: Floats | float
    known_b: Floats | float


def divergence(a: Best, b: Best) -> Divergence:
    """How far two distributions are apart at each token.

    Args:
        a, b: the ids (T, K) and log-probabilities (T, K) of each one's most probable tokens; K may differ.
    """
    rows = [slice(i, i + ROWS) for i in range(0, len(a[0]), ROWS)]
    parts = [_rows(a[0][at], a[1][at], b[0][at], b[1][at]) for at in rows]
    return Divergence(*(np.concatenate([part[i] for part in parts]) for i in range(len(Divergence._fields))))


def _rows(
    ids_a_TK: npt.NDArray[np.int32], logp_TK: npt.NDArray[np.float32],
    ids_b_TJ: npt.NDArray[np.int32], logq_TJ: npt.NDArray[np.float32],
) -> Divergence:  # fmt: skip
    same_TKJ = ids_a_TK[:, :, None] == ids_b_TJ[:, None, :]
    both_TK = same_TKJ.any(2)
    found_TK = np.take_along_axis(logq_TJ, same_TKJ.argmax(2), 1)
    logp, logq = (np.where(both_TK, x.astype(np.float64), -np.inf) for x in (logp_TK, found_TK))
    known_a, known_b = np.exp(logp).sum(1), np.exp(logq).sum(1)
    rest_a, rest_b = (np.maximum(ROUNDING, 1 - known) for known in (known_a, known_b))
    log_a, log_b = np.log(rest_a), np.log(rest_b)
    inside = _js(logp, logq).sum(1)
    return Divergence(
        kl_ab=np.maximum(0.0, _kl(logp, logq).sum(1) + _kl(log_a, log_b)),
        kl_ba=np.maximum(0.0, _kl(logq, logp).sum(1) + _kl(log_b, log_a)),
        js_low=np.maximum(0.0, inside + _js(log_a, log_b)), js_high=inside + math.log(2) * (rest_a + rest_b) / 2,
        known_a=known_a, known_b=known_b,
    )  # fmt: skip


def _kl(logp: Floats, logq: Floats) -> Floats:
    """p log(p / q), and 0 where p is 0."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(logp), 0.0, np.exp(logp) * (logp - logq))


def _js(logp: Floats, logq: Floats) -> Floats:
    logm = np.logaddexp(logp, logq) - math.log(2)
    return (_kl(logp, logm) + _kl(logq, logm)) / 2
