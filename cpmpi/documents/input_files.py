"""Which files ``--input`` means: a file, a folder, or a glob."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cpmpi.errors import UserError

FOLDER_SUFFIXES = (".txt", ".md", ".jsonl", ".npy")


class InputFile(NamedTuple):
    """A file to read, and the name its documents go by unless they bring their own."""

    path: Path
    name: str


def find_input_files(inputs: Sequence[str | Path]) -> list[InputFile]:
    """The files that ``inputs`` mean, in the order given.

    A file is taken whatever its suffix. A folder means its ``FOLDER_SUFFIXES`` files at any depth, sorted by path,
    without hidden files and folders, links followed. Anything else with ``*``, ``?`` or ``[`` is a glob (``**`` for any
    depth), its matches sorted and each then taken as a file or folder. A file is named by its path below the folder
    given, or below the part of the glob before the first pattern; a single file by its file name.

    Raises:
        UserError: an input is missing, unreadable, matches nothing, or is a folder with no such file.
    """
    if not inputs:
        raise UserError("no input: give text files, folders, globs, .jsonl or .npy files")
    return [file for item in inputs for file in _files_of(Path(item))]


def _files_of(item: Path) -> list[InputFile]:
    try:
        if item.is_dir():
            found = _named(_files_below(item), item)
            nothing = f"the folder has no {', '.join(FOLDER_SUFFIXES[:-1])} or {FOLDER_SUFFIXES[-1]} file"
        elif item.exists():
            return _named([item], item.parent)
        elif glob.has_magic(str(item)):
            fixed = next(i for i, part in enumerate(item.parts) if glob.has_magic(part))
            matches = [Path(match) for match in sorted(glob.glob(str(item), recursive=True))]
            paths = (path for match in matches for path in (_files_below(match) if match.is_dir() else [match]))
            # A recursive pattern matches folders and what is in them: each file once.
            found = _named(list(dict.fromkeys(paths)), Path(*item.parts[:fixed]))
            nothing = "no file matches"
        else:
            raise UserError(f"{item}: no such file or folder")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    if not found:
        raise UserError(f"{item}: {nothing}")
    return found


def _named(paths: list[Path], base: Path) -> list[InputFile]:
    return [InputFile(path, path.relative_to(base).as_posix()) for path in paths]


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = os.path.realpath(parent)
        # A link to a folder above itself would be followed for ever.
        folders[:] = [f for f in folders if not f.startswith(".") and not _is_above(os.path.join(parent, f), here)]
        found += [Path(parent, n) for n in names if not n.startswith(".") and n.lower().endswith(FOLDER_SUFFIXES)]
    return sorted(found)


def _is_above(folder: str, here: str) -> bool:
    real = os.path.realpath(folder)
    return os.path.commonpath([real, here]) == real
