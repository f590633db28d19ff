"""Put a file in place at once: readers see the old file, the new one or none, never a half."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpmpi.errors import UserError, one_line

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, make it durable and rename it to ``path``.

    The temporary name is fixed, so that what a killed writer left behind is overwritten by the next one.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` at once, and durably.

    Raises:
        UserError: it cannot be written: no space, no permission.
    """
    with saying(path, "cannot be written"), published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing, and make the new names durable where that is allowed.

    Raises:
        UserError: that is not possible.
    """
    with saying(path, "cannot make this folder"):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which does not exist")
        new = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in reversed(new or [path]):  # one that is there may have been made just now, by another rank
            with suppress(PermissionError):
                sync_path(made.parent)


def sync_path(path: Path) -> None:
    """fsync a file or a folder by its path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, errors of calls that know a file by its descriptor alone get its name."""
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise


@contextmanager
def saying(path: Path, what: str) -> Iterator[None]:
    """Within it, errors of the system, and of HDF5, become one line about ``path``.

    Raises:
        UserError: that line.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError) as problem:
        why = problem.strerror if isinstance(problem, OSError) and problem.strerror else one_line(problem)
        raise UserError(f"{path}: {what} ({why})") from problem
