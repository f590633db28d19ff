"""A document in windows (``--context``): the baseline that whole documents are compared with.

Windows begin a stride apart, and the model sees each by itself, from position 0 on. A token is scored in the first
window in which it is predicted: after at most ``context`` tokens and, once past the first window, after more than
``context - stride``. With windows of M = context + 1 tokens this is what transformers' guide calls the strided
perplexity of a fixed-length model (its ``max_length`` is M), and with a stride of ``context`` it is lm-evaluation-
harness' ``loglikelihood_rolling``, but for the last window, which that moves back to be full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.layout import Layout
from cpmpi.engine.score import Engine, Scores
from cpmpi.run.spec import Scoring


class Window(NamedTuple):
    """Tokens that go through the model together, and the first that is scored by them; the last is the one after."""

    start: int
    stop: int
    first: int

    @property
    def size(self) -> int:
        """Tokens that go through the model."""
        return self.stop - self.start


def windows_of(n_tokens: int, scoring: Scoring) -> Iterator[Window]:
    """The windows of a document, in order; all of it, where none are asked for.

    Args:
        n_tokens: that go through the model, a prefix token among them.
        scoring: how wide they are, how far apart, and what is scored.
    """
    first, start = scoring.first + scoring.prefix, 0
    while True:
        stop = min(n_tokens, start + scoring.context) if scoring.context else n_tokens
        if first <= stop or stop == n_tokens:
            yield Window(start, stop, first)
            first = max(first, stop + 1)
        if stop == n_tokens:
            return
        start += scoring.stride


def score_in_windows(
    engine: Engine, token_ids: npt.NDArray[np.integer], layout: Layout, name: str, scoring: Scoring
) -> Scores:  # fmt: skip
    """Log-probabilities of this rank's share of a document, window by window; see `Engine.score`. Collective.

    What is kept of the last token is from the last window, which it is in.
    """
    found: list[Scores] = []
    windows = list(windows_of(len(token_ids), scoring))
    for window in windows:
        ids = token_ids[window.start : window.stop + 1]  # the last one is only predicted
        here = replace(engine, first=window.first - window.start)
        scores = here.score(ids, replace(layout, n_tokens=window.size), name)
        scores.positions = scores.positions + window.start
        found.append(scores)
        if window is not windows[-1]:  # that one once it is stored
            engine.progress.done(window.size)
    return joined(found)


def joined(found: Sequence[Scores]) -> Scores:
    """The scores of windows, in order, as those of one document."""
    names = dict.fromkeys(name for scores in found for name in scores.kept)
    seconds = dict.fromkeys(name for scores in found for name in scores.seconds)
    return Scores(
        positions=torch.cat([scores.positions for scores in found]),
        logprobs=torch.cat([scores.logprobs for scores in found]),
        last_hidden=found[-1].last_hidden,
        kept={n: torch.cat([scores.kept[n] for scores in found if n in scores.kept]) for n in names},
        seconds={n: sum(scores.seconds[n] for scores in found) for n in seconds},
    )
