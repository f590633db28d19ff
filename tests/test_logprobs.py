"""Log-probabilities from logits, against torch's log_softmax in float64.

Tolerance: a log-probability is the difference of two numbers of at most 200, rounded to float32 (8e-6 each), one of
them with the logarithm of a sum of 1,000 terms, whose roundings are at most 1,000 * 6e-8 = 6e-5 of it: 1e-4 in all.
"""

from __future__ import annotations

import pytest
import torch

from cpmpi.model.token_scores import token_logprobs


@pytest.mark.parametrize("tokens", [0, 1, 7, 700])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_equals_log_softmax(tokens, scale):
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, 1000, generator=generator) * scale
    targets = torch.randint(0, 1000, (tokens,), generator=generator)
    expected = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None])[:, 0]
    got = token_logprobs(logits.clone(), targets)
    assert got.dtype == torch.float32
    assert got.shape == (tokens,)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-6)


def test_masked_vocabulary_and_huge_logits_stay_finite():
    logits = torch.full((2, 64), float("-inf"))
    logits[0, 3] = 1e4
    logits[1, :2] = torch.tensor([-1e4, -1e4])
    got = token_logprobs(logits, torch.tensor([3, 1]))
    torch.testing.assert_close(got, torch.tensor([0.0, -0.6931472]), atol=1e-3, rtol=0)
