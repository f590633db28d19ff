"""The job that answers prompts from a stored document: text goes in, tokens come out as they are made. Collective."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from cpmpi.comm.ranks import AgreedError, Ranks, start
from cpmpi.documents.continuations import whole_characters, would_merge
from cpmpi.documents.tokenization import load_tokenizer, tokenize
from cpmpi.engine.append import append_group, hold
from cpmpi.engine.contexts import (
    ContextJob,
    New,
    context_of,
    find_document,
    introduce_stored,
    open_context,
    open_stored,
    prepare_contexts,
)
from cpmpi.engine.decode import Decoding, TokenIds
from cpmpi.engine.options import GenerateOptions
from cpmpi.engine.run import load_engine
from cpmpi.engine.score import Engine
from cpmpi.engine.watch import alive
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.sampling import Sampling
from cpmpi.run.growth import Text, check_can_grow
from cpmpi.run.reader import Document, Run
from cpmpi.text import counted

Show = Callable[[int, str], None]


@dataclass(kw_only=True)
class Answer:
    """What is generated after a prompt: token ids and their text, without the stop text or end token."""

    prompt: str
    tokenizer: Any = field(repr=False)
    stop: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False

    def add(self, token: int) -> str:
        """Add a token; the text that is final now and was not before."""
        before = len(self._final())
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False)
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        self.ended = bool(found)
        self.text = text[: min(found)] if found else text
        return self._final()[before:]

    def finish(self) -> str:
        """The text that was held back: nothing comes any more."""
        held = self.text[len(self._final()) :]
        self.ended = True
        return held

    def _final(self) -> str:
        """What will not change: not half a character, and not what may be the beginning of a stop text."""
        if self.ended:
            return self.text
        text = self.text.rstrip("\ufffd")
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - held]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answers (the same on all ranks), seconds of the prompts' pass, of all steps after it, and their number."""

    job: ContextJob
    answers: list[Answer]
    first_s: float
    steps_s: float
    steps: int


def generate(options: GenerateOptions, show: Show = lambda _, __: None) -> Answered:
    """Answer prompts from a stored document. Collective.

    Args:
        options: what is asked.
        show: takes, on every rank alike, the number of a prompt and text that is new in its answer.

    Raises:
        UserError: something the user can mend; before any work where it can be known then.
    """
    ranks = start()
    if options.save and len(options.prompts) > 1:
        raise AgreedError(
            f"--save appends one prompt with its answer to the document, but there are {len(options.prompts)}"
        )
    wanted = {each.name: getattr(options, each.name) for each in fields(Sampling)}
    sampling = ranks.together(Sampling, **wanted)
    with ExitStack() as stack:
        if options.save:
            hold(options, ranks, stack)
        run, checkpoint = stack.enter_context(open_stored(options, ranks))
        return _generate(options, ranks, run, checkpoint, sampling, show)


def _generate(
    options: GenerateOptions, ranks: Ranks, run: Run, checkpoint: Checkpoint, sampling: Sampling, show: Show
) -> Answered:
    """Answer the prompts from a document of an open run. Collective."""
    document = ranks.together(find_document, run, ranks.together(_document_id, options, run), "--document")
    if options.save:
        ranks.together(check_can_grow, document, "--save")
    tokenizer = ranks.together(load_tokenizer, checkpoint.folder)
    prompts = ranks.together(_prompt_ids, options, tokenizer)
    context = context_of(document, None, "--document")
    new = max(map(len, prompts)) + options.max_new_tokens
    work = New(stored=context.n_tokens, longest=new, at_once=len(prompts), sequences=len(prompts))
    job = prepare_contexts(options, ranks, run, checkpoint, work)
    job.progress.say(
        f"{counted(len(prompts), 'prompt')} after {context.n_tokens:,} tokens of {options.run}, "
        f"{counted(job.ranks.size, 'rank')}"
    )
    introduce_stored(job)
    if joined := job.ranks.on_root(lambda: sum(would_merge(tokenizer, document.token_ids, ids) for ids in prompts)):
        job.progress.say(
            f"note: the tokenizer would have joined the first token of {counted(joined, 'prompt')} with the document's "
            "last; it is a token of its own (begin the prompt with a space or a new line to say otherwise)"
        )
    answers = [Answer(prompt=prompt, tokenizer=tokenizer, stop=options.stop) for prompt in options.prompts]
    before = document.token_ids.tolist() if sampling.repetition_penalty != 1 else []
    ends = end_tokens(checkpoint)
    streams = [sampling.stream(i) for i in range(len(prompts))]

    def choose(i: int, logits_V: torch.Tensor, ids: list[int]) -> int:
        token = -1 if answers[i].ended else sampling.choose(logits_V, [*before, *ids], streams[i])
        return -1 if token in ends else token

    times: list[float] = []
    beside = not options.save  # else the run is held for this job
    with alive(job, options.run, options.hang_timeout, beside=beside), load_engine(job) as engine:
        with open_context(job, engine, context) as extension:
            decoding = Decoding(
                engine=engine, context=extension.context, n_tokens=context.n_tokens, last_hidden=None,
                gather=job.ranks.allgather,
            )  # fmt: skip
            times.append(time.perf_counter())
            for step in decoding.generate(prompts, choose, options.max_new_tokens):
                times.append(time.perf_counter())
                for i, token in step:
                    show(i, answers[i].add(token))
        for i, answer in enumerate(answers):
            show(i, answer.finish())
        if options.save:
            _save(job, engine, document, np.array([*prompts[0], *answers[0].ids], np.int64))
    began, first, last = times[0], times[min(1, len(times) - 1)], times[-1]
    return Answered(job=job, answers=answers, first_s=first - began, steps_s=last - first, steps=max(0, len(times) - 2))


def _save(job: ContextJob, engine: Engine, document: Document, token_ids: TokenIds) -> None:
    """Append a prompt and its answer to the document. Collective.

    They go through the model once more, dealt over the ranks as any text that is appended: the answer's last token has
    no keys and values yet, and the others' lie on one rank.
    """
    taken = {part.id for part in document.appended}
    name = next(name for n in itertools.count(1) if (name := f"answer {n}") not in taken)
    text = Text(document=document.index, id=name, token_ids=token_ids, source="--save")
    job, _ = append_group(job, engine, [text])
    job.progress.say(
        f"{document.id}: the prompt and its answer, {counted(len(token_ids), 'token')}, are its part {name!r} now"
    )
    job.run.close()


def _document_id(options: GenerateOptions, run: Run) -> str:
    if options.document is not None:
        return options.document
    if len(run.documents) > 1:
        some = ", ".join(repr(d.id) for d in run.documents[:3])
        raise UserError(f"{options.run} holds {len(run.documents)} documents ({some}, ...): choose one with --document")
    return run.documents[0].id


def _prompt_ids(options: GenerateOptions, tokenizer: Any) -> list[TokenIds]:
    """The token ids of every prompt."""
    if not options.prompts:
        raise UserError("--prompt is missing: there is nothing to answer")
    if "" in options.stop:
        raise UserError("--stop is empty: every answer would end before it begins")
    found = []
    for prompt in options.prompts:
        if not whole_characters(prompt, "--prompt"):
            raise UserError("--prompt is empty: it has no token after which to go on")
        if options.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; leave --chat out")
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        found.append(tokenize(tokenizer, prompt, special_tokens=False).astype(np.int64))
    return found


def end_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    """The tokens that end a text, as the checkpoint says."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True).eos_token_id
    except OSError:
        ends = checkpoint.text_config_value("eos_token_id")
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
