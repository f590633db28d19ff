"""A run that several jobs share: each document is a part, a run of its own in ``parts/``, until all are one run.

HDF5 has one writer at a time. So a job writes each document that it has claimed into ``parts/000017/``, a run folder
with that document alone, where another job may go on with it. Readers see finished parts as what they are of the whole
(`cpmpi.run.reader`), and `fold` lays out one ``run.h5`` of all, whose shards are those of the parts.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cpmpi.errors import UserError
from cpmpi.run import folder as folders
from cpmpi.run.document import Document
from cpmpi.run.index import RunIndex, create_index
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import make_folder, saying, sync_path
from cpmpi.run.reader import Run, open_run
from cpmpi.run.spec import DocumentSpec, RunSpec, ShardSet, checkpoint_bytes, index_bytes, shard_bytes
from cpmpi.run.spec import check_room as check_free
from cpmpi.text import human_bytes

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
        folders.check_same(run, spec, keep_finished=True)
        return run.version > 1 and _listed(run, spec)


def _listed(run: Run, spec: RunSpec) -> bool:
    """Whether a run is of the same documents, in the same order and by the same names."""
    pairs = zip(run.documents, spec.documents)
    return len(run.documents) == len(spec.documents) and all(
        old.id == new.id and folders.matches(old, new) for old, new in pairs
    )


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
        places = [int(part.folder.name) for part in self._paths.every_part()]
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
                if part.complete and folders.matches(found, self._spec.documents[index]):
                    self.ends[index] = found.failed
        except UserError:  # being written or folded; who claims it looks again, and says what is wrong
            return


def fold(folder: Path, spec: RunSpec, *, keep_finished: bool = False, retry_failed: bool = False) -> None:
    """Make finished parts and what ``run.h5`` has one ``run.h5``, for this list of documents. On rank 0.

    Nobody else may fold at the same time, but others may work on parts of the same list.

    Args:
        folder: the run folder.
        spec: of the job.
        keep_finished: go on where documents have changed, see `cpmpi.run.folder.start_index`.
        retry_failed: whether documents that failed are to be done again.

    Raises:
        UserError: the folder holds a run of another model, or of documents that have changed.
    """
    with open_run(folder) as run:
        folders.check_same(run, spec, keep_finished=keep_finished)
        same = _listed(run, spec)
        failed = {document_name(d.index): d for d in run.documents if d.failed} if same else {}
        laid_out, kept = folders.with_finished(run, spec)
        ended = {document.index for document in run.documents if document.complete or document.failed}
        index = make_one(run, laid_out, kept if retry_failed else failed | kept)
    done = {*index.finished, *index.failed}
    if len(done) == len(spec.documents):
        index.finish()
    delete_parts(folder, None if not same or len(done) == len(spec.documents) else ended)


def make_one(run: Run, spec: RunSpec, ended: Mapping[str, Document]) -> RunIndex:
    """Lay out ``run.h5`` with documents that are done or have failed, in parts or in the ``run.h5`` that is there.

    Shards get a second name where they belong before ``run.h5`` names them there, and lose the first one after it: a
    kill at any moment leaves a run whose finished documents can be read.

    Args:
        run: as it is.
        spec: of what it is to be.
        ended: these documents, by the names of their groups in the new file.
    """
    for document in ended.values():
        if document.part is not None and document.complete and run.kv_dtype is not None:
            _link_shards(run, *document.part)
    index = create_index(run.paths.folder, spec, {name: document.group for name, document in ended.items()})
    if len(index.finished) + len(index.failed) < len(spec.documents):
        for table in (run.paths.summary, run.paths.spans):
            table.unlink(missing_ok=True)
    return index


def _link_shards(run: Run, part: Run, number: int) -> None:
    inner = part.documents[0].places[0].shard_set
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
    for part in paths.every_part():
        if which is None or int(part.folder.name) in which:
            folders.delete_run(part.folder)
            part.lock.unlink(missing_ok=True)
            for emptied in (part.log, part.folder):
                with suppress(OSError):
                    emptied.rmdir()
    with suppress(OSError):
        paths.parts.rmdir()


def check_room(folder: Path, spec: RunSpec, hidden_bytes: int = 0) -> str:
    """Refuse, before any work, a shared run whose unfinished documents cannot fit. On rank 0.

    Args:
        folder: the run folder.
        spec: what is to be run.
        hidden_bytes: of a token's hidden state in checkpoints, of which a job has those of one document at a time; 0:
            there are none.

    Returns:
        What is needed, in words.

    Raises:
        UserError: the file system has too little room.
    """
    left = tuple(_unfinished(folder, spec))
    checkpoints = checkpoint_bytes(replace(spec, documents=left), hidden_bytes) if left else 0
    needed = sum(_bytes(spec, document) for document in left) + checkpoints
    check_free(folder, needed, checkpoints)
    return f"disk: {human_bytes(needed)} to be written, by all jobs that share the documents together"


def _unfinished(folder: Path, spec: RunSpec) -> Iterator[DocumentSpec]:
    if not RunPaths(folder).index.exists():
        yield from spec.documents
        return
    with open_run(folder) as run:
        done = {content for document in run.documents if document.complete for content in document.spec.contents}
    yield from (document for document in spec.documents if document.contents[0] not in done)


def _bytes(spec: RunSpec, document: DocumentSpec) -> int:
    alone = replace(spec, documents=(document,))
    return index_bytes(alone) + sum(shard_bytes(alone, rank) for rank in range(spec.world_size))
