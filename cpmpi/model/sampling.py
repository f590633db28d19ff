"""Which token comes next: the most probable one, or one drawn after transformers' own warping of the logits.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cpmpi.errors import UserError

SEEDS = 1_000_003  # apart, so that the n-th prompt's draws with one seed are not the first's with the next


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: what logits are divided by; 0: the most probable token is taken.
        top_k, top_p, min_p: which tokens are left to draw from; 0, 1 and 0: all.
        repetition_penalty: what logits of tokens that occurred are divided by (multiplied with, below 0); 1: none.
        seed: of the draws; every prompt has its own stream, whatever rank computes it.

    Raises:
        UserError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": self.temperature >= 0, "top-k": self.top_k >= 0, "top-p": 0 < self.top_p <= 1,
            "min-p": 0 <= self.min_p <= 1, "repetition-penalty": self.repetition_penalty > 0,
        }  # fmt: skip
        for name, right in ranges.items():
            if not right:
                allowed = {"top-p": "above 0 and at most 1", "min-p": "from 0 to 1", "repetition-penalty": "above 0"}
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {value}: must be {allowed.get(name, 'at least 0')}")

    @cached_property
    def _processors(self) -> Any:
        """transformers' processors, in the order in which its own ``generate`` applies them."""
        from transformers import generation

        made = []
        if self.repetition_penalty != 1:
            made.append(generation.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            made.append(generation.TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            made.append(generation.TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            made.append(generation.TopPLogitsWarper(self.top_p))
        if self.temperature and self.min_p:
            made.append(generation.MinPLogitsWarper(self.min_p))
        return generation.LogitsProcessorList(made)

    def stream(self, prompt: int) -> torch.Generator:
        """The random numbers of a prompt."""
        return torch.Generator().manual_seed(self.seed * SEEDS + prompt)

    def choose(self, logits_V: torch.Tensor, ids: list[int], stream: torch.Generator) -> int:
        """The next token after ``ids``, the whole text so far."""
        logits_1V = self._processors(torch.tensor([ids], dtype=torch.int64), logits_V.float().cpu()[None])
        if not self.temperature:
            return int(logits_1V.argmax())
        return int(torch.multinomial(logits_1V[0].double().softmax(0), 1, generator=stream))
