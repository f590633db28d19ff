"""Texts are appended to finished documents: their keys and values in shards of their own, made known by one new run.h5.

Nothing that is there is changed. The new shards are laid out, filled and synced while the run is what it was; then a
``run.h5`` with the longer documents is laid out beside the old one, with all results in it, and takes its place at
once. Who has the old one open reads on in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.attention.grid import Grid
from cpmpi.attention.layout import Layout
from cpmpi.errors import UserError
from cpmpi.run import parts
from cpmpi.run.document import Document
from cpmpi.run.folder import delete_shards_but
from cpmpi.run.index import RunIndex, checked_results, create_index
from cpmpi.run.paths import document_name
from cpmpi.run.reader import Run, open_run
from cpmpi.run.results import DIGESTS, Results
from cpmpi.run.spec import (
    DocumentSpec,
    KVSpec,
    Origin,
    Part,
    RunSpec,
    ShardSet,
    check_room,
    index_bytes,
    shard_bytes,
    token_digest,
)
from cpmpi.run.text_places import TEXT_GROUP
from cpmpi.run.unchanged import recorded_files

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text for a document.

    Attributes:
        document: its place in the run.
        id: a name of the text's own: the same text is not appended twice under it.
        token_ids: (T,) of the text.
        source: where it came from, for messages.
    """

    document: int
    id: str
    token_ids: TokenIds
    source: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found for a text: log-probabilities (T,), the last token's hidden state after the final norm, and the
    digest of every new shard, in rank order."""

    text: Text
    logprobs: npt.NDArray[np.float32]
    last_hidden: npt.NDArray[np.float32]
    digests: Sequence[int]


def spec_of(run: Run) -> RunSpec:
    """The spec of a run as it is on disk."""
    text: dict[str, Any] = {
        name: str(run.attributes[name]) for name in ("model", "model_sha256", "tokenizer_sha256", "dtype")
    }
    documents = tuple(document.spec for document in run.documents)
    shapes, sets = run.documents[0].kv_shapes, [run.shard_sets[number] for number in sorted(run.shard_sets)]
    return RunSpec(
        **text, kv=KVSpec(shapes=shapes, dtype=run.kv_dtype) if shapes and run.kv_dtype else None,
        world_size=run.world_size, hidden_size=int(run.attributes["hidden_size"]), documents=documents,
        set_aside=tuple(document.spec for document in run.set_aside), topology=str(run.attributes["topology"]),
        shard_set=sets[-1] if sets else ShardSet(world_size=run.world_size), earlier_sets=tuple(sets[:-1]),
        command=str(run.attributes["command"]), version=str(run.attributes["cpmpi_version"]),
        model_path=run.model_path, files=tuple(sorted(recorded_files(run).items())),
        run_id=str(run.attributes["run_id"]), scoring=run.scoring,
    )  # fmt: skip


def is_there(document: Document, text: Text) -> bool:
    """Whether a text was appended to a document already.

    Raises:
        UserError: another text was, under its id.
    """
    for part in document.appended:
        if part.id == text.id:
            if part.token_ids_sha256 == token_digest(text.token_ids):
                return True
            raise UserError(
                f"{text.source}: another text was appended to {document.id!r} as {text.id!r} already; choose another id"
            )
    return False


def check_can_grow(document: Document, source: str) -> None:
    """Refuse a text for a document of which more is kept than what is computed of the text, or can be dropped.

    Where its tokens stand in its text, and how much text that is, is dropped: of what is appended it is not known.

    Args:
        document: that is to grow.
        source: where the text came from.

    Raises:
        UserError: scores or spans are kept of the document.
    """
    kept = {extra.name.split("/")[0] for extra in document.spec.extras} - {TEXT_GROUP}
    if kept:
        raise UserError(
            f"{source}: nothing can be appended to {document.id!r}: scores are kept of it (--keep), or sums over "
            "spans, which would not be known of what is appended; make the run without --keep and --spans"
        )


def finish(folder: Path) -> None:
    """Mark a run as complete whose documents all are done: a job was killed before it had done that.

    Raises:
        UserError: documents are left to do.
    """
    with open_run(folder) as run:
        left = [document.id for document in run.documents if not (document.complete or document.failed)]
        if left:
            raise UserError(
                f"{run.paths.folder}: {len(left)} of {len(run.documents)} documents are not finished ({left[0]!r} is "
                "the first); start the job that made it again, then append"
            )
        complete, paths, spec = run.complete, run.paths, spec_of(run)
        if run.parts:
            spec = _make_one(run, spec)
    if not complete:
        RunIndex(paths.folder, spec).finish()
    parts.delete_parts(paths.folder)


def _make_one(run: Run, spec: RunSpec) -> RunSpec:
    """Have documents that several jobs have done in parts in ``run.h5``, without the shards of those that failed; its
    spec then."""
    done = [document for document in (*run.documents, *run.set_aside) if document.complete]
    used = {placed.shard_set for document in done for placed in document.places}
    spec = replace(
        spec, documents=tuple(d.spec if d.complete else replace(d.spec, origin=None) for d in run.documents),
        earlier_sets=tuple(run.shard_sets[number] for number in sorted(used & run.shard_sets.keys())),
        shard_set=ShardSet(world_size=run.world_size, number=max(run.shard_sets, default=-1) + 1),
        run_id=uuid.uuid4().hex,
    )  # fmt: skip
    ended = {document_name(document.index): document for document in run.documents}
    ended |= {document_name(document.index, set_aside=True): document for document in run.set_aside}
    return parts.make_one(run, spec, ended).spec


def grown(run: Run, texts: Sequence[Text], *, world_size: int, segments: int, grid: Grid) -> RunSpec:
    """The spec of a run with the texts at the end of its documents, of each one at most.

    Args:
        run: as it is.
        texts: what is appended.
        world_size: ranks of the job that does it.
        segments: that each text is cut into.
        grid: how its ranks share heads and tokens.
    """
    before = spec_of(run)
    number = max(run.shard_sets, default=-1) + 1
    documents = list(before.documents)
    for text in texts:
        old = documents[text.document]
        layout = Layout(
            n_tokens=len(text.token_ids), world=world_size // grid.head_groups, segments=segments, start=old.n_tokens
        )
        part = Part(
            layout=layout, grid=grid, id=text.id, token_ids_sha256=token_digest(text.token_ids),
            origin=Origin(world_size=world_size, shard_set=number, number=text.document),
        )  # fmt: skip
        whole = np.concatenate([run.documents[text.document].token_ids, text.token_ids])
        documents[text.document] = replace(
            old, n_tokens=len(whole), appended=(*old.appended, part), token_ids_sha256=token_digest(whole),
            first_sha256=old.first_sha256 or old.token_ids_sha256, text=(), extras=(),
        )  # fmt: skip
    return replace(
        before, documents=tuple(documents), earlier_sets=tuple(run.shard_sets[n] for n in sorted(run.shard_sets)),
        shard_set=ShardSet(world_size=world_size, number=number), run_id=uuid.uuid4().hex,
    )  # fmt: skip


def make_room(run: Run, spec: RunSpec) -> None:
    """Delete what a killed job left of shards, and refuse what cannot fit.

    Raises:
        UserError: the file system has too little room.
    """
    delete_shards_but(run.paths.folder, {*run.shard_sets})
    needed = index_bytes(spec) + sum(shard_bytes(spec, rank) for rank in range(spec.shard_set.world_size))
    check_room(run.paths.folder, needed)


def switch(run: Run, spec: RunSpec, sizes: Sequence[int], found: Sequence[Found]) -> None:
    """Make texts a part of the run, whose shards are filled and synced.

    Args:
        run: as it was, open.
        spec: what it is to be.
        sizes: bytes of each new shard.
        found: what was found for each text.

    Raises:
        NotFiniteError: a log-probability or hidden value is not finite; the run stays as it was.
    """
    results: dict[str, Any] = {document_name(d.index): d.group for d in run.documents}
    results |= {document_name(d.index, set_aside=True): d.group for d in run.set_aside}
    for one in found:
        i = one.text.document
        results[document_name(i)] = _longer(run.documents[i], spec.documents[i], one)
    spec = replace(spec, shard_set=replace(spec.shard_set, sizes=tuple(sizes)))
    create_index(run.paths.folder, spec, results).finish()


def _longer(document: Document, spec: DocumentSpec, found: Found) -> Results:
    """The results of a document with a text at its end."""
    last_hidden = np.asarray(found.last_hidden, "<f4")
    outputs = {
        "token_ids": np.concatenate([document.token_ids, found.text.token_ids]).astype("<i4"),
        "logprobs": np.concatenate([document.logprobs, found.logprobs]).astype("<f4"),
        "last_hidden": last_hidden,
        DIGESTS: np.concatenate([document.group[DIGESTS][:], np.array(found.digests, "<u8")]),
    }
    return checked_results(spec, outputs, document.first_scored)
