"""Being told to stop: signals set a flag, and the job looks at it where its state is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Within it, SIGTERM (preemption, the time limit) and SIGUSR1 (a batch script's warning) set a flag and no more.

    In threads other than the main one, where Python takes no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.told: str | None = None
        """The signal that came first; None while none came."""
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told = self.told or signal.Signals(number).name

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
