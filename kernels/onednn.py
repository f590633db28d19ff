"""Flash attention for the CPU out of oneDNN's matrix products, in float32.

For processors on which the products of torch's own operator (MKL's) are slow: on an AMD EPYC with AVX-512 oneDNN's run
at twice their speed, and so does attention. Half-precision inputs are converted, which is exact; results are float32.

Legend: T query tokens, S key tokens, H query heads, G KV heads, r = H / G, D key head dim, E value head dim; n equal
blocks; R rows, the queries of the r heads that share a KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from . import blocked, fused
from .backend import Contribution
from .mask import Mask
from .partial import NEVER
from .products import onednn_linear
from .softmax import LOG2_E, RunningSoftmax

TILE = fused.Tile(queries=4096, keys=4096)
ROWS, KEYS = 512, 512
"""Of the scores that are worked on at a time: 1 MiB, which stays in the cache of a core."""
BLOCKED_BELOW = 64
"""Queries x heads per KV head below which copying the keys costs more than the attention itself."""


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
    """Partials of the mask's blocks (see backend.Contributions).

    Raises:
        ValueError: with float64, which oneDNN does not multiply.
    """
    if q_THD.dtype == torch.float64:
        raise ValueError(f"onednn takes no float64 ({q_THD.dtype}); blocked takes all")
    if len(q_THD) * q_THD.shape[1] < BLOCKED_BELOW * k_SGD.shape[1]:
        return blocked.contributions(
            q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale, softcap=softcap
        )
    capped = partial(kernel, softcap=softcap)
    return fused.contributions(
        capped, TILE, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale
    )


class KeyTile(NamedTuple):
    """Some keys of one KV head and their values, as the products want them: float32, and in the order of memory."""

    start: int
    k_SD: torch.Tensor
    v_ES: torch.Tensor


def kernel(
    q_nHTD: torch.Tensor,
    k_nGSD: torch.Tensor,
    v_nGSE: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See fused.Kernel."""
    n, kv_heads, keys, value_dim = v_nGSE.shape
    q_nGrTD = q_nHTD.unflatten(1, (kv_heads, -1))  # type: ignore[no-untyped-call]
    out_nGrTE = torch.empty(*q_nGrTD.shape[:-1], value_dim)
    lse_nGrT = torch.empty(q_nGrTD.shape[:-1])
    tokens, tile_T = q_nGrTD.shape[3], max(1, ROWS // q_nGrTD.shape[2])
    for place in ((i, g) for i in range(n) for g in range(kv_heads)):
        tiles = [
            KeyTile(s, k_SD.float().contiguous(), v_SE.T.float().contiguous())
            for s, k_SD, v_SE in zip(
                range(0, keys, KEYS), torch.split(k_nGSD[place], KEYS), torch.split(v_nGSE[place], KEYS), strict=True
            )
        ]
        for first in range(0, tokens, tile_T):
            rows = (*place, slice(None), slice(first, first + tile_T))
            out_nGrTE[rows], lse_nGrT[rows] = _attend(
                q_nGrTD[rows].float(), tiles, first if causal else None, scale, softcap
            )
    return out_nGrTE.flatten(1, 2), lse_nGrT.flatten(1, 2)


def _attend(
    q_rTD: torch.Tensor, tiles: list[KeyTile], first: int | None, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out (r, T, E) and lse (r, T) of some queries; ``first``: the number of the first one, where causal."""
    r, tokens, _ = q_rTD.shape
    last = first + tokens - 1 if first is not None else None
    q_RD = q_rTD.mul(scale if softcap else scale * LOG2_E).flatten(0, 1)
    softmax = RunningSoftmax((len(q_RD),), len(tiles[0].v_ES), like=q_RD)
    for start, k_SD, v_ES in tiles:
        if last is not None and start > last:
            break
        scores_RS = onednn_linear(q_RD, k_SD)
        if softcap:
            scores_RS.div_(softcap).tanh_().mul_(softcap * LOG2_E)
        if first is not None and start + len(k_SD) - 1 > first:
            hidden_TS = torch.ones(tokens, len(k_SD), dtype=torch.bool).triu_(first - start + 1)
            scores_RS.view(r, tokens, -1).masked_fill_(hidden_TS, NEVER)
        weights_RS = softmax.weigh_(scores_RS)
        softmax.out_RE.add_(onednn_linear(weights_RS, v_ES))
    out_RE, lse_R = softmax.finish()
    return out_RE.view(r, tokens, -1), lse_R.view(r, tokens)
