"""Attention over some of the keys, and how partials merge.

Legend: T query tokens, H query heads, E value head dim; n equal runs of rows.

A partial is ``(out_THE, lse_TH)``: the softmax-weighted mean of the values over some keys, and the log-sum-exp of the
scaled scores of these keys (natural logarithm). Rows that saw no key have ``out = 0`` and ``lse = -inf``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NEVER = float("-inf")


class Rows(NamedTuple):
    """``repeat`` runs of ``size`` rows each, the n-th starting at row ``start + n * step``; runs do not overlap."""

    start: int
    size: int
    repeat: int = 1
    step: int = 0

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + (self.repeat - 1) * self.step + self.size

    def view(self, x_T: torch.Tensor) -> torch.Tensor:
        """These rows of ``x_T`` (T, ...) as (repeat, size, ...), a view of the same memory."""
        part = x_T[self.start : self.stop]
        if self.repeat == 1:
            return part[None]
        return part.unfold(0, self.size, self.step).movedim(-1, 1)


def merge_(out_THE: torch.Tensor, lse_TH: torch.Tensor, other_THE: torch.Tensor, other_lse_TH: torch.Tensor) -> None:
    """Merge another partial, over other keys of the same queries, into ``out_THE`` and ``lse_TH`` in place.

    Leading dimensions are free as long as the four agree. The only temporaries have the size of ``lse_TH``.
    Plain formula (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1):

        lse = log(exp(lse_a) + exp(lse_b))
        out = (exp(lse_a) * out_a + exp(lse_b) * out_b) / exp(lse)

    and the stable one: ``out = out_a + (out_b - out_a) * sigmoid(lse_b - lse_a)``, ``lse = logaddexp(lse_a, lse_b)``.
    """
    # -inf - -inf is NaN: neither side has a key, and nothing moves.
    weight_TH = torch.sub(other_lse_TH, lse_TH).sigmoid_().nan_to_num_(nan=0.0)
    out_THE.lerp_(other_THE.to(out_THE.dtype), weight_TH[..., None])
    torch.logaddexp(lse_TH, other_lse_TH, out=lse_TH)


class Partial:
    """An accumulator of partials for T queries: starts with no key, takes contributions, and is finished once.

    ``out_THE`` and ``lse_TH`` are its state, zeros and -inf at first; float32, or float64 for float64 inputs.
    Read them freely; change them only through these methods, which know which rows are still empty.
    """

    def __init__(
        self,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.out_THE = torch.zeros(tokens, heads, head_dim, dtype=dtype, device=device)
        self.lse_TH = torch.full((tokens, heads), NEVER, dtype=dtype, device=device)
        self._touched = bytearray(tokens)
        self._finished = False

    def add_(self, rows: Rows, out_nTHE: torch.Tensor, lse_nTH: torch.Tensor) -> None:
        """Add a contribution to ``rows``: (repeat, size, H, E) and (repeat, size, H).

        Rows that nothing was added to before are assigned, others are merged.
        """
        assert not self._finished
        first = self._touched.find(1, rows.start, rows.stop) < 0
        self._touched[rows.start : rows.stop] = b"\x01" * (rows.stop - rows.start)
        ours_nTHE, ours_nTH = rows.view(self.out_THE), rows.view(self.lse_TH)
        if first:
            ours_nTHE.copy_(out_nTHE)
            ours_nTH.copy_(lse_nTH)
        else:
            merge_(ours_nTHE, ours_nTH, out_nTHE, lse_nTH)

    def merge_(self, out_THE: torch.Tensor, lse_TH: torch.Tensor, row: int = 0) -> None:
        """Add a partial of the rows from ``row`` on, such as one received from another rank."""
        self.add_(Rows(row, len(out_THE)), out_THE[None], lse_TH[None])

    def finish(self, sinks_H: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The result ``(out_THE, lse_TH)``, after all keys of all ranks were added.

        ``sinks_H`` are attention sinks, one logit a head that joins the softmax's denominator and has no value
        (gpt-oss): ``out *= exp(lse) / (exp(lse) + exp(sink))``. They enter once, so nothing can be added afterwards.
        """
        assert not self._finished
        self._finished = True
        if sinks_H is not None:
            sinks_H = sinks_H.to(self.lse_TH)
            self.out_THE *= torch.sub(self.lse_TH, sinks_H).sigmoid_()[..., None]
            torch.logaddexp(self.lse_TH, sinks_H, out=self.lse_TH)
        return self.out_THE, self.lse_TH
