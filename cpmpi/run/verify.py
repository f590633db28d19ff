"""Check a run against itself: sizes, checksums, outputs. Every problem is a line that names the file."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5s

from cpmpi.errors import UserError, one_line
from cpmpi.run.document import Document, Placed
from cpmpi.run.extras import checksum_of, recorded_checksums
from cpmpi.run.hdf5 import STORED_FLOATS, RawArray
from cpmpi.run.index import summary_text
from cpmpi.run.layer_reader import PARTS
from cpmpi.run.paths import RunPaths
from cpmpi.run.reader import Run, open_run
from cpmpi.run.results import DIGESTS, perplexity, read_outputs, sum_nll
from cpmpi.run.sealed_json import check_text, read_sealed
from cpmpi.run.shard import ShardDocument, ShardFile
from cpmpi.run.spec import KVGroup, token_digest
from cpmpi.run.text_places import spans_text

CHUNK_BYTES = 4 << 20
# log-softmax in float32 may come out above 0 by its rounding.
LOGPROB_ROUNDING = 1e-4
# Rows of a document that are read through its virtual datasets, which is slow; their map is under the seal besides.
VIRTUAL_ROWS = 8


@dataclass(kw_only=True)
class Damage:
    """What is damaged, for whoever would repair it. Documents by the names of their groups in ``run.h5``."""

    shards: set[tuple[int, int]] = field(default_factory=set)
    """Set and rank of shards that cannot be opened, or are laid out otherwise than ``run.h5`` says."""
    layers: dict[str, dict[int, set[int]]] = field(default_factory=dict)
    """Of documents, by rank: layers whose keys or values are not what was written."""
    outputs: set[str] = field(default_factory=set)
    """Documents whose outputs, or results, are not what was written."""
    results: set[str] = field(default_factory=set)
    """Those among them of which it is not known either what their shards must hold."""
    other: bool = False
    """Something that can be told from the rest of the run: the summary, or what is complete."""
    checkpoints: set[Path] = field(default_factory=set)
    """Manifests of checkpoints that are not whole."""
    circumstances: bool = False
    """``schedule.json`` or ``topology.json``."""

    def note_layers(self, document: Document, rank: int, layers: Iterable[int]) -> None:
        """Some layers of a document in the shard of a rank are damaged."""
        self.layers.setdefault(str(document.group.name), {}).setdefault(rank, set()).update(layers)


@dataclass(kw_only=True)
class Verification:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """A line each, empty when all is well."""
    documents: int = 0
    """Complete documents."""
    shards: int = 0
    """Shards that could be opened."""
    kv_bytes: int = 0
    """Bytes of KV compared with their checksums."""
    damage: Damage = field(default_factory=Damage)
    """What is behind the problems that can be repaired."""


def verify_run(path: Path, *, quick: bool = False, threads: int = 4, parts: bool = True) -> Verification:
    """Check the run in the folder ``path``. An unfinished run is a problem; its finished documents are checked.

    Args:
        path: the run folder.
        quick: read everything but the KV itself.
        threads: that read KV at the same time.
        parts: of a run that several jobs share, whether what they have in parts is checked, too.

    Raises:
        UserError: there is no run that can be opened; what is damaged in ``run.h5`` itself is one.
    """
    with open_run(path, parts=parts) as run:
        found, sound = Verification(), []
        for document in (*run.documents, *run.set_aside):
            with _noted(found, run.paths.index) as noted:
                document.check_result()
                sound.append(document)
            if noted.failed:
                found.damage.outputs.add(document.group.name)
                found.damage.results.add(document.group.name)
        with _noted(found, run.paths.index) as noted:
            found.problems += _state_problems(run, sound, found.damage)
        found.damage.other |= noted.failed
        _check_circumstances(run, found)
        for paths in (run.paths, *(run.paths.every_part() if parts else ())):
            _check_checkpoints(paths, found)
        complete = [document for document in sound if document.complete]
        for document in complete:
            with _noted(found, run.paths.index) as noted:
                found.problems += (wrong := list(output_problems(document)))
                noted.failed = bool(wrong)
            if noted.failed:
                found.damage.outputs.add(document.group.name)
        found.documents = len(complete)
        if run.kv_dtype is not None and complete:
            before = len(found.problems)
            _check_shards(run, complete, found, quick, threads)
            for document in complete if len(found.problems) == before and not quick else ():
                with _noted(found, run.paths.index):
                    found.problems += virtual_problems(document)
        return found


def _state_problems(run: Run, sound: list[Document], damage: Damage) -> Iterator[str]:
    """What is not finished, or has failed, and a summary that says something else."""
    index = run.paths.index
    for document in sound:
        if document.failed:
            yield f"{index}: document {document.id!r} failed: {document.failed}"
        elif run.complete and not document.complete:
            damage.other = True
            yield f"{index}: damaged: the run is complete, but document {document.id!r} is not"
    if not run.complete:
        done = sum(document.complete for document in run.documents)
        yield f"{index}: not complete: {done} of {len(run.documents)} documents are finished"
        return
    if not run.paths.summary.exists():
        damage.other = True
        yield f"{run.paths.summary}: no such file"
    elif run.version > 1 and run.paths.summary.read_bytes() != summary_text(run.file).encode():
        damage.other = True
        yield f"{run.paths.summary}: does not say what run.h5 says"
    if run.scoring.spans and not run.paths.spans.exists():
        damage.other = True
        yield f"{run.paths.spans}: no such file"
    elif run.scoring.spans and run.paths.spans.read_bytes() != spans_text(run.file).encode():
        damage.other = True
        yield f"{run.paths.spans}: does not say what run.h5 says"


def _check_circumstances(run: Run, found: Verification) -> None:
    """By which schedule and on what machine the run was made, where that is said; a job under way writes both anew."""
    schedule, topology = run.paths.schedule, run.paths.topology
    if not schedule.exists():
        return
    with _noted(found, schedule) as noted:
        said = read_sealed(schedule)
        if run.complete:
            with _noted(found, topology) as other:
                check_text(topology, said.get("topology_xxh3"))
            found.damage.circumstances |= other.failed
    found.damage.circumstances |= noted.failed


def _check_checkpoints(folder: RunPaths, found: Verification) -> None:
    """The checkpoints inside documents that are not finished."""
    paths = sorted(folder.checkpoints.glob("*.json"))
    if paths:
        from cpmpi.run.hidden import SavedHidden  # needs torch
        from cpmpi.run.manifest import Manifest
    for path in paths:
        with _noted(found, path) as noted, closing(SavedHidden(folder.folder, Manifest.read(path))) as saved:
            saved.check(0, 1)
        if noted.failed:
            found.damage.checkpoints.add(path)


def output_problems(document: Document) -> Iterator[str]:
    """What is wrong with the outputs of a complete document."""
    who = f"{document.run.paths.index}: document {document.id!r}"
    outputs = read_outputs(document.group)
    logprobs = outputs["logprobs"]
    if not document.outputs_are_sound:
        yield f"{who}: its outputs do not have the checksum that was recorded"
    expected = document.spec.token_ids_sha256
    if expected and token_digest(outputs["token_ids"]) != expected:
        yield f"{who}: its token ids are not those that it was started with"
    first = document.first_scored
    for early in np.flatnonzero(~np.isnan(logprobs[:first]))[:1]:
        yield f"{who}: logprobs[{early}] is {logprobs[early]}, not NaN"
    found = logprobs[first:]
    wrong = np.flatnonzero(~(found <= LOGPROB_ROUNDING) | np.isinf(found)) + len(logprobs) - len(found)
    if len(wrong):
        yield f"{who}: {len(wrong)} log-probabilities are not finite or above 0, the first at token {wrong[0]}"
    nll = sum_nll(found, scored=document.scored)
    if not np.isclose(document.nll, nll, rtol=1e-12, atol=1e-12, equal_nan=not document.scored):
        yield f"{who}: nll is {document.nll}, but its log-probabilities sum to {nll}"
    if not np.isclose(document.perplexity, perplexity(document.nll, len(found)), rtol=1e-12, equal_nan=True):
        yield f"{who}: perplexity is {document.perplexity}, not exp(nll / {len(found)}) of nll {document.nll}"
    if not np.isfinite(outputs["last_hidden"]).all():
        yield f"{who}: last_hidden is not finite"
    for name, checksum in recorded_checksums(document.group).items():
        if checksum_of(document.group[name]) != checksum:
            yield f"{who}: {name} does not have the checksum that was recorded"


def virtual_problems(document: Document) -> Iterator[str]:
    """Whether what h5py shows of a document's KV, in its last layers, is what the shards hold: a sample of its rows."""
    for group in document.kv_groups:
        expected = document.kv(group.layers[-1], raw=True, verify=False)
        for position in np.unique(np.linspace(0, document.n_tokens - 1, VIRTUAL_ROWS, dtype=np.int64)).tolist():
            for name, rows in zip((group.key, group.value), expected):
                if not np.array_equal(_virtual_row(document, group, name, position), rows[position]):
                    yield (
                        f"{document.run.paths.index}: document {document.id!r}: the virtual dataset kv/{name} does not "
                        f"show token {position} as the shards hold it"
                    )
                    return


