"""The portable backend: tiles of scores with a running softmax, in plain torch, on any device.

For what fused kernels lack, such as a softcap, and for few queries. Memory beyond the result is a few tiles, whatever
the length. Computes in float32 (float64 for float64 inputs); half-precision inputs are converted tile by tile.

Legend: T query tokens, S key tokens, H query heads, G KV heads, r = H / G, D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .backend import Contribution, accumulator_dtype
from .mask import Mask
from .partial import NEVER, Rows

TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Scores (H x queries x keys) in a tile: a few MB stay in a core's cache, a GPU wants large products."""


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
    """One partial for each tile of queries (see backend.Contributions)."""
    keys = range(k_start, k_start + len(k_SGD))
    visible = mask.queries(range(q_start, q_start + len(q_THD)), keys)
    tile_T, tile_S = tile_shape(q_THD.shape[1], q_THD.device)
    for first in visible[::tile_T]:
        queries = range(first, min(first + tile_T, visible.stop))
        rows = Rows(first - q_start, len(queries))
        softmax = _RunningSoftmax(rows.view(q_THD)[0], k_SGD.shape[1], v_SGE.shape[2], scale, softcap)
        seen = mask.keys(queries, keys)
        for start in seen[::tile_S]:
            tile = range(start, min(start + tile_S, seen.stop))
            hidden_TS = None if mask.sight(queries, tile) == "full" else ~mask.dense(queries, tile, q_THD.device)
            part = slice(tile.start - k_start, tile.stop - k_start)
            softmax.add_(k_SGD[part], v_SGE[part], hidden_TS)
        yield Contribution(rows, *softmax.finish())


def tile_shape(heads: int, device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile."""
    scores = TILE_SCORES.get(device.type, TILE_SCORES["cuda"]) // heads
    tile_S = 1 << max(6, scores.bit_length() // 2)
    return max(16, scores // tile_S), tile_S


class _RunningSoftmax:
    """Softmax-weighted values of some queries over key tiles that come one after the other.

    Plain formula: ``out = sum_j exp(s_j) v_j / sum_j exp(s_j)``, ``lse = log sum_j exp(s_j)``; here with
    the largest score so far taken out of every exponent (Milakov and Gimelshein, arXiv 1805.02867).
    """

    def __init__(self, q_THD: torch.Tensor, kv_heads: int, value_dim: int, scale: float, softcap: float | None) -> None:
        tokens, heads, head_dim = q_THD.shape
        self.softcap = softcap
        self.shape_GrT = (kv_heads, heads // kv_heads, tokens)
        dtype = accumulator_dtype(q_THD.dtype)
        q_GrTD = q_THD.to(dtype).mul(scale).view(tokens, *self.shape_GrT[:2], head_dim).permute(1, 2, 0, 3)
        self.q_GRD = q_GrTD.reshape(kv_heads, -1, head_dim)
        rows = self.q_GRD.shape[:2]
        self.largest_GR1 = self.q_GRD.new_full((*rows, 1), NEVER)
        self.sum_GR1 = self.q_GRD.new_zeros(*rows, 1)
        self.out_GRE = self.q_GRD.new_zeros(*rows, value_dim)

    def add_(self, k_SGD: torch.Tensor, v_SGE: torch.Tensor, hidden_TS: torch.Tensor | None) -> None:
        """Add a tile of keys, those that ``hidden_TS`` (T, S) marks left out."""
        dtype = self.q_GRD.dtype
        scores_GRS = torch.bmm(self.q_GRD, k_SGD.to(dtype).permute(1, 2, 0))
        if self.softcap is not None:
            scores_GRS.div_(self.softcap).tanh_().mul_(self.softcap)
        if hidden_TS is not None:
            scores_GRS.view(*self.shape_GrT, -1).masked_fill_(hidden_TS, NEVER)
        largest_GR1 = torch.maximum(self.largest_GR1, scores_GRS.amax(-1, keepdim=True))
        # A row that has seen no key yet has largest = -inf, and -inf - -inf is NaN.
        shift_GR1 = largest_GR1.masked_fill(largest_GR1 == NEVER, 0.0)
        weights_GRS = scores_GRS.sub_(shift_GR1).exp_()
        fade_GR1 = self.largest_GR1.sub_(shift_GR1).exp_()
        self.sum_GR1.mul_(fade_GR1).add_(weights_GRS.sum(-1, keepdim=True))
        self.out_GRE.mul_(fade_GR1).baddbmm_(weights_GRS, v_SGE.to(dtype).transpose(0, 1))
        self.largest_GR1 = largest_GR1

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out (1, T, H, E) and lse (1, T, H)."""
        # The largest score adds exp(0) = 1, so the sum is at least 1, or 0 in rows without keys, where out is 0 too.
        out_GRE = self.out_GRE.div_(self.sum_GR1.clamp(min=1.0))
        lse_GR = self.largest_GR1.add_(self.sum_GR1.log_())[..., 0]
        out_GrTE, lse_GrT = out_GRE.view(*self.shape_GrT, -1), lse_GR.view(self.shape_GrT)
        return out_GrTE.permute(2, 0, 1, 3).flatten(1, 2)[None], lse_GrT.permute(2, 0, 1).flatten(1, 2)[None]
