"""What the logits before a token say of it: its log-probability, and what else is wanted of the distribution.

Legend: T tokens, V vocabulary, K best tokens, M given tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpmpi.kernels.softmax import LOG2_E

CACHED_BYTES = 1 << 20  # of logits that are worked on at a time on a CPU, so that they stay in the cache of a core
DEVICE_ROWS = 64  # on other devices: few enough that what is made on the way stays small beside the logits
BLOCK = 64  # columns whose largest value is looked at before they are
LEAST_LOG2 = -200.0  # 2 to this is 0 in float32; a masked token's minus infinity times its 0 would be no number


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Scores besides the log-probability; each has a name in what `token_scores` returns.

    Attributes:
        rank: ``rank`` (T,) int32: 1 + the tokens of the vocabulary with a higher logit; tied ones share the best place.
        greedy: ``greedy`` (T,) bool: whether the token has the highest logit, and the lowest id among equal ones.
        entropy: ``entropy`` (T,) float32, of the distribution, in nats.
        moments: ``moments`` (T, 2) float32: mean and variance of the surprisal -log p(x) where x is drawn from the
            distribution itself, in nats and nats squared. The mean is the entropy.
        top_k: ``topk_ids`` (T, K) int32 and ``topk_logprobs`` (T, K) float32 of the most probable tokens, the best
            first, and the lower id first among equal ones; 0: not wanted.
        ids: ``ids_logprobs`` (T, M) float32 of these tokens.
    """

    rank: bool = False
    greedy: bool = False
    entropy: bool = False
    moments: bool = False
    top_k: int = 0
    ids: tuple[int, ...] = ()


NOTHING = Wanted()


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """``log softmax(logits)[target]`` for each row, (T,) float32. Overwrites ``logits_TV``."""
    return token_scores(logits_TV, targets_T)["logprobs"]


