"""Prepare a job on stored documents: the run that is there, the model that made it, and this job's ranks.

As in `cpmpi.engine.prepare`, each step is collective, and what can be refused is refused before weights are read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from cpmpi.attention.layout import Layout
from cpmpi.comm.device import available_bytes, resident_set_bytes
from cpmpi.comm.ranks import Ranks
from cpmpi.cost.choose import choose_schedule
from cpmpi.cost.memory import Memory, choose_residence
from cpmpi.engine.extend import Extension
from cpmpi.engine.options import ContextOptions
from cpmpi.engine.prepare import find_place, inspect, progress_of
from cpmpi.engine.score import Engine
from cpmpi.engine.state import Decision, Inputs, Model, Place, Prepared
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.fingerprint import model_sha256, tokenizer_sha256
from cpmpi.model.probe import backends_of
from cpmpi.model.rotary import same_for
from cpmpi.model.weights import weight_bytes
from cpmpi.run.cache import StoredKeys
from cpmpi.run.reader import Document, Run, open_run

BATCH_TOKENS = 4096  # of continuations that a rank takes through the layers at a time


@dataclass(frozen=True, kw_only=True)
class Context:
    """A stored document, or its first tokens, as what comes before something else.

    Attributes:
        document: its place in the run.
        n_tokens: how many of its tokens come before.
        upto: how many tokens are the context; one more than ``n_tokens`` where not all of the document is: the last
            one's hidden state is not stored, so that it is computed again.
    """

    document: int
    n_tokens: int
    upto: int

    @property
    def again(self) -> bool:
        """Whether the last token goes through the model again."""
        return self.upto > self.n_tokens


@dataclass(frozen=True, kw_only=True)
class ContextJob(Prepared):
    """A job on stored documents: the run that holds them, and whether their keys and values stay in memory."""

    options: ContextOptions
    run: Run
    resident: bool


def find_document(run: Run, name: str, source: str) -> Document:
    """A finished document of a run.

    Raises:
        UserError: there is none of that name (the closest are named), it is not finished, or its KV was not kept.
    """
    try:
        document = run.documents[name]
    except KeyError:
        close = difflib.get_close_matches(name, [d.id for d in run.documents], n=3, cutoff=0.0)
        raise UserError(
            f"{source}: no document {name!r} in {run.paths.folder}; the closest: {', '.join(map(repr, close))}"
        ) from None
    if not document.complete:
        raise UserError(f"{source}: document {name!r} of {run.paths.folder} is not finished; prefill it first")
    return document


def context_of(document: Document, upto: int | None, source: str) -> Context:
    """What of a document comes before.

    Raises:
        UserError: it has fewer tokens.
    """
    if upto is None or upto == document.n_tokens:
        return Context(document=document.index, n_tokens=document.n_tokens, upto=document.n_tokens)
    if upto > document.n_tokens:
        raise UserError(f'{source}: "upto" is {upto}, but document {document.id!r} has {document.n_tokens} tokens')
    return Context(document=document.index, n_tokens=upto - 1, upto=upto)


def open_stored(options: ContextOptions, ranks: Ranks) -> tuple[Run, Checkpoint]:
    """The run, opened by every rank, and the checkpoint that made it. Collective."""
    run: Run = ranks.together(open_run, options.run)
    checkpoint = ranks.together(Checkpoint, options.model)

    def check() -> None:
        if run.kv_dtype is None:
            raise UserError(f"{options.run}: keeps no keys and values (it was made by `cpmpi score`); prefill it")
        for name, digest in (("model", model_sha256), ("tokenizer", tokenizer_sha256)):
            if (found := digest(checkpoint.folder)) != (made := run.attributes[f"{name}_sha256"]):
                raise UserError(
                    f"{options.model}: its {name} has the digest {found[:12]}, but {options.run} was made with another "
                    f"one ({made[:12]})"
                )

    ranks.on_root(check)
    return run, checkpoint


def prepare_contexts(
    options: ContextOptions, ranks: Ranks, run: Run, checkpoint: Checkpoint, *, longest: int, new: int, at_once: int
) -> ContextJob:
    """A job on contexts of up to ``longest`` tokens, with up to ``new`` after them. Collective.

    A pass takes some ``at_once`` of these tokens through the model, for which the schedule is chosen.

    Raises:
        UserError: something the user can mend.
    """
    if options.dtype == "auto":
        options = replace(options, dtype=str(run.attributes["dtype"]))
    ranks.together(_check_positions, options, checkpoint, longest, new)
    inputs = Inputs(checkpoint=checkpoint, documents=(), longest=longest + new)
    model = inspect(options, ranks, inputs)
    ranks.together(_check_rotary, model, longest, new)
    place = find_place(options, ranks, inputs, model)
    backends = backends_of(place.layers, model.device, place.ranks)
    schedule, reason = choose_schedule(
        place.ranks, place.topology, options.attention, place.layers, backends, tokens=at_once, stored=longest,
        segments=options.segments, device=model.device, grid=place.grid,
    )  # fmt: skip
    memory, resident = place.ranks.together(_residence, options, model, place, longest, new)
    decision = Decision(schedule=schedule, reason=reason, backends=backends, memory=memory)
    return ContextJob(
        options=options, run=run, inputs=inputs, model=model, place=place, decision=decision, resident=resident,
        progress=progress_of(options, place.ranks),
    )  # fmt: skip


def _check_positions(options: ContextOptions, checkpoint: Checkpoint, longest: int, new: int) -> None:
    limit = checkpoint.max_positions
    if limit is not None and longest + new > limit and not options.allow_longer:
        raise UserError(
            f"{longest} stored tokens and up to {new} after them are more than the {limit} positions that "
            f"{checkpoint.folder} was made for (max_position_embeddings); --allow-longer goes on all the same"
        )


def _check_rotary(model: Model, longest: int, new: int) -> None:
    if not same_for(model.skeleton, (longest, longest + new)):
        raise UserError(
            f"the rotary embeddings of this model depend on the document's length: keys of {longest} tokens are not "
            f"those of {longest + new}; prefill the whole text instead"
        )


def _residence(options: ContextOptions, model: Model, place: Place, longest: int, new: int) -> tuple[Memory, bool]:
    """What a rank needs, and whether stored keys and values stay in memory. Collective."""
    positions = place.ranks.size // place.grid.head_groups
    token_bytes = [h.kv_heads * (h.key_dim + h.value_dim) * h.dtype.itemsize for h, *_ in place.layers]
    available = available_bytes(place.ranks, model.device)
    program = resident_set_bytes() if model.device.type == "cpu" else 0

    def held(layers: list[int]) -> Memory:
        parts = {
            "stored keys and values": -(-longest // positions) * sum(layers),
            "continuations": new * 4 * sum(sorted(token_bytes)[-2:]),
        }
        return choose_residence(
            parts, weight_bytes(place.reader), choice=options.weights, limit=options.memory_limit,
            available=available, program=program,
        )  # fmt: skip

    mapped = sorted(token_bytes)[-2:]
    if options.kv == "auto":
        whole = held(token_bytes) if options.memory_limit is None else held(mapped)
        fits = whole.total <= available and options.memory_limit is None
        return (whole, True) if fits else (held(mapped), False)
    return held(token_bytes if options.kv == "memory" else mapped), options.kv == "memory"


def introduce_stored(job: ContextJob) -> None:
    """Say what the stored keys are, how attention goes across ranks, and what a rank needs."""
    computed = str(job.model.dtype).removeprefix("torch.")
    rounding = "" if job.run.kv_dtype == computed else f" (rounded to it once; a new prefill has them in {computed})"
    how = "in memory" if job.resident else "read a layer ahead"
    job.progress.say(f"stored keys and values: {job.run.kv_dtype}{rounding}; {how}")
    job.progress.say(f"attention: {job.decision.reason}")
    job.progress.say(str(job.decision.memory))


@contextmanager
def open_context(job: ContextJob, engine: Engine, context: Context) -> Iterator[Extension]:
    """What goes on from a context on this rank. Collective."""
    place, document = job.place, job.run.documents[context.document]
    grid, position = place.grid, engine.position
    layout = Layout(
        n_tokens=context.n_tokens, world=place.ranks.size // grid.head_groups, segments=job.options.segments
    )  # fmt: skip
    heads = tuple(layer.heads for layer in place.layers)
    with StoredKeys(
        document, layout, position, group=grid.group(place.ranks.rank), heads=heads, device=job.model.device,
        resident=job.resident,
    ) as stored:  # fmt: skip
        hidden = None if context.again else torch.from_numpy(document.last_hidden).to(job.model.device)
        yield Extension(engine=engine, context=stored, n_tokens=context.n_tokens, last_hidden=hidden)
