"""The job that scores continuations of stored documents: lines in, scores in a run folder of their own out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpmpi.attention.layout import Layout
from cpmpi.comm.ranks import Ranks, start
from cpmpi.documents.continuations import (
    ALONE,
    Continuation,
    prefix_ids,
    read_continuations,
    without_context,
    would_merge,
)
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.engine.contexts import (
    BATCH_TOKENS,
    Context,
    ContextJob,
    New,
    context_of,
    find_document,
    introduce_stored,
    open_context,
    open_stored,
    prepare_contexts,
)
from cpmpi.engine.extend import Question, Scored
from cpmpi.engine.options import ExtendOptions
from cpmpi.engine.run import load_engine
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.run import folder
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, publish_text
from cpmpi.run.reader import Run
from cpmpi.run.scores import Row, compared, scores_text
from cpmpi.run.spec import DocumentSpec, RunSpec
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
    """
    ranks = start()
    began = time.perf_counter()
    ranks.on_root(_check_output, options)
    with open_stored(options, ranks) as (run, checkpoint):
        return _extend(options, ranks, run, checkpoint, began)


def _extend(options: ExtendOptions, ranks: Ranks, run: Run, checkpoint: Checkpoint, began: float) -> Extended:
    """Score the continuations of an open run. Collective."""
    continuations = ranks.on_root(_read, options, checkpoint)
    asked = ranks.on_root(_by_context, run, continuations)
    longest = max(a.context.upto for a in asked)
    most = max(len(c.stem) + max(map(len, c.answers)) for c in continuations)
    whole = sum(len(c.stem) + sum(map(len, c.answers)) for c in continuations)
    at_once = max(most, min(whole, BATCH_TOKENS * ranks.size))
    job = prepare_contexts(options, ranks, run, checkpoint, New(stored=longest, longest=most, at_once=at_once))
    _introduce(job, asked, continuations, _merging(ranks, run, checkpoint, continuations))
    job.ranks.on_root(
        make_folder, RunPaths(options.output).lock.parent
    )  # one that cannot be made is told before the work
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
    rows = job.ranks.on_root(_store, job, continuations, scores)
    return Extended(job=job, rows=rows, seconds=time.perf_counter() - began)


def _read(options: ExtendOptions, checkpoint: Checkpoint) -> list[Continuation]:
    """The lines, and after them, where that is asked for, their answers without a context."""
    lines = read_continuations(options.inputs, checkpoint=checkpoint.folder, vocab_size=checkpoint.vocab_size)
    if options.unconditional is None:
        return lines
    bos = checkpoint.text_config_value("bos_token_id")
    prefix = prefix_ids(options.unconditional, lambda: load_tokenizer(checkpoint.folder), bos)
    return [*lines, *without_context(lines, prefix)]


def alone_of(continuations: Sequence[Continuation]) -> dict[str, str]:
    """For the id of each answer that is scored without a context, that of the same with it."""
    alone = [c for c in continuations if c.upto == 0]
    return {name: c.id.removesuffix(ALONE) + name[len(c.id) :] for c in alone for name in c.names}


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
    introduce_stored(job)
    if merging:
        say(
            f"note: the tokenizer would have joined the first token of {counted(merging, 'text')} with the one before; "
            "they are scored as tokens of their own (give token_ids to say otherwise)"
        )


def _check_output(options: ExtendOptions) -> None:
    """Refuse an output folder that holds a run, unless it is to be overwritten: scores are made in one piece.

    The run with the stored documents is never overwritten, however it is named.
    """
    folder.check_folder(options.output, overwrite=options.overwrite)
    if options.output.resolve() == RunPaths.of(options.run).folder.resolve():
        raise UserError(f"--output {options.output} is the run with the stored documents; choose another folder")
    if RunPaths(options.output).index.exists() and not options.overwrite:
        raise UserError(f"{options.output}: holds a run already; choose another --output, or --overwrite")


def _store(
    job: ContextJob, continuations: Sequence[Continuation], scores: dict[tuple[int, int], Scored]
) -> tuple[Row, ...]:  # fmt: skip
    """Write the run of the continuations, on rank 0: a document for each, then the table."""
    options, run = job.options, job.run
    assert isinstance(options, ExtendOptions)
    which = [(line, i) for line, c in enumerate(continuations) for i in range(len(c.answers))]
    spec = RunSpec(
        model=str(run.attributes["model"]), model_sha256=str(run.attributes["model_sha256"]), kv=None,
        tokenizer_sha256=str(run.attributes["tokenizer_sha256"]), dtype=str(job.model.dtype).removeprefix("torch."),
        world_size=job.ranks.size, hidden_size=int(run.attributes["hidden_size"]),
        documents=tuple(_document_spec(run, continuations[line], i) for line, i in which),
        topology=job.place.topology.to_json(), command=options.command,
    )  # fmt: skip
    with folder.only_writer(options.output):
        index = folder.start_index(options.output, spec, overwrite=options.overwrite)
        for n, (line, i) in enumerate(which):
            found = scores[line, i]
            index.write_outputs(
                n, token_ids=continuations[line].answers[i], logprobs=found.logprobs, last_hidden=found.last_hidden,
                greedy=found.greedy,
            )  # fmt: skip
        rows = compared(rows_of(continuations, scores), alone_of(continuations))
        publish_text(RunPaths(options.output).scores, scores_text(rows))
        index.finish()
    return rows


def _document_spec(run: Run, c: Continuation, i: int) -> DocumentSpec:
    document, n_tokens = run.documents[c.document], len(c.answers[i])
    follows: list[tuple[str, str | int]] = [
        ("context_run_id", str(run.attributes["run_id"])), ("context_document", c.document),
        ("context_tokens", document.n_tokens if c.upto is None else c.upto),
    ]  # fmt: skip
    if c.chosen:
        follows += [("question", c.id), ("answer", i)]
    return DocumentSpec(
        id=c.names[i], source=c.source, n_tokens=n_tokens, layout=Layout(n_tokens=n_tokens, world=1),
        continues=tuple(follows),
    )  # fmt: skip


def rows_of(continuations: Sequence[Continuation], scores: dict[tuple[int, int], Scored]) -> tuple[Row, ...]:
    """The rows of all lines, in order."""
    rows = []
    for line, c in enumerate(continuations):
        scored = [scores[line, i] for i in range(len(c.answers))]
        sums = [float(np.sum(s.logprobs, dtype=np.float64)) for s in scored]
        per_byte = [total / size if size else float("nan") for total, size in zip(sums, c.n_bytes, strict=True)]
        most = max((value for value in per_byte if not np.isnan(value)), default=float("nan"))
        for i, s in enumerate(scored):
            row = Row(
                id=c.names[i], question=c.id if c.chosen else "", answer=i, document=c.document,
                n_tokens=len(s.logprobs), logprob=sums[i], per_token=sums[i] / len(s.logprobs), per_byte=per_byte[i],
                greedy=bool(s.greedy.all()), best=c.chosen and sums[i] == max(sums),
                best_per_byte=c.chosen and per_byte[i] == most,
            )  # fmt: skip
            rows.append(row)
    return tuple(rows)
