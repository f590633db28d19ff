"""A softmax over tiles of keys that come one after the other, for kernels that make their scores by themselves.

Legend: R rows (queries of several heads), S keys of a tile, E value head dim; leading dimensions are free.
"""

from __future__ import annotations

import math

import torch

from .partial import NEVER

LOG2_E = math.log2(math.e)
"""What scores are multiplied with beforehand: powers of 2 are five times faster than powers of e on some processors."""


class RunningSoftmax:
    """Softmax-weighted values of some rows, and the log-sum-exp of their scores.

    Plain formula: ``out = sum_j exp(s_j) v_j / sum_j exp(s_j)``, ``lse = log sum_j exp(s_j)``; here in powers of 2 and
    with the largest score so far taken out of every exponent (Milakov and Gimelshein, arXiv 1805.02867).

    For each tile: ``weights_RS = softmax.weigh_(scores_RS)``, then the caller adds ``weights_RS @ v_SE`` to ``out_RE``.
    """

    def __init__(self, rows: tuple[int, ...], value_dim: int, *, like: torch.Tensor) -> None:
        self.largest_R1 = like.new_full((*rows, 1), NEVER)
        self.sum_R1 = like.new_zeros(*rows, 1)
        self.out_RE = like.new_zeros(*rows, value_dim)

    def weigh_(self, scores_RS: torch.Tensor) -> torch.Tensor:
        """The tile's weights, in the memory of its scores, which are scaled by ``LOG2_E``, and -inf where hidden."""
        largest_R1 = torch.maximum(self.largest_R1, scores_RS.amax(-1, keepdim=True))
        # A row that has seen no key yet has largest = -inf, and -inf - -inf is NaN.
        shift_R1 = largest_R1.masked_fill(largest_R1 == NEVER, 0.0)
        weights_RS = scores_RS.sub_(shift_R1).exp2_()
        fade_R1 = self.largest_R1.sub_(shift_R1).exp2_()
        self.sum_R1.mul_(fade_R1).add_(weights_RS.sum(-1, keepdim=True))
        self.out_RE.mul_(fade_R1)
        self.largest_R1 = largest_R1
        return weights_RS

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out (R, E) and the natural log-sum-exp (R)."""
        # The largest score adds 2^0 = 1, so the sum is at least 1, or 0 in rows without keys, where out is 0 too.
        out_RE = self.out_RE.div_(self.sum_R1.clamp(min=1.0))
        lse_R1 = self.largest_R1.add_(self.sum_R1.log2_()).div_(LOG2_E)
        return out_RE, lse_R1[..., 0]
