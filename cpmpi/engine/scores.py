"""The run of continuations that a job fills: each is written when it is scored, and never scored again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cpmpi.attention.layout import Layout
from cpmpi.documents.continuations import ALONE, Continuation
from cpmpi.engine.contexts import ContextJob
from cpmpi.engine.extend import Question, Scored
from cpmpi.engine.options import ExtendOptions
from cpmpi.errors import UserError, some
from cpmpi.run import folder
from cpmpi.run.index import RunIndex
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import publish_text
from cpmpi.run.reader import Run, open_run
from cpmpi.run.scores import Row, compared, scores_text
from cpmpi.run.spec import DocumentSpec, RunSpec, token_digest
from cpmpi.text import counted

Which = tuple[int, int]  # a line, and which of its answers


def check_output(options: ExtendOptions) -> None:
    """Refuse an output folder that cannot take the scores.

    The run with the stored documents is never written to, nor overwritten, however it is named.

    Raises:
        UserError: that.
    """
    if options.output is None:
        raise UserError("--output is missing: a run folder for the scores; or --append, which extends the documents")
    folder.check_folder(options.output, overwrite=options.overwrite)
    if options.output.resolve() == RunPaths.of(options.run).folder.resolve():
        raise UserError(f"--output {options.output} is the run with the stored documents; choose another folder")


@dataclass(kw_only=True)
class Results:
    """What is scored of all lines; every rank has one, and rank 0 writes.

    Attributes:
        continuations: the lines.
        done: the answers whose scores were there at the start.
    """

    job: ContextJob
    continuations: Sequence[Continuation]
    done: frozenset[Which]
    _index: RunIndex | None
    _scores: dict[Which, Scored] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Answers in all."""
        return len(self._places)

    @cached_property
    def _places(self) -> dict[Which, int]:
        """The place of each answer's document in the run."""
        return {which: n for n, which in enumerate(_which(self.continuations))}

    def keep(self, lines: Sequence[tuple[int, Question]], found: Sequence[Scored]) -> int:
        """Write what the ranks have scored of some lines; how many answers that are. Collective."""
        everyone = self.job.ranks.gather(found)

        def store() -> int:
            scored = [s._replace(question=lines[s.question][0]) for each in everyone or () for s in each]
            for s in scored:
                self._write(s)
            return len(scored)

        return self.job.ranks.on_root(store)

    def _write(self, s: Scored) -> None:
        assert self._index is not None
        which = s.question, s.answer
        self._index.write_outputs(
            self._places[which], token_ids=self.continuations[s.question].answers[s.answer],
            logprobs=s.logprobs, last_hidden=s.last_hidden, greedy=s.greedy,
        )  # fmt: skip
        self._scores[which] = s

    def finish(self) -> tuple[Row, ...]:
        """Write the table and mark the run as complete; the rows. Collective."""

        def write() -> tuple[Row, ...]:
            assert self._index is not None
            assert isinstance(self.job.options, ExtendOptions)
            assert self.job.options.output is not None
            rows = compared(rows_of(self.continuations, self._scores), alone_of(self.continuations))
            publish_text(RunPaths(self.job.options.output).scores, scores_text(rows))
            self._index.finish()
            return rows

        return self.job.ranks.on_root(write)


