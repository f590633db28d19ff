"""Keys and values that were computed elsewhere become a run. Collective.

A file says little of where its numbers come from. So the model computes the last token again, from the keys and values
before it, and what it makes of that token in every layer must be what the file has. The same pass gives the token's
hidden state, from which a continuation's first token is predicted. Nothing is written before that went well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from cpmpi.attention.execute import Heads, Keys
from cpmpi.attention.layout import Dealt, Layout, Piece
from cpmpi.comm.device import room_of
from cpmpi.comm.ranks import Ranks, start
from cpmpi.cost.choose import choose_schedule
from cpmpi.cost.memory import choose_residence
from cpmpi.engine.contexts import check_rotary
from cpmpi.engine.extend import Branch, Extension, keys_of
from cpmpi.engine.options import ImportOptions
from cpmpi.engine.prepare import find_place, inspect, progress_of, workload
from cpmpi.engine.run import load_engine
from cpmpi.engine.score import Engine
from cpmpi.engine.state import Decision, Inputs, Model, Place, Prepared
from cpmpi.errors import UserError, some
from cpmpi.model.attention_call import Call
from cpmpi.model.cached_keys import check_cached
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.fingerprint import Fingerprint, fingerprint
from cpmpi.model.linear import choose_products
from cpmpi.model.weights import weight_bytes
from cpmpi.run import folder
from cpmpi.run.cache import StoredKeys
from cpmpi.run.export.tensors import FORMAT
from cpmpi.run.index import RunIndex
from cpmpi.run.kv_file import PARTS, KVFile
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.shard import prepare_shard
from cpmpi.run.spec import DocumentSpec, KVShape, KVSpec, RunSpec, token_digest
from cpmpi.run.writer import ShardWriter
from cpmpi.text import counted, duration

# How far the last token's keys, values and hidden state may be from those that the model computes, as a share of their
# norm: what bfloat16 and other kernels change is a few hundredths; another model, position or layout changes all of it.
BOUND = 0.1


@dataclass(frozen=True, kw_only=True)
class ImportJob(Prepared):
    """An import that nothing was found against: the open files, and what the run folder will hold."""

    options: ImportOptions
    files: tuple[KVFile, ...]
    spec: RunSpec


@dataclass(frozen=True, kw_only=True)
class FileKeys:
    """One rank's share of a file's keys and values, a layer at a time, as `cpmpi.run.cache.StoredKeys` has a run's."""

    file: KVFile
    layout: Layout
    pieces: tuple[Piece, ...]
    group: int
    heads: tuple[Heads, ...]
    device: torch.device

    def layer(self, layer: int) -> Keys:
        """Keys and values of a layer, in the type that the model computes in."""
        heads = self.heads[layer]
        keys = Keys.empty(self.pieces, heads, self.device)
        held, row = slice(self.group * heads.kv_heads, (self.group + 1) * heads.kv_heads), 0
        for piece in self.pieces:
            for given, place in zip(self.file.kv(layer, *piece), (keys.k_SGD, keys.v_SGE), strict=True):
                place[row : row + piece.size] = given[:, held]
            row += piece.size
        return keys


@dataclass(kw_only=True)
class LastToken(Extension):
    """Computes the token after a context again; every rank has one.

    Attributes:
        made: keys (1, G, D) and values (1, G, E) of each layer, on the ranks that compute it.
    """

    made: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @torch.inference_mode()
    def compute(self, token: int) -> torch.Tensor | None:
        """The token's hidden state (hidden,) after the final norm, on the ranks that compute it. Collective."""
        branch = Branch(np.array([token]), self.n_tokens)
        placed = Dealt(
            runs=((branch.run,), *((),) * (self._holders - 1)), copies=self.engine.grid.copies
        )  # fmt: skip
        mine = [branch] if self._here == 0 else []
        states = self._hidden(mine, placed, branch.stop)
        return states[0][0].float().cpu() if mine else None

    def attend(
        self, branches: list[Branch], placed: Dealt, longest: int, layer: int, calls: list[Call]
    ) -> torch.Tensor:
        """As for continuations; what the layer makes of the token is kept."""
        if branches:
            self.made.append(keys_of(calls[0]))
        return super().attend(branches, placed, longest, layer, calls)


def import_kv(options: ImportOptions) -> ImportJob:
    """Make a run of files with keys and values. Collective.

    Raises:
        UserError: something the user can mend; before anything is written where it can be known then.
    """
    ranks, began = start(), time.perf_counter()
    ranks.on_root(_check_output, options)
    checkpoint = ranks.together(Checkpoint, options.model)
    with ExitStack() as stack:
        files = tuple(
            stack.enter_context(closing(ranks.together(KVFile, Path(name)))) for name in options.files
        )  # fmt: skip
        job = _prepare(options, ranks, checkpoint, files)
        with load_engine(job) as engine:
            hidden = [last_hidden(job, engine, file) for file in files]
        _store(job, hidden)
        job.progress.say(f"{counted(len(files), 'document')} imported in {duration(time.perf_counter() - began)}")
    return job


