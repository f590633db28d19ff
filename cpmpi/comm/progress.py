"""Progress of long work, on rank 0: a line that renews itself on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
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
        self._name, self._tokens, self._layers = "", 0, 0
        self._done = 0.0
        self._started = self._shown = time.perf_counter()

    def start(self, name: str, tokens: int, layers: int) -> None:
        """A document's work begins."""
        self._name, self._tokens, self._layers, self._done = name, tokens, layers, 0.0
        self._started = self._shown = time.perf_counter()

    def update(self, layers_done: float) -> None:
        """``layers_done`` layers are done, a fraction of the current one included."""
        self._done = max(self._done, layers_done)
        if self.enabled and time.perf_counter() - self._shown >= self.interval_s:
            self._shown = time.perf_counter()
            self._show(self._line())

    def _line(self) -> str:
        part = min(1.0, self._done / max(1, self._layers))
        elapsed = time.perf_counter() - self._started
        left = f"{duration(elapsed / part - elapsed)} left" if part > 0.01 else "..."
        rate = part * self._tokens / max(elapsed, 1e-9)
        layer = min(self._layers, int(self._done) + 1)
        size = f"{self._tokens:,} tokens"
        return f"{self._name}: {part:4.0%}  layer {layer}/{self._layers}  {size}  {rate:,.0f} tokens/s  {left}"

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
