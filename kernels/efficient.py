"""The memory-efficient backend: xFormers' CUTLASS kernels, through torch, for float32 on CUDA and for older GPUs.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim; n equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import fused
from .backend import Contribution
from .mask import Mask

TILE = fused.Tile(queries=1 << 14, keys=1 << 14)
"""Keys are few because GQA repeats them."""


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
        ValueError: with a softcap, or float64.
    """
    if softcap is not None or q_THD.dtype == torch.float64:
        raise ValueError(f"efficient takes no float64 ({q_THD.dtype}) and no softcap ({softcap}); blocked takes all")
    return fused.contributions(
        kernel, TILE, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale
    )


def kernel(
    q_nHTD: torch.Tensor, k_nGSD: torch.Tensor, v_nGSE: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See fused.Kernel. The operator has no GQA, wants head dims in steps of 8, and pads lse to a multiple of 32."""
    heads, tokens, value_dim = q_nHTD.shape[1], q_nHTD.shape[2], v_nGSE.shape[3]
    q, k, v = fused.pad_head_dims(q_nHTD, k_nGSD, v_nGSE, multiple=8)
    if heads > k.shape[1]:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out[..., :value_dim], lse[..., :tokens]
