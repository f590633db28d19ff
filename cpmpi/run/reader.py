"""Read a run: its documents, their log-probabilities and their KV.

Shapes: ``T`` tokens, ``G`` KV heads, ``D`` key dim, ``E`` value dim. Keys and values are read from the shards at disk
speed, each number bit for bit as it was stored. Everything that is read is compared with its checksum: a file that is
missing or damaged is an error that names it, the document and the layer.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from cpmpi.errors import UserError, one_line
from cpmpi.run.document import Document, read_truth
from cpmpi.run.hdf5 import open_file
from cpmpi.run.index_layout import FORMAT, FORMAT_VERSION, OLDER_VERSIONS
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import saying
from cpmpi.run.shard import OpenShards, ShardFile
from cpmpi.run.spec import PLAIN, Scoring, ShardSet

__all__ = ["Document", "Documents", "Run", "open_run"]
SUMMARY = ("id", "source", "n_tokens", "nll", "perplexity", "complete", "failed")


def open_run(path: str | os.PathLike[str], *, locking: bool | str = "best-effort", parts: bool = True) -> Run:
    """Open a run folder (or its ``run.h5``) for reading. Use as a context manager, or call ``close``.

    Args:
        path: of the folder, or the file.
        locking: HDF5's; False where this process writes the run meanwhile.
        parts: of a run that several jobs share, whether what is finished in parts belongs to it already.

    Raises:
        UserError: there is no run, or its ``run.h5`` is damaged.
    """
    return Run(Path(path), locking, parts)


class Run:
    """A run, complete or in progress."""

    def __init__(self, path: Path, locking: bool | str = "best-effort", parts: bool = True) -> None:
        """Open the run in the folder ``path``."""
        self.paths = RunPaths.of(path)
        with saying(self.paths.folder, "cannot be looked into"):
            found = self.paths.index.exists()
        if not found:
            raise UserError(f"{self.paths.folder}: no run here (no run.h5)")
        self.file = open_file(self.paths.index, locking=locking)
        self._shards = OpenShards(self.paths.folder)
        self.parts: dict[int, Run] = {}
        """Of a run that several jobs share: the parts that are finished, by the place of their document."""
        self._part_sets: dict[int, tuple[Run, int]] = {}
        try:
            self.attributes: dict[str, Any] = dict(self.file.attrs)
            """The attributes of ``/``: model, dtype, world_size, topology, command and so on."""
            self.version = self._read_version()
            """Of the format."""
            self.shard_sets = self._read_shard_sets()
            """The sets of shards, by number; none when the run keeps no KV."""
            self._first_part_set = max(self.shard_sets, default=-1) + 1
            if parts and self.paths.parts.is_dir():
                self._read_parts()
        except BaseException as problem:
            self.close()
            if isinstance(problem, OSError | KeyError | RuntimeError | TypeError):
                raise UserError(f"{self.paths.index}: damaged: {one_line(problem)}") from problem
            raise

    def __repr__(self) -> str:
        """What is in it, for a notebook."""
        documents = list(self.documents)
        done, failed = sum(d.complete for d in documents), sum(bool(d.failed) for d in documents)
        words = f"{len(documents)} document{'s' * (len(documents) != 1)}, {done} finished"
        words += f", {failed} failed" * bool(failed)
        kv = f"KV in {self.kv_dtype}" if self.kv_dtype else "no KV"
        return f"<Run {self.paths.folder}: {words}, {sum(d.n_tokens for d in documents):,} tokens, {kv}>"

    def summary(self) -> Any:
        """A table with a row per document: a pandas DataFrame where pandas is installed, else a dict of NumPy arrays.

        The columns are ``id``, ``source``, ``n_tokens``, ``nll``, ``perplexity``, ``complete`` and ``failed``.
        """
        documents = list(self.documents)
        columns = {name: np.array([getattr(document, name) for document in documents]) for name in SUMMARY}
        try:
            return importlib.import_module("pandas").DataFrame(columns)
        except ImportError:
            return columns

    @property
    def complete(self) -> bool:
        """Whether the run reached its end: every document is finished, or has failed."""
        return read_truth(self.file, "complete", self.paths.index)

    @cached_property
    def scoring(self) -> Scoring:
        """What is scored and kept of every document; see docs/scores.md."""
        known = asdict(PLAIN)
        found: dict[str, Any] = {n: type(value)(self.attributes.get(n, value)) for n, value in known.items()}
        return Scoring(**found)

    @property
    def world_size(self) -> int:
        """Ranks of the job that laid the run out; a document may have been done by another number of them."""
        return int(self.attributes["world_size"])

    @property
    def model_path(self) -> str:
        """Where the checkpoint was that made it; empty where an older version did not record it."""
        return str(self.attributes.get("model_path", ""))

    @property
    def recorded_checkpoint(self) -> Path:
        """The checkpoint folder that made it, as it was called then; of a run of an earlier version, by its config."""
        if self.model_path:
            return Path(self.model_path)
        path = Path(str(json.loads(self.attributes["model"]).get("_name_or_path") or ""))
        return path.parent if path.name == "config.json" else path

    @property
    def kv_dtype(self) -> str | None:
        """The stored type of keys and values; None when the run keeps none."""
        name = str(self.attributes["kv_dtype"])
        return None if name == "none" else name

    @cached_property
    def documents(self) -> Documents:
        """All documents, also the unfinished ones."""
        return Documents(self)

    @cached_property
    def set_aside(self) -> Documents:
        """Finished documents that a later job did not ask for: kept, and taken back when one does."""
        return Documents(self, set_aside=True)

    def shard_size(self, rank: int, shard_set: int = 0) -> int:
        """The size in bytes that the shard of ``rank`` in a set must have."""
        return self.shard_sets[shard_set].sizes[rank]

    def shard(self, rank: int, shard_set: int = 0) -> ShardFile:
        """The shard of ``rank`` in a set; it stays open until many others have been asked for.

        Raises:
            UserError: it is missing, truncated, damaged, or belongs to another run.
        """
        return self._shards.get(self.shard_sets[shard_set], rank, self.shard_path(rank, shard_set))

    def shard_path(self, rank: int, shard_set: int = 0) -> Path:
        """The file of ``rank`` in a set of shards."""
        if shard_set in self._part_sets:
            part, number = self._part_sets[shard_set]
            path = part.paths.shard(rank, number)
            if path.exists():  # else it was made one run since, where it has the number that it has here
                return path
        return self.paths.shard(rank, shard_set)

    def part_of(self, index: int) -> tuple[Run, int] | None:
        """The finished part that holds a document, and its shards' number in this run; None: ``run.h5`` holds it."""
        if index not in self.parts:
            return None
        number = self._first_part_set + index if self.kv_dtype is not None else 0
        return self.parts[index], number

    def close(self) -> None:
        """Close ``run.h5``, the shards and the parts."""
        for part in self.parts.values():
            part.close()
        self._shards.close()
        self.file.close()

    def _read_version(self) -> int:
        found = (self.attributes.get("format"), self.attributes.get("format_version"))
        if found[0] != FORMAT or found[1] not in (FORMAT_VERSION, *OLDER_VERSIONS):
            raise UserError(
                f"{self.paths.index}: format {found[0]!r} version {found[1]}, expected {FORMAT!r} {FORMAT_VERSION}"
            )
        version = int(found[1])
        if (version == 1) != (self.file.userblock_size == 0):
            raise UserError(f"{self.paths.index}: damaged: a file of format version {version} looks otherwise")
        return version

    def _read_shard_sets(self) -> dict[int, ShardSet]:
        if self.kv_dtype is None:
            return {}
        if self.version == 1:
            found = [(0, self.attributes["run_id"], self.file["shards"])]
        else:
            found = [(int(name), group.attrs["set_id"], group) for name, group in self.file["shards"].items()]
        sizes = {number: tuple(group["size"][:].tolist()) for number, _, group in found}
        return {
            number: ShardSet(world_size=len(sizes[number]), number=number, id=set_id, sizes=sizes[number])
            for number, set_id, _ in found
        }

    def _read_parts(self) -> None:
        """Find the parts that are finished. Each set of their shards gets a number beyond those in ``run.h5``."""
        places = [int(path.name) for path in self.paths.parts.glob("[0-9]" * 6)]
        for index in sorted(place for place in places if place < len(self.documents)):
            part = open_part(self.paths, index, Document(self, index, document_name(index)))
            if part is not None:
                self.parts[index] = part
                if part.kv_dtype is not None:
                    number, inner = self._first_part_set + index, part.documents[0].places[0].shard_set
                    self._part_sets[number] = part, inner
                    self.shard_sets[number] = replace(part.shard_sets[inner], number=number)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_part(paths: RunPaths, index: int, document: Document) -> Run | None:
    """The run of a document alone, of those that several jobs share; None where it is not finished there.

    Args:
        paths: of the whole run.
        index: the document's place in it.
        document: as ``run.h5`` has it, which counts where it is complete.

    Raises:
        UserError: the part is damaged.
    """
    inner = paths.part(index)
    if document.complete or not inner.summary.exists():  # which is written last but for a mark
        return None
    try:
        part = Run(inner.folder)
    except UserError:
        if paths.claim(index).exists():  # just being written
            return None
        raise
    if part.complete and part.documents[0].spec.contents == document.spec.contents:
        return part
    part.close()
    return None


