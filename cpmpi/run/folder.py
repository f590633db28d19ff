"""Start a run in a folder: a new one, or the same one again, which then continues where it stopped.

A document that is finished is kept by its content, whatever its place in the list, its name, or the number of ranks
that did it. Where the list differs from that in ``run.h5``, or what is left is to be done by other ranks, a new
``run.h5`` is laid out beside the old one, with the finished documents' results in it, and takes its place at once.
Their keys and values stay where they are, and a new set of shards takes those of the documents that are left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from cpmpi.errors import UserError, some
from cpmpi.run import checkpoint
from cpmpi.run.document import Document
from cpmpi.run.hdf5 import open_file
from cpmpi.run.index import RunIndex, create_index
from cpmpi.run.index_layout import FORMAT
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import saying, sync_path
from cpmpi.run.reader import Run, open_run
from cpmpi.run.seal import HDF5_SIGNATURE, MAGIC
from cpmpi.run.spec import DocumentSpec, KVShape, RunSpec, ShardSet, checkpoint_bytes, index_bytes, shard_bytes
from cpmpi.run.spec import check_room as check_free
from cpmpi.run.unchanged import check_same_documents, check_same_run
from cpmpi.text import human_bytes


def start_index(folder: Path, spec: RunSpec, *, overwrite: bool = False, keep_finished: bool = False) -> RunIndex:
    """The ``run.h5`` to write to: a new one, or that of the same run, to be continued. On rank 0.

    ``RunIndex.spec`` says what holds, ``RunIndex.finished`` and ``RunIndex.failed`` which documents are done.

    Args:
        folder: the run folder; it may not exist yet, and may hold files that are no part of a run.
        spec: what is to be run.
        overwrite: delete the run that is in the folder first.
        keep_finished: go on where documents have changed: the finished ones that did not are kept.

    Raises:
        UserError: the folder has a file where a run would put one, or holds a run of another model, or of documents
            that have changed.
    """
    check_folder(folder, overwrite=overwrite)
    if overwrite:
        delete_run(folder)
    if not RunPaths(folder).index.exists():
        return create_index(folder, spec)
    with open_run(folder) as run:
        check_same(run, spec, keep_finished=keep_finished)
        if _goes_on(run, spec):
            index = RunIndex(folder, _as_laid_out(run, spec))
        else:
            spec, kept = with_finished(run, spec)
            index = create_index(folder, spec, {name: document.group for name, document in kept.items()})
            for table in (RunPaths(folder).summary, RunPaths(folder).spans):
                table.unlink(missing_ok=True)
    left = [document for i, document in enumerate(index.spec.documents) if i not in {*index.finished, *index.failed}]
    checkpoint.delete_others(folder, [checkpoint.identity_of(index.spec, document) for document in left])
    delete_unused_shards(folder, index.spec)  # a kill may have left some, too
    return index


def delete_unused_shards(folder: Path, spec: RunSpec) -> None:
    """Delete the shards of sets that neither the run nor a checkpoint names any more. On rank 0."""
    run = {one.number for one in (*spec.earlier_sets, spec.shard_set)}
    delete_shards_but(folder, run | checkpoint.shard_sets(folder))


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder in which a run would collide with something else.

    Raises:
        UserError: it is a file, its ``run.h5`` is not that of a run, or cannot be read, or is missing where other files
            of a run are there. With ``overwrite`` a damaged run is no obstacle.
    """
    with saying(folder, "cannot be looked into"):
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"{folder}: is a link to {os.readlink(folder)}, which does not exist")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file, not a folder; choose another --output")
        if not folder.is_dir():
            above = next(each for each in folder.absolute().parents if each.exists())
            if not above.is_dir():
                raise UserError(f"{folder}: cannot be made, {above} is a file; choose another --output")
            return
        paths = RunPaths(folder)
        ours = [path for path in paths.contents() if path.suffix != ".tmp" and path.parent != paths.parts]
    if not paths.index.exists():
        if paths.deleted in ours and overwrite:
            return
        if paths.deleted in ours:
            raise UserError(
                f"{folder}: holds what is left of a run that --overwrite was deleting; give --overwrite again"
            )
        names = some([path.relative_to(folder).as_posix() for path in ours], 5)
        shards = any(path.is_relative_to(paths.shards) for path in ours)
        if shards and not overwrite:
            raise UserError(
                f"{folder}: holds {names}, but no run.h5, which says what is in them; put it back, choose another "
                "--output, or --overwrite, which deletes them"
            )
        if ours and not shards:
            raise UserError(f"{folder}: holds {names}, which a run would replace; choose another --output")
        return
    if not paths.index.is_file():
        raise UserError(f"{paths.index}: is not a file; choose another --output")
    with open(paths.index, "rb") as file:
        hdf5 = file.read(len(MAGIC)).startswith((MAGIC, HDF5_SIGNATURE))
    if not hdf5:
        raise UserError(f"{paths.index}: is not a run's, or damaged beyond reading; choose another --output")
    _check_readable(paths.index, overwrite)


