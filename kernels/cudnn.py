"""The cuDNN backend: NVIDIA's fused attention, through torch, for bf16 and fp16.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim; n equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import flash, fused
from .backend import Contribution
from .mask import Mask


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
        ValueError: with a softcap, or a dtype other than bf16 and fp16.
    """
    flash.check_half(q_THD.dtype, softcap, "cudnn")
    return fused.contributions(
        kernel, flash.TILE, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale
    )


def kernel(
    q_nHTD: torch.Tensor, k_nGSD: torch.Tensor, v_nGSE: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See fused.Kernel. Takes GQA and strided views; lse is (n, H, T, 1) or (n, H, T), by torch's version."""
    n, heads, tokens, _ = q_nHTD.shape
    if 1 in (tokens, k_nGSD.shape[2]):  # torch refuses one key, and several cuDNN versions one query
        return flash.kernel(q_nHTD, k_nGSD, v_nGSE, causal=causal, scale=scale)
    out_nHTE, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_nHTD, k_nGSD, v_nGSE, None, True, 0.0, causal, False, scale=scale
    )
    return out_nHTE, lse.reshape(n, heads, tokens)