class Documents(Sequence[Document]):
    """The documents of a run, by place (``documents[0]``) or by id (``documents["contract-17"]``)."""

    def __init__(self, run: Run, *, set_aside: bool = False) -> None:
        self._run, self._set_aside = run, set_aside
        self._size = len(run.file.get("set_aside" if set_aside else "documents", ()))
        self._made: dict[int, Document] = {}

    def __repr__(self) -> str:
        """The first few names."""
        return f"<{self._size} documents: {self._some_ids()}>"

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Document]:
        return map(self._document, range(self._size))

    @overload
    def __getitem__(self, key: int | str) -> Document: ...
    @overload
    def __getitem__(self, key: slice) -> list[Document]: ...
    def __getitem__(self, key: int | str | slice) -> Document | list[Document]:
        if isinstance(key, slice):
            return [self._document(index) for index in range(self._size)[key]]
        if isinstance(key, int):
            return self._document(range(self._size)[key])
        if key not in self._places:
            raise KeyError(f"no document {key!r} among {self._size} ({self._some_ids()})")
        return self._document(self._places[key])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {document.id: document.index for document in self}

    def _document(self, index: int) -> Document:
        if index not in self._made:
            part = None if self._set_aside else self._run.part_of(index)
            name = document_name(index if part is None else 0, set_aside=self._set_aside)
            self._made[index] = Document(self._run, index, name, part)
        return self._made[index]

    def _some_ids(self, most: int = 5) -> str:
        return ", ".join(repr(document.id) for document in self[:most]) + ", ..." * (self._size > most)
