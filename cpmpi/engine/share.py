"""Several jobs share the documents of a run: each takes one that is free, does it, and takes the next. Collective.

Rank 0 decides (`cpmpi.engine.corpus`), and the others follow. A document is a part of the run (`cpmpi.run.parts`) while
it is worked on, where another job goes on with it if this one dies; the last job makes all parts one ``run.h5``.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpmpi.comm import watchdog
from cpmpi.comm.log import rank_log
from cpmpi.comm.stop import Stop
from cpmpi.engine.checkpoint import Checkpoints
from cpmpi.engine.corpus import Corpus, Turn
from cpmpi.engine.options import hang_seconds
from cpmpi.engine.report import Outcome
from cpmpi.engine.run import (
    Files,
    load_engine,
    make_checkpoints,
    make_seeker,
    open_run_folder,
    open_writer,
    recording,
    score_document,
)
from cpmpi.engine.score import Engine
from cpmpi.engine.state import Job
from cpmpi.engine.watch import Watch, watched
from cpmpi.errors import Stopped
from cpmpi.model.size import pair_weight
from cpmpi.run import parts
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.text import counted
from cpmpi.timeline.intervals import Recorder

PAUSE_S = 1.0  # between two looks at what others do


def share_documents(job: Job, stop: Stop | None = None) -> Outcome:
    """Do documents of a run until none is left to take. Collective.

    Raises:
        Stopped: on all ranks, once a rank was told to stop and what is done is saved, or where the time that is left
            is too short for the next document.
    """
    ranks, output, of = job.ranks, job.options.output, len(job.spec.documents)
    stop = stop or Stop(job.options.grace)
    with ExitStack() as stack:
        recorder = stack.enter_context(recording(job))
        ranks.on_root(stack.enter_context, only_writer(output, shared=True))
        corpus: list[Corpus] = []  # rank 0's
        ranks.on_root(lambda: corpus.append(stack.enter_context(Corpus.opened(job))))
        ended, name = ranks.on_root(lambda: (corpus[0].join(), corpus[0].name))
        log = RunPaths(output).log / f"job-{name}"
        ranks.together(stack.enter_context, rank_log(log, ranks))
        watch = stack.enter_context(watched(job, output, stop, documents=of, finished=ended))
        worker = Worker(job=job, watch=watch, stop=stop, recorder=recorder, stack=stack, log=log)
        while True:
            watch.go_on()
            turn: Turn = ranks.on_root(lambda: corpus[0].next())
            watch.finished = turn.ended
            if turn.index is not None:
                worker.do(turn.index, next(iter(corpus), None))
            elif turn.wait:
                time.sleep(PAUSE_S)
            else:
                break
        left: int = ranks.on_root(lambda: corpus[0].close_up())
        did = f"{counted(len(worker.seconds), 'document')} done here, {of - left} of {of} in all"
        if turn.late:
            raise Stopped(f"{turn.late}: not begun; {did}; the same command goes on")
        job.progress.say(did + (f"; {left} are left to other jobs" if left else ""))
    return Outcome(job=job, seconds=worker.seconds, failed=worker.failed)


@dataclass(kw_only=True)
class Worker:
    """Does one document after the other; the weights are read for the first.

    Attributes:
        seconds, failed: what each document took, and why it has no result, by its place.
        stack: closes what stays open from one document to the next.
        log: the folder of this job's logs.
    """

    job: Job
    watch: Watch
    stop: Stop
    recorder: Recorder | None
    stack: ExitStack
    log: Path
    seconds: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    _engine: Engine | None = None
    _checkpoints: Checkpoints | None = None

    def do(self, index: int, corpus: Corpus | None) -> None:
        """One document, into its part, from where it was left. Collective.

        Args:
            index: its place in the run.
            corpus: on rank 0: to give the document back to, done or not.
        """
        document = self.job.spec.documents[index]
        try:
            before = self.watch.finished
            self.job.progress.say(f"document {before + 1:,} of {self.watch.documents:,}: {document.id}")
            self._do(self._alone(index), index)
            if corpus is not None:
                corpus.clock.done(document.id, document.n_tokens, self.seconds.get(index, 0.0), corpus.name)
        finally:
            if corpus is not None:
                corpus.give_back()
        self.watch.document_done()

    def _alone(self, index: int) -> Job:
        """The job of a document alone, in a run of its own."""
        job, given = self.job, self.job.inputs
        part = RunPaths(job.options.output).part(index)
        own = replace(given, documents=given.documents[index : index + 1])
        return replace(
            job, options=replace(job.options, output=part.folder), inputs=own, spec=parts.part_spec(job.spec, index)
        )

    def _do(self, job: Job, index: int) -> None:
        hang_s = hang_seconds(job.options.hang_timeout)  # between documents the others wait for rank 0, and may
        with ExitStack() as stack:
            stack.enter_context(watchdog.watched(job.ranks, self.log, hang_s, job.progress.say))
            run_index, spec, finished, failed = open_run_folder(job)
            if not (finished or failed):
                writer = None
                if spec.kv is not None:
                    writer = stack.enter_context(open_writer(job, run_index, spec, finished, self.recorder))
                files = Files(index=run_index, writer=writer, spec=spec, finished=finished, failed=failed)
                failed = self._score(job, files, index)
            job.ranks.on_root(lambda: run_index.finish() if run_index is not None else None)
        for reason in failed.values():
            self.failed[index] = reason

    def _score(self, job: Job, files: Files, index: int) -> dict[int, str]:
        engine, checkpoints = self._open(job, files)
        checkpoints.folder, checkpoints.spec, checkpoints.writer = job.options.output, files.spec, files.writer
        document = files.spec.documents[0]
        weight = pair_weight(job.model.skeleton, job.inputs.checkpoint, job.model.layers)
        job.progress.job([document.n_tokens], weight)
        reason = score_document(job, engine, files, make_seeker(job, files, self.stop), 0)
        self.seconds[index] = checkpoints.spent_s
        if reason is not None:
            job.progress.say(f"failed: {reason}; the others go on")
        return {0: reason} if reason is not None else {}

    def _open(self, job: Job, files: Files) -> tuple[Engine, Checkpoints]:
        if self._engine is None or self._checkpoints is None:
            self._checkpoints = self.stack.enter_context(make_checkpoints(job, files, self.stop).opened())
            self._engine = self.stack.enter_context(load_engine(self.job, self.recorder, self._checkpoints))
        return self._engine, self._checkpoints
