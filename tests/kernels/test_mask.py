"""The mask's arithmetic against the dense mask, and the dense mask against the rule and transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from cpmpi.kernels.mask import Mask

from .strategies import masks, spans


@given(mask=masks(), q=spans(), k=spans())
@settings(max_examples=300, deadline=None)
def test_arithmetic_equals_dense(mask: Mask, q: range, k: range) -> None:
    dense = mask.dense(q, k)
    assert mask.pairs(q, k) == int(dense.sum())
    assert mask.sight(q, k) == ("none" if not dense.any() else "full" if dense.all() else "some")
    assert list(mask.queries(q, k)) == [i for i, row in zip(q, dense) if row.any()]
    seen = [j for j, column in zip(k, dense.T) if column.any()]
    assert list(mask.keys(q, k)) == (list(range(seen[0], seen[-1] + 1)) if seen else [])


@given(mask=masks(), q=spans(min_size=1), k=spans(min_size=1))
@settings(max_examples=100, deadline=None)
def test_dense_is_the_rule(mask: Mask, q: range, k: range) -> None:
    dense = mask.dense(q, k)
    for i in q:
        for j in k:
            seen = j <= i and (mask.window is None or i - j < mask.window)
            seen = seen and not any(j < start <= i for start in mask.documents)
            assert bool(dense[i - q.start, j - k.start]) == seen
        assert mask.first_key(i) == min(j for j in range(i + 1) if mask.dense(range(i, i + 1), range(j, j + 1)).item())


def test_window_is_that_of_transformers() -> None:
    masking_utils = pytest.importorskip("transformers.masking_utils")
    for window in (1, 3, 64):
        visible = masking_utils.sliding_window_causal_mask_function(window)
        q, k = range(50, 90), range(0, 90)
        theirs = visible(0, 0, torch.arange(q.start, q.stop)[:, None], torch.arange(k.start, k.stop)[None])
        assert torch.equal(Mask(window=window).dense(q, k), theirs)


def test_pairs_at_ten_million_tokens() -> None:
    tokens, window = 10**7, 4096
    whole = range(tokens)
    assert Mask().pairs(whole, whole) == tokens * (tokens + 1) // 2
    assert Mask(window=window).pairs(whole, whole) == window * (window + 1) // 2 + (tokens - window) * window
    chunks = Mask(documents=tuple(range(0, tokens, 10**6)))
    assert chunks.pairs(whole, whole) == 10 * (10**6 * (10**6 + 1) // 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window .0."), ({"documents": (3, 3)}, "3 follows 3"), ({"documents": (-1,)}, "-1 follows -1")],
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask(**options)
