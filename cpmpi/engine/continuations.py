"""The job that scores continuations of stored documents: lines in, scores in a run folder of their own out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.comm.ranks import Ranks, start
from cpmpi.comm.stop import Stop, listening
from cpmpi.documents.continuations import (
    Continuation,
    prefix_ids,
    read_continuations,
    without_context,
    would_merge,
)
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.engine.circumstances import publish_circumstances
from cpmpi.engine.contexts import (
    BATCH_TOKENS,
    MOST_TOGETHER,
    TOGETHER_TOKENS,
    Context,
    ContextJob,
    New,
    context_of,
    find_document,
    introduce_stored,
    open_contexts,
    open_stored,
    prepare_contexts,
    trunk_of,
)
from cpmpi.engine.extend import Question
from cpmpi.engine.options import ExtendOptions
from cpmpi.engine.run import load_engine
from cpmpi.engine.scores import Results, check_output, opened
from cpmpi.engine.trunk import LEAST_TOKENS, Joint, judge, plan
from cpmpi.engine.watch import alive, watched
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.rotary import length_matters
from cpmpi.run.reader import Run
from cpmpi.run.scores import Row
from cpmpi.text import counted, duration


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Continuations of one context; ``lines`` are their places in the input."""

    context: Context
    lines: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Extended:
    """What was found: a row for each continuation, on all ranks, and seconds of the whole."""

    job: ContextJob
    rows: tuple[Row, ...]
    seconds: float


def extend(options: ExtendOptions) -> Extended:
    """Score continuations of stored documents. Collective.

    Raises:
        UserError: something the user can mend; before any work where it can be known then.
        Stopped: on all ranks, once a rank was told to stop; what is scored is kept.
    """
    ranks = start()
    began = time.perf_counter()
    ranks.on_root(check_output, options)
    with listening(options.grace, speaks=ranks.is_root) as stop, open_stored(options, ranks) as (run, checkpoint):
        continuations = ranks.on_root(_read, options, checkpoint)
        asked = ranks.on_root(_by_context, run, continuations)
        longest = max(a.context.upto for a in asked)
        stored = max(longest, min(sum(a.context.upto for a in asked), TOGETHER_TOKENS))
        sizes = [len(c.stem) + max(map(len, c.answers)) for c in continuations]
        most = max(sizes)
        whole = sum(len(c.stem) + sum(map(len, c.answers)) for c in continuations)
        at_once = max(most, min(whole, BATCH_TOKENS * ranks.size))
        spans = tuple((a.context.upto, a.context.upto + max(map(sizes.__getitem__, a.lines))) for a in asked)
        texts = ranks.on_root(texts_of, run, asked, continuations)
        work = New(stored=stored, longest=most, at_once=at_once, spans=spans, texts=texts)
        job = prepare_contexts(options, ranks, run, checkpoint, work)
        _introduce(job, asked, continuations, merging(ranks, run, checkpoint, continuations))
        with opened(job, continuations) as results:
            _score(job, asked, results, stop)
            rows = results.finish()
    return Extended(job=job, rows=rows, seconds=time.perf_counter() - began)


def _read(options: ExtendOptions, checkpoint: Checkpoint) -> list[Continuation]:
    """The lines, and after them, where that is asked for, their answers without a context."""
    lines = read_continuations(options.inputs, checkpoint=checkpoint.folder, vocab_size=checkpoint.vocab_size)
    if options.unconditional is None:
        return lines
    bos = checkpoint.text_config_value("bos_token_id")
    prefix = prefix_ids(options.unconditional, lambda: load_tokenizer(checkpoint.folder), bos)
    return [*lines, *without_context(lines, prefix)]


def _score(job: ContextJob, asked: Sequence[Asked], results: Results, stop: Stop) -> None:
    """Score what is left of all contexts, and write it down as it comes. Collective."""
    left = [(each, lines) for each in asked if (lines := _left(job.run, each, results))]
    assert isinstance(job.options, ExtendOptions)
    assert job.options.output is not None
    began, holders = time.perf_counter(), job.ranks.size // job.place.grid.tp
    total, done = results.count, len(results.done)
    output, hang_timeout = job.options.output, job.options.hang_timeout
    with (
        alive(job, output, hang_timeout),
        watched(job, output, stop, documents=total, finished=done, noun="continuations") as watch,
    ):
        if not left:
            return
        tasks = [_task(each.context, lines, holders) for each, lines in left]
        with load_engine(job) as engine:
            job.ranks.on_root(publish_circumstances, job, job.options.output)
            scored = 0
            for group in together(tasks, 0 if length_matters(job.model.skeleton) else TOGETHER_TOKENS):
                _say_joint(job, [joint for task in group for joint in task.joints])
                with open_contexts(job, engine, [task.context for task in group]) as extension:
                    make = partial(trunk_of, job, extension)
                    for joint in group[0].joints:
                        watch.go_on()
                        question = group[0].lines[joint.question][1]
                        watch.document_done(results.keep(group[0].lines, judge(make, question, joint)))
                    rest = [
                        (line, question._replace(context=i)) for i, task in enumerate(group)
                        for line, question in task.others
                    ]  # fmt: skip
                    for batch in batches(rest, holders):
                        watch.go_on()
                        found = extension.score([question for _, question in batch])
                        watch.document_done(results.keep(batch, found))
                scored += len(group)
                job.progress.say(f"{scored} of {len(tasks)} contexts, {duration(time.perf_counter() - began)}")


class Task(NamedTuple):
    """What is left of a context: lines with their questions, what all ranks compute together, and the others."""

    context: Context
    lines: list[tuple[int, Question]]
    joints: list[Joint]
    others: list[tuple[int, Question]]