def _check_output(options: ImportOptions) -> None:
    if not options.files:
        raise UserError("there is no file to import")
    folder.check_folder(options.output, overwrite=options.overwrite)
    if RunPaths(options.output).index.exists() and not options.overwrite:
        raise UserError(f"{options.output}: holds a run already; choose another --output, or --overwrite")


def _prepare(options: ImportOptions, ranks: Ranks, checkpoint: Checkpoint, files: tuple[KVFile, ...]) -> ImportJob:
    inputs = Inputs(checkpoint=checkpoint, documents=(), longest=max(file.n_tokens for file in files))
    ranks.together(_check_positions, options, checkpoint, files)
    model = inspect(options, ranks, inputs)
    ranks.together(_check_files, checkpoint, model, files)
    place = find_place(options, ranks, inputs, model)
    ranks = place.ranks
    found = fingerprint(checkpoint.folder, ranks)
    ranks.together(_check_digests, files, found.model_sha256, found.tokenizer_sha256)
    run_spec = ranks.on_root(_make_spec, options, checkpoint, model, place, files, found)
    ranks.on_root(folder.check_room, options.output, run_spec, overwrite=options.overwrite)
    computed = workload(options, model, place, tokens=1, stored=inputs.longest)
    schedule, reason = choose_schedule(ranks, place.topology, options.attention, computed)
    layer = max(h.kv_heads * (h.key_dim + h.value_dim) * h.dtype.itemsize for h, *_ in place.layers)
    share = -(-inputs.longest // (ranks.size // place.grid.head_groups))
    memory = ranks.together(
        choose_residence, {"two layers' keys and values": 2 * share * layer}, weight_bytes(place.reader),
        choice=options.weights, limit=options.memory_limit, room=room_of(ranks, model.device),
    )  # fmt: skip
    products = choose_products(place.skeleton, model.device, ranks, recorded=None)
    decision = Decision(
        schedule=schedule, reason=reason, backends=computed.backends, products=products, memory=memory
    )  # fmt: skip
    job = ImportJob(
        options=options, inputs=inputs, model=model, place=place, decision=decision, files=files, spec=run_spec,
        progress=progress_of(options, ranks),
    )  # fmt: skip
    for file in files:
        if file.others:
            job.progress.say(f"note: {file.path}: left out: {some(file.others)}, which a run has no place for")
    job.progress.say(str(memory))
    return job


def _check_positions(options: ImportOptions, checkpoint: Checkpoint, files: Sequence[KVFile]) -> None:
    limit = checkpoint.max_positions
    for file in files:
        if limit is not None and file.n_tokens > limit and not options.allow_longer:
            raise UserError(
                f"{file.path}: {file.n_tokens} tokens are more than the {limit} positions that {checkpoint.folder} was "
                "made for (max_position_embeddings); --allow-longer imports them all the same"
            )


def _check_files(checkpoint: Checkpoint, model: Model, files: Sequence[KVFile]) -> None:
    for file in files:
        file.check(_shapes(model), checkpoint.text_config_value("hidden_size"), checkpoint.vocab_size)
        if file.dtype != files[0].dtype:
            raise UserError(
                f"{file.path}: is of {file.dtype}, but {files[0].path} of {files[0].dtype}; a run has one type"
            )
    grown = [file for file in files if file.metadata.get("format") != FORMAT]  # in calls of any length
    check_rotary(model, [(1, file.n_tokens) for file in grown])
    if cached := [file for file in files if file.as_cached]:
        try:
            check_cached(model.skeleton)
        except UserError as problem:
            raise UserError(f"{cached[0].path}: is a cache of transformers, but {problem}") from problem


def _check_digests(files: Sequence[KVFile], model: str, tokenizer: str) -> None:
    for file in files:
        for name, digest in (("model", model), ("tokenizer", tokenizer)):
            said = file.metadata.get(f"{name}_sha256", digest)
            if said != digest:
                raise UserError(
                    f"{file.path}: was made with another {name} (digest {said[:12]}, that of --model is {digest[:12]})"
                )


def _shapes(model: Model) -> tuple[KVShape, ...]:
    return tuple(KVShape(h.kv_heads, h.key_dim, h.value_dim) for h, *_ in model.layers)


def _make_spec(
    options: ImportOptions, checkpoint: Checkpoint, model: Model, place: Place, files: Sequence[KVFile],
    found: Fingerprint,
) -> RunSpec:  # fmt: skip
    """What the run folder will hold."""
    world = place.topology.world
    computed = str(model.dtype).removeprefix("torch.")
    documents = tuple(
        DocumentSpec(
            id=file.id, source=str(file.path), n_tokens=file.n_tokens, grid=place.grid, scored="logprobs" in file.names,
            layout=Layout(
                n_tokens=file.n_tokens, world=world // place.grid.head_groups, segments=options.segments
            ),
            token_ids_sha256=token_digest(file.token_ids),
        )
        for file in files
    )  # fmt: skip
    return RunSpec(
        model=json.dumps(checkpoint.config.to_dict(), sort_keys=True, default=str), model_sha256=found.model_sha256,
        tokenizer_sha256=found.tokenizer_sha256, model_path=str(checkpoint.folder.absolute()),
        files=tuple(sorted(found.files.items())), dtype=files[0].metadata.get("dtype", computed), world_size=world,
        kv=KVSpec(shapes=_shapes(model), dtype=files[0].dtype), topology=place.topology.to_json(),
        hidden_size=checkpoint.text_config_value("hidden_size"), documents=documents, command=options.command,
    )  # fmt: skip


def last_hidden(job: ImportJob, engine: Engine, file: KVFile) -> npt.NDArray[np.float32]:
    """The last token's hidden state after the final norm (hidden,), computed again unless the file has it. Collective.

    Raises:
        UserError: the model makes another thing of the last token than the file has.
    """
    grid, n = engine.grid, file.n_tokens - 1
    layout = Layout(
        n_tokens=n, world=job.ranks.size // grid.head_groups, segments=job.options.segments
    )  # fmt: skip
    heads = tuple(layer.heads for layer in job.place.layers)
    keys = FileKeys(
        file=file, layout=layout, pieces=layout.pieces(engine.position), group=grid.group(job.ranks.rank), heads=heads,
        device=engine.device,
    )  # fmt: skip
    last = LastToken(engine=engine, context=cast(StoredKeys, keys), n_tokens=n, last_hidden=None)
    computed = last.compute(int(file.token_ids[-1]))
    job.ranks.together(_check_last, job, file, last.made, computed)
    found = [x for x in job.ranks.allgather(computed if computed is None else computed.numpy()) if x is not None]
    given, again = file.result("last_hidden"), found[0]
    hidden: npt.NDArray[np.float32] = again if given is None else given
    return hidden


def _check_last(
    job: ImportJob, file: KVFile, made: Sequence[tuple[torch.Tensor, torch.Tensor]], computed: torch.Tensor | None
) -> None:
    """Compare what the model makes of the last token with the file; on ranks that computed it."""
    n = file.n_tokens - 1
    for layer, rows in enumerate(made):
        held = job.place.layers[layer].heads.kv_heads
        first = job.place.grid.group(job.ranks.rank) * held
        for part, got, want in zip(PARTS, rows, file.kv(layer, n, n + 1), strict=True):
            _check_near(file, f"layers.{layer}.{part}", want[:, first : first + held], got)
    given = file.result("last_hidden")
    if computed is not None and given is not None:
        _check_near(file, "last_hidden", torch.from_numpy(given), computed)


def _check_near(file: KVFile, name: str, given: torch.Tensor, computed: torch.Tensor) -> None:
    given, computed = given.float().cpu(), computed.float().cpu()
    off = float((given - computed).norm() / computed.norm().clamp(min=1e-30))
    if not off <= BOUND:
        raise UserError(
            f"{file.path}: {name} of the last token is not what the model computes (off by {off:.2g} of its norm, at "
            f"most {BOUND:g}): other weights, tokens or positions, or keys before their rotary embedding"
        )


def _store(job: ImportJob, hidden: Sequence[npt.NDArray[np.float32]]) -> None:
    """Write the run. Collective."""
    ranks, options, spec = job.ranks, job.options, job.spec
    opened: list[RunIndex] = []
    with ExitStack() as stack:
        ranks.on_root(stack.enter_context, only_writer(options.output))
        spec = ranks.on_root(_open_index, job, opened)
        path = ranks.together(prepare_shard, options.output, spec, ranks.rank, ())
        sizes = ranks.gather(path.stat().st_size)
        ranks.on_root(lambda: opened[0].write_manifest(sizes or ()))
        writer = stack.enter_context(ShardWriter(path, spec, ranks.rank, queue_bytes=0))
        for i, file in enumerate(job.files):
            ranks.together(_put, writer, spec, i, file, ranks.rank)
            digests = ranks.gather(ranks.together(writer.finish, i))
            ranks.on_root(_finish, opened, i, file, hidden[i], digests)
        ranks.on_root(lambda: opened[0].finish())


def _open_index(job: ImportJob, opened: list[RunIndex]) -> RunSpec:
    opened.append(folder.start_index(job.options.output, job.spec, overwrite=job.options.overwrite))
    return opened[0].spec


def _put(writer: ShardWriter, spec: RunSpec, i: int, file: KVFile, rank: int) -> None:
    """Write this rank's pieces of a document, a layer at a time."""
    assert spec.kv is not None
    document = spec.documents[i]
    for layer, shape in enumerate(spec.kv.shapes):
        held = slice(*document.heads(rank, shape.heads))
        pieces = [file.kv(layer, *piece) for piece in document.pieces(rank)] or [file.kv(layer, 0, 0)]
        writer.put(i, layer, *(torch.cat([piece[part][:, held] for piece in pieces]) for part in range(2)))


def _finish(opened: list[RunIndex], i: int, file: KVFile, hidden: Any, digests: Any) -> None:
    logprobs = file.result("logprobs")
    if logprobs is None:
        logprobs = np.full(file.n_tokens, np.nan, np.float32)
    opened[0].write_outputs(
        i, token_ids=file.token_ids, logprobs=logprobs, last_hidden=hidden, digests=digests
    )  # fmt: skip
