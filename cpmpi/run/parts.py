"""A run that several jobs share: each document is a part, a run of its own in ``parts/``, until all are one run.

HDF5 has one writer at a time. So a job writes each document that it has claimed into ``parts/000017/``, a run folder
with that document alone, where another job may go on with it. Readers see finished parts as what they are of the whole
(`cpmpi.run.reader`), and `fold` lays out one ``run.h5`` of all, whose shards are those of the parts.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cpmpi.errors import UserError
from cpmpi.run import folder as folders
from cpmpi.run.index import create_index
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, saying, sync_path
from cpmpi.run.reader import Run, open_run
from cpmpi.run.spec import DocumentSpec, RunSpec, ShardSet, index_bytes, shard_bytes
from cpmpi.run.spec import check_room as check_free

MOST_PARTS = 256  # readers have them all open; more are folded on the way


def join(folder: Path, spec: RunSpec) -> bool:
    """Whether ``run.h5`` is there for this list of documents; where there is none it is laid out. On rank 0.

    Raises:
        UserError: the folder holds a run of another model, or something else.
    """
    folders.check_folder(folder)
    if not RunPaths(folder).index.exists():
        create_index(folder, spec)
        return True
    with open_run(folder) as run:
        folders.check_same_run(run, spec)
        listed = [(document.id, *folders.content_of(document.spec)) for document in run.documents]
        return run.version > 1 and listed == [(d.id, *folders.content_of(d)) for d in spec.documents]


def part_spec(spec: RunSpec, index: int) -> RunSpec:
    """The run of a document alone."""
    return replace(
        spec, documents=(spec.documents[index],), set_aside=(), earlier_sets=(), shard_set=ShardSet(world_size=0),
        run_id=uuid.uuid4().hex,
    )  # fmt: skip


class Results:
    """Which documents of a shared run are done, learned a part at a time.

    Attributes:
        ends: of every document that is done, why it failed; empty where it did not.
        parts: how many of them are in parts.
    """

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        self._paths, self._spec = RunPaths(folder), spec
        self._seen: tuple[int, int] | None = None
        self.ends: dict[int, str] = {}
        self.parts = 0

    def refresh(self) -> None:
        """Look for what is new. Parts come first: what is no part any more is in ``run.h5`` already."""
        places = [int(p.name) for p in self._paths.parts.glob("[0-9]" * 6)]
        for index in places:
            if index < len(self._spec.documents) and index not in self.ends:
                self._look_at_part(index)
        self.parts = sum(place in self.ends for place in places)
        status = self._paths.index.stat()
        if self._seen != (status.st_ino, status.st_mtime_ns):
            self._seen = status.st_ino, status.st_mtime_ns
            with open_run(self._paths.folder) as run:
                ended = [document for document in run.documents if document.complete or document.failed]
                self.ends |= {document.index: document.failed for document in ended}

    def _look_at_part(self, index: int) -> None:
        paths = self._paths.part(index)
        if not (paths.summary.exists() and paths.index.exists()):
            return
        try:
            with Run(paths.folder) as part:
                found = part.documents[0]
                wanted = folders.content_of(self._spec.documents[index])
                if part.complete and folders.content_of(found.spec) == wanted:
                    self.ends[index] = found.failed
        except UserError:  # being written or folded; who claims it looks again, and says what is wrong
            return


def fold(folder: Path, spec: RunSpec) -> None:
    """Make finished parts and what ``run.h5`` has one ``run.h5``, for this list of documents. On rank 0.

    Nobody else may fold at the same time, but others may work on parts of the same list.
    Shards get a second name where they belong before ``run.h5`` names them there, and lose the first one after it: a
    kill at any moment leaves a run whose finished documents can be read.
    """
    with open_run(folder) as run:
        folders.check_same_run(run, spec)
        same = [folders.content_of(d.spec) for d in run.documents] == [folders.content_of(d) for d in spec.documents]
        failed = {d.index: d.failed for d in run.documents if d.failed} if same else {}
        laid_out, kept = folders.keep_finished(run, spec)
        for document in kept.values():
            if document.part is not None and run.kv_dtype is not None:
                _link_shards(run, *document.part)
        index = create_index(folder, laid_out, {name: document.group for name, document in kept.items()})
    for place, reason in failed.items():
        if place not in index.finished:
            index.mark_failed(place, reason)
    done = {*index.finished, *failed}
    if len(done) == len(spec.documents):
        index.finish()
    delete_parts(folder, None if not same or len(done) == len(spec.documents) else done)


def _link_shards(run: Run, part: Run, number: int) -> None:
    inner = part.documents[0].shard_set
    for rank in range(part.shard_sets[inner].world_size):
        source, target = part.paths.shard(rank, inner), run.paths.shard(rank, number)
        make_folder(target.parent)
        with saying(target, "cannot be made"):
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except (PermissionError, NotImplementedError):
                os.rename(source, target)
            sync_path(target.parent)


def delete_parts(folder: Path, which: set[int] | None = None) -> None:
    """Delete the parts of these documents, or all, with their folder."""
    paths = RunPaths(folder)
    for part in [RunPaths(path) for path in paths.parts.glob("[0-9]" * 6)]:
        if which is None or int(part.folder.name) in which:
            folders.delete_run(part.folder)
            part.lock.unlink(missing_ok=True)
            for emptied in (part.log, part.folder):
                with suppress(OSError):
                    emptied.rmdir()
    with suppress(OSError):
        paths.parts.rmdir()


def check_room(folder: Path, spec: RunSpec) -> None:
    """Refuse, before any work, a shared run whose unfinished documents cannot fit. On rank 0.

    Raises:
        UserError: the file system has too little room.
    """
    check_free(folder, sum(_bytes(spec, document) for document in _unfinished(folder, spec)))


def _unfinished(folder: Path, spec: RunSpec) -> Iterator[DocumentSpec]:
    if not RunPaths(folder).index.exists():
        yield from spec.documents
        return
    with open_run(folder) as run:
        done = {folders.content_of(document.spec) for document in run.documents if document.complete}
    yield from (document for document in spec.documents if folders.content_of(document) not in done)


def _bytes(spec: RunSpec, document: DocumentSpec) -> int:
    alone = replace(spec, documents=(document,))
    return index_bytes(alone) + sum(shard_bytes(alone, rank) for rank in range(spec.world_size))
