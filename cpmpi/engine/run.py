"""The main job: documents and a checkpoint in, exact log-probabilities and KV in a run folder out. Collective."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from cpmpi.comm import watchdog
from cpmpi.comm.log import rank_log
from cpmpi.comm.ranks import start
from cpmpi.comm.stop import Stop, listening
from cpmpi.engine.checkpoint import Checkpoints, InWork
from cpmpi.engine.circumstances import publish_circumstances
from cpmpi.engine.corpus import Corpus
from cpmpi.engine.keep import Keeper
from cpmpi.engine.options import JobOptions, hang_seconds
from cpmpi.engine.outputs import assemble, write_kept
from cpmpi.engine.pace import ASSUMED_BYTES_PER_S, Pace
from cpmpi.engine.placement import split
from cpmpi.engine.prepare import prepare
from cpmpi.engine.redeal import Redeal
from cpmpi.engine.report import Outcome, log_document
from cpmpi.engine.resume import Seeker
from cpmpi.engine.score import Engine
from cpmpi.engine.state import Job, Prepared
from cpmpi.engine.watch import watched
from cpmpi.engine.windows import score_in_windows, windows_of
from cpmpi.model.forward import sum_outputs
from cpmpi.model.linear import use_products
from cpmpi.model.size import pair_weight
from cpmpi.run import checkpoint, folder
from cpmpi.run.index import NotFiniteError, RunIndex
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.shard import prepare_shard
from cpmpi.run.spec import RunSpec
from cpmpi.run.writer import ShardWriter
from cpmpi.text import counted, duration
from cpmpi.timeline.files import save_files
from cpmpi.timeline.intervals import Recorder

ALONE = "choose another --output, or --share its documents if the others do"


def run(options: JobOptions) -> Outcome:
    """Run the job. Collective.

    Raises:
        UserError: something the user can mend; before any work where it can be known then. On all ranks alike.
        Stopped: on all ranks, once a rank was told to stop and what is done is saved.
    """
    ranks = start()
    with listening(options.grace, speaks=ranks.is_root) as stop:
        return run_prepared(prepare(options, ranks), stop)


def run_prepared(job: Job, stop: Stop | None = None) -> Outcome:
    """Run a job that nothing was found against, until it is told to stop, if it is. Collective.

    Raises:
        Stopped: on all ranks, once a rank was told to stop and what is done is saved.
    """
    if job.options.share:
        from cpmpi.engine.share import share_documents  # which does each document by what is below

        return share_documents(job, stop)
    seconds: dict[int, float] = {}
    with ExitStack() as stack:
        recorder = stack.enter_context(recording(job))
        files = stack.enter_context(_open_files(job, recorder))
        failed = dict(files.failed)
        todo = [i for i in range(len(files.spec.documents)) if i not in files.finished and i not in failed]
        of, finished = len(files.spec.documents), len(files.finished)
        stop = stop or Stop(job.options.grace)
        watch = stack.enter_context(watched(job, job.options.output, stop, documents=of, finished=finished))
        if todo:
            checkpoints = stack.enter_context(make_checkpoints(job, files, stop).opened())
            seeker = make_seeker(job, files, stop)
            engine = stack.enter_context(load_engine(job, recorder, checkpoints))
            job.ranks.on_root(publish_circumstances, job, job.options.output)
            weight = pair_weight(job.model.skeleton, job.inputs.checkpoint, job.model.layers)
            scoring = job.inputs.keeping.scoring
            ways = {i: [*windows_of(files.spec.documents[i].layout.n_tokens, scoring)] for i in todo}
            noun = "window" if scoring.context else "document"
            job.progress.job([window.size for way in ways.values() for window in way], weight, noun)
            for i in todo:
                watch.go_on()
                if reason := score_document(job, engine, files, seeker, i):
                    failed[i] = reason
                    job.progress.say(f"failed: {reason}; the others go on")
                seconds[i] = checkpoints.spent_s
                job.progress.done(ways[i][-1].size)
                watch.document_done()
            job.progress.close()
        job.ranks.on_root(lambda: files.index.finish() if files.index is not None else None)
    return Outcome(job=job, seconds=seconds, failed=failed)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The run folder of a job under way.

    Attributes:
        index: of the run; on rank 0 only.
        writer: of this rank's shard, where KV is kept.
        spec: of the run, with the run id that holds.
        finished: documents that are done already.
        failed: documents that have no result, and why.
    """

    index: RunIndex | None
    writer: ShardWriter | None
    spec: RunSpec
    finished: frozenset[int]
    failed: Mapping[int, str]


