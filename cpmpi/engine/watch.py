"""What is told of a job while it runs, and what tells it to stop: the record of a run's jobs, its status, signals.

A job that is told to stop does so on all ranks together, between documents or inside one that can be saved
(`cpmpi.engine.checkpoint`): what is finished is safe in the run folder, and the same command goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmpi.comm import watchdog
from cpmpi.comm.log import rank_log
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import node_name
from cpmpi.comm.stop import Stop
from cpmpi.engine.options import JobOptions, hang_seconds
from cpmpi.engine.state import Prepared
from cpmpi.errors import Stopped, one_line, why
from cpmpi.run.paths import RunPaths
from cpmpi.slurm import record
from cpmpi.slurm.allocation import allocation, few_cores

MOST_IN_VAIN = 2  # starts that were stopped before they had finished a document, in a row


@dataclass
class Watch:
    """A job under way: how many documents are finished, and whether it was told to stop."""

    job: Prepared
    stop: Stop
    documents: int
    finished: int
    noun: str = "documents"
    finished_here: int = 0

    def go_on(self) -> None:
        """Return, or stop on all ranks where any rank was told to. Collective; called where nothing would be lost.

        Raises:
            Stopped: on all ranks.
        """
        told = [number for number in self.job.ranks.allgather(self.stop.signal) if number]
        if told:
            done = f"{self.finished} of {self.documents} {self.noun} are finished"
            raise Stopped(f"stopped by {signal.Signals(told[0]).name}: {done}; the same command goes on")

    def document_done(self, count: int = 1) -> None:
        """One more is finished, or several."""
        self.finished += count
        self.finished_here += count


@contextmanager
def watched(
    job: Prepared, output: Path, stop: Stop, *, documents: int, finished: int, noun: str = "documents"
) -> Iterator[Watch]:  # fmt: skip
    """A job's record, status file and log line of its allocation, kept by rank 0 while the block runs. Collective.

    Args:
        job: that is watched.
        output: its run folder.
        stop: whether it is told to stop.
        documents: that it has to do in all.
        finished: of these, before it began.
        noun: what they are.

    Raises:
        Stopped: from the block; with exit status 1 where the job never gets to the end of a document.
    """
    watch = Watch(job=job, stop=stop, documents=documents, finished=finished, noun=noun)
    _tell_allocation(job)
    if not job.ranks.is_root:
        yield watch
        return
    folder, own = RunPaths.of(output).log, allocation()
    name, restarts = (own.name, own.restart_count) if own else (None, 0)
    common = {"job": name, "of": documents}
    _note(folder, **common, started=int(time.time()), restarts=restarts, finished=finished,
                ranks=job.ranks.size, node=node_name())  # fmt: skip
    shared = isinstance(job.options, JobOptions) and job.options.share
    speaker = own_name() if shared else name
    status = record.StatusFile(folder, speaker if shared else None)
    job.progress.listener = lambda progress: _tell(status, progress, watch, speaker)
    how, why, saved = "failed", "", False
    try:
        yield watch
        how = "complete"
    except Stopped as told:
        how, why, saved = "stopped", one_line(told), told.saved
        past = [e for e in record.entries(folder) if not shared or e.get("job") == name]
        if not (watch.finished_here or saved) and record.starts_in_vain(past) + 1 >= MOST_IN_VAIN:
            told.give_up(f"{MOST_IN_VAIN} starts in a row ended before a document did: more time or nodes are needed")
        raise
    except BaseException as problem:
        why = one_line(problem)
        raise
    finally:
        job.progress.listener = None
        if shared:
            status.remove()
        _note(folder, **common, ended=int(time.time()), how=how, why=why, finished=watch.finished,
                    finished_here=watch.finished_here, saved=saved)  # fmt: skip


@contextmanager
def alive(job: Prepared, run: Path, hang_timeout: str, *, beside: bool = False) -> Iterator[None]:
    """Within it this rank has its log, and a watchdog that ends a job in which no rank goes on. Collective.

    Args:
        job: that is watched.
        run: whose logs are written.
        hang_timeout: as `hang_seconds` takes it.
        beside: whether other jobs may use the run at the same time: then there are no lines in its logs.
    """
    ranks, log = job.ranks, RunPaths.of(run).log
    with ExitStack() as stack:
        if beside:
            stack.enter_context(_unheard())
        else:
            ranks.together(stack.enter_context, rank_log(log, ranks))
        seconds = hang_seconds(hang_timeout)
        stack.enter_context(watchdog.watched(ranks, log, seconds, job.progress.say, beside=beside))
        yield


@contextmanager
def _unheard() -> Iterator[None]:
    """Within it what would be logged is not printed instead."""
    handler = logging.NullHandler()
    logging.getLogger("cpmpi").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("cpmpi").removeHandler(handler)


def _note(folder: Path, **entry: Any) -> None:
    """A line in the record, where it can be written: no job fails for want of it."""
    try:
        record.note(folder, **entry)
    except OSError as problem:
        logging.getLogger("cpmpi").warning("%s", why(problem))


def _tell(status: record.StatusFile, progress: Progress, watch: Watch, name: str | None) -> None:
    if status.due():
        status.write(
            job=name, document=progress.name, tokens=progress.tokens, layer=progress.layer, layers=progress.layers,
            part=round(progress.part, 4), tokens_per_s=round(progress.rate, 1), left_s=progress.left_s,
            finished=watch.finished, of=watch.documents,
        )  # fmt: skip


def _tell_allocation(job: Prepared) -> None:
    """The allocation in one line in every log, and what Slurm gave too little of. Collective."""
    own = allocation()
    told = None
    if own is not None:
        logging.getLogger("cpmpi").info("%s", own.line())
        job.progress.say(own.line())
        here = next(len(n.ranks) for n in job.place.topology.nodes if job.ranks.rank in [p.rank for p in n.ranks])
        told = few_cores(
            cores=len(os.sched_getaffinity(0)), node_cores=os.cpu_count() or 1, node_ranks=here, node=node_name()
        )
    for line in dict.fromkeys(line for line in job.ranks.allgather(told) if line is not None):
        job.progress.say(f"warning: {line}")


def own_name() -> str:
    """This job's name in logs: Slurm's, or node and process."""
    own = allocation()
    return own.name if own is not None else f"{node_name()}-{os.getpid()}"
