"""Repair a run: compute again what is damaged of it, on any number of ranks, and nothing else. Collective.

A document of which layers are damaged goes through the model from its start to the last of them; of what comes out,
the damaged layers of the damaged shards are written over, where they are. On ranks that lie as those that made the run
the bytes are those that were there: their checksums, which are still known, show it, and those of sound layers are
compared, too. On others they are right within the rounding by which layouts differ, and get checksums of their own.
Where outputs are damaged, the document goes through the whole model, and they are written anew.

Everything that is overwritten is damaged before, so that a kill loses nothing: the same command goes on.

Legend: T tokens of a rank, G KV heads, D key head dim, E value head dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import xxhash

from cpmpi.attention.layout import Layout, Piece
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.documents.read import InputDocument
from cpmpi.engine.circumstances import recorded_options
from cpmpi.engine.contexts import check_made_by
from cpmpi.engine.corpus import check_nobody_works
from cpmpi.engine.options import JobOptions
from cpmpi.engine.outputs import assemble
from cpmpi.engine.prepare import decide, find_place, inspect, make_spec
from cpmpi.engine.run import load_engine
from cpmpi.engine.score import Engine, Scores
from cpmpi.engine.state import Inputs, Job
from cpmpi.engine.watch import alive
from cpmpi.errors import UserError
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.fingerprint import fingerprint
from cpmpi.run import mend
from cpmpi.run.extras import checksum_of, recorded_checksums
from cpmpi.run.hdf5 import RawArray, pwrite_all
from cpmpi.run.index import write_datasets, write_results
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import naming
from cpmpi.run.reader import Document, Run
from cpmpi.run.results import DIGESTS, Results, perplexity, predicted, read_results, sum_nll
from cpmpi.run.shard import ShardFile
from cpmpi.run.spec import DocumentSpec, token_digest
from cpmpi.run.verify import Verification, verify_run
from cpmpi.text import counted, human_bytes

Outputs = tuple[RawArray, RawArray, torch.Tensor | None, int]  # of a rank, as `assemble` takes them


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be computed again of a document.

    Attributes:
        name: of its group in ``run.h5``.
        layers: by rank of the job that did it.
        outputs: whether its outputs are, too.
    """

    name: str
    layers: dict[int, set[int]]
    outputs: bool

    @property
    def last(self) -> int:
        """The last layer that is needed."""
        return max((layer for layers in self.layers.values() for layer in layers), default=-1)


class Enough(Exception):
    """The last damaged layer of a document is done: on all ranks at the same place."""


def repair(folder: Path, model: Path | None, ranks: Ranks, progress: Progress) -> Verification:
    """Repair the run in a folder. Collective.

    Args:
        folder: the run folder.
        model: checkpoint folder that made the run; None: where it was then.
        ranks: any number.
        progress: tells what is done.

    Returns:
        What is still wrong, with the run as it is afterwards.

    Raises:
        UserError: ``run.h5`` itself cannot be read, another process writes the run, or the checkpoint is another.
    """
    with ExitStack() as stack:
        ranks.on_root(stack.enter_context, only_writer(folder, instead="stop it first"))
        for part in (folder, *ranks.on_root(_parts, folder, stack)):
            _repair_alone(part, model, ranks, progress)
        return ranks.on_root(verify_run, folder)


def _parts(folder: Path, stack: ExitStack) -> list[Path]:
    """The parts of a run that jobs shared, each held for this process; none of them is at work. On rank 0."""
    check_nobody_works(folder, "work on documents of this run: stop them first")
    found = [part.folder for part in RunPaths.of(folder).every_part() if part.index.exists()]
    for part in found:
        stack.enter_context(only_writer(part, instead="stop it first"))
    return found


def _repair_alone(folder: Path, model: Path | None, ranks: Ranks, progress: Progress) -> None:
    """Repair a run, without the parts of it that are runs of their own. Collective."""
    work = ranks.on_root(find_work, folder, progress)
    if work:
        _compute(folder, model, work, ranks, progress)
    ranks.on_root(mend.mend_states, folder)