@contextmanager
def _open_files(job: Job, recorder: Recorder | None) -> Iterator[Files]:
    """The run folder, held for this job. Collective."""
    options, ranks = job.options, job.ranks
    with ExitStack() as stack:
        ranks.on_root(stack.enter_context, only_writer(options.output, instead=ALONE))
        ranks.on_root(take_over_shared, job)
        index, spec, finished, failed = open_run_folder(job)
        ranks.together(stack.enter_context, rank_log(RunPaths(options.output).log, ranks))
        hang_s = hang_seconds(options.hang_timeout)
        stack.enter_context(watchdog.watched(ranks, RunPaths(options.output).log, hang_s, job.progress.say))
        writer = None
        if spec.kv is not None and len(finished) + len(failed) < len(spec.documents):
            writer = stack.enter_context(open_writer(job, index, spec, finished, recorder))
        yield Files(index=index, writer=writer, spec=spec, finished=finished, failed=failed)


def take_over_shared(job: Job) -> None:
    """Make a run that other jobs shared, and did not complete, one of this job alone. On rank 0."""
    if RunPaths(job.options.output).parts.is_dir():
        with Corpus.opened(job) as corpus:
            corpus.absorb()


def open_run_folder(job: Job) -> tuple[RunIndex | None, RunSpec, frozenset[int], Mapping[int, str]]:
    """The run's index (rank 0 only), its spec with the run id that holds, and the documents finished and failed."""
    opened: list[RunIndex] = []

    def open_index() -> tuple[RunSpec, frozenset[int], Mapping[int, str]]:
        if job.options.overwrite and RunPaths(job.options.output).contents():
            job.progress.say(f"--overwrite deletes {folder.what_is_deleted(job.options.output)}")
        options = job.options
        opened.append(
            folder.start_index(
                options.output, job.spec, overwrite=options.overwrite, keep_finished=options.keep_finished
            )
        )
        failed = opened[0].failed
        if options.retry_failed and failed:  # each keeps its mark until it is done
            job.progress.say(f"{counted(len(failed), 'document')} failed before, and will be tried again")
        return opened[0].spec, opened[0].finished, {} if options.retry_failed else dict(failed)

    spec, finished, failed = job.ranks.on_root(open_index)
    if finished:
        job.progress.say(f"{len(finished)} of {len(spec.documents)} documents are finished already")
    return next(iter(opened), None), spec, finished, failed


def open_writer(
    job: Job, index: RunIndex | None, spec: RunSpec, finished: frozenset[int], recorder: Recorder | None
) -> ShardWriter:
    """Lay out or check this rank's shard, and record the sizes of all. Collective."""
    ranks = job.ranks
    path = ranks.together(prepare_shard, job.options.output, spec, ranks.rank, finished)
    sizes = ranks.gather(path.stat().st_size)
    ranks.on_root(lambda: index.write_manifest(sizes) if index is not None and sizes is not None else None)
    # One layer may wait: a longer queue would not make the disk faster.
    tell = job.progress.say if ranks.is_root else logging.getLogger("cpmpi").warning
    return ranks.together(ShardWriter, path, spec, ranks.rank, queue_bytes=0, recorder=recorder, tell=tell)


def make_checkpoints(job: Job, files: Files, stop: Stop) -> Checkpoints:
    """The checkpoints of a job. Collective."""
    options, place = job.options, job.place
    share = max(d.n_tokens for d in files.spec.documents) / place.ranks.size
    guess_s = share * place.blocks.token_bytes / ASSUMED_BYTES_PER_S
    return Checkpoints(
        folder=options.output, spec=files.spec, ranks=place.ranks, grid=place.grid, blocks=place.blocks,
        writer=files.writer, stop=stop, progress=job.progress,
        pace=Pace(choice=options.checkpoint, nodes=len(place.topology.nodes), write_s=guess_s),
    )  # fmt: skip