@contextmanager
def opened(job: ContextJob, continuations: Sequence[Continuation]) -> Iterator[Results]:
    """The run of the continuations, held for this job: new, or as far as an earlier start came. Collective."""
    options, ranks = job.options, job.ranks
    assert isinstance(options, ExtendOptions)
    assert options.output is not None
    output = options.output
    with ExitStack() as stack:
        ranks.on_root(stack.enter_context, only_writer(output))
        kept: list[tuple[RunIndex, dict[Which, Scored]]] = []

        def open_index() -> frozenset[Which]:
            if options.overwrite and RunPaths(output).contents():
                job.progress.say(f"--overwrite deletes {folder.what_is_deleted(output)}")
            before = _finished(output) if RunPaths(output).index.exists() and not options.overwrite else frozenset()
            spec = _spec(job, continuations)
            index = folder.start_index(output, spec, overwrite=options.overwrite, keep_finished=True)
            _say_again(job, [d.id for i, d in enumerate(spec.documents) if d.id in before and i not in index.finished])
            scores = _read(output, continuations, index.finished)
            kept.append((index, scores))
            return frozenset(scores)

        done = ranks.on_root(open_index)
        if done:
            job.progress.say(f"{len(done)} of {counted(len(_which(continuations)), 'continuation')} are scored already")
        index, scores = kept[0] if kept else (None, {})
        yield Results(job=job, continuations=continuations, done=done, _index=index, _scores=scores)


def _finished(output: Path) -> frozenset[str]:
    """The names of what a run has scores of."""
    with open_run(output) as run:
        return frozenset(document.id for document in run.documents if document.complete)


def _say_again(job: ContextJob, names: Sequence[str]) -> None:
    """Say which continuations have scores under their names that are of something else."""
    if names:
        job.progress.say(
            f"{counted(len(names), 'continuation')} scored again: another text, or after another document, question or "
            "--unconditional text, than at an earlier start, or an older version did not record which: "
            f"{some([repr(name) for name in names])}; the earlier scores are set aside"
        )


def _which(continuations: Sequence[Continuation]) -> list[Which]:
    """All answers, in the order of their documents."""
    return [(line, i) for line, c in enumerate(continuations) for i in range(len(c.answers))]


def _read(output: Path, continuations: Sequence[Continuation], finished: frozenset[int]) -> dict[Which, Scored]:
    """The scores that are there."""
    which = _which(continuations)
    with open_run(output) as run:
        found = {}
        for n in sorted(finished):
            document = run.documents[n]
            assert document.greedy is not None
            found[which[n]] = Scored(*which[n], document.logprobs, document.greedy, document.last_hidden)
        return found


def _spec(job: ContextJob, continuations: Sequence[Continuation]) -> RunSpec:
    """The run of the continuations: a document for each."""
    run = job.run
    return RunSpec(
        model=str(run.attributes["model"]), model_sha256=str(run.attributes["model_sha256"]), kv=None,
        model_path=str(job.inputs.checkpoint.folder.absolute()),
        tokenizer_sha256=str(run.attributes["tokenizer_sha256"]), dtype=str(job.model.dtype).removeprefix("torch."),
        world_size=job.ranks.size, hidden_size=int(run.attributes["hidden_size"]),
        documents=tuple(_document_spec(run, continuations[line], i) for line, i in _which(continuations)),
        topology=job.place.topology.to_json(), command=job.options.command,
    )  # fmt: skip


def _document_spec(run: Run, c: Continuation, i: int) -> DocumentSpec:
    document, n_tokens = run.documents[c.document], len(c.answers[i])
    follows: list[tuple[str, str | int]] = [
        ("context_run_id", str(run.attributes["run_id"])), ("context_document", c.document),
        ("context_tokens", document.n_tokens if c.upto is None else c.upto),
    ]  # fmt: skip
    if c.chosen:
        follows += [("question", c.id), ("answer", i)]
    if len(c.stem):
        follows.append(("question_sha256", token_digest(c.stem)))
    return DocumentSpec(
        id=c.names[i], source=c.source, n_tokens=n_tokens, layout=Layout(n_tokens=n_tokens, world=1),
        token_ids_sha256=token_digest(c.answers[i]), continues=tuple(follows),
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


def alone_of(continuations: Sequence[Continuation]) -> dict[str, str]:
    """For the id of each answer that is scored without a context, that of the same with it."""
    alone = [c for c in continuations if c.upto == 0]
    return {name: c.id.removesuffix(ALONE) + name[len(c.id) :] for c in alone for name in c.names}
