"""How far two float32 computations of one document may be apart: every numeric test takes its bounds from here.

Both sides compute the same formulas in float32 (24 bits, 6e-8 of a value) and differ in the order of sums, which
depends on the processor's instructions, the libraries' kernels and the number of threads. Logits of these models are
about 10 in size, so that one rounding of the last sum moves a log-probability by 6e-7; some ten roundings a layer,
amplified by those after it, give 1e-6 to 5e-6 on average on processors with AVX2, AVX-512 and AMX. For one token:

    MEAN = 1e-5    on average over many tokens
    TOKEN = 1e-4   for a single one: the worst of thousands lies ten times over their average

and for what sums n tokens, of which some single one may be that far off: ``n * MEAN + TOKEN``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TOKEN, MEAN = 1e-4, 1e-5
KEYS = 1e-4
"""Of keys, values and hidden states, as a share of the largest of them: as many roundings, of sums that may cancel."""


def of_a_sum(n_tokens: int) -> float:
    """The bound of a sum over n tokens' log-probabilities, such as a document's nll."""
    return n_tokens * MEAN + TOKEN


def check_logprobs(found_T: npt.ArrayLike, expected_T: npt.ArrayLike, *what: Any) -> float:
    """Assert that log-probabilities (T,) are the expected ones, but for the first, NaN in both; the largest error.

    ``what`` says in a failure's message whose they are.
    """
    found, expected = np.asarray(found_T, np.float64), np.asarray(expected_T, np.float64)
    assert found.shape == expected.shape, (*what, found.shape, expected.shape)
    assert np.isnan(found[0]), what
    assert np.isnan(expected[0]), what
    error = np.abs(found - expected)[1:]
    assert np.isfinite(error).all(), what
    worst = float(error.max(initial=0.0))
    assert worst <= TOKEN, (*what, worst, int(error.argmax()) + 1)
    assert error.sum() <= of_a_sum(len(error)), (*what, error.sum(), len(error))
    return worst


def check_keys(found_TGD: npt.ArrayLike, expected_TGD: npt.ArrayLike, *what: Any) -> None:
    """Assert that a layer's keys, or values, or hidden states are the expected ones."""
    found, expected = np.asarray(found_TGD), np.asarray(expected_TGD)
    assert found.shape == expected.shape, what
    worst = np.abs(found - expected).max(initial=0.0)
    assert worst <= KEYS * np.abs(expected).max(initial=0.0), (*what, worst)
