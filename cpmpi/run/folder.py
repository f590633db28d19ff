"""Start a run in a folder: a new one, or the same one again, which then continues where it stopped."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cpmpi.errors import UserError, some
from cpmpi.run.hdf5 import open_file
from cpmpi.run.index import FORMAT, FORMAT_VERSION, RunIndex, create_index, kv_dtype
from cpmpi.run.paths import RunPaths, document_name
from cpmpi.run.publish import make_folder
from cpmpi.run.spec import RunSpec

CHOICES = "choose another --output, or --overwrite"


def start_index(folder: Path, spec: RunSpec, *, overwrite: bool = False) -> RunIndex:
    """The ``run.h5`` to write to: a new one, or that of the same run, to be continued. On rank 0.

    ``RunIndex.spec`` carries the run id that holds, ``RunIndex.finished`` the documents that are done.

    Args:
        folder: the run folder; it may not exist yet, or be empty.
        spec: what is to be run.
        overwrite: delete the run that is in the folder first.

    Raises:
        UserError: the folder holds something that is not a run, or a run of something else.
    """
    check_folder(folder)
    if overwrite:
        delete_run(folder)
    if RunPaths(folder).index.exists():
        return open_index_for_resume(folder, spec)
    return create_index(folder, spec)


def open_index_for_resume(folder: Path, spec: RunSpec) -> RunIndex:
    """Open the ``run.h5`` in ``folder`` to continue it.

    Raises:
        UserError: it is of another model, tokenizer, input, type, number of ranks or segments.
    """
    with open_file(RunPaths(folder).index) as file:
        _check_format(folder, file)
        _check_same_run(folder, file, spec)
        _check_same_documents(folder, file, spec)
    return RunIndex(folder, spec)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something that no run puts there.

    Raises:
        UserError: it does, or it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; choose another --output")
    foreign = [path.relative_to(folder).as_posix() for path in RunPaths(folder).contents()[1]]
    if foreign:
        raise UserError(f"{folder}: is not a run folder (it holds {some(foreign, 5)}); choose another --output")
    paths = RunPaths(folder)
    if paths.index.exists():
        with open_file(paths.index) as file:
            _check_format(folder, file)


def delete_run(folder: Path) -> None:
    """Delete the files of a run but its logs; ``run.h5`` first, so that no half-deleted run is taken for a run."""
    paths = RunPaths(folder)
    if folder.is_dir():
        ours, _ = paths.contents()
        for path in sorted(ours, key=lambda path: path != paths.index):
            path.unlink(missing_ok=True)
        for emptied in (paths.shards, paths.report):
            with suppress(OSError):
                emptied.rmdir()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process, so that a second job does not write the same run. On rank 0.

    The lock goes with the process however it ends, and holds across the nodes of a network file system. Where the file
    system has no locks, none is taken.

    Raises:
        UserError: another process holds it.
    """
    lock = RunPaths(folder).lock
    make_folder(lock.parent)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{folder}: another process is writing this run; wait for it or choose another --output"
                ) from problem
        yield
    finally:
        os.close(descriptor)


def _check_format(folder: Path, file: Any) -> None:
    found = file.attrs.get("format")
    if found != FORMAT:
        raise UserError(f"{folder}: its run.h5 is not a run's (format {found!r}, expected {FORMAT!r})")
    version = file.attrs["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"{folder}: its run.h5 has format version {version}, this cpmpi knows {FORMAT_VERSION}")


def _check_same_run(folder: Path, file: Any, spec: RunSpec) -> None:
    expected = {
        "model_sha256": spec.model_sha256,
        "tokenizer_sha256": spec.tokenizer_sha256,
        "dtype": spec.dtype,
        "kv_dtype": kv_dtype(spec),
        "world_size": spec.world_size,
        "hidden_size": spec.hidden_size,
    }
    for name, value in expected.items():
        found = file.attrs[name]
        if found != value:
            raise UserError(f"{folder}: holds a run with {name} {found}, this one has {value}; {CHOICES}")
    n_documents = len(file["documents"])
    if n_documents != len(spec.documents):
        raise UserError(
            f"{folder}: holds a run of {n_documents} documents, this one has {len(spec.documents)}; {CHOICES}"
        )


def _check_same_documents(folder: Path, file: Any, spec: RunSpec) -> None:
    for index, document in enumerate(spec.documents):
        expected = {
            "id": document.id,
            "n_tokens": document.n_tokens,
            "token_ids_sha256": document.token_ids_sha256,
            "segments": document.layout.segments,
            "first_rank": document.first_rank,
            "n_ranks": document.n_ranks,
            "tp": document.grid.tp,
        }
        attributes = file[document_name(index)].attrs
        for name, value in expected.items():
            if attributes[name] != value:
                raise UserError(
                    f"{folder}: document {index} of the run there has {name} {attributes[name]}, "
                    f"of this one ({document.source}) {value}; {CHOICES}"
                )
