"""Training windows: which tokens a step sees, and at which positions it is told they stand.

A model trained on short windows fails on long documents for two reasons: it has never seen their relative distances,
and never so many keys at once. Skipped positions cure the first at the price of short windows (PoSE, arXiv 2309.10400):
a window of 512 tokens with gaps between its positions spans up to ``REACH``. The last phases, of ever longer windows,
cure the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

REACH = 131_072
MAX_GAPS = 3


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some steps of one shape."""

    window_tokens: int
    """Tokens in a window."""
    batch: int
    """Windows in a step."""
    steps: int
    """Steps in the phase."""
    gap_share: float
    """Share of the windows whose positions have gaps."""

    @property
    def step_weight(self) -> float:
        """How far a step takes the training: by its tokens, and more for long windows, which are few and cost most."""
        return self.window_tokens * self.batch * (1 + self.window_tokens / 4096)


def sample(tokens: torch.Tensor, phase: Phase, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows at random places of ``tokens``, as (batch, window + 1) ids, and their (batch, window) positions."""
    starts = torch.randint(len(tokens) - phase.window_tokens, (phase.batch,), generator=random)
    ids = tokens[starts[:, None] + torch.arange(phase.window_tokens + 1)]
    return ids, torch.stack([positions(phase, random) for _ in range(phase.batch)])


def positions(phase: Phase, random: torch.Generator) -> torch.Tensor:
    """Consecutive positions, or with probability ``gap_share`` up to ``MAX_GAPS`` gaps of log-uniform sizes in them."""
    length = phase.window_tokens
    consecutive = torch.arange(length)
    if torch.rand((), generator=random) >= phase.gap_share or length >= REACH:
        return consecutive
    gaps = int(torch.randint(1, MAX_GAPS + 1, (), generator=random))
    sizes = ((REACH - length) / gaps) ** torch.rand(gaps, generator=random)
    places = torch.randint(1, length, (gaps,), generator=random)
    steps = torch.ones(length, dtype=torch.int64)
    steps[0] = 0
    steps.index_add_(0, places, sizes.to(torch.int64))
    return steps.cumsum(0)
