"""Run a fused kernel that knows only "every key" and "causal" on any mask.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim; n equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import pad

from .backend import Contribution
from .blocks import Block, blocks
from .mask import Mask, Span
from .partial import Rows


class Kernel(Protocol):
    """A fused attention kernel on n blocks at once."""

    def __call__(
        self, q_nHTD: torch.Tensor, k_nGSD: torch.Tensor, v_nGSE: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Out (n, H, T, E) and the natural log-sum-exp (n, H, T); ``causal``: T = S, query m sees keys 0..m."""
        ...


class Tile(NamedTuple):
    """The most that a kernel is given in one call: it bounds the memory of the kernel's result and of copies."""

    queries: int
    keys: int


def contributions(
    kernel: Kernel,
    tile: Tile,
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGE: torch.Tensor,
    *,
    q_start: int,
    k_start: int,
    mask: Mask,
    scale: float,
) -> Iterator[Contribution]:
    """One partial for each block of the mask (see backend.Contributions)."""
    q, k = range(q_start, q_start + len(q_THD)), range(k_start, k_start + len(k_SGD))
    for block in tiled_blocks(mask, q, k, tile):
        rows = Rows(block.q.start - q_start, len(block.q), block.repeat, block.step)
        keys = Rows(block.k.start - k_start, len(block.k), block.repeat, block.step)
        yield Contribution(rows, *_attend(kernel, rows.view(q_THD), keys.view(k_SGD), keys.view(v_SGE), block, scale))


def tiled_blocks(mask: Mask, q: Span, k: Span, tile: Tile) -> Iterator[Block]:
    """The blocks of ``mask`` over a grid of tiles."""
    visible = mask.queries(q, k)
    for i in visible[:: tile.queries]:
        queries = range(i, min(i + tile.queries, visible.stop))
        seen = mask.keys(queries, k)
        for j in seen[:: tile.keys]:
            yield from blocks(mask, queries, range(j, min(j + tile.keys, seen.stop)))


def pad_head_dims(
    q_nHTD: torch.Tensor, k_nGSD: torch.Tensor, v_nGSE: torch.Tensor, *, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equal head dims, a multiple of ``multiple``, for kernels that need them: zeros change no score and no value."""
    wanted = max(k_nGSD.shape[3], v_nGSE.shape[3])
    wanted += -wanted % multiple
    q, k, v = (x if x.shape[3] == wanted else pad(x, (0, wanted - x.shape[3])) for x in (q_nHTD, k_nGSD, v_nGSE))
    return q, k, v


def _attend(
    kernel: Kernel,
    q_nTHD: torch.Tensor,
    k_nSGD: torch.Tensor,
    v_nSGE: torch.Tensor,
    block: Block,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out (n, T, H, E) and lse (n, T, H) of one block."""
    reverse = block.kind == "anticausal"
    if reverse:
        q_nTHD, k_nSGD, v_nSGE = (x.flip(1) for x in (q_nTHD, k_nSGD, v_nSGE))
    out_nHTE, lse_nHT = kernel(
        q_nTHD.transpose(1, 2),
        k_nSGD.transpose(1, 2),
        v_nSGE.transpose(1, 2),
        causal=block.kind != "full",
        scale=scale,
    )
    out_nTHE, lse_nTH = out_nHTE.transpose(1, 2), lse_nHT.transpose(1, 2)
    return (out_nTHE.flip(1), lse_nTH.flip(1)) if reverse else (out_nTHE, lse_nTH)
