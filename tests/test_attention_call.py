"""A model's rule of who sees whom is one that cpmpi knows, or refused, wherever it departs from them."""

import pytest
import torch

from cpmpi.errors import UserError
from cpmpi.kernels.mask import Mask
from cpmpi.model.attention_call import Visible

WINDOW = 24
LENGTHS = (500, 1001, 1 << 16)


def causal(_, __, q, k):
    return k <= q


def windowed(_, __, q, k):
    return (k <= q) & (k > q - WINDOW)


def chunked(_, __, q, k):
    return (k <= q) & (q // WINDOW == k // WINDOW)


def whole(n):
    return Mask(documents=tuple(range(WINDOW, n + WINDOW, WINDOW)))


@pytest.mark.parametrize("n", LENGTHS)
def test_known_rules_are_found(n):
    assert Visible(causal, None).mask(n) == Mask()
    assert Visible(causal, WINDOW).mask(n) == Mask()
    assert Visible(windowed, WINDOW).mask(n) == Mask(window=WINDOW)
    assert Visible(chunked, WINDOW).mask(n) == whole(n)


# Where a rule departs from a known one, in a document of n tokens: the query, and the key that it sees or does not.
ODD = {
    "at its middle, a new document": lambda n: lambda q, k: (q < n // 2) | (k >= n // 2),
    "at its last token, which does not see itself": lambda n: lambda q, k: (q < n - 1) | (k != q),
    "at its last token, which sees itself alone": lambda n: lambda q, k: (q < n - 1) | (k == q),
    "at its first token, which nobody sees": lambda n: lambda q, k: (q == 0) | (k > 0),
    "at the token before": lambda n: lambda q, k: (k != q - 1) | (q == 0),
}


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("base", [causal, windowed, chunked])
@pytest.mark.parametrize("where", ODD)
def test_a_rule_that_departs_from_them_is_refused(where, base, n):
    odd, size = ODD[where](n), None if base is causal else WINDOW
    sees = lambda b, h, q, k: base(b, h, q, k) & odd(q, k)  # noqa: E731
    with pytest.raises(UserError, match="the model's mask is neither causal, nor causal with a window or chunks"):
        Visible(sees, size).mask(n)


def test_a_window_that_changes_at_the_middle_is_refused():
    for n in LENGTHS:
        wide = lambda b, h, q, k, n=n: torch.where(q < n // 2, windowed(b, h, q, k), k <= q)  # noqa: E731
        with pytest.raises(UserError, match="neither causal"):
            Visible(wide, WINDOW).mask(n)


def test_a_rule_that_looks_at_tokens_is_refused():
    lengths = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(UserError, match="depends on the tokens, not only on their positions"):
        Visible(lambda b, h, q, k: (k <= q) & lengths[k], None).mask(500)
