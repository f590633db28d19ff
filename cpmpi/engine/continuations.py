"""The job that scores continuations of stored documents: lines in, scores in a run folder of their own out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cpmpi.comm.ranks import Ranks, start
from cpmpi.documents.continuations import Continuation, read_continuations, would_merge
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.engine.contexts import (
    BATCH_TOKENS,
    Context,
    ContextJob,
    context_of,
    find_document,
    open_context,
    open_stored,
    prepare_contexts,
)
from cpmpi.engine.extend import Question, Scored
from cpmpi.engine.options import ExtendOptions
from cpmpi.engine.run import load_engine
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.run.reader import Run
from cpmpi.text import counted, duration


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Continuations of one context; ``lines`` are their places in the input."""

    context: Context
    lines: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Extended:
    """What was found: of every line and answer its scores, on rank 0 only, and seconds of the whole."""

    job: ContextJob
    continuations: Sequence[Continuation]
    scores: dict[tuple[int, int], Scored] = field(repr=False)
    seconds: float


def extend(options: ExtendOptions) -> Extended:
    """Score continuations of stored documents. Collective.

    Raises:
        UserError: something the user can mend; before any work where it can be known then.
    """
    ranks = start()
    began = time.perf_counter()
    run, checkpoint = open_stored(options, ranks)
    continuations = ranks.on_root(
        read_continuations, options.inputs, checkpoint=checkpoint.folder, vocab_size=checkpoint.vocab_size
    )
    asked = ranks.on_root(_by_context, run, continuations)
    longest = max(a.context.upto for a in asked)
    most = max(len(c.stem) + max(map(len, c.answers)) for c in continuations)
    whole = sum(len(c.stem) + sum(map(len, c.answers)) for c in continuations)
    at_once = max(most, min(whole, BATCH_TOKENS * ranks.size))
    job = prepare_contexts(options, ranks, run, checkpoint, longest=longest, new=most, at_once=at_once)
    _introduce(job, asked, continuations, _merging(ranks, run, checkpoint, continuations))
    scores: dict[tuple[int, int], Scored] = {}
    with load_engine(job) as engine:
        for i, each in enumerate(asked):
            with open_context(job, engine, each.context) as extension:
                lines = [(line, _question(run, each.context, continuations[line])) for line in each.lines]
                for batch in batches(lines, job.ranks.size // job.place.grid.tp):
                    found = extension.score([question for _, question in batch])
                    everyone = job.ranks.comm.gather(found)
                    for score in (s for each in everyone or () for s in each):
                        scores[batch[score.question][0], score.answer] = score
            job.progress.say(f"{i + 1} of {len(asked)} contexts, {duration(time.perf_counter() - began)}")
    return Extended(job=job, continuations=continuations, scores=scores, seconds=time.perf_counter() - began)


def _by_context(run: Run, continuations: Sequence[Continuation]) -> list[Asked]:
    """The lines by what comes before them, in the order in which contexts first occur."""
    lines: dict[Context, list[int]] = {}
    for i, c in enumerate(continuations):
        lines.setdefault(context_of(find_document(run, c.document, c.source), c.upto, c.source), []).append(i)
    return [Asked(context=context, lines=tuple(places)) for context, places in lines.items()]


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
    yield batch


def _merging(ranks: Ranks, run: Run, checkpoint: Checkpoint, continuations: Sequence[Continuation]) -> int:
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


def _introduce(job: ContextJob, asked: Sequence[Asked], continuations: Sequence[Continuation], merging: int) -> None:
    """Say what is going to happen, before it does."""
    say = job.progress.say
    answers = sum(len(c.answers) for c in continuations)
    tokens = sum(sum(map(len, c.answers)) for c in continuations)
    say(
        f"{counted(answers, 'continuation')} of {counted(tokens, 'token')} after {counted(len(asked), 'context')} of "
        f"{job.options.run}, {counted(job.ranks.size, 'rank')}"
    )
    computed = str(job.model.dtype).removeprefix("torch.")
    rounding = "" if job.run.kv_dtype == computed else f" (rounded to it once; a new prefill has them in {computed})"
    how = "in memory" if job.resident else "read a layer ahead"
    say(f"stored keys and values: {job.run.kv_dtype}{rounding}; {how}")
    say(f"attention: {job.decision.reason}")
    say(str(job.decision.memory))
    if merging:
        say(
            f"note: the tokenizer would have joined the first token of {counted(merging, 'text')} with the one before; "
            "they are scored as tokens of their own (give token_ids to say otherwise)"
        )
