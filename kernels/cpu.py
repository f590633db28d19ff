"""The CPU backend: torch's fused flash attention for the CPU, float32 (or float64) inside.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D head dim (values have the same, E = D); n blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import fused
from .backend import Contribution, accumulator_dtype
from .mask import Mask

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
    """Partials of the mask's blocks (see backend.Contributions).

    Raises:
        ValueError: with a softcap, or where the head dims of keys and values differ.
    """
    if softcap is not None or k_SGD.shape[2] != v_SGE.shape[2]:
        raise ValueError(
            f"the cpu backend takes no softcap ({softcap}) and one head dim for keys ({k_SGD.shape[2]}) "
            f"and values ({v_SGE.shape[2]}); use blocked"
        )
    return fused.contributions(_kernel, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale)


def _kernel(
    q_nHTD: torch.Tensor, k_nGSD: torch.Tensor, v_nGSE: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See fused.Kernel. No row is without a key (torch would return lse = 0 there); strided views are not copied."""
    # Not in bf16 or fp16: without hardware support their products run a hundred times slower than float32.
    dtype = accumulator_dtype(q_nHTD.dtype)
    out_nHTD, lse_nHT = _flash(q_nHTD.to(dtype), k_nGSD.to(dtype), v_nGSE.to(dtype), 0.0, causal, scale=scale)
    return out_nHTD, lse_nHT
