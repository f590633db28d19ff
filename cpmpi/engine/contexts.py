"""Prepare a job on stored documents: the run that is there, the model that made it, and this job's ranks.

As in `cpmpi.engine.prepare`, each step is collective, and what can be refused is refused before weights are read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.layout import Layout
from cpmpi.comm.device import Room, room_of
from cpmpi.comm.ranks import AgreedError, Ranks
from cpmpi.cost.memory import Memory, choose_residence, document_memory
from cpmpi.cost.workload import TokenSizes
from cpmpi.engine.circumstances import recorded_products
from cpmpi.engine.extend import APART, Before, Extension
from cpmpi.engine.options import ContextOptions
from cpmpi.engine.prepare import find_place, inspect, progress_of, schedule_for, workload
from cpmpi.engine.score import Engine
from cpmpi.engine.state import Decision, Inputs, Model, Place, Prepared
from cpmpi.engine.trunk import Trunk
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.fingerprint import Fingerprint, fingerprint
from cpmpi.model.linear import choose_products
from cpmpi.model.rotary import length_matters, same_for
from cpmpi.model.size import inner_width
from cpmpi.model.weights import weight_bytes
from cpmpi.run.cache import StoredKeys
from cpmpi.run.hdf5 import STORED_FLOATS
from cpmpi.run.reader import Document, Run, open_run
from cpmpi.run.unchanged import changed_files, recorded_files

BATCH_TOKENS = 4096  # of continuations that a rank takes through the layers at a time
TOGETHER_TOKENS = 1 << 14  # of several contexts whose continuations go through the layers together, or of the longest
MOST_TOGETHER = 16  # of them: each looks at the keys of all, to see that they are not its own


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
class New:
    """How many tokens come after how many stored ones.

    Attributes:
        stored: of the longest context.
        longest: after it, of one line.
        at_once: that go through the model in a pass, of all ranks; for these the schedule is chosen.
        sequences: lines whose new keys and values, of all layers, stay until the end.
        dealt: whether all ranks share the tokens of a line, and store their keys and values.
        spans: of each context its tokens, and how many they are with the longest line; by default of the one above.
        texts: of each context the tokens of the document whose keys it has (none: it has none), of the shortest text
            that goes on from them, and of the longest; by default as the spans say.
    """

    stored: int
    longest: int
    at_once: int
    sequences: int = 0
    dealt: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """The spans."""
        return self.spans or ((self.stored, self.stored + self.longest),)


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
    if upto == 0:  # no context: what comes before is all in the line
        return Context(document=document.index, n_tokens=0, upto=0)
    if upto > document.n_tokens:
        raise UserError(f'{source}: "upto" is {upto}, but document {document.id!r} has {document.n_tokens} tokens')
    return Context(document=document.index, n_tokens=upto - 1, upto=upto)


def model_folder(options: ContextOptions, run: Run) -> Path:
    """The checkpoint that was asked for, or that made the run.

    Raises:
        UserError: neither is known, or it is not where it was.
    """
    if options.model is not None:
        return options.model
    if not run.model_path:
        raise UserError(f"--model is missing: {options.run} does not say where its checkpoint is")
    if not Path(run.model_path).is_dir():
        raise UserError(
            f"{options.run}: the checkpoint that made it is not in {run.model_path} any more; --model says where it is"
        )
    return Path(run.model_path)


@contextmanager
def open_stored(options: ContextOptions, ranks: Ranks) -> Iterator[tuple[Run, Checkpoint]]:
    """The run, opened by every rank, and the checkpoint that made it. Collective.

    Raises:
        UserError: there is no run, it keeps no keys and values, or it was made with another model or tokenizer.
    """
    run: Run = ranks.together(open_run, options.run)
    with run:
        checkpoint = ranks.together(lambda: Checkpoint(model_folder(options, run)))
        if run.kv_dtype is None:
            raise AgreedError(f"{options.run}: keeps no keys and values (it was made by `cpmpi score`); prefill it")
        check_made_by(run, checkpoint.folder, fingerprint(checkpoint.folder, ranks))  # the ranks read a share each
        yield run, checkpoint


def check_made_by(run: Run, model: Path, found: Fingerprint) -> None:
    """Refuse a checkpoint that did not make a run. On every rank alike.

    Raises:
        AgreedError: it is another one; files that differ are named.
    """
    for name, digest in (("tokenizer", found.tokenizer_sha256), ("model", found.model_sha256)):
        if digest != (made := run.attributes[f"{name}_sha256"]):
            files = changed_files(recorded_files(run), found.files)
            raise AgreedError(
                f"{model}: its {name} has the digest {digest[:12]}, but {run.paths.folder} was made with another one "
                f"({made[:12]}){files and f': {files}'}"
            )


def prepare_contexts(options: ContextOptions, ranks: Ranks, run: Run, checkpoint: Checkpoint, work: New) -> ContextJob:
    """A job on stored contexts. Collective.

    Raises:
        UserError: something the user can mend.
    """
    if options.dtype == "auto":
        options = replace(options, dtype=str(run.attributes["dtype"]))
    ranks.together(_check_positions, options, checkpoint, work)
    inputs = Inputs(checkpoint=checkpoint, documents=(), longest=work.stored + work.longest)
    model = inspect(options, ranks, inputs)
    ranks.together(check_rotary, model, work.texts or work.lengths)
    place = find_place(options, ranks, inputs, model)
    computed = workload(options, model, place, tokens=work.at_once, stored=work.stored)
    schedule, reason = schedule_for(options, options.goes_on, place, computed)
    room = room_of(place.ranks, model.device)
    parts = document_memory(computed, schedule, _sizes(options, run, inputs, place)) if work.dealt else {}
    memory, resident = place.ranks.together(_residence, options, place, work, room, parts)
    products = choose_products(
        place.skeleton, model.device, place.ranks, recorded=place.ranks.on_root(recorded_products, options.run)
    )  # fmt: skip
    decision = Decision(
        schedule=schedule, reason=reason, backends=computed.backends, products=products, memory=memory
    )  # fmt: skip
    return ContextJob(
        options=options, run=run, inputs=inputs, model=model, place=place, decision=decision, resident=resident,
        progress=progress_of(options, place.ranks),
    )  # fmt: skip


def _check_positions(options: ContextOptions, checkpoint: Checkpoint, work: New) -> None:
    limit = checkpoint.max_positions
    stored, whole = max(work.lengths, key=lambda span: span[1])
    if limit is not None and whole > limit and not options.allow_longer:
        raise UserError(
            f"{stored} stored tokens and up to {whole - stored} after them are more than the {limit} positions that "
            f"{checkpoint.folder} was made for (max_position_embeddings); --allow-longer goes on all the same"
        )


def check_rotary(model: Model, texts: Sequence[tuple[int, ...]]) -> None:
    """Refuse keys that would be others in a shorter or longer text.

    Args:
        model: whose they are.
        texts: tokens of a document that there are keys of (0: of none), and of texts that they are used in.

    Raises:
        UserError: that.
    """
    for made, *used in sorted(set(texts)) if length_matters(model.skeleton) else ():
        for tokens in used:
            if not same_for(model.skeleton, (made or used[0], tokens)):
                raise UserError(
                    f"the rotary embeddings of this model depend on the document's length: keys of "
                    f"{made or used[0]} tokens are not those of {tokens}; prefill the whole text instead"
                )


def _sizes(options: ContextOptions, run: Run, inputs: Inputs, place: Place) -> TokenSizes:
    """What a token of a text that all ranks compute takes beside its attention."""
    assert run.kv_dtype is not None
    return TokenSizes(
        hidden=inputs.checkpoint.text_config_value("hidden_size"), inner=inner_width(place.skeleton),
        vocabulary=inputs.checkpoint.vocab_size, chunk_tokens=options.chunk_tokens,
        stored_itemsize=STORED_FLOATS[run.kv_dtype].itemsize, checkpoint_bytes=0,
    )  # fmt: skip


def _residence(
    options: ContextOptions, place: Place, work: New, room: Room, parts: Mapping[str, int]
) -> tuple[Memory, bool]:  # fmt: skip
    """What a rank needs, ``parts`` and more, and whether stored keys and values stay in memory."""
    positions = place.ranks.size // place.grid.head_groups
    holders = place.ranks.size // place.grid.tp
    stored, grown = -(-work.stored // positions), -(-work.sequences // holders) * work.longest
    token_bytes = [h.kv_heads * (h.key_dim + h.value_dim) * h.dtype.itemsize for h, *_ in place.layers]
    two_layers = sum(sorted(token_bytes)[-2:])  # the one that is attended to, and the next, which is being read

    def needed(stored_bytes: int) -> Memory:
        held = {"stored keys and values": stored * stored_bytes, **parts}
        if not work.dealt:
            held["new keys and values"] = 4 * work.longest * two_layers + grown * sum(token_bytes)
        return choose_residence(
            held, weight_bytes(place.reader), choice=options.weights, limit=options.memory_limit, room=room
        )  # fmt: skip

    if options.kv != "auto":
        resident = options.kv == "memory"
        return needed(sum(token_bytes) if resident else two_layers), resident
    mapped = needed(two_layers)
    more = stored * (sum(token_bytes) - two_layers)
    most = room.bytes if options.memory_limit is None else options.memory_limit
    weights = weight_bytes(place.reader)
    least = mapped.total - mapped.parts["weights"] + more
    least += weights.total if options.weights == "resident" else weights.lasting + weights.streamed
    return (needed(sum(token_bytes)), True) if least <= most else (mapped, False)


def introduce_stored(job: ContextJob) -> None:
    """Say what the stored keys are, how attention goes across ranks, and what a rank needs."""
    computed = str(job.model.dtype).removeprefix("torch.")
    rounding = "" if job.run.kv_dtype == computed else f" (rounded to it once; a new prefill has them in {computed})"
    how = "in memory" if job.resident else "read a layer ahead"
    job.progress.say(f"stored keys and values: {job.run.kv_dtype}{rounding}; {how}")
    job.progress.say(f"attention: {job.decision.reason}")
    job.progress.say(str(job.decision.memory))


@contextmanager
def open_contexts(job: ContextJob, engine: Engine, contexts: Sequence[Context]) -> Iterator[Extension]:
    """What goes on from contexts on this rank, each blind to the others. Collective."""
    place, grid, position = job.place, job.place.grid, engine.position
    stored, befores = [], []
    for i, context in enumerate(contexts):
        document, base = job.run.documents[context.document], i * APART
        layout = Layout(
            n_tokens=context.n_tokens, world=place.ranks.size // grid.head_groups, segments=job.options.segments,
            start=base,
        )  # fmt: skip
        hidden = None if context.again else torch.from_numpy(document.last_hidden).to(job.model.device)
        stored.append((document, layout))
        befores.append(Before(context.n_tokens, hidden, base))
    heads = tuple(layer.heads for layer in place.layers)
    engine.flight.begin(document.index, document.id, len(heads))
    with StoredKeys(
        *stored[0], position, group=grid.group(place.ranks.rank), heads=heads, device=job.model.device,
        resident=job.resident, more=stored[1:],
    ) as keys:  # fmt: skip
        n_tokens, last_hidden, _ = befores[0]
        yield Extension(
            engine=engine, context=keys, n_tokens=n_tokens, last_hidden=last_hidden, more=tuple(befores[1:])
        )  # fmt: skip


def open_context(job: ContextJob, engine: Engine, context: Context) -> AbstractContextManager[Extension]:
    """What goes on from a context on this rank. Collective."""
    return open_contexts(job, engine, (context,))


def trunk_of(job: ContextJob, extension: Extension, ids: npt.NDArray[np.int64]) -> Trunk:
    """A text that all ranks take through the layers together after a context."""
    return Trunk(
        engine=extension.engine, context=extension.context, n_tokens=extension.n_tokens, ids=ids,
        last_hidden=extension.last_hidden, segments=job.options.segments, gather=job.ranks.allgather,
    )  # fmt: skip
