"""The CPU's fused flash attention in half precision: products of bf16 or fp16, for processors that have them (AMX).

Weights are rounded to the inputs' type before they meet the values, as in transformers' own attention in that type;
scores, sums and lse are float32. The result of a call is rounded to the type as well: one rounding for each 4096 keys.

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim; n equal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from . import cpu, flash, fused
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
    """Partials of the mask's blocks (see backend.Contributions); very few queries go to ``blocked``, in float32.

    Raises:
        ValueError: with a softcap, or a dtype other than bf16 and fp16.
    """
    flash.check_half(q_THD.dtype, softcap, "cpu_half")
    if len(q_THD) * q_THD.shape[1] < cpu.BLOCKED_BELOW * k_SGD.shape[1]:
        return cpu.contributions(
            q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale, softcap=softcap
        )
    kernel = partial(cpu.kernel, dtype=q_THD.dtype)
    return fused.contributions(
        kernel, cpu.TILE, q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale
    )