def find_work(folder: Path, progress: Progress) -> list[Work]:
    """Give shards that cannot be opened a structure again, and say what is to be computed. On rank 0."""
    with mend.open_alone(folder) as run:
        if run.version == 1:
            raise UserError(f"{folder}: of format version 1, which is not repaired: start again with --overwrite")
        mend.sweep(run.paths)
    mend.mend_states(folder)
    found = verify_run(folder, parts=False)
    for problem in found.problems:
        progress.say(problem)
    with mend.open_alone(folder) as run:
        for shard_set, rank in sorted(found.damage.shards):
            mend.lay_out_anew(run, shard_set, rank)
        mend.delete_checkpoints(found.damage.checkpoints)
        if found.damage.circumstances:
            mend.forget_circumstances(run)
    if found.damage.shards:
        found = verify_run(folder, parts=False)
    with mend.open_alone(folder) as run:
        return list(_work(run, found, progress))


def _work(run: Run, found: Verification, progress: Progress) -> Iterator[Work]:
    damage = found.damage
    for document in (*run.documents, *run.set_aside):
        name = str(document.group.name)
        layers, outputs = damage.layers.get(name, {}), name in damage.outputs
        if name in damage.results and document.kv_shapes:  # nor is it known what the shards must hold
            layers = {rank: set(range(len(document.kv_shapes))) for rank in range(document.world_size)}
        if not layers and not outputs:
            continue
        if token_digest(document.group["token_ids"][:]) != document.spec.token_ids_sha256:
            progress.say(f"{document.id}: its token ids are damaged: start the job that made it again, which does it")
            mend.unfinish(run, document)
            continue
        if len(document.places) > 1:
            progress.say(f"{document.id}: was appended to, and is not repaired: make it anew")
            continue
        if outputs and (run.scoring.prefix or run.scoring.context or not _extras_are_sound(document)):
            what = "its kept scores or places, or scores after a prefix token or in windows"
            progress.say(f"{document.id}: {what}, are not repaired")
            continue
        yield Work(name=name, layers=layers, outputs=outputs)


def _extras_are_sound(document: Document) -> bool:
    """Whether the datasets besides the outputs have their checksums, and so need not be computed again."""
    return all(checksum_of(document.group[name]) == sum for name, sum in recorded_checksums(document.group).items())


def _compute(folder: Path, model: Path | None, work: list[Work], ranks: Ranks, progress: Progress) -> None:
    with ranks.together(mend.open_alone, folder) as run:
        job = _prepare(run, model, work, ranks, progress)
        with alive(job, run.paths.folder, job.options.hang_timeout, beside=True), load_engine(job) as engine:
            for one in work:
                _repair_document(job, engine, run, one)


def _prepare(run: Run, model: Path | None, work: list[Work], ranks: Ranks, progress: Progress) -> Job:
    """A job like that which made the run. Collective."""
    folder, documents = run.paths.folder, [_document(run, one.name) for one in work]
    recorded = ranks.on_root(recorded_options, folder)
    if ranks.size % recorded.get("tp", 1):
        del recorded["tp"]
    options = JobOptions(
        model=model or Path(ranks.on_root(recorded_model, run)), output=folder, dtype=str(run.attributes["dtype"]),
        kv_dtype=run.kv_dtype or "bfloat16", keep_kv=run.kv_dtype is not None, checkpoint="off", allow_longer=True,
        quiet=not progress.enabled, **recorded,
    )  # fmt: skip
    checkpoint = ranks.together(Checkpoint, options.model)
    found = fingerprint(checkpoint.folder, ranks)
    check_made_by(run, options.model, found)
    read = tuple(InputDocument(id=d.id, source=d.source, token_ids=d.group["token_ids"][:]) for d in documents)
    read = tuple({document.id: document for document in read}.values())  # one that is set aside may have its name
    inputs = Inputs(checkpoint=checkpoint, documents=read, longest=max(d.n_tokens for d in documents))
    inspected = inspect(options, ranks, inputs)
    place = find_place(options, ranks, inputs, inspected)
    spec = place.ranks.on_root(make_spec, options, inputs, inspected, place, found)
    return Job(
        options=options, inputs=inputs, model=inspected, place=place, spec=spec,
        decision=decide(options, inputs, inspected, place, spec), progress=progress,
    )  # fmt: skip


