"""The FlashAttention backend: Dao's kernels, through torch, for bf16 and fp16.

It is FlashAttention 2, or 3 or 4 where ``torch.nn.attention.activate_flash_attention_impl`` was called before.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim; n equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import fused
from .backend import Contribution
from .mask import Mask

TILE = fused.Tile(queries=1 << 14, keys=1 << 17)
"""Few queries keep the result small before it is merged; many keys make merges rare."""


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
    check_half(q_THD.dtype, softcap, "flash")
    return fused.contributions(
        kernel, TILE, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale
    )


def kernel(
    q_nHTD: torch.Tensor, k_nGSD: torch.Tensor, v_nGSE: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See fused.Kernel. Takes GQA and strided views, and one head dim, a multiple of 8."""
    tokens, value_dim = q_nHTD.shape[2], v_nGSE.shape[3]
    q, k, v = fused.pad_head_dims(q_nHTD, k_nGSD, v_nGSE, multiple=8)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out[..., :value_dim], lse[..., :tokens]


def check_half(dtype: torch.dtype, softcap: float | None, name: str) -> None:
    """Refuse what the half-precision kernels lack.

    Raises:
        ValueError: with a softcap, or a dtype other than bf16 and fp16.
    """
    if softcap is not None or dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{name} takes bfloat16 or float16 ({dtype}) and no softcap ({softcap}); blocked takes all")