@contextmanager
def load_engine(
    job: Prepared, recorder: Recorder | None = None, checkpoints: Checkpoints | None = None
) -> Iterator[Engine]:  # fmt: skip
    """The weights read and the transports open. Collective."""
    options, place, decision = job.options, job.place, job.decision
    began = time.perf_counter()
    weights = place.ranks.together(job.inputs.checkpoint.weights, place.reader, stream=decision.memory.stream)
    use_products(weights.model, decision.products)
    job.progress.say(str(decision.products))
    job.progress.say(f"weights read in {duration(time.perf_counter() - began)}")
    group, sharers = split(place.ranks, place.grid)
    names = place.ranks.numbers_of(group)
    with ExitStack() as stack:
        summing = None
        if place.sharing.summed:
            summing = stack.enter_context(closing(place.carrier.connect(sharers, place.ranks.flight)))
            sum_outputs(weights.model, place.sharing.summed, summing.sum)
        yield Engine(
            rank=place.ranks.rank, weights=weights, layers=place.layers, schedule=decision.schedule,
            transport=stack.enter_context(closing(place.carrier.connect(group, place.ranks.flight, names))),
            backends=decision.backends, flight=place.ranks.flight,
            device=job.model.device, progress=job.progress, grid=place.grid, summing=summing,
            checkpoints=checkpoints, recorder=recorder, chunk_tokens=options.chunk_tokens,
            check_finite=options.check_finite, wanted=job.inputs.keeping.wanted, first=job.inputs.keeping.first,
        )  # fmt: skip


def score_document(job: Job, engine: Engine, files: Files, seeker: Seeker, i: int) -> str | None:
    """One document, from where it was left: compute, store, mark as finished; or as failed, then the reason.
    Collective."""
    document, ranks, index, writer = files.spec.documents[i], job.ranks, files.index, files.writer
    token_ids = ranks.spread(job.inputs.documents[i].token_ids if ranks.is_root else None)

    keeper = None
    if writer is not None:
        assert engine.checkpoints is not None
        keeper = Keeper(document=i, writer=writer, flight=ranks.flight, broke=engine.checkpoints.broke)
    identity = checkpoint.identity_of(files.spec, document)
    ranks.flight.begin(i, document.id, len(job.place.layers))
    with seeker.find(i) as resume:
        if engine.checkpoints is not None:
            spent_s = resume.spent_s if resume is not None else 0.0
            engine.checkpoints.document = InWork(
                index=i, identity=identity, name=document.id, n_tokens=document.layout.n_tokens,
                began_s=time.monotonic() - spent_s,
            )  # fmt: skip
        scoring, ids = job.inputs.keeping.scoring, job.inputs.keeping.preceded(token_ids)
        if scoring.context:
            scores = score_in_windows(engine, ids, document.layout, document.id, scoring)
        else:
            scores = engine.score(ids, document.layout, document.id, keeper.keep if keeper else None, resume)
        scores.positions = scores.positions - scoring.prefix
    digest = ranks.together(keeper.finish) if keeper is not None else 0
    everyone = ranks.gather((scores.positions.numpy(), scores.logprobs.numpy(), scores.last_hidden, digest))
    write_kept(ranks, index, i, document.extras, scores, [positions for positions, *_ in everyone or ()])

    def store() -> str | None:
        assert everyone is not None
        assert index is not None
        reason = None
        logprobs, last_hidden = assemble(everyone, document.n_tokens)
        digests = [digest for *_, digest in everyone] if writer is not None else ()
        try:
            index.write_outputs(
                i, token_ids=token_ids, logprobs=logprobs, last_hidden=last_hidden, digests=digests,
                extras=job.inputs.keeping.known(job.inputs.documents[i], logprobs),
            )  # fmt: skip
        except NotFiniteError as problem:
            if job.options.fail_fast:
                raise
            index.mark_failed(i, str(problem))
            reason = str(problem)
        checkpoint.delete(job.options.output, identity)  # not before: what cannot be written now, a later start writes
        return reason

    failed = ranks.on_root(store)
    log_document(scores, writer, document.id)
    return failed


def make_seeker(job: Job, files: Files, stop: Stop) -> Seeker:
    """What finds where documents go on."""
    run, spec, ranks, progress = job.options.output, files.spec, job.ranks, job.progress
    redeal = None
    if files.writer is not None:
        redeal = Redeal(folder=run, spec=spec, ranks=ranks, writer=files.writer, stop=stop, progress=progress)
    return Seeker(folder=run, spec=spec, ranks=ranks, blocks=job.place.blocks, progress=progress, redeal=redeal)


@contextmanager
def recording(job: Job) -> Iterator[Recorder | None]:
    """Within it a recorder of what this rank does when, if that is asked for; its files are written at the end."""
    options, comm = job.options, job.ranks.comm
    if not (options.trace or options.plot):
        yield None
        return
    comm.Barrier()
    recorder = Recorder(rank=comm.rank, epoch_s=time.perf_counter())
    yield recorder
    everyone = comm.gather(recorder.intervals)
    intervals = [interval for rank in everyone or () for interval in rank]
    title = f"{options.output.name}, measured"
    job.ranks.on_root(save_files, intervals, plot=options.plot, trace=options.trace, title=title)
