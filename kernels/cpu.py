"""The CPU backend: torch's fused flash attention for the CPU, in float32 (or float64) whatever the inputs.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim; n equal blocks.

What is done around the operator, and why (numbers in docs/kernels.md): keys and values are copied head by head, because
rows a power of two apart (G = 8, D = 128) share few cache sets; where queries are few, the heads that share a KV head
are packed into longer columns of one head; tiles keep copies and results small; very few queries go to ``blocked``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import blocked, fused
from .backend import Contribution, accumulator_dtype
from .mask import Mask

TILE = fused.Tile(queries=4096, keys=4096)
PACK_BELOW = 768
"""Queries below which the operator works in smaller tiles, and packing heads pays."""
BLOCKED_BELOW = 512
"""Queries x heads per KV head below which copying the keys costs more than the attention itself."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
    """Partials of the mask's blocks (see backend.Contributions); the operator lacks a softcap, ``blocked`` has it."""
    if softcap is not None or len(q_THD) * q_THD.shape[1] < BLOCKED_BELOW * k_SGD.shape[1]:
        return blocked.contributions(
            q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale, softcap=softcap
        )
    return fused.contributions(
        kernel, TILE, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale
    )


def kernel(
    q_nHTD: torch.Tensor,
    k_nGSD: torch.Tensor,
    v_nGSE: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See fused.Kernel; computes in ``dtype``, by default in float32 (or float64) whatever the inputs.

    No row is without a key here; the operator would return out = 0 and lse = 0 for it.
    """
    n, heads, tokens, _ = q_nHTD.shape
    kv_heads, value_dim = v_nGSE.shape[1], v_nGSE.shape[3]
    dtype = dtype or accumulator_dtype(q_nHTD.dtype)
    q, k, v = fused.pad_head_dims(q_nHTD, k_nGSD, v_nGSE)
    q = q.to(dtype)
    # Both calls are needed: to() may keep the strides where the dtype stays, contiguous() alone would copy twice.
    k, v = (x.to(dtype, memory_format=torch.contiguous_format).contiguous() for x in (k, v))
    packed = not causal and tokens < PACK_BELOW and heads > kv_heads
    if packed:
        q = q.reshape(n, kv_heads, -1, q.shape[3])
    out, lse = _flash(q, k, v, 0.0, causal, scale=scale)
    if packed:
        out, lse = out.reshape(n, heads, tokens, -1), lse.reshape(n, heads, tokens)
    return out[..., :value_dim], lse