def _check_readable(index: Path, overwrite: bool) -> None:
    try:
        with open_file(index) as file:
            found = file.attrs.get("format")
    except UserError as problem:
        if overwrite:
            return
        raise UserError(f"{problem}; put it back, choose another --output, or --overwrite") from problem
    if found != FORMAT:
        raise UserError(f"{index}: is not a run's (format {found!r}, expected {FORMAT!r}); choose another --output")
    if not overwrite:
        open_run(index).close()


def what_is_deleted(folder: Path) -> str:
    """What ``--overwrite`` deletes, in words: how many documents, how many of them finished, how many bytes."""
    paths = RunPaths(folder)
    ours = paths.contents() if folder.is_dir() else []
    size = human_bytes(_size(ours))
    if not paths.index.exists():
        return f"{len(ours)} files of a run ({size})"
    try:
        with open_run(folder) as run:
            done = sum(document.complete for document in run.documents)
            aside = f" and {len(run.set_aside)} set aside" if len(run.set_aside) else ""
            return f"a run with {done} of {len(run.documents)} documents finished{aside} ({size})"
    except UserError:
        return f"a run that cannot be read ({size})"


def check_room(folder: Path, spec: RunSpec, *, overwrite: bool = False, hidden_bytes: int = 0) -> str:
    """Refuse, before any work, a run that cannot fit; what is finished or laid out already needs no room. On rank 0.

    Args:
        folder: the run folder.
        spec: what is to be run.
        overwrite: whether the run that is there is deleted first.
        hidden_bytes: of a token's hidden state in checkpoints; 0: there are none.

    Returns:
        What is needed, in words.

    Raises:
        UserError: the file system has too little room.
    """
    paths, written = RunPaths(folder), []
    if overwrite and folder.is_dir():
        written = paths.contents()
    elif paths.index.exists():
        with open_run(folder) as run:
            goes_on = _goes_on(run, spec)
            spec = _as_laid_out(run, spec) if goes_on else with_finished(run, spec)[0]
        if goes_on:
            written = [paths.index, *(paths.shard(rank, spec.shard_set.number) for rank in range(spec.world_size))]
    saved = () if overwrite else (path for path in paths.contents() if path.is_relative_to(paths.checkpoints))
    checkpoints = max(0, checkpoint_bytes(spec, hidden_bytes) - _size(saved))
    needed = index_bytes(spec)
    if any(document.origin is None for document in spec.documents):
        needed += sum(shard_bytes(spec, rank) for rank in range(spec.world_size))
    needed = max(0, needed - _size(written)) + checkpoints
    check_free(folder, needed, checkpoints)
    words = f", {human_bytes(checkpoints)} of it for checkpoints" if checkpoints else ""
    return f"disk: {human_bytes(needed)} to be written{words}"


