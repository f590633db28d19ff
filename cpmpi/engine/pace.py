"""How often a checkpoint is written: by what one costs, and how often jobs fail.

Young (1974) and Daly (2006): work that is lost and time that is spent on checkpoints are together least with

    interval = sqrt(2 * seconds to write one * seconds between failures)

The time to write is measured; the rate of failures is assumed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from cpmpi.engine.options import minutes_between

# One failure a day on each node. Hardware fails far less often (Llama 3's training saw one in 264 node-days, arXiv
# 2407.21783), but a job is also preempted, runs out of time or memory, and loses its file system.
NODE_FAILURE_S = 86_400.0
# Checkpoints are never so frequent that writing them takes a larger part of the time.
LARGEST_PART = 0.02
ASSUMED_BYTES_PER_S = 2e8  # of writing, before the first checkpoint


@dataclass(kw_only=True)
class Pace:
    """When the next checkpoint is due.

    Args:
        choice: of ``--checkpoint``.
        nodes: that may fail.
        write_s: seconds that a checkpoint takes, at first a guess.
    """

    choice: str
    nodes: int
    write_s: float
    _measured: bool = False
    _last_s: float = field(default_factory=time.monotonic)

    @property
    def off(self) -> bool:
        """Whether there are no checkpoints at all."""
        return self.interval_s == math.inf

    @property
    def interval_s(self) -> float:
        """Seconds between two checkpoints."""
        minutes = minutes_between(self.choice)
        if minutes is not None:
            return 60 * minutes
        young_s = math.sqrt(2 * self.write_s * NODE_FAILURE_S / self.nodes)
        return max(young_s, self.write_s / LARGEST_PART)

    @property
    def due(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() - self._last_s >= self.interval_s

    def taken(self) -> None:
        """One is being written, or a document begins: count from now."""
        self._last_s = time.monotonic()

    def measured(self, seconds: float) -> None:
        """A checkpoint took so long to write; the longest counts."""
        self.write_s = max(self.write_s, seconds) if self._measured else seconds
        self._measured = True
