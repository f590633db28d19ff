"""Check a run against itself: sizes, checksums, outputs. Every problem is a line that names the file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from cpmpi.errors import UserError, one_line
from cpmpi.run.hdf5 import STORED_FLOATS, RawArray
from cpmpi.run.index import OUTPUTS, outputs_digest, perplexity, sum_nll
from cpmpi.run.reader import Document, Run, open_run
from cpmpi.run.shard import ShardDocument, ShardFile
from cpmpi.run.spec import token_digest

CHUNK_BYTES = 4 << 20
# log-softmax in float32 may come out above 0 by its rounding.
LOGPROB_ROUNDING = 1e-4


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


def verify_run(path: Path, *, quick: bool = False, threads: int = 4) -> Verification:
    """Check the run in the folder ``path``. An unfinished run is a problem; its finished documents are checked.

    Args:
        path: the run folder.
        quick: read everything but the KV itself.
        threads: that read KV at the same time.

    Raises:
        UserError: there is no run that can be opened.
    """
    with open_run(path) as run:
        found = Verification()
        complete = [document for document in run.documents if document.complete]
        found.documents = len(complete)
        if not run.complete:
            found.problems.append(
                f"{run.paths.index}: not complete: {len(complete)} of {len(run.documents)} documents are finished"
            )
        if run.complete and not run.paths.summary.exists():
            found.problems.append(f"{run.paths.summary}: no such file")
        for document in complete:
            with _noted(found, run.paths.index):
                found.problems += output_problems(document)
        if run.kv_dtype is not None and complete:
            _check_shards(run, complete, found, quick, threads)
        return found


def output_problems(document: Document) -> Iterator[str]:
    """What is wrong with the outputs of a complete document."""
    who = f"{document.run.paths.index}: document {document.id!r}"
    outputs = {name: np.asarray(document.group[name]) for name in OUTPUTS}
    logprobs = outputs["logprobs"]
    if outputs_digest(outputs) != document.group.attrs["outputs_xxh3"]:
        yield f"{who}: its outputs do not have the checksum that was recorded"
    expected = document.spec.token_ids_sha256
    if expected and token_digest(outputs["token_ids"]) != expected:
        yield f"{who}: its token ids are not those that it was started with"
    if not np.isnan(logprobs[0]):
        yield f"{who}: logprobs[0] is {logprobs[0]}, not NaN"
    wrong = np.flatnonzero(~(logprobs[1:] <= LOGPROB_ROUNDING) | np.isinf(logprobs[1:])) + 1
    if len(wrong):
        yield f"{who}: {len(wrong)} log-probabilities are not finite or above 0, the first at token {wrong[0]}"
    nll = sum_nll(logprobs)
    if not np.isclose(document.nll, nll, rtol=1e-12, atol=1e-12):
        yield f"{who}: nll is {document.nll}, but its log-probabilities sum to {nll}"
    if not np.isclose(document.perplexity, perplexity(document.nll, document.n_tokens), rtol=1e-12, equal_nan=True):
        yield f"{who}: perplexity is {document.perplexity}, not exp(nll / (T - 1)) of nll {document.nll}"
    if not np.isfinite(outputs["last_hidden"]).all():
        yield f"{who}: last_hidden is not finite"


def _check_shards(run: Run, documents: list[Document], found: Verification, quick: bool, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for rank in range(run.world_size):
            with _noted(found, run.paths.shard(rank)):
                shard = run.shard(rank)
                found.shards += 1
                for document in documents:
                    with _noted(found, shard.path):
                        _check_shard_document(shard, rank, document, found, None if quick else pool)


@contextmanager
def _noted(found: Verification, path: Path) -> Iterator[None]:
    """Within it, what a damaged file leads to is a problem that is found, and not the end."""
    try:
        yield
    except UserError as problem:
        found.problems.append(str(problem))
    except (OSError, KeyError, RuntimeError, ValueError) as problem:
        found.problems.append(f"{path}: cannot be read: {one_line(problem)}")


def _check_shard_document(
    shard: ShardFile, rank: int, document: Document, found: Verification, pool: ThreadPoolExecutor | None
) -> None:
    who = f"{shard.path}: document {document.id!r}"
    place = shard.document(document.index)
    if place.pieces != document.spec.pieces(rank):
        found.problems.append(f"{who}: has pieces {place.pieces}, but run.h5 {document.spec.pieces(rank)}")
        return
    undone = np.flatnonzero(~shard.layers_done(document.index))
    if len(undone):
        found.problems.append(f"{who}: layers {undone.tolist()} were not written in full")
    if shard.digest(document.index) != document.group["kv/shard_digest"][rank]:
        found.problems.append(f"{who}: its checksums are not those that run.h5 recorded")
        return
    if pool is None or not place.n_tokens:
        return
    dtype = document.run.kv_dtype
    assert dtype is not None
    itemsize = STORED_FLOATS[dtype].itemsize
    check = partial(_layer_problems, shard, place, shard.checksums(document.index), itemsize)
    for layer, problems in enumerate(pool.map(check, range(place.layers))):
        found.problems += (f"{who}: layer {layer}: {problem}" for problem in problems)
    found.kv_bytes += place.layers * place.n_tokens * place.heads * (place.key_dim + place.value_dim) * itemsize


def _layer_problems(
    shard: ShardFile, place: ShardDocument, checksums_LP2: npt.NDArray[np.uint64], itemsize: int, layer: int
) -> list[str]:
    """Compare one layer of a document in a shard with its checksums."""
    problems = []
    for part, (name, offset, dim) in enumerate(
        (("key", place.key_offset, place.key_dim), ("value", place.value_offset, place.value_dim))
    ):
        row_bytes = place.heads * dim * itemsize
        for number, (first, piece) in enumerate(zip(place.firsts(), place.pieces)):
            start = offset + (layer * place.n_tokens + first) * row_bytes
            if _checksum(shard, start, piece.size * row_bytes) != checksums_LP2[layer, number, part]:
                problems.append(f"{name} of tokens {piece.start} to {piece.stop - 1} does not have its checksum")
    return problems


_local = threading.local()


def _buffer() -> RawArray:
    """A buffer of this thread, made once: fresh memory costs more than reading into it."""
    if not hasattr(_local, "buffer"):
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
