"""The documents of a run that several jobs share, as rank 0 sees them: which are done, which are free, which is ours.

A document is free where nobody claims it, or where the job that did is gone. It is ours once the claim
(`cpmpi.slurm.claims`) and the file lock of its part (`cpmpi.run.lock`) are, and it is still not done then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cpmpi.engine.circumstances import publish_circumstances
from cpmpi.engine.state import Job
from cpmpi.engine.watch import own_name
from cpmpi.errors import UserError, told
from cpmpi.model.size import pair_weight
from cpmpi.run import folder, parts
from cpmpi.run.lock import HeldError, is_held, only_writer
from cpmpi.run.paths import RunPaths, part_name
from cpmpi.run.reader import open_run
from cpmpi.slurm import record
from cpmpi.slurm.allocation import allocation
from cpmpi.slurm.claims import Claims, State, time_left_s
from cpmpi.text import duration

WHOLE = "run"  # the claim of who lays run.h5 out
PATIENCE_S = 600.0  # for it
MARGIN = 1.2  # on the predicted time of a document
SEEN = 8  # last documents that tell how long one takes


@dataclass(frozen=True)
class Turn:
    """What is to be done next.

    Attributes:
        index: the document that is ours now; None: none.
        wait: whether to look again.
        ended: how many documents are done, or have failed.
        late: why a free document was not begun: there is too little time.
    """

    index: int | None = None
    wait: bool = False
    ended: int = 0
    late: str = ""


class Clock:
    """Whether there is time for a document: what one took, by any job, against what is left of the time limit."""

    def __init__(self, job: Job) -> None:
        self._log, self._ranks, self._grace_s = RunPaths(job.options.output).log, job.ranks.size, job.options.grace
        self._per_pair = pair_weight(job.model.skeleton, job.inputs.checkpoint, job.model.layers)
        own = allocation()
        self._left_s = None if own is None else time_left_s(own.end_time, own.job_id)
        self._began_s = time.monotonic()
        self._costs = [e["rank_seconds"] / e["cost"] for e in record.documents(self._log)][-SEEN:]

    def cost(self, tokens: int) -> float:
        """What a document costs, where a token by itself costs 1."""
        return tokens + self._per_pair * tokens * tokens / 2

    def done(self, name: str, tokens: int, seconds: float, job: str) -> None:
        """A document took so long on these ranks."""
        cost, rank_seconds = self.cost(tokens), seconds * self._ranks
        record.note_document(self._log, job=job, document=name, tokens=tokens, seconds=round(seconds, 3),
                             rank_seconds=round(rank_seconds, 3), cost=cost, at=round(time.time(), 3))  # fmt: skip
        self._costs = [*self._costs, rank_seconds / cost][-SEEN:]

    def late(self, tokens: int) -> str:
        """Why there is no time for a document; empty where there is, or nobody knows."""
        if self._left_s is None or not self._costs:
            return ""
        left_s = self._left_s - (time.monotonic() - self._began_s) - self._grace_s
        needed_s = MARGIN * max(self._costs) * self.cost(tokens) / self._ranks
        if needed_s <= left_s:
            return ""
        return f"takes about {duration(needed_s)}, and {duration(max(0.0, left_s))} are left before the time to stop"


class Corpus:
    """The documents that this job may take, on rank 0. Use `opened`."""

    def __init__(self, job: Job, claims: Claims, name: str) -> None:
        self.job, self.claims, self.name, self.clock = job, claims, name, Clock(job)
        self.folder, self.spec = job.options.output, job.spec
        self.results = parts.Results(self.folder, self.spec)
        lengths = {i: document.n_tokens for i, document in enumerate(self.spec.documents)}
        most = job.options.most_tokens
        self.order = sorted((i for i in lengths if most is None or lengths[i] <= most), key=lambda i: lengths[i])
        if job.options.take == "longest":
            self.order.reverse()
        self._ours = ExitStack()
        self._begun = 0

    @classmethod
    @contextmanager
    def opened(cls, job: Job) -> Iterator[Corpus]:
        """Within it documents can be taken; what is ours at its end is given back."""
        with claims_of(job.options.output) as claims:
            corpus = cls(job, claims, own_name())
            with corpus._ours:
                yield corpus

    def join(self) -> int:
        """Take part in the run, which is laid out where there is none; how many documents are done.

        Raises:
            UserError: the folder holds a run of another model, or jobs work on another list in it.
        """
        options = self.job.options
        with self._whole():
            if not parts.join(self.folder, self.spec):
                check_alone(self.claims, "work on another list of documents here: give all the same --input, or wait")
                parts.fold(self.folder, self.spec, keep_finished=options.keep_finished)
            elif options.retry_failed and not at_work(self.claims):  # else who came first has them tried again
                parts.fold(self.folder, self.spec, retry_failed=True)
            if not RunPaths(self.folder).schedule.exists():  # others take from the first what changes the order of sums
                publish_circumstances(self.job, self.folder)
        self.results.refresh()
        return len(self.results.ends)

    def next(self) -> Turn:
        """Take the next document that is free and for which there is time; see `Turn`."""
        self.results.refresh()
        if self.results.parts >= parts.MOST_PARTS and told(self.claims.take, WHOLE):
            parts.fold(self.folder, self.spec)
            self.claims.drop(WHOLE)
        claimed = self.claims.look()
        states = {i: claimed.get(part_name(i)) for i in self.order if i not in self.results.ends}
        free = [i for i, state in states.items() if state in (None, State.DEAD)]
        late = {i: self.clock.late(self.spec.documents[i].n_tokens) for i in free}
        in_time = [i for i in free if not late[i]]
        if not self._begun:  # a whole time limit: if that is too short, the document goes on after a checkpoint
            in_time = in_time or free
        for i in in_time:
            if self._take(i):
                self._begun += 1
                return Turn(index=i, ended=len(self.results.ends))
        if free and not in_time:
            document = self.spec.documents[free[0]]
            why = f"document {document.id!r} ({document.n_tokens:,} tokens) {late[free[0]]}"
            return Turn(late=why, ended=len(self.results.ends))
        wait = bool(in_time) or State.YOUNG in states.values() or (self.job.options.stay and bool(states))
        return Turn(wait=wait, ended=len(self.results.ends))

    def give_back(self) -> None:
        """Another job may take the document that was ours, if it is not done."""
        self._ours.close()

    def close_up(self) -> int:
        """How many documents are left, of all; where none is, the run is made one."""
        self.results.refresh()
        left = len(self.spec.documents) - len(self.results.ends)
        if left == 0:
            with self._whole():
                with open_run(self.folder) as run:
                    complete = run.complete
                if not complete:
                    parts.fold(self.folder, self.spec)
                parts.delete_parts(self.folder)
        return left

    def absorb(self) -> None:
        """Make a run that was shared one of this job alone.

        Raises:
            UserError: jobs share it at this moment.
        """
        with self._whole():
            check_alone(self.claims, "share the documents of this run: do as they do (--share), or wait for them")
            if not self.job.options.overwrite:
                parts.fold(self.folder, self.spec, keep_finished=self.job.options.keep_finished)
                parts.delete_parts(self.folder)

    def _take(self, i: int) -> bool:
        name, part = part_name(i), RunPaths(self.folder).part(i).folder
        if not told(self.claims.take, name):
            return False
        self._ours.callback(self.claims.drop, name)
        try:
            self._ours.enter_context(only_writer(part))
        except HeldError:  # Slurm spoke of the wrong job, or its answer came late
            self._ours.close()
            return False
        if RunPaths(part).deleted.exists():  # a kill left it half deleted
            folder.delete_run(part)
        self.results.refresh()
        if i in self.results.ends:
            self._ours.callback(parts.delete_parts, self.folder, {i} if not RunPaths(part).index.exists() else set())
            self._ours.close()
            return False
        return True

    @contextmanager
    def _whole(self) -> Iterator[None]:
        patience = time.monotonic() + PATIENCE_S
        while not told(self.claims.take, WHOLE):
            if time.monotonic() > patience:
                file, holder = RunPaths(self.folder).parts / f"{WHOLE}.claim", _holder(self.claims, WHOLE)
                raise UserError(f"{file}: held for {duration(PATIENCE_S)} by {holder}; delete it if that is gone")
            time.sleep(0.2)
        try:
            yield
        finally:
            self.claims.drop(WHOLE)


@contextmanager
def claims_of(run: Path) -> Iterator[Claims]:
    """The claims on documents of a run, for this process; its own are dropped at the end."""
    own, paths = allocation(), RunPaths(run)

    def held(name: str) -> bool | None:
        return None if name == WHOLE else is_held(paths.parts / name)

    try:
        with Claims(paths.parts, held, own.restart_count if own else 0) as claims:
            yield claims
    finally:
        with suppress(OSError):
            paths.parts.rmdir()


def at_work(claims: Claims) -> list[str]:
    """The jobs that work on documents of a run beside this one."""
    others = [n for n, state in claims.look().items() if n != WHOLE and state in (State.LIVES, State.YOUNG)]
    return sorted({_holder(claims, name) for name in others})


def check_alone(claims: Claims, why: str) -> None:
    """Refuse to go on where other jobs work on documents.

    Raises:
        UserError: they do; with ``why`` after their names.
    """
    if others := at_work(claims):
        raise UserError(f"{claims.folder.parent}: {', '.join(others)} {why}")


def check_nobody_works(run: Path, why: str) -> None:
    """As `check_alone`, for a job that shares nothing.

    Raises:
        UserError: jobs work on documents of a run.
    """
    if RunPaths(run).parts.is_dir():
        with claims_of(run) as claims:
            check_alone(claims, why)


def _holder(claims: Claims, name: str) -> str:
    owner = claims.owner(name)
    if owner is None:
        return "somebody"
    return f"job {owner[2]}" if owner[0] == "SLURM" else f"process {owner[2]}"
