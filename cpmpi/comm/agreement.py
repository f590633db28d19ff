"""What ranks tell each other on the way, without waiting: a few numbers of each, one layer later known to all.

Every rank posts its numbers when it leaves a meeting of all ranks and reads everyone's at the next one, so that the
message travels while the layer between is computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpmpi.comm.flight import Flight

if TYPE_CHECKING:
    from mpi4py import MPI

LONGEST_PAUSE_S = 0.001


class Agreement:
    """Numbers of all ranks. Collective: every rank posts and reads in the same order.

    Args:
        comm: of the ranks; a duplicate of it is used.
        count: numbers of a rank, int64.
        flight: records the waiting.
    """

    def __init__(self, comm: MPI.Intracomm, count: int, flight: Flight | None = None) -> None:
        self._flight = flight or Flight()
        with self._flight.waits("open"):
            self._comm = comm.Dup()
        self._mine = np.zeros(count, np.int64)
        self._all_NK = np.zeros((comm.size, count), np.int64)
        self._request: MPI.Request | None = None

    def post(self, numbers: Sequence[int]) -> None:
        """Start to tell this rank's numbers."""
        assert self._request is None, "the numbers before were not read"
        self._mine[:] = numbers
        self._request = self._comm.Iallgather(self._mine, self._all_NK)

    def read(self) -> npt.NDArray[np.int64] | None:
        """The numbers (ranks, count) that were posted last; None where none were since the last reading."""
        if self._request is None:
            return None
        with self._flight.waits("agreement"):
            started = time.perf_counter()
            while not self._request.Test():  # not Wait, which takes a core that computing ranks may need
                waited_s = time.perf_counter() - started
                time.sleep(min(LONGEST_PAUSE_S, waited_s / 10) if waited_s > 2e-4 else 0.0)
        self._request = None
        return self._all_NK.copy()

    def close(self) -> None:
        """Read what is under way and free the communicator. Collective."""
        self.read()
        self._comm.Free()
