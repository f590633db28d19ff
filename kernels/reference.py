"""The plain reference: the whole score matrix in float64. Every fast backend is compared with it.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .backend import Contribution, accumulator_dtype
from .mask import Mask
from .partial import Rows


def contributions(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGE: torch.Tensor,
    *,
    q_start: int,
    k_start: int,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Iterator[Contribution]:
    """One partial: ``softmax(cap(scale * q k^T) masked) v`` by the textbook (see backend.Contributions)."""
    queries_per_key = q_THD.shape[1] // k_SGD.shape[1]
    q_HTD = q_THD.double().transpose(0, 1)
    k_HSD = k_SGD.double().transpose(0, 1).repeat_interleave(queries_per_key, 0)
    v_HSE = v_SGE.double().transpose(0, 1).repeat_interleave(queries_per_key, 0)
    scores_HTS = scale * (q_HTD @ k_HSD.mT)
    if softcap is not None:
        scores_HTS = softcap * torch.tanh(scores_HTS / softcap)
    q, k = range(q_start, q_start + len(q_THD)), range(k_start, k_start + len(k_SGD))
    visible_TS = mask.dense(q, k, scores_HTS.device)
    scores_HTS = scores_HTS.masked_fill(~visible_TS, float("-inf"))
    lse_HT = scores_HTS.logsumexp(-1)
    # A row without keys has lse = -inf; exp(-inf - -inf) is NaN where 0 is meant.
    weights_HTS = (scores_HTS - lse_HT[..., None]).exp().masked_fill(~visible_TS, 0.0)
    dtype = accumulator_dtype(q_THD.dtype)
    out_THE = (weights_HTS @ v_HSE).transpose(0, 1).to(dtype)
    yield Contribution(Rows(0, len(q)), out_THE[None], lse_HT.T.to(dtype)[None])