def recorded_model(run: Run) -> str:
    """Where the checkpoint was that made a run.

    Raises:
        UserError: it does not say, or nothing is there.
    """
    found = run.model_path
    if not found or not Path(found).is_dir():
        where = f"is not at {found} any more" if found else "was not recorded"
        raise UserError(f"{run.paths.folder}: the checkpoint that made this run {where}; say where it is: --model DIR")
    return found


def _document(run: Run, name: str) -> Document:
    _, where, number = name.split("/")
    return (run.set_aside if where == "set_aside" else run.documents)[int(number)]


def _repair_document(job: Job, engine: Engine, run: Run, work: Work) -> None:
    """Compute and write what is damaged of a document. Collective."""
    document, ranks = _document(run, work.name), job.place.ranks
    grid = job.place.grid
    layout = Layout(
        n_tokens=document.n_tokens, world=ranks.size // grid.head_groups, segments=document.spec.layout.segments
    )
    here = replace(document.spec, layout=layout, grid=grid, first_rank=0, origin=None)
    mender = Mender(run=run, document=document, here=here, work=work, rank=ranks.rank, world=ranks.size)
    keep = mender.keep if run.kv_dtype is not None else None
    ranks.flight.begin(document.index, document.id, len(job.place.layers))
    scores = None
    try:
        scores = engine.score(document.group["token_ids"][:], layout, document.id, keep)
    except Enough:
        engine.weights.close()
    ranks.together(mender.sync)
    counts = ranks.comm.allgather((mender.written, mender.blocks, mender.differ))
    everyone = ranks.comm.gather(_outputs(scores)) if scores is not None and work.outputs else None
    same = ranks.on_root(_finish, run, document, work, everyone)
    written, blocks, differ = (sum(column) for column in zip(*counts))
    job.progress.say(f"{document.id}: {_words(document, work, written, same)}")
    if differ:
        job.progress.say(
            f"{document.id}: {differ} of {counted(blocks, 'sound block')} come out with other bytes here: another "
            "machine or library; what was written is right within rounding"
        )


def _outputs(scores: Scores) -> Outputs:
    return scores.positions.numpy(), scores.logprobs.numpy(), scores.last_hidden, 0


def _words(document: Document, work: Work, written: int, same: bool) -> str:
    """What was done for a document."""
    parts = [
        f"layers {', '.join(map(str, sorted(layers)))} of rank {rank}" if len(layers) < len(document.kv_shapes or ())
        else f"all layers of rank {rank}"
        for rank, layers in sorted(work.layers.items())
    ]  # fmt: skip
    parts += ["its outputs"] * work.outputs
    how = " as they were, bit for bit" if same else ", with checksums of their own"
    kv = f"; {human_bytes(written)} written{how}" if work.layers else ""
    return f"{', '.join(parts)} computed again{kv}"


def _finish(run: Run, document: Document, work: Work, everyone: list[Outputs] | None) -> bool:
    """Record what was written; whether the keys and values are what they were, bit for bit. On rank 0."""
    index, name, same = run.paths.index, work.name, True
    results = read_results(document.group)
    arrays = dict(results.arrays)
    if work.layers:
        digests = np.array(arrays[DIGESTS], "<u8")
        for rank, layers in work.layers.items():
            placed = document.places[0]
            shard = run.shard(rank, placed.shard_set)
            digests[rank] = mend.write_tables(shard, placed.number, layers)
        same = bool((digests == arrays[DIGESTS]).all())
        arrays[DIGESTS] = digests
    if everyone is not None:
        logprobs, last_hidden = assemble(everyone, document.n_tokens)
        logprobs[: document.first_scored] = np.nan
        arrays |= {"logprobs": logprobs, "last_hidden": last_hidden.astype("<f4")}
    if everyone is not None or not same:
        nll = sum_nll(arrays["logprobs"], scored=document.scored)
        write_datasets(index, name, arrays)
        new = Results(arrays=arrays, nll=nll, perplexity=perplexity(nll, len(predicted(arrays["logprobs"]))))
        write_results(index, name, new, complete=True)
    return same


