"""The job that extends stored documents: texts become a part of them, with their keys and values. Collective.

Texts go into the run by groups, each with a set of shards of its own and one switch of ``run.h5`` (`cpmpi.run.growth`).
A text that is there already, under its id, is not appended again: the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpmpi.comm.ranks import AgreedError, Ranks, start
from cpmpi.comm.stop import Stop, listening
from cpmpi.documents.continuations import Continuation, read_continuations
from cpmpi.engine.contexts import (
    Context,
    ContextJob,
    New,
    find_document,
    introduce_stored,
    open_context,
    open_stored,
    prepare_contexts,
    trunk_of,
)
from cpmpi.engine.continuations import merging, say_merging
from cpmpi.engine.corpus import check_nobody_works
from cpmpi.engine.keep import Keeper
from cpmpi.engine.options import ContextOptions, ExtendOptions
from cpmpi.engine.run import load_engine
from cpmpi.engine.score import Engine
from cpmpi.engine.watch import alive, watched
from cpmpi.errors import UserError
from cpmpi.run import growth
from cpmpi.run.growth import Found, Text
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.reader import Run, open_run
from cpmpi.run.shard import create_shard
from cpmpi.run.spec import RunSpec
from cpmpi.run.writer import ShardWriter
from cpmpi.text import counted

GROUP_TOKENS = 1 << 16  # of the texts that are appended with one switch, or a single one


class Appended(NamedTuple):
    """A text that was appended by this start of the job.

    Attributes:
        id: of the text.
        document: id of the document.
        n_tokens: of the text.
        logprob: of all its tokens, given the document before, in nats.
        total: tokens of the document with it.
    """

    id: str
    document: str
    n_tokens: int
    logprob: float
    total: int


@dataclass(frozen=True, kw_only=True)
class Extended:
    """What was appended, the same on all ranks; how many texts were there already; seconds of the whole."""

    ranks: Ranks
    texts: tuple[Appended, ...]
    before: int
    seconds: float


def append(options: ExtendOptions) -> Extended:
    """Append texts to stored documents. Collective.

    Raises:
        UserError: something the user can mend; before any work where it can be known then.
        Stopped: on all ranks, once a rank was told to stop; what is appended by then stays.
    """
    ranks = start()
    began = time.perf_counter()
    if options.output is not None or options.overwrite:
        raise AgreedError("--append extends the documents where they are: leave --output and --overwrite out")
    if options.unconditional is not None:
        raise AgreedError("--append makes no scores to compare: leave --unconditional out")
    with ExitStack() as stack:
        stop = stack.enter_context(listening(options.grace, speaks=ranks.is_root))
        hold(options, ranks, stack)
        run, checkpoint = stack.enter_context(open_stored(options, ranks))
        lines = ranks.on_root(
            read_continuations, options.inputs, checkpoint=checkpoint.folder, vocab_size=checkpoint.vocab_size
        )
        texts = ranks.on_root(_texts, run, lines)
        left = ranks.on_root(lambda: [i for i, text in enumerate(texts) if not _is_there(run, text)])
        appended: tuple[Appended, ...] = ()
        if left:
            todo = [texts[i] for i in left]
            job = prepare_contexts(options, ranks, run, checkpoint, new_of(run, todo))
            _introduce(job, todo, merging(ranks, run, checkpoint, [lines[i] for i in left]))
            appended = _append(job, todo, len(texts) - len(left), stop)
    before = len(texts) - len(left)
    return Extended(ranks=ranks, texts=appended, before=before, seconds=time.perf_counter() - began)


def hold(options: ContextOptions, ranks: Ranks, stack: ExitStack) -> None:
    """Hold the run with the stored documents for this job, and finish what a killed one left undone. Collective.

    Raises:
        UserError: there is no run, another job writes it, or documents of it are not finished.
    """
    folder = RunPaths.of(options.run).folder
    ranks.on_root(_check_whole, folder)  # before a lock is made where there is no run
    ranks.on_root(stack.enter_context, only_writer(folder, instead="stop it first"))
    ranks.on_root(check_nobody_works, folder, "work on documents of this run: wait for them")
    ranks.on_root(growth.finish, folder)


def _check_whole(folder: Path) -> None:
    open_run(folder).close()
    paths = RunPaths(folder)
    if paths.whole != paths:
        raise UserError(f"{folder}: is a part of the run {paths.whole.folder}, which several jobs share: name that run")


def new_of(run: Run, texts: Sequence[Text]) -> New:
    """How much comes after how much."""
    before = {i: run.documents[i].n_tokens for i in {text.document for text in texts}}
    grown, stored = dict(before), 0
    for text in texts:
        stored = max(stored, grown[text.document])
        grown[text.document] += len(text.token_ids)
    longest = max(len(text.token_ids) for text in texts)
    spans = tuple((before[i], grown[i]) for i in before)
    return New(stored=stored, longest=longest, at_once=longest, dealt=True, spans=spans)


def _texts(run: Run, lines: Sequence[Continuation]) -> list[Text]:
    """The texts of the lines.

    Raises:
        UserError: a line has several answers, or follows only a part of its document, or of a document scores or spans
            are kept.
    """
    texts = []
    for line in lines:
        if line.chosen or line.upto is not None:
            raise UserError(f'{line.source}: what is appended has neither "choices" nor "upto"')
        document = find_document(run, line.document, line.source)
        growth.check_can_grow(document, line.source)
        texts.append(Text(document=document.index, id=line.id, token_ids=line.answers[0], source=line.source))
    return texts


def _is_there(run: Run, text: Text) -> bool:
    return growth.is_there(run.documents[text.document], text)


def _introduce(job: ContextJob, texts: Sequence[Text], merging: int) -> None:
    """Say what is going to happen, before it does."""
    say = job.progress.say
    tokens, documents = sum(len(text.token_ids) for text in texts), len({text.document for text in texts})
    say(
        f"{counted(len(texts), 'text')} of {counted(tokens, 'token')} are appended to "
        f"{counted(documents, 'document')} of {job.options.run}, dealt over {counted(job.ranks.size, 'rank')}"
    )
    introduce_stored(job)
    say_merging(job, merging, "appended")


def groups(texts: Sequence[Text], most: int = GROUP_TOKENS) -> Iterator[list[Text]]:
    """The texts in groups of at most so many tokens, or of one text; of a document there is one text in each."""
    group: list[Text] = []
    tokens = 0
    for text in texts:
        full = tokens + len(text.token_ids) > most or text.document in {other.document for other in group}
        if group and full:
            yield group
            group, tokens = [], 0
        group.append(text)
        tokens += len(text.token_ids)
    if group:
        yield group


def _append(job: ContextJob, texts: Sequence[Text], before: int, stop: Stop) -> tuple[Appended, ...]:
    """Append the texts, group by group. Collective."""
    done: list[Appended] = []
    of = len(texts) + before
    with (
        alive(job, job.options.run, job.options.hang_timeout),
        watched(job, job.options.run, stop, documents=of, finished=before, noun="texts") as watch,
    ):
        with load_engine(job) as engine:
            job.progress.job([len(text.token_ids) for text in texts])
            for group in groups(texts):
                watch.go_on()
                job, appended = append_group(job, engine, group)
                done += appended
                watch.document_done(len(group))
            job.progress.close()
        job.run.close()
    return tuple(done)


def append_group(job: ContextJob, engine: Engine, texts: Sequence[Text]) -> tuple[ContextJob, list[Appended]]:
    """Append texts with one switch; the job goes on with the run as it is then. Collective."""
    run, ranks = job.run, job.ranks
    folder, spec = run.paths.folder, ranks.on_root(_lay_out, job, texts)
    path = ranks.together(create_shard, folder, spec, ranks.rank)
    sizes = ranks.gather(path.stat().st_size)
    with ranks.together(ShardWriter, path, spec, ranks.rank, queue_bytes=0) as writer:
        found = [_grow(job, engine, writer, text) for text in texts]
    ranks.on_root(lambda: growth.switch(run, spec, sizes or (), found))
    run.close()
    job = replace(job, run=ranks.together(open_run, folder))
    appended = []
    for one in found:
        document = job.run.documents[one.text.document]
        logprob = float(np.sum(one.logprobs, dtype=np.float64))
        n_tokens = len(one.text.token_ids)
        appended.append(Appended(one.text.id, document.id, n_tokens, logprob, document.n_tokens))
    return job, appended


def _lay_out(job: ContextJob, texts: Sequence[Text]) -> RunSpec:
    """What the run is to be; there is room for it."""
    spec = growth.grown(
        job.run, texts, world_size=job.ranks.size, segments=job.options.segments, grid=job.place.grid
    )  # fmt: skip
    growth.make_room(job.run, spec)
    return spec


def _grow(job: ContextJob, engine: Engine, writer: ShardWriter, text: Text) -> Found:
    """Take a text through the model, and its keys and values into this rank's shard. Collective."""
    n_tokens = job.run.documents[text.document].n_tokens
    keeper = Keeper(document=text.document, writer=writer, flight=job.ranks.flight)
    with open_context(job, engine, Context(document=text.document, n_tokens=n_tokens, upto=n_tokens)) as extension:
        grown, _ = trunk_of(job, extension, text.token_ids).grow(keep=keeper.keep, name=text.id)
        digests = job.ranks.gather(job.ranks.together(keeper.finish))
    job.progress.done(len(text.token_ids))
    return Found(text=text, logprobs=grown.logprobs, last_hidden=grown.last_hidden, digests=digests or ())