def token_scores(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, wanted: Wanted = NOTHING
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Scores of the target token of each row: ``logprobs`` (T,) float32, and what is wanted. Overwrites ``logits_TV``.

    Some rows at a time, so that beside the logits nothing of their size is ever made.
    """
    logits_TV = logits_TV.float()
    if wanted == NOTHING and logits_TV.device.type != "cpu":
        return {"logprobs": logits_TV.gather(1, targets_T[:, None])[:, 0] - logits_TV.logsumexp(1)}
    rows = max(1, CACHED_BYTES // (4 * logits_TV.shape[1])) if logits_TV.device.type == "cpu" else DEVICE_ROWS
    blocks = zip(torch.split(logits_TV, rows), torch.split(targets_T, rows), strict=True)
    parts = [_block_scores(block_TV, target_T, wanted) for block_TV, target_T in blocks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _block_scores(logits_TV: torch.Tensor, targets_T: torch.Tensor, wanted: Wanted) -> dict[str, torch.Tensor]:
    """The scores of some rows; overwrites them last."""
    chosen_T1 = logits_TV.gather(1, targets_T[:, None])
    largest_T1 = logits_TV.amax(1, keepdim=True)
    found: dict[str, torch.Tensor] = {}
    if wanted.rank:  # counted in float32, which sums fastest and is exact up to 16 million
        greater_TV = torch.gt(logits_TV, chosen_T1, out=torch.empty_like(logits_TV))
        found["rank"] = greater_TV.sum(1).int() + 1
    if wanted.greedy:
        found["greedy"] = _greedy(logits_TV, targets_T, (chosen_T1 == largest_T1)[:, 0])
    if wanted.top_k:
        best_TK, ids_TK = top_k(logits_TV, wanted.top_k)
        found["topk_ids"] = ids_TK.int()
    if wanted.ids:
        given_TM = logits_TV[:, torch.tensor(wanted.ids, device=logits_TV.device)]
    lse_T1, entropy_T, variance_T = _moments_(logits_TV, largest_T1, wanted)
    if wanted.top_k:
        found["topk_logprobs"] = best_TK - lse_T1
    if wanted.ids:
        found["ids_logprobs"] = given_TM - lse_T1
    if wanted.entropy:
        found["entropy"] = entropy_T
    if wanted.moments:
        found["moments"] = torch.stack([entropy_T, variance_T], 1)
    return {"logprobs": (chosen_T1 - lse_T1)[:, 0], **found}


def _greedy(logits_TV: torch.Tensor, targets_T: torch.Tensor, as_large_T: torch.Tensor) -> torch.Tensor:
    """Whether the target is the first of the largest; only rows are searched where it is one of them."""
    rows = as_large_T.nonzero()[:, 0]
    greedy_T = torch.zeros_like(as_large_T)
    greedy_T[rows] = logits_TV[rows].argmax(1) == targets_T[rows]
    return greedy_T


def _moments_(
    block_TV: torch.Tensor, largest_T1: torch.Tensor, wanted: Wanted
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp (T, 1) of each row, and, where wanted, the mean and the variance of the surprisal; overwrites them.

    Plain formulas: ``lse = log(sum(exp(logits)))``, ``p = exp(logits - lse)``, ``mean = -sum(p * log(p))`` and
    ``variance = sum(p * (log(p) + mean)**2)``. The largest logit is taken out of the sums so that no exponential
    overflows, and powers are those of 2, which are faster than those of e.
    """
    none_T = block_TV.new_empty(0)
    log2_TV = block_TV.sub_(largest_T1).mul_(LOG2_E)
    if not (wanted.entropy or wanted.moments):
        return log2_TV.exp2_().sum(1, keepdim=True).log_().add_(largest_T1), none_T, none_T
    weight_TV = log2_TV.clamp_(min=LEAST_LOG2).exp2()
    sum_T1 = weight_TV.sum(1, keepdim=True)
    mean_T1 = torch.bmm(weight_TV[:, None], log2_TV[:, :, None])[:, 0] / sum_T1
    entropy_T = (sum_T1.log2() - mean_T1)[:, 0] / LOG2_E
    variance_T = none_T
    if wanted.moments:
        variance_T = log2_TV.sub_(mean_T1).square_().mul_(weight_TV).sum(1) / sum_T1[:, 0] / LOG2_E**2
    return sum_T1.log_().add_(largest_T1), entropy_T, variance_T


def top_k(logits_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their columns, (T, K) each: the largest first, the first column among equal ones.

    ``torch.topk`` leaves open which of equal ones it takes; where the last one has equals, those are looked for.
    """
    vocabulary = logits_TV.shape[1]
    values, ids = _largest(logits_TV, min(k + 1, vocabulary))
    by_id = ids.argsort(1)
    values, order = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, by_id).gather(1, order)
    if k < vocabulary:
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        if len(tied):
            ids[tied, :k] = _first_columns(logits_TV[tied], values[tied, :k], ids[tied, :k])
    return values[:, :k], ids[:, :k]


def _first_columns(logits_TV: torch.Tensor, values_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """``ids_TK`` with the first columns of those that equal the last value."""
    last_T1, k = values_TK[:, -1:], values_TK.shape[1]
    column_V = torch.arange(logits_TV.shape[1], device=logits_TV.device, dtype=torch.float32)
    equal_TV = torch.where(logits_TV == last_T1, -column_V, -torch.inf)
    first_TK = _largest(equal_TV, k)[1]
    place_TK = torch.arange(k, device=logits_TV.device) - (values_TK > last_T1).sum(1, keepdim=True)
    return torch.where(place_TK < 0, ids_TK, first_TK.gather(1, place_TK.clamp(min=0)))


def _largest(values_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.topk`` by way of blocks of columns: the k largest lie in the k blocks with the largest maxima.

    Of equal values any may be taken. A block has every n-th column, so that its maximum is found by whole vectors.
    """
    n = values_TV.shape[1] // BLOCK
    if n < 4 * k:
        return values_TV.topk(k, 1)
    maxima_TN = values_TV[:, : n * BLOCK].view(-1, BLOCK, n).amax(1)
    blocks_TK = maxima_TN.topk(k, 1, sorted=False).indices
    inside = torch.arange(BLOCK, device=values_TV.device) * n
    columns = (blocks_TK[:, :, None] + inside).flatten(1)
    rest = torch.arange(n * BLOCK, values_TV.shape[1], device=values_TV.device).expand(len(values_TV), -1)
    columns = torch.cat([columns, rest], 1)
    best, place = values_TV.gather(1, columns).topk(k, 1)
    return best, columns.gather(1, place)
