"""Log-probabilities of given tokens from logits.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch

CACHED_BYTES = 1 << 20  # of logits that are worked on at a time on a CPU, so that they stay in the cache of a core


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """``log softmax(logits)[target]`` for each row, (T,) float32. Overwrites ``logits_TV``.

    Plain formula: ``logit[target] - log(sum(exp(logits)))``; the largest logit is taken out of the sum so that no
    exponential overflows. The whole softmax is never made: it would be as large as the logits.
    """
    logits_TV = logits_TV.float()
    chosen_T = logits_TV.gather(1, targets_T[:, None])[:, 0]
    if logits_TV.device.type != "cpu":
        return chosen_T - logits_TV.logsumexp(1)
    rows = max(1, CACHED_BYTES // (4 * logits_TV.shape[1]))
    lse = [_logsumexp_(block) for block in torch.split(logits_TV, rows)]
    return chosen_T - torch.cat(lse)


def _logsumexp_(block_TV: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of each row, overwriting the block."""
    largest_T1 = block_TV.amax(1, keepdim=True)
    return block_TV.sub_(largest_T1).exp_().sum(1).log_().add_(largest_T1[:, 0])
