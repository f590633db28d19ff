"""Which files ``--input`` means: a file, a folder, a glob, a pipe, or standard input."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from cpmpi.errors import UserError, some
from cpmpi.text import counted, shown

COMPRESSED = (".gz", ".zst")
TEXTS = (".txt", ".md", ".jsonl")
FOLDER_SUFFIXES = (*TEXTS, *(text + packed for text in TEXTS for packed in COMPRESSED), ".npy", ".parquet")
STANDARD_INPUT = Path("-")
DATASET_FILE = "state.json"  # that a data set which Hugging Face `datasets` saved has in its folder


class InputFile(NamedTuple):
    """A file to read, and the name its documents go by unless they bring their own."""

    path: Path
    name: str

    @property
    def source(self) -> str:
        """Where its documents come from."""
        return "standard input" if self.path == STANDARD_INPUT else str(self.path)

    @property
    def shown(self) -> str:
        """The same, as messages name it."""
        return shown(self.source)


@dataclass(frozen=True)
class InputFiles:
    """What the inputs of a job mean: files, what is wrong with the inputs, and what is left out with a reason."""

    files: list[InputFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_input_files(inputs: Sequence[str | Path]) -> InputFiles:
    """The files that ``inputs`` mean, in the order given.

    A file is taken whatever its suffix, a pipe too; ``-`` is standard input. A folder means its ``FOLDER_SUFFIXES``
    files and saved data sets at any depth, sorted by path, without hidden files and folders; links are followed, and
    what they lead to is read once however many there are. Anything else with ``*``, ``?`` or ``[`` is a glob (``**``
    for any depth), its matches sorted and each then taken as a file or folder. A file is named by its path below the
    folder given, or below the part of the glob before the first pattern; a single file by its file name.

    An input that is missing, unreadable, a device, matches nothing, or is a folder with no such file is a problem.

    Raises:
        UserError: there are no inputs.
    """
    if not inputs:
        raise UserError("no input: give text files, folders, globs, .jsonl, .npy or .parquet files, or - for a pipe")
    found = InputFiles()
    streams: set[str] = set()
    for item in inputs:
        try:
            files = _files_of(Path(item), found.notes)
            _check_read_once(files, streams)
            found.files.extend(files)
        except UserError as problem:
            found.problems.append(str(problem))
    return found


def _files_of(item: Path, notes: list[str]) -> list[InputFile]:
    if item == STANDARD_INPUT:
        return [InputFile(item, "stdin")]
    try:
        if item.is_dir():
            found = _named(_files_below(item, notes), item)
            nothing = f"the folder has no {', '.join(TEXTS)}, .npy or .parquet file and no saved data set"
        elif item.exists():
            _check_readable(item)
            return [InputFile(item, f"pipe-{item.name}" if _is_descriptor(item) else item.name)]
        elif glob.has_magic(str(item)):
            fixed = next(i for i, part in enumerate(item.parts) if glob.has_magic(part))
            found = _named(_matches(item, notes), Path(*item.parts[:fixed]))
            nothing = "no file matches"
        else:
            gone = "; a launcher hands no such pipe to its ranks: use - or a named pipe" * _is_descriptor(item)
            raise UserError(f"{shown(item)}: no such file or folder{gone}")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # of a name with a zero byte
        raise UserError(f"{shown(item)}: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise UserError(f"{shown(item)}: {nothing}")
    return found


def _named(paths: list[Path], base: Path) -> list[InputFile]:
    return [InputFile(path, path.name if path == base else path.relative_to(base).as_posix()) for path in paths]


def _is_descriptor(path: Path) -> bool:
    """Whether it is one of the process's own open files, as a shell's ``<(command)`` is."""
    return path.parent.as_posix() in ("/dev/fd", "/proc/self/fd")


def _check_readable(path: Path) -> None:
    mode = path.stat().st_mode
    for is_kind, kind in ((stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"), (stat.S_ISSOCK, "socket")):
        if is_kind(mode):
            raise UserError(f"{shown(path)}: is a {kind}, which cannot be read as a document")


def _check_read_once(files: list[InputFile], streams: set[str]) -> None:
    """What comes through a pipe is there once: a second reader would wait for ever."""
    for file in files:
        if file.path == STANDARD_INPUT or stat.S_ISFIFO(os.stat(file.path).st_mode if file.path.exists() else 0):
            real = os.path.realpath(file.path)
            if real in streams:
                raise UserError(f"{file.shown}: given twice, and can be read once")
            streams.add(real)


def _matches(pattern: Path, notes: list[str]) -> list[Path]:
    """The files that a glob matches or that are below a folder it matches, sorted, each once."""
    deep = next((i for i, part in enumerate(pattern.parts) if part == "**"), None)
    if deep is None:
        matches = sorted(map(Path, glob.glob(str(pattern))))
    else:  # glob's own ** goes round and round through links that loop
        bases = [Path(base) for base in glob.glob(str(Path(*pattern.parts[:deep]))) if os.path.isdir(base)]
        below = [(base, path) for base in bases for path in _everything_below(base, notes)]
        matches = sorted(path for base, path in below if _fits(path.relative_to(base).parts, pattern.parts[deep:]))
    found: dict[str, Path] = {}
    for match in matches:  # a pattern may match a folder and also what is in it
        for path in _files_below(match, notes) if match.is_dir() else [match]:
            found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def _fits(parts: Sequence[str], rule: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a glob. What is hidden has to be asked for."""
    if not rule or not parts:
        return not parts and all(part == "**" for part in rule)
    if rule[0] == "**":
        return _fits(parts, rule[1:]) or (not parts[0].startswith(".") and _fits(parts[1:], rule))
    hidden = parts[0].startswith(".") and not rule[0].startswith(".")
    return not hidden and fnmatchcase(parts[0], rule[0]) and _fits(parts[1:], rule[1:])


def _files_below(folder: Path, notes: list[str]) -> list[Path]:
    """The files of a folder that are taken for documents, at any depth, sorted; a saved data set is one."""
    found: dict[str, Path] = {}
    for parent, names in _folders_below(folder, notes):
        if DATASET_FILE in names:
            found.setdefault(os.path.realpath(parent), parent)
            continue
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(FOLDER_SUFFIXES):
                found.setdefault(os.path.realpath(parent / name), parent / name)
    return sorted(found.values())


def _everything_below(folder: Path, notes: list[str]) -> Iterator[Path]:
    """All files and folders at any depth."""
    for parent, names in _folders_below(folder, notes):
        if parent != folder:
            yield parent
        yield from (parent / name for name in names)


def _folders_below(folder: Path, notes: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """The folder and those in it at any depth, each once whatever links lead to it, with the names of its files.

    Those without links come before those behind links; links to what was there already, or above, are noted.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    above = set(map(str, Path(os.path.realpath(folder)).parents))
    waiting, again = [str(folder)], []
    for start in waiting:
        if os.path.realpath(start) in seen | above:
            again.append(start)
            continue
        for parent, folders, names in os.walk(start, onerror=refuse):
            here = os.path.realpath(parent)
            visible = [] if here in seen else sorted(f for f in folders if not f.startswith("."))
            links = [f for f in visible if os.path.islink(os.path.join(parent, f))]
            waiting += [os.path.join(parent, link) for link in links]
            folders[:] = [f for f in visible if f not in links]
            if here not in seen:
                seen.add(here)
                yield Path(parent), names
    if again:
        what = counted(len(again), "link that leads round is", "links that lead round are")
        notes.append(f"{shown(folder)}: {what} not followed: {some([shown(link) for link in again])}")
