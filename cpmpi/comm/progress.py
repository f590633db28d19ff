"""Progress of long work, on rank 0: a line that renews itself on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from cpmpi.text import duration


class Progress:
    """How far a document is: layer, tokens per second, time left.

    Args:
        enabled: False on other ranks and with ``--quiet``: then nothing is printed.
        stream: where to print.
        interval_s: seconds between updates; by default 0.2 on a terminal, 10 elsewhere.
    """

    def __init__(self, enabled: bool, stream: TextIO | None = None, interval_s: float | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.interval_s = interval_s if interval_s is not None else 0.2 if self.live else 10.0
        self.listener: Callable[[Progress], None] | None = None  # told of every step, also where nothing is printed
        self.name, self.tokens, self.layers = "", 0, 0
        self._done = 0.0
        self._started = self._shown = time.perf_counter()

    def start(self, name: str, tokens: int, layers: int) -> None:
        """A document's work begins."""
        self.name, self.tokens, self.layers, self._done = name, tokens, layers, 0.0
        self._started = self._shown = time.perf_counter()

    def update(self, layers_done: float) -> None:
        """``layers_done`` layers are done, a fraction of the current one included."""
        self._done = max(self._done, layers_done)
        if self.listener is not None:
            self.listener(self)
        if self.enabled and time.perf_counter() - self._shown >= self.interval_s:
            self._shown = time.perf_counter()
            self._show(self._line())

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
        """Tokens per second."""
        return self.part * self.tokens / max(time.perf_counter() - self._started, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds until the document is done; None while it is too early to tell."""
        elapsed = time.perf_counter() - self._started
        return elapsed / self.part - elapsed if self.part > 0.01 else None

    def _line(self) -> str:
        left = "..." if self.left_s is None else f"{duration(self.left_s)} left"
        layer, size = f"layer {self.layer}/{self.layers}", f"{self.tokens:,} tokens"
        return f"{self.name}: {self.part:4.0%}  {layer}  {size}  {self.rate:,.0f} tokens/s  {left}"

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            if self.live:
                self.stream.write("\r\x1b[K")
            print(text, file=self.stream, flush=True)

    def _show(self, text: str) -> None:
        if self.live:
            self.stream.write(f"\r\x1b[K{text}")
            self.stream.flush()
        else:
            print(text, file=self.stream, flush=True)