@dataclass(kw_only=True)
class Mender:
    """Writes this rank's part of what is damaged of a document, as it comes out of the model.

    Args:
        run, document, work: what is repaired.
        here: the document, as it lies on the ranks that compute it now.
        rank, world: this one, of how many.

    Attributes:
        written: bytes.
        blocks, differ: sound blocks that were computed again, and those among them that came out otherwise.
    """

    run: Run
    document: Document
    here: DocumentSpec
    work: Work
    rank: int
    world: int
    written: int = 0
    blocks: int = 0
    differ: int = 0
    _open: dict[int, int] = field(default_factory=dict)

    def keep(self, layer: int, key_TGD: torch.Tensor, value_TGE: torch.Tensor) -> None:
        """Take a finished layer of this rank.

        Raises:
            Enough: it is the last that was needed.
        """
        dtype: torch.dtype = getattr(torch, str(self.run.kv_dtype))
        rows = [tensor.to(dtype).contiguous().cpu() for tensor in (key_TGD, value_TGE)]
        for rank, layers in self.work.layers.items():
            if layer in layers:
                for part, tensor in enumerate(rows):
                    self._write(rank, layer, part, tensor)
        self._compare(layer, rows)
        if layer == self.work.last and not self.work.outputs:
            raise Enough

    def sync(self) -> None:
        """Make it last."""
        while self._open:
            rank, descriptor = self._open.popitem()
            try:
                with naming(self._shard(rank).path):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _shard(self, rank: int) -> ShardFile:
        return self.run.shard(rank, self.document.places[0].shard_set)

    def _write(self, rank: int, layer: int, part: int, mine_TGD: torch.Tensor) -> None:
        """Write what this rank has of a layer's keys or values into the shard of ``rank``."""
        place = self._shard(rank).document(self.document.places[0].number)
        shape, *offsets = place.layers[layer]
        held, own = self._heads(self.document.spec, rank, layer), self._heads(self.here, self.rank, layer)
        heads = Piece(max(held.start, own.start), min(held.stop, own.stop))
        if heads.start >= heads.stop:
            return
        head_bytes = mine_TGD.shape[2] * mine_TGD.element_size()
        row_bytes, first = shape.heads * head_bytes, (heads.start - held.start) * head_bytes
        for row, mine, count in overlaps(place.pieces, self.here.pieces(self.rank)):
            block = mine_TGD[mine : mine + count, heads.start - own.start : heads.stop - own.start].contiguous()
            data = block.reshape(-1).view(torch.uint8).numpy().reshape(count, -1)
            whole = data.shape[1] == row_bytes
            for n, piece in enumerate([data.reshape(-1)] if whole else data):
                pwrite_all(self._descriptor(rank), piece, offsets[part] + (row + n) * row_bytes + first)
            self.written += data.nbytes

    def _heads(self, spec: DocumentSpec, rank: int, layer: int) -> Piece:
        assert self.document.kv_shapes is not None
        return spec.heads(rank, self.document.kv_shapes[layer].heads)

    def _descriptor(self, rank: int) -> int:
        if rank not in self._open:
            self._open[rank] = os.open(self._shard(rank).path, os.O_WRONLY)
        return self._open[rank]

    def _compare(self, layer: int, rows: list[torch.Tensor]) -> None:
        """Compare a layer that is sound with what comes out now, where ranks lie as they did."""
        then = self.document.spec
        alike = (then.layout, then.grid, then.first_rank) == (self.here.layout, self.here.grid, 0)
        if not alike or self.document.world_size != self.world or layer in self.work.layers.get(self.rank, ()):
            return
        shard = self._shard(self.rank)
        place, table = shard.document(self.document.places[0].number), shard.checksums(self.document.places[0].number)
        for number, block in enumerate(place.blocks):
            for part, tensor in enumerate(rows):
                data = tensor[block.row : block.row + block.stop - block.start].reshape(-1).view(torch.uint8).numpy()
                self.blocks += 1
                self.differ += int(xxhash.xxh3_64_intdigest(data.tobytes()) != table[layer, number, part])


def overlaps(held: tuple[Piece, ...], own: tuple[Piece, ...]) -> Iterator[tuple[int, int, int]]:
    """Where the tokens of some pieces are among others: row there, row here, how many; pieces lie one after another."""
    row = 0
    for there in held:
        mine = 0
        for here in own:
            start, stop = max(there.start, here.start), min(there.stop, here.stop)
            if start < stop:
                yield row + start - there.start, mine + start - here.start, stop - start
            mine += here.size
        row += there.size
