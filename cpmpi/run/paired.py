"""How sure a mean difference is: percentile intervals of paired bootstraps.

Several documents are drawn with replacement, whole: the tokens of one are not independent, other documents are (Koehn
2004, "Statistical significance tests for machine translation evaluation", does so with sentences). Within one document
it is runs of neighbouring tokens that are drawn: the circular block bootstrap (Politis and Romano 1992, "A circular
block-resampling procedure for stationary data"; Künsch 1989), whose blocks keep the dependence that single tokens,
drawn one by one, would lose, and with it most of the width of the interval.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
MOST_BLOCKS = 1000  # of a document: of a longer one they are longer, which does not narrow the interval
LEAST_UNITS = 2  # documents, or blocks: fewer have no spread
PORTION = 100  # resamples of many documents at a time


class Interval(NamedTuple):
    """Bounds of a mean; NaN where too little is there to say."""

    low: float
    high: float


NOTHING = Interval(math.nan, math.nan)


def over_documents(sums_DB: Floats, counts_DB: Floats, seed: int) -> list[Interval]:
    """Intervals of the mean difference a token, documents drawn with replacement.

    Args:
        sums_DB: sums of the differences of a document's tokens (row), in each of some bins (column).
        counts_DB: how many tokens these are.
        seed: of the draws; all bins see the same ones.
    """
    random, (n, bins) = np.random.default_rng(seed), sums_DB.shape
    means = np.empty((RESAMPLES, bins))
    for first in range(0, RESAMPLES, PORTION):
        drawn = random.multinomial(n, np.full(n, 1 / n), PORTION).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[first : first + PORTION] = (drawn @ sums_DB) / (drawn @ counts_DB)
    enough_B = (counts_DB > 0).sum(0) >= LEAST_UNITS
    return [_bounds(means[:, b][~np.isnan(means[:, b])]) if enough_B[b] else NOTHING for b in range(bins)]


def over_blocks(differences_T: Floats, seed: int, block: int | None = None) -> Interval:
    """The interval of the mean of (T,) neighbouring differences, blocks of them drawn with replacement.

    Args:
        differences_T: in their order.
        seed: of the draws.
        block: tokens of one; None: `block_length`.
    """
    n = len(differences_T)
    block = block or block_length(differences_T)
    blocks = -(-n // block)
    if blocks < LEAST_UNITS:
        return NOTHING
    total = np.concatenate([[0.0], np.cumsum(np.concatenate([differences_T, differences_T[:block]]))])
    starts = np.random.default_rng(seed).integers(0, n, (RESAMPLES, blocks))
    return _bounds((total[starts + block] - total[starts]).mean(1) / block)


def block_length(values_T: Floats) -> int:
    """Tokens of a block: by their autocorrelation, and so many that there are no more than ``MOST_BLOCKS`` blocks.

    The rule is that of Politis and White (2004), "Automatic block-length selection for the dependent bootstrap", as
    corrected by Patton, Politis and White (2009), for the circular block bootstrap. With autocovariances R(k), a flat
    top window w(k) = min(1, 2 (1 - |k| / M)), and M twice the lag after which correlations are negligible,

        b = (2 G^2 / D)^(1/3) T^(1/3),  G = sum w(k) |k| R(k),  D = 4/3 (sum w(k) R(k))^2,  sums over -M <= k <= M
    """
    n = len(values_T)
    least = -(-n // MOST_BLOCKS)
    lags = min(n - 1, math.ceil(math.sqrt(n)) + max(5, math.ceil(math.log10(max(n, 2)))))
    if lags < 2 or not np.ptp(values_T) > 0:
        return max(1, least)
    R = _autocovariances(values_T, lags)
    M = min(lags, 2 * _last_lag(R / R[0], n))
    k = np.arange(1, M + 1)
    weighted = np.minimum(1.0, 2 * (1 - k / M)) * R[1 : M + 1]
    G, spectrum = 2 * float((weighted * k).sum()), R[0] + 2 * float(weighted.sum())
    if not spectrum > 0:
        return max(1, least)
    best = float((1.5 * (G / spectrum) ** 2 * n) ** (1 / 3))
    most = math.ceil(min(3 * math.sqrt(n), n / 3))
    return max(1, least, min(most, math.ceil(best)))


def _last_lag(rho: Floats, n: int) -> int:
    """The lag after which several correlations in a row are within the noise; at least 1."""
    run, band = max(5, math.ceil(math.log10(n))), 2 * math.sqrt(math.log10(n) / n)
    small = np.abs(rho[1:]) < band
    for lag in range(len(small)):
        if small[lag : lag + run].all():
            return max(1, lag)
    return len(small)


def _autocovariances(values_T: Floats, lags: int) -> Floats:
    """R(0) to R(lags), each divided by T, by the fast Fourier transform."""
    n, centred = len(values_T), values_T - values_T.mean()
    spectrum = np.fft.rfft(centred, 1 << (n + lags).bit_length())
    found: Floats = np.fft.irfft(np.abs(spectrum) ** 2)[: lags + 1] / n
    return found


def _bounds(means: Floats) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(low), float(high))