def _virtual_row(document: Document, group: KVGroup, name: str, position: int) -> RawArray:
    """The stored bits of a position in the last layer of a virtual dataset, read as h5py reads."""
    dataset: h5py.Dataset = document.group[f"kv/{name}"]
    assert document.run.kv_dtype is not None
    stored = STORED_FLOATS[document.run.kv_dtype]
    row = np.empty(dataset.shape[2:], stored.raw)
    space = dataset.id.get_space()
    space.select_hyperslab((len(group.layers) - 1, position, 0, 0), (1, 1, *dataset.shape[2:]))
    dataset.id.read(h5s.create_simple((1, 1, *row.shape)), space, row.reshape(1, 1, *row.shape), stored.h5type())
    return row


def _check_shards(run: Run, documents: list[Document], found: Verification, quick: bool, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for number, shard_set in run.shard_sets.items():
            inside = [(document, p) for document in documents for p in document.places if p.shard_set == number]
            for rank in range(shard_set.world_size) if inside else ():
                with _noted(found, run.shard_path(rank, number)) as noted:
                    shard = run.shard(rank, number)
                    found.shards += 1
                    for document, placed in inside:
                        with _noted(found, shard.path) as one:
                            _check_shard_document(shard, rank, document, placed, found, None if quick else pool)
                        noted.failed |= one.failed
                if noted.failed:
                    found.damage.shards.add((number, rank))


@dataclass(kw_only=True)
class Noted:
    """Whether something went wrong in a block."""

    failed: bool = False


@contextmanager
def _noted(found: Verification, path: Path) -> Iterator[Noted]:
    """Within it, what a damaged file leads to is a problem that is found, and not the end."""
    noted = Noted()
    try:
        yield noted
    except UserError as problem:
        noted.failed = True
        found.problems.append(str(problem))
    except (OSError, KeyError, IndexError, RuntimeError, ValueError, TypeError, AssertionError) as problem:
        noted.failed = True
        found.problems.append(f"{path}: cannot be read: {one_line(problem)}")


def _check_shard_document(
    shard: ShardFile, rank: int, document: Document, placed: Placed, found: Verification,
    pool: ThreadPoolExecutor | None,
) -> None:  # fmt: skip
    who = f"{shard.path}: document {document.id!r}"
    place = shard.document(placed.number)
    if place.pieces != placed.part.pieces(rank):
        raise UserError(f"{who}: has pieces {place.pieces}, but run.h5 {placed.part.pieces(rank)}")
    undone = np.flatnonzero(~shard.layers_done(placed.number)).tolist()
    if undone:
        found.problems.append(f"{who}: layers {undone} were not written in full")
        found.damage.note_layers(document, rank, undone)
    if shard.digest(placed.number) != document.group[DIGESTS][placed.first_digest + rank]:
        found.problems.append(f"{who}: its checksums are not those that run.h5 recorded")
        found.damage.note_layers(document, rank, range(len(place.layers)))
        return
    if pool is None or not place.n_tokens:
        return
    check = partial(_layer_problems, shard, place, shard.checksums(placed.number))
    for layer, problems in enumerate(pool.map(check, range(len(place.layers)))):
        found.problems += (f"{who}: layer {layer}: {problem}" for problem in problems)
        if problems:
            found.damage.note_layers(document, rank, [layer])
    found.kv_bytes += place.n_bytes


def _layer_problems(
    shard: ShardFile, place: ShardDocument, checksums_LB2: npt.NDArray[np.uint64], layer: int
) -> list[str]:
    """Compare one layer of a document in a shard with its checksums."""
    found_B2 = layer_checksums(shard, place, layer)
    return [
        f"{PARTS[part]} of tokens {block.start} to {block.stop - 1} does not have its checksum"
        for part in range(2)
        for number, block in enumerate(place.blocks)
        if found_B2[number, part] != checksums_LB2[layer, number, part]
    ]


def layer_checksums(shard: ShardFile, place: ShardDocument, layer: int) -> npt.NDArray[np.uint64]:
    """The checksums (B, 2) of what a shard holds of a layer of a document, key and value of each block."""
    shape, *offsets = place.layers[layer]
    found_B2 = np.zeros((len(place.blocks), 2), np.dtype("<u8"))
    for part, (offset, dim) in enumerate(zip(offsets, (shape.key_dim, shape.value_dim))):
        row_bytes = shape.heads * dim * place.itemsize
        for number, block in enumerate(place.blocks):
            size = (block.stop - block.start) * row_bytes
            found_B2[number, part] = _checksum(shard, offset + block.row * row_bytes, size)
    return found_B2


_local = threading.local()


def _buffer() -> RawArray:
    """A buffer of this thread, made once: fresh memory costs more than reading into it."""
    if len(getattr(_local, "buffer", ())) != CHUNK_BYTES:
        _local.buffer = np.empty(CHUNK_BYTES, np.uint8)
    buffer: RawArray = _local.buffer
    return buffer


def _checksum(shard: ShardFile, offset: int, size: int) -> int:
    checksum = xxhash.xxh3_64()
    for start in range(0, size, CHUNK_BYTES):
        data = _buffer()[: min(CHUNK_BYTES, size - start)]
        shard.read(data, offset + start)
        checksum.update(data.data)
    return checksum.intdigest()