def _task(context: Context, lines: list[tuple[int, Question]], holders: int) -> Task:
    joints, questions = plan([question for _, question in lines], holders)
    others = [(line, question) for (line, _), question in zip(lines, questions, strict=True)]
    return Task(context, lines, joints, [one for one in others if any(map(len, one[1].answers))])


def together(tasks: Sequence[Task], most: int) -> Iterator[list[Task]]:
    """Contexts next to one another whose continuations go through the layers together.

    Small ones: with ``most`` tokens, or as many as the longest of all, which there is memory for. A context with
    texts that are dealt over the ranks goes alone; all do where ``most`` is 0.
    """
    most = max(most, *(task.context.upto for task in tasks)) if most else 0
    group: list[Task] = []
    for task in tasks:
        tokens = sum(one.context.upto for one in (*group, task))
        dealt = any(one.joints for one in (*group, task))
        if group and (dealt or tokens > most or len(group) == MOST_TOGETHER):
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def _left(run: Run, asked: Asked, results: Results) -> list[tuple[int, Question]]:
    """The lines of a context with the answers that are not scored yet, the others without tokens."""
    lines = []
    for line in asked.lines:
        question = _question(run, asked.context, results.continuations[line])
        answers = tuple(a[:0] if (line, i) in results.done else a for i, a in enumerate(question.answers))
        if any(map(len, answers)):
            lines.append((line, Question(question.stem, answers)))
    return lines


def _say_joint(job: ContextJob, joints: Sequence[Joint]) -> None:
    """Say what all ranks compute together."""
    if joints:
        answers = sum(len(joint.answers) for joint in joints)
        job.progress.say(
            f"{counted(answers, 'continuation')} of {LEAST_TOKENS} tokens or more with the question: dealt over the "
            f"{counted(job.ranks.size, 'rank')}; the others are computed by one rank each"
        )


def _by_context(run: Run, continuations: Sequence[Continuation]) -> list[Asked]:
    """The lines by what comes before them, in the order in which contexts first occur."""
    lines: dict[Context, list[int]] = {}
    for i, c in enumerate(continuations):
        lines.setdefault(context_of(find_document(run, c.document, c.source), c.upto, c.source), []).append(i)
    return [Asked(context=context, lines=tuple(places)) for context, places in lines.items()]


def texts_of(
    run: Run, asked: Sequence[Asked], continuations: Sequence[Continuation]
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """Of each context the tokens of its document, of the shortest text that goes on from it, and of the longest.

    The keys of a document's first tokens are those of a text as long as the document.
    """
    texts = []
    for each in asked:
        sizes = [len(c.stem) + len(a) for c in map(continuations.__getitem__, each.lines) for a in c.answers]
        made = run.documents[each.context.document].n_tokens if each.context.upto else 0
        texts.append((made, each.context.upto + min(sizes), each.context.upto + max(sizes)))
    return tuple(texts)


def _question(run: Run, context: Context, c: Continuation) -> Question:
    """What goes through the model: where the context ends before the document does, its last token again."""
    ids = run.documents[context.document].token_ids[context.n_tokens : context.upto].astype(np.int64)
    return Question(np.concatenate([ids, c.stem]), c.answers)


def batches(
    lines: Sequence[tuple[int, Question]], holders: int, most: int = BATCH_TOKENS
) -> Iterator[list[tuple[int, Question]]]:
    """The lines in batches of at most so many tokens a holder, or a single line."""
    batch: list[tuple[int, Question]] = []
    tokens = 0
    for line, question in lines:
        size = len(question.stem) + sum(map(len, question.answers))
        if batch and tokens + size > most * holders:
            yield batch
            batch, tokens = [], 0
        batch.append((line, question))
        tokens += size
    if batch:
        yield batch


def merging(ranks: Ranks, run: Run, checkpoint: Checkpoint, continuations: Sequence[Continuation]) -> int:
    """Of how many texts the tokenizer would have joined the first token with the document's last. Collective."""

    def count() -> int:
        texts = [c for c in continuations if any(c.n_bytes)]
        if not texts:
            return 0
        tokenizer = load_tokenizer(checkpoint.folder)
        tails: dict[tuple[str, int | None], npt.NDArray[np.int32]] = {}
        for c in texts:
            tails.setdefault((c.document, c.upto), run.documents[c.document].token_ids[: c.upto])
        firsts = [c.stem if len(c.stem) else c.answers[0] for c in texts]
        return sum(would_merge(tokenizer, tails[c.document, c.upto], ids) for c, ids in zip(texts, firsts, strict=True))

    return ranks.on_root(count)


def say_merging(job: ContextJob, merging: int, done: str) -> None:
    """Note of how many texts the tokenizer would have joined the first token, and what is ``done`` with them."""
    if merging:
        job.progress.say(
            f"note: the tokenizer would have joined the first token of {counted(merging, 'text')} with the one before; "
            f"they are {done} as tokens of their own (give token_ids to say otherwise)"
        )


def _introduce(job: ContextJob, asked: Sequence[Asked], continuations: Sequence[Continuation], merging: int) -> None:
    """Say what is going to happen, before it does."""
    say = job.progress.say
    answers = sum(len(c.answers) for c in continuations)
    tokens = sum(sum(map(len, c.answers)) for c in continuations)
    say(
        f"{counted(answers, 'continuation')} of {counted(tokens, 'token')} after {counted(len(asked), 'context')} of "
        f"{job.options.run}, {counted(job.ranks.size, 'rank')}"
    )
    introduce_stored(job)
    say_merging(job, merging, "scored")
