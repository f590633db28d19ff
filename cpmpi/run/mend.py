"""Mends a run by what is left of it: the structure of a shard, what is complete, the summary. On rank 0.

What has to be computed again is left to `cpmpi.engine.repair`. Every step leaves a run that can be mended again,
wherever it is interrupted: a file takes its place at once, and only what is damaged is overwritten.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cpmpi.errors import UserError, some
from cpmpi.run.document import Document, read_truth
from cpmpi.run.hdf5 import changed_file, pwrite_all, set_attribute
from cpmpi.run.index import summary_text, write_datasets, write_results
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, publish_text, sync_path
from cpmpi.run.reader import Run, open_run
from cpmpi.run.results import Results, read_results, result_digest
from cpmpi.run.seal import places_of
from cpmpi.run.shard import ShardFile, create_shard
from cpmpi.run.spec import KVSpec, RunSpec
from cpmpi.run.text_places import spans_text
from cpmpi.run.verify import layer_checksums

COPY_BYTES = 16 << 20


def open_alone(folder: Path) -> Run:
    """A run that this process mends, without the parts that jobs which share it have: they are runs of their own."""
    return open_run(folder, locking=False, parts=False)


def lay_out_anew(run: Run, shard_set: int, rank: int) -> None:
    """Give a shard a structure that is whole, with the bytes that are left of the old one at their places.

    Which of these are what they must be, checksums tell afterwards.
    """
    path, beside = run.paths.shard(rank, shard_set), run.paths.repair
    make_folder(beside)
    new = create_shard(beside, _spec_of_set(run, shard_set), rank)
    if path.is_file():
        _copy_places(path, new)
    make_folder(path.parent)
    os.replace(new, path)
    sync_path(path.parent)
    sweep(run.paths)
    sizes = np.array(run.shard_sets[shard_set].sizes, "<i8")
    sizes[rank] = path.stat().st_size
    write_datasets(run.paths.index, f"/shards/{shard_set:06d}", {"size": sizes})


def sweep(paths: RunPaths) -> None:
    """Delete what a repair that was interrupted left behind."""
    shutil.rmtree(paths.repair, ignore_errors=True)


def _spec_of_set(run: Run, shard_set: int) -> RunSpec:
    """What a set of shards was laid out from, as far as it matters to the shards."""
    everyone = [(each, placed) for each in (*run.documents, *run.set_aside) for placed in each.places]
    placed = sorted((placed.number, i) for i, (_, placed) in enumerate(everyone) if placed.shard_set == shard_set)
    inside = [everyone[i][0] for _, i in placed]
    if grown := [document.id for document in inside if len(document.places) > 1]:
        raise UserError(f"{run.paths.folder}: shards of what was appended to are not laid out anew: {some(grown, 5)}")
    shapes = inside[0].kv_shapes
    assert shapes is not None
    assert run.kv_dtype is not None
    return RunSpec(
        model="", model_sha256="", tokenizer_sha256="", dtype="", kv=KVSpec(shapes=shapes, dtype=run.kv_dtype),
        world_size=run.shard_sets[shard_set].world_size, hidden_size=1, shard_set=run.shard_sets[shard_set],
        documents=tuple(document.spec for document in inside),
    )  # fmt: skip


def _copy_places(old: Path, new: Path) -> None:
    """Copy what is written later, from one file to another that is laid out alike; a shorter file has less of it."""
    with open(old, "rb") as source, open(new, "r+b") as target:
        for start, stop in places_of(new):
            for first in range(start, stop, COPY_BYTES):
                data = os.pread(source.fileno(), min(COPY_BYTES, stop - first), first)
                pwrite_all(target.fileno(), np.frombuffer(data, np.uint8), first)
        os.fsync(target.fileno())


def mend_states(folder: Path) -> None:
    """Set whether each document, and the run, is complete by the results that are there, and write the summary.

    What can be shown neither to be complete nor to have failed is for the job to do again.
    """
    with open_alone(folder) as run:
        ended = _truth(run.file, run)
        for document in (*run.documents, *run.set_aside):
            complete, failed = _truth(document.group, run), bool(document.group.attrs.get("failed"))
            if complete or (complete is False and failed and _failed_soundly(document)):
                continue
            if result_digest(read_results(document.group)) == document.group.attrs["result_xxh3"]:
                _set(run.paths.index, document.group.name, "complete", True)
            elif complete is None or ended is not False or failed:
                unfinish(run, document)
    with open_alone(folder) as run:
        if _truth(run.file, run) is None:
            _set(run.paths.index, "/", "complete", all(d.complete or d.failed for d in run.documents))
    with open_alone(folder) as run:
        if run.complete:
            publish_text(run.paths.summary, summary_text(run.file))
            if run.scoring.spans:
                publish_text(run.paths.spans, spans_text(run.file))


def _failed_soundly(document: Document) -> bool:
    """Whether the reason of a document that failed has its checksum."""
    try:
        return bool(document.failed)
    except UserError:
        return False


def _truth(owner: Any, run: Run) -> bool | None:
    """Whether it is complete; None where that is damaged."""
    try:
        return read_truth(owner, "complete", run.paths.index)
    except UserError:
        return None


def _set(index: Path, name: str, attribute: str, value: Any) -> None:
    with changed_file(index) as file:
        set_attribute(file[name], attribute, value)
    sync_path(index)


def unfinish(run: Run, document: Document) -> None:
    """Have a document done again by the job that did it: only its input can tell what it was."""
    index, name = run.paths.index, str(document.group.name)
    if name.startswith("/documents"):  # what is set aside is no part of what the run must have
        _set(index, "/", "complete", False)
        for table in (run.paths.summary, run.paths.spans):
            table.unlink(missing_ok=True)
    _set(index, name, "complete", False)
    write_results(index, name, Results(arrays={}, nll=np.nan, perplexity=np.nan), complete=False)


def write_tables(shard: ShardFile, number: int, layers: set[int]) -> int:
    """Write the checksums of layers of a document that were computed again, and the markers; then its digest."""
    place, table = shard.document(number), shard.checksums(number)
    for layer in layers:
        table[layer] = layer_checksums(shard, place, layer)
    descriptor = os.open(shard.path, os.O_WRONLY)
    try:
        pwrite_all(descriptor, table, place.checksum_offset)
        pwrite_all(descriptor, np.ones(len(place.layers), np.uint8), place.layer_done_offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return int(xxhash.xxh3_64_intdigest(table.tobytes()))


def delete_checkpoints(manifests: set[Path]) -> None:
    """Delete checkpoints that are not whole, manifests first: their documents go on from an earlier one, or begin."""
    for manifest in sorted(manifests):
        parts = manifest.parent.glob(f"{manifest.stem}-rank-*.h5")
        for path in (manifest, *parts):
            path.unlink(missing_ok=True)
        sync_path(manifest.parent)


def forget_circumstances(run: Run) -> None:
    """Delete what says how a run was made, where it is damaged: results do not depend on it, and the machine that laid
    the run out is in ``run.h5``, too."""
    for path in (run.paths.schedule, run.paths.topology):
        path.unlink(missing_ok=True)
    sync_path(run.paths.folder)
