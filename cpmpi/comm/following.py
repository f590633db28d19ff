"""A program that knows of no ranks, on rank 0, while the others follow what it asks of the engine, call by call.

Whatever happens to the program between two calls, the others only wait to be told; what happens within a call happens
on all ranks together, or ends the launch. So nobody waits for a rank that is gone.
"""

from __future__ import annotations

import atexit
import time
from typing import Any

from cpmpi.comm.ranks import AgreedError, Ranks, abort, connected

TAG, PAUSE_S = 1, 0.005
END = ""


class Following:
    """The calls of rank 0's program to a worker that every rank has. Collective.

    Args:
        ranks: of the launch.
        worker: has the methods that are called; what they do together is theirs.
    """

    def __init__(self, ranks: Ranks, worker: Any) -> None:
        self.ranks, self.worker = ranks, worker
        self._comm: Any = ranks.comm.Dup()  # no other message is taken for a call
        self._over = self._within = False
        atexit.register(self._leave)

    @property
    def broken(self) -> bool:
        """Whether an error that only this rank knows of came out of a call, in which the others still are."""
        return self._within

    def call(self, name: str, *arguments: Any) -> Any:
        """What rank 0's worker says to this, while those of the other ranks do the same. On rank 0 only.

        Raises:
            AgreedError: on all ranks.
        """
        assert self.ranks.is_root
        assert not self._over, "the ranks do not follow any more"
        self._tell(name, arguments)
        return self._do(name, arguments)

    def follow(self) -> str | None:
        """Do what rank 0 asks for until it ends. On the other ranks only.

        Returns:
            What rank 0 ended with.

        Raises:
            AgreedError: on all ranks.
        """
        while True:
            while not self._comm.iprobe(source=0, tag=TAG):  # with no core: rank 0's program may compute for minutes
                time.sleep(PAUSE_S)
            self._comm.recv(source=0, tag=TAG)
            name, arguments = self._comm.bcast(None)
            if name == END:
                self._over = True
                problem: str | None = arguments[0]
                return problem
            self._do(name, arguments)

    def end(self, problem: str | None = None) -> None:
        """Let the other ranks go, with what went wrong on rank 0, if they have not gone."""
        if self.ranks.is_root and not self._over:
            self._over = True
            self._tell(END, (problem,))

    def _tell(self, name: str, arguments: tuple[Any, ...]) -> None:
        for rank in range(1, self.ranks.size):
            self._comm.send(None, dest=rank, tag=TAG)
        self._comm.bcast((name, arguments))

    def _do(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self._within = True
        try:
            result = getattr(self.worker, name)(*arguments)
        except AgreedError:
            self._over, self._within = True, False
            raise
        self._within = False
        return result

    def _leave(self) -> None:
        """At the end of the process, whoever ends it: an error within a call leaves the other ranks in it."""
        if self._within and connected():
            abort("ended within a call that the other ranks were in")
        self.end()