def _size(paths: Iterable[Path]) -> int:
    """Bytes that files take on disk."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.exists())


def delete_run(folder: Path) -> None:
    """Delete the files of a run but its logs.

    ``run.h5`` loses its name first, so that no half-deleted run is taken for a run, and goes last, so that what is left
    is known as one, wherever this is interrupted.
    """
    paths = RunPaths(folder)
    if not folder.is_dir():
        return
    if paths.index.exists():
        os.replace(paths.index, paths.deleted)
        sync_path(folder)
    left = [path for path in paths.contents() if path != paths.deleted]
    for path in left:
        path.unlink(missing_ok=True)
    for within in {path.parent for path in left}:
        sync_path(within)
    _remove_if_empty(*paths.shards.glob("[0-9]" * 6), paths.shards, paths.report, paths.checkpoints)
    if paths.deleted.exists():
        paths.deleted.unlink()
        sync_path(folder)


def delete_shards_but(folder: Path, sets: set[int]) -> None:
    """Delete the shards of all sets but some."""
    paths = RunPaths(folder)
    for path in paths.contents():
        if path.is_relative_to(paths.shards):
            number = 0 if path.parent == paths.shards else int(path.parent.name)
            if number not in sets:
                path.unlink(missing_ok=True)
    _remove_if_empty(*paths.shards.glob("[0-9]" * 6))


def _remove_if_empty(*folders: Path) -> None:
    for emptied in folders:
        with suppress(OSError):
            emptied.rmdir()


def check_same(run: Run, spec: RunSpec, *, keep_finished: bool) -> None:
    """Refuse to go on with a run of another model or types, or of documents that have changed.

    Raises:
        UserError: what differs.
    """
    check_same_run(run, spec, partial(what_is_deleted, run.paths.folder))
    check_same_documents(run, spec, keep_finished=keep_finished)
    _check_same_shapes(run, spec)


def _check_same_shapes(run: Run, spec: RunSpec) -> None:
    """Finished documents must have what this job would give them; those that are not finished are laid out anew."""
    finished = next((document for document in (*run.documents, *run.set_aside) if document.complete), None)
    if finished is not None and finished.kv_shapes != _shapes(spec):
        raise UserError(
            f"{run.paths.folder}: holds a run with another number of layers or other shapes of keys and values; "
            f"choose another --output, or --overwrite, which deletes {what_is_deleted(run.paths.folder)}"
        )


def _shapes(spec: RunSpec) -> tuple[KVShape, ...] | None:
    return spec.kv.shapes if spec.kv is not None else None


def _goes_on(run: Run, spec: RunSpec) -> bool:
    """Whether ``run.h5`` as it is laid out serves: the same documents in the same order, and those left dealt alike."""
    if run.version == 1 or len(run.documents) != len(spec.documents) or run.documents[0].kv_shapes != _shapes(spec):
        return False
    for old, new in zip(run.documents, spec.documents):
        if old.id != new.id or not matches(old, new):
            return False
        if not old.complete and not (_dealt_alike(run, old, new, spec) and _laid_out_alike(old.spec, new)):
            return False
    return True


def _dealt_alike(run: Run, old: Document, new: DocumentSpec, spec: RunSpec) -> bool:
    here = (old.spec.layout, old.spec.grid, old.spec.first_rank, old.world_size)
    there = (new.layout, new.grid, new.first_rank, spec.world_size)
    return here == there and old.places[0].shard_set == max(run.shard_sets, default=0)


def _laid_out_alike(old: DocumentSpec, new: DocumentSpec) -> bool:
    return (old.extras, old.text) == (new.extras, new.text)


def matches(old: Document, new: DocumentSpec) -> bool:
    """Whether a document is the one that is asked for; one that was appended to is also what it was at first."""
    same = new.contents[0] in (old.spec.contents if old.id == new.id else old.spec.contents[:1])
    return same and old.spec.continues == new.continues


def _as_laid_out(run: Run, spec: RunSpec) -> RunSpec:
    """The spec of a job that goes on with a run: what the file says of finished documents and of shards."""
    sets = [run.shard_sets[number] for number in sorted(run.shard_sets)]
    documents = (old.spec if old.complete else new for old, new in zip(run.documents, spec.documents))
    return replace(
        spec,
        run_id=run.attributes["run_id"],
        documents=tuple(documents),
        set_aside=tuple(document.spec for document in run.set_aside),
        shard_set=sets[-1] if sets else spec.shard_set,
        earlier_sets=tuple(sets[:-1]),
    )


def with_finished(run: Run, spec: RunSpec) -> tuple[RunSpec, dict[str, Document]]:
    """The spec with what is finished already, and for each such document's group in the new ``run.h5`` its old self.

    Raises:
        UserError: results of a finished document are damaged.
    """
    left: dict[tuple[int, str], list[Document]] = {}
    for document in (*run.documents, *run.set_aside):
        if document.complete:
            document.logprobs  # noqa: B018 - is an error where they do not have their checksum
            for content in document.spec.contents:
                left.setdefault(content, []).append(document)
    taken: set[Document] = set()
    documents, kept = list(spec.documents), {}
    for same_name in (True, False):
        for i, new in enumerate(spec.documents):
            same = [old for old in left.get(new.contents[0], ()) if old not in taken and matches(old, new)]
            found = [old for old in same if old.id == new.id or not same_name]
            if documents[i].origin is None and found and new.token_ids_sha256:
                taken.add(found[0])
                kept[document_name(i)] = found[0]
                documents[i] = replace(found[0].spec, id=new.id, source=new.source)
    aside = [each for each in (*run.documents, *run.set_aside) if each.complete and each not in taken]
    kept |= {document_name(i, set_aside=True): document for i, document in enumerate(aside)}
    used = {placed.shard_set for document in kept.values() for placed in document.places} & run.shard_sets.keys()
    numbers = {*run.shard_sets, *checkpoint.shard_sets(run.paths.folder)}
    laid_out = replace(
        spec,
        documents=tuple(documents),
        set_aside=tuple(document.spec for document in aside),
        earlier_sets=tuple(run.shard_sets[number] for number in sorted(used)),
        shard_set=ShardSet(world_size=spec.world_size, number=max(numbers, default=-1) + 1),
    )
    return laid_out, kept
