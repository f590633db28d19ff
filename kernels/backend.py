"""What a backend is: attention over a block of keys, one signature for all of them.

Legend: T query tokens, S key tokens, H query heads, G KV heads (H a multiple of G, query head h reads KV head
``h // (H / G)``), D key head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .mask import Mask
from .partial import Partial, Rows


class Contribution(NamedTuple):
    """The partial of ``rows`` over some of the keys: out (repeat, size, H, E) and lse (repeat, size, H)."""

    rows: Rows
    out_nTHE: torch.Tensor
    lse_nTH: torch.Tensor


class Contributions(Protocol):
    """What a backend file provides: the block's attention as partials that together hold every visible pair once.

    Called with checked shapes, and only where some query sees some key.
    """

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_SGD: torch.Tensor,
        v_SGE: torch.Tensor,
        *,
        q_start: int,
        k_start: int,
        mask: Mask,
        scale: float,
        softcap: float | None,
    ) -> Iterator[Contribution]: ...


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partials of inputs of this dtype are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to compute attention over a block of keys, chosen once for a run and reported."""

    name: str
    """One word, a key of ``select.BACKENDS``."""
    reason: str
    """One line: why this one was chosen."""
    contributions: Contributions
    """The computation."""

    def attend(
        self,
        q_THD: torch.Tensor,
        k_SGD: torch.Tensor,
        v_SGE: torch.Tensor,
        *,
        q_start: int,
        k_start: int,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Attention of the queries at positions ``q_start, ...`` over the keys at positions ``k_start, ...``.

        Args:
            q_THD: queries, any strides.
            k_SGD: keys.
            v_SGE: values.
            q_start: position of the first query; the others follow without gaps.
            k_start: position of the first key; the others follow without gaps.
            mask: which query sees which key.
            scale: what the scores ``q . k`` are multiplied with.
            softcap: if given, scores become ``softcap * tanh(score / softcap)``, after the scale and before the mask.

        Returns:
            ``(out_THE, lse_TH)`` in float32 (float64 for float64 inputs), with out = 0 and lse = -inf in rows that
            see no key; None when no query sees any key.

        Raises:
            ValueError: shapes that do not fit, or something that this backend does not compute.
        """
        check(q_THD, k_SGD, v_SGE)
        q, k = range(q_start, q_start + len(q_THD)), range(k_start, k_start + len(k_SGD))
        if mask.sight(q, k) == "none":
            return None
        partial = Partial(
            len(q_THD),
            q_THD.shape[1],
            v_SGE.shape[2],
            dtype=accumulator_dtype(q_THD.dtype),
            device=q_THD.device,
        )
        self.attend_into(
            partial, 0, q_THD, k_SGD, v_SGE,
            q_start=q_start, k_start=k_start, mask=mask, scale=scale, softcap=softcap,
        )  # fmt: skip
        return partial.out_THE, partial.lse_TH

    def attend_into(
        self,
        partial: Partial,
        row: int,
        q_THD: torch.Tensor,
        k_SGD: torch.Tensor,
        v_SGE: torch.Tensor,
        *,
        q_start: int,
        k_start: int,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
    ) -> bool:
        """Like ``attend``, added to the rows ``row, ..., row + T - 1`` of ``partial``, without a whole result between.

        Returns:
            Whether any query saw any key; if not, nothing was done.
        """
        check(q_THD, k_SGD, v_SGE)
        assert 0 <= row <= len(partial.out_THE) - len(q_THD)
        q, k = range(q_start, q_start + len(q_THD)), range(k_start, k_start + len(k_SGD))
        if mask.sight(q, k) == "none":
            return False
        for rows, out_nTHE, lse_nTH in self.contributions(
            q_THD, k_SGD, v_SGE, q_start=q_start, k_start=k_start, mask=mask, scale=scale, softcap=softcap
        ):
            partial.add_(rows._replace(start=row + rows.start), out_nTHE, lse_nTH)
        return True


def check(q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGE: torch.Tensor) -> None:
    """Refuse tensors whose shapes, dtypes or devices do not fit together.

    Raises:
        ValueError: naming the three shapes, dtypes and devices.
    """
    three = (q_THD, k_SGD, v_SGE)
    fits = all(x.ndim == 3 for x in three) and k_SGD.shape[:2] == v_SGE.shape[:2]
    fits = fits and q_THD.shape[2] == k_SGD.shape[2] and q_THD.shape[1] % max(1, k_SGD.shape[1]) == 0
    if not fits or len({(x.dtype, x.device) for x in three}) > 1 or not q_THD.is_floating_point():
        q, k, v = (f"{tuple(x.shape)} {x.dtype} {x.device}" for x in three)
        raise ValueError(
            f"q {q}, k {k}, v {v}: expected (T, H, D), (S, G, D), (S, G, E) "
            "with H a multiple of G, of one float dtype on one device"
        )
