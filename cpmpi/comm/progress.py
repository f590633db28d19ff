"""Progress of long work, on rank 0: a line that renews itself on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from cpmpi.text import counted, cut, duration, shown

LIVE_S, PLAIN_S, MOST_S = 0.2, 10.0, 300.0  # seconds between updates
NAME_WIDTH = 40
CLEAR = "\r\x1b[K"


class Progress:
    """How far a job is: documents, tokens per second, and the time left for everything.

    The engine tells it, in this order: `job` once, then for each document `start`, `update` as its layers come, and
    `done`; at last `close`.

    Args:
        enabled: False on other ranks and with ``--quiet``: then nothing is printed.
        stream: where to print.
        interval_s: seconds between updates; by default 0.2 on a terminal, elsewhere 10, and more as a job gets long.
    """

    _live: Progress | None = None  # whose line stands unfinished on the terminal

    def __init__(self, enabled: bool, stream: TextIO | None = None, interval_s: float | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.listener: Callable[[Progress], None] | None = None  # told of every step, also where nothing is printed
        self.name, self.tokens, self.layers, self._noun = "", 0, 0, "document"
        self._interval_s = interval_s
        self._began = self._shown = self._started = time.perf_counter()
        self._documents, self._work, self._per_pair = 1, 0.0, 0.0
        self._documents_done, self._tokens_done, self._work_done, self._done = 0, 0, 0.0, 0.0
        self._first = self._kept_work = self._kept_tokens = 0.0

    def job(self, lengths: Sequence[int], per_pair: float = 0.0, noun: str = "document") -> None:
        """The whole job's work begins.

        Args:
            lengths: tokens of each document that is to be done.
            per_pair: what a pair of tokens costs, where a token costs 1 (attention against the rest): the time left of
                documents of different lengths follows from it.
            noun: what they are called.
        """
        self._per_pair, self._noun = per_pair, noun
        self._documents, self._work = len(lengths), sum(map(self._cost, lengths))
        self._documents_done, self._tokens_done, self._work_done = 0, 0, 0.0
        self._kept_work = self._kept_tokens = 0.0
        self._began = self._shown = time.perf_counter()

    def start(self, name: str, tokens: int, layers: int, first: int = 0) -> None:
        """A document's work begins, or goes on with layer ``first``."""
        self.name, self.tokens, self.layers, self._done = name, tokens, layers, float(first)
        self._started = time.perf_counter()
        if not self._work:
            self.job([tokens])
        self._first = first / max(1, layers)
        self._kept_work += self._first * self._cost(tokens)
        self._kept_tokens += self._first * tokens

    def update(self, layers_done: float) -> None:
        """``layers_done`` layers are done, a fraction of the current one included."""
        self._done = max(self._done, layers_done)
        if self.listener is not None:
            self.listener(self)
        self._now_and_then(self._line)

    def done(self, tokens: int) -> None:
        """A document of so many tokens is finished and stored."""
        self._documents_done += 1
        self._tokens_done += tokens
        self._work_done += self._cost(tokens)
        self.tokens, self._done = 0, 0.0
        self._now_and_then(self._line)

    def count(self, what: str, done: int, of: int) -> None:
        """So much of something else is done, such as ``tokenized 3 of 7 characters``; the last is always said."""
        text = f"{what.format(done=f'{done:,}', of=f'{of:,}')}"
        if done >= of:
            self.say(text)
        else:
            self._now_and_then(lambda: text)

    @property
    def part(self) -> float:
        """How much of the document is done, from 0 to 1."""
        return min(1.0, self._done / max(1, self.layers))

    @property
    def layer(self) -> int:
        """The layer that is being computed, counted from 1."""
        return min(self.layers, int(self._done) + 1)

    @property
    def rate(self) -> float:
        """Tokens of the document per second."""
        return (self.part - self._first) * self.tokens / max(time.perf_counter() - self._started, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds until the document is done; None while it is too early to tell."""
        elapsed, here = time.perf_counter() - self._started, self.part - self._first
        return elapsed * (1 - self.part) / here if here > 0.01 else None

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            end_line()
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """The job is over: what it did, where it did several documents."""
        seconds = time.perf_counter() - self._began
        if self._documents_done > 1:
            rate = f"{(self._tokens_done - self._kept_tokens) / max(seconds, 1e-9):,.0f} tokens/s"
            documents = f"{counted(self._documents_done, self._noun)}, {self._tokens_done:,} tokens"
            self.say(f"{documents} in {duration(seconds)}, {rate}")
        end_line()

    def _cost(self, tokens: int) -> float:
        return tokens + self._per_pair * tokens * tokens / 2

    def _line(self) -> str:
        share = (self._work_done + self.part * self._cost(self.tokens)) / max(self._work, 1e-9)
        elapsed = time.perf_counter() - self._began
        here = share - self._kept_work / max(self._work, 1e-9)  # what this start of the job did
        left = f"{duration(elapsed * (1 - share) / here)} left" if here > 0.002 else "..."
        tokens = self._tokens_done + self.part * self.tokens
        rate = f"{(tokens - self._kept_tokens) / max(elapsed, 1e-9):,.0f} tokens/s"
        over = self._documents_done >= self._documents  # the last document's results are being written
        layer = f"layer {self.layers if over else self.layer}/{self.layers}"
        name = shown(self.name, NAME_WIDTH)
        if self._documents == 1:
            return f"{name}: {share:4.0%}  {layer}  {self.tokens or self._tokens_done:,} tokens  {rate}  {left}"
        documents = f"{self._noun} {min(self._documents, self._documents_done + 1):,} of {self._documents:,}"
        return f"{documents}: {share:4.0%}  {tokens:,.0f} tokens  {rate}  {left}  ({name}, {layer})"

    @property
    def interval_s(self) -> float:
        """Seconds until the next line: a log of a long job needs fewer."""
        if self._interval_s is not None:
            return self._interval_s
        return LIVE_S if self.live else min(MOST_S, max(PLAIN_S, (time.perf_counter() - self._began) / 20))

    def _now_and_then(self, line: Callable[[], str]) -> None:
        if self.enabled and time.perf_counter() - self._shown >= self.interval_s:
            self._shown = time.perf_counter()
            if self.live:
                Progress._live = self
                self.stream.write(CLEAR + cut(line(), columns(self.stream) - 1))
                self.stream.flush()
            else:
                print(line(), file=self.stream, flush=True)


def end_line() -> None:
    """Take a live line away, where one stands: for what is printed next, on either stream."""
    standing, Progress._live = Progress._live, None
    if standing is not None:
        standing.stream.write(CLEAR)
        standing.stream.flush()


def columns(stream: TextIO) -> int:
    """How wide the terminal is; a longer line would leave its beginning behind when it is renewed."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
