"""What is kept of the logits before a token, against plain formulas in float64.

Tolerances: as in test_logprobs.py for log-probabilities; entropy and variance are sums of 1,000 terms whose roundings
are at most 1,000 * 6e-8 of the sums (at most 10 nats, and some 100 nats squared): 6e-4 and 6e-3 at worst, a hundredth
of that on average.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.model.token_scores import BLOCK, Wanted, token_logprobs, token_scores, top_k

ALL = Wanted(rank=True, greedy=True, entropy=True, moments=True, top_k=7, ids=(3, 0, 41))


def expected_scores(logits, targets, wanted=ALL):
    """In float64, by the definitions."""
    p = torch.log_softmax(logits.double(), 1)
    chosen = p.gather(1, targets[:, None])
    raw = logits.numpy().astype(np.float64)
    order = torch.from_numpy(np.argsort(-raw, axis=1, kind="stable"))[:, : wanted.top_k]
    weight, finite = p.exp(), torch.where(torch.isinf(p), 0.0, p)
    mean = -(weight * finite).sum(1)
    return {
        "logprobs": chosen[:, 0],
        "rank": 1 + (logits > logits.gather(1, targets[:, None])).sum(1),
        "greedy": torch.from_numpy(raw.argmax(1)) == targets,
        "entropy": mean,
        "moments": torch.stack([mean, (weight * (finite + mean[:, None]) ** 2).sum(1)], 1),
        "topk_ids": order,
        "topk_logprobs": p.gather(1, order),
        "ids_logprobs": p[:, list(wanted.ids)],
    }


TYPES = {"rank": torch.int32, "greedy": torch.bool, "topk_ids": torch.int32}


def check(logits, targets, wanted=ALL, atol=1e-4):
    expected, found = expected_scores(logits, targets, wanted), token_scores(logits.clone(), targets, wanted)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == TYPES.get(name, torch.float32), name
        assert values.shape == expected[name].shape, name
        if name in TYPES:
            assert torch.equal(values.long(), expected[name].long()), name
        else:
            torch.testing.assert_close(values.double(), expected[name], atol=atol, rtol=2e-6, msg=name)


@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("vocabulary", [1024, 4999])
def test_every_score_is_its_definition(tokens, scale, vocabulary):
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, vocabulary, generator=generator) * scale
    check(logits, torch.randint(0, vocabulary, (tokens,), generator=generator))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equal_logits_are_told_apart_by_rule(data):
    """Logits of few values: ranks share the best place, and the first ids come first, in any width and number."""
    vocabulary = data.draw(st.sampled_from([50, 97, 5 * BLOCK, 40 * BLOCK, 40 * BLOCK + 13]))
    levels, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits = torch.randint(0, levels, (rows, vocabulary), generator=generator).float()
    wanted = Wanted(rank=True, greedy=True, entropy=True, moments=True, top_k=data.draw(st.integers(1, 50)), ids=(49,))
    check(logits, torch.randint(0, vocabulary, (rows,), generator=generator), wanted)


def test_all_of_a_vocabulary_can_be_kept():
    logits = torch.randn(5, 97)
    values, ids = top_k(logits, 97)
    assert torch.equal(ids.sort(1).values, torch.arange(97).expand(5, -1))
    assert torch.equal(values, logits.gather(1, ids))


def test_masked_vocabulary_and_huge_logits_stay_finite():
    """A masked token adds nothing to the moments, and its log-probability is minus infinity."""
    logits = torch.full((3, 200), float("-inf"))
    logits[0, 3] = 1e4
    logits[1, :2] = torch.tensor([-1e4, -1e4])
    logits[2, 150:190] = torch.linspace(-300, 0, 40)
    check(logits, torch.tensor([3, 1, 160]), atol=1e-3)  # 10,000 is a multiple of 0.001 in float32


def test_what_is_kept_changes_no_logprob():
    logits, targets = torch.randn(300, 5000) * 5, torch.arange(300)
    assert torch.equal(token_scores(logits.clone(), targets, ALL)["logprobs"], token_logprobs(logits.clone(), targets))


def test_half_precision_logits_keep_their_ties():
    """bfloat16 logits are widened, exactly: those that are equal there are equal here."""
    logits = (torch.randn(50, 4096) * 3).bfloat16()
    targets = torch.arange(50)
    found = token_scores(logits, targets, ALL)
    expected = expected_scores(logits.float(), targets)
    for name in TYPES:
        assert torch.equal(found[name].long(), expected[name].long()), name
