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
from .softmax import LOG2_E, RunningSoftmax

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
        tiles = _Tiles(rows.view(q_THD)[0], k_SGD.shape[1], v_SGE.shape[2], scale, softcap)
        seen = mask.keys(queries, keys)
        for start in seen[::tile_S]:
            tile = range(start, min(start + tile_S, seen.stop))
            hidden_TS = None if mask.sight(queries, tile) == "full" else ~mask.dense(queries, tile, q_THD.device)
            part = slice(tile.start - k_start, tile.stop - k_start)
            tiles.add_(k_SGD[part], v_SGE[part], hidden_TS)
        yield Contribution(rows, *tiles.finish())


def tile_shape(heads: int, device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile."""
    scores = TILE_SCORES.get(device.type, TILE_SCORES["cuda"]) // heads
    tile_S = 1 << max(6, scores.bit_length() // 2)
    return max(16, scores // tile_S), tile_S


class _Tiles:
    """Some queries that attend to key tiles, one after the other."""

    def __init__(self, q_THD: torch.Tensor, kv_heads: int, value_dim: int, scale: float, softcap: float | None) -> None:
        tokens, heads, head_dim = q_THD.shape
        self.softcap = softcap
        self.shape_GrT = (kv_heads, heads // kv_heads, tokens)
        # The softcap comes after the scale and before the change to powers of 2.
        factor = scale if softcap is not None else scale * LOG2_E
        q_THD = q_THD.to(accumulator_dtype(q_THD.dtype)).mul(factor)
        q_GrTD = q_THD.view(tokens, *self.shape_GrT[:2], head_dim).permute(1, 2, 0, 3)
        self.q_GRD = q_GrTD.reshape(kv_heads, -1, head_dim)
        self.softmax = RunningSoftmax((kv_heads, self.q_GRD.shape[1]), value_dim, like=self.q_GRD)

    def add_(self, k_SGD: torch.Tensor, v_SGE: torch.Tensor, hidden_TS: torch.Tensor | None) -> None:
        """Add a tile of keys, those that ``hidden_TS`` (T, S) marks left out."""
        dtype = self.q_GRD.dtype
        scores_GRS = torch.bmm(self.q_GRD, k_SGD.to(dtype).permute(1, 2, 0))
        if self.softcap is not None:
            scores_GRS.div_(self.softcap).tanh_().mul_(self.softcap * LOG2_E)
        if hidden_TS is not None:
            scores_GRS.view(*self.shape_GrT, -1).masked_fill_(hidden_TS, NEVER)
        weights_GRS = self.softmax.weigh_(scores_GRS)
        self.softmax.out_RE.baddbmm_(weights_GRS, v_SGE.to(dtype).transpose(0, 1))

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out (1, T, H, E) and lse (1, T, H)."""
        out_GRE, lse_GR = self.softmax.finish()
        out_GrTE, lse_GrT = out_GRE.view(*self.shape_GrT, -1), lse_GR.view(self.shape_GrT)
        return out_GrTE.permute(2, 0, 1, 3).flatten(1, 2)[None], lse_GrT.permute(2, 0, 1).flatten(1, 2)[None]
