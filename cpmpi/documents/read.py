"""The documents that ``--input`` names, as token ids, checked before any other work starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.documents.content import is_stream
from cpmpi.documents.formats import read_file
from cpmpi.documents.input_files import InputFile, find_input_files
from cpmpi.documents.places import TextPlaces
from cpmpi.documents.records import Columns, Found, check_name, check_token_ids
from cpmpi.documents.spans import SpanRule
from cpmpi.documents.tokenization import load_tokenizer, tokenize_in_place
from cpmpi.errors import UserError
from cpmpi.text import counted, shown

OnProgress = Callable[[int, int], None]
MOST_PROBLEMS = 20  # lines of a report


@dataclass(frozen=True, eq=False, kw_only=True)
class InputDocument:
    """One document of a run."""

    id: str
    """Its name, unique in the run."""
    source: str
    """The file it came from, with ``:`` and the line number for one of a .jsonl file, or item or row."""
    token_ids: npt.NDArray[np.int32]
    """(T,), at least one, read-only."""
    places: TextPlaces | None = None
    """Where they stand in the text; None where token ids were given."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which documents of the inputs are read, and how.

    Raises:
        UserError: no number that can be, or no regular expression.
    """

    column: str | None = None
    """The field or column with text or token ids; None: ``text``, ``token_ids`` or ``input_ids``, the one there is."""
    id_column: str | None = None
    """The field or column with the id; None: ``id``, and without one the file's name and the line, item or row."""
    select: str | None = None
    """A regular expression; documents in whose id it is not found are left out."""
    limit: int | None = None
    """Documents that are read at most: the first ones of those selected."""
    skip_bad: bool = False
    """Whether bad inputs are left out, and said, instead of refused."""
    special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens; None leaves that to the tokenizer."""
    max_positions: int | None = None
    """Tokens that a document may have, with that before it; None: any number."""
    prefix: int = 0
    """Tokens that come before a document."""
    spans: SpanRule | None = None
    """What parts of the texts are wanted."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, not {self.limit}")
        try:
            re.compile(self.select or "")
        except re.error as error:
            raise UserError(f"--select {shown(self.select)}: not a regular expression: {error}") from error

    def selected(self, id: str) -> bool:
        """Whether a document is wanted."""
        return self.select is None or re.search(self.select, id) is not None


@dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """What the inputs of a job gave."""

    documents: list[InputDocument] = field(default_factory=list)
    """In the order of the inputs."""
    problems: list[str] = field(default_factory=list)
    """What was wrong with the others, a line each."""
    notes: list[str] = field(default_factory=list)
    """What the user should know besides."""


def read_documents(
    inputs: Sequence[str | Path],
    *,
    checkpoint: Path,
    vocab_size: int,
    options: ReadOptions | None = None,
    progress: OnProgress | None = None,
) -> Reading:
    """All documents of ``inputs``, in the order given; every file is checked before the first text is tokenized.

    - ``.jsonl``: a document per line, ``{"id": ..., "text": ...}`` or ``{"id": ..., "token_ids": [...]}``; other keys
      are not read, blank lines are skipped. An integer as id becomes its decimal digits.
    - ``.json``: a list of such objects.
    - ``.npy``: one document, a 1-D array of integer token ids.
    - ``.parquet``, ``.arrow`` and folders of a saved data set: a document per row.
    - any other file: one document, UTF-8 text exactly as stored, line ends and all, but for a byte order mark.
    - ``.gz`` and ``.zst`` of all but the tables; standard input (``-``) and pipes, whose content tells what they hold.

    Which files a folder or glob means, and their names, which are the ids: see ``find_input_files``.

    Arguments:
        inputs: files, folders and globs.
        checkpoint: the folder with the tokenizer; not looked at where all inputs are token ids.
        vocab_size: the model's; every id must be below it.
        options: which documents, and how.
        progress: called after each text with the characters tokenized so far, and of all.

    Raises:
        UserError: inputs are missing, empty, broken or ambiguous, and not to be skipped: all of them in one report, a
            line each that names file, line and numbers; or nothing is left.
    """
    options = options or ReadOptions()
    found, reading = _find(inputs, options, vocab_size)
    _refuse(reading.problems, options, len(found))
    if not found and not reading.problems:
        raise UserError(f"--select {shown(options.select)}: found in the id of no document")
    characters = sum(len(d.content) for d in found if isinstance(d.content, str))
    tokenizer = load_tokenizer(checkpoint) if characters else None
    done = 0
    for one in found:
        try:
            token_ids, places = _token_ids(one, tokenizer, options, checkpoint, vocab_size)
            document = InputDocument(id=one.id, source=one.source, token_ids=token_ids, places=places)
            reading.documents.append(document)
        except UserError as problem:
            reading.problems.append(str(problem))
        if isinstance(one.content, str):
            done += len(one.content)
            if progress:
                progress(done, characters)
    _refuse(reading.problems, options, len(reading.documents))
    if options.spans is not None:
        options.spans.check_documents([one.id for one in found])
    return reading


def _token_ids(
    one: Found, tokenizer: Any, options: ReadOptions, checkpoint: Path, vocab_size: int
) -> tuple[npt.NDArray[np.int32], TextPlaces | None]:
    places = None
    if isinstance(one.content, str):
        spans = options.spans.of(one.id, one.content) if options.spans is not None else None
        token_ids, places = tokenize_in_place(tokenizer, one.content, options.special_tokens, spans)
        check_token_ids(token_ids, vocab_size, f"{shown(one.source)}: document '{shown(one.id)}'")
    else:
        token_ids = one.content
    limit, where = options.max_positions, f"{shown(one.source)}: document '{shown(one.id)}'"
    if options.spans is not None and (options.spans.cuts or one.id in options.spans.named):
        _check_spans(places, tokenizer, f"--spans {shown(options.spans.name)}: {where}")
    if limit is not None and len(token_ids) + options.prefix > limit:
        before = " and one before them" * options.prefix
        raise UserError(
            f"{where} has {len(token_ids)} tokens{before}, but {shown(checkpoint)} was made for {limit} positions "
            "(max_position_embeddings); --allow-longer runs it all the same"
        )
    token_ids.setflags(write=False)
    return token_ids, places


def _check_spans(places: TextPlaces | None, tokenizer: Any, where: str) -> None:
    """Refuse spans of what has no text, or none in which tokens have their place."""
    if places is None:
        raise UserError(f"{where} is given as token ids: there is no text to have spans of")
    if places.characters is None:
        raise UserError(
            f"{where}: its tokenizer ({type(tokenizer).__name__}) does not say where tokens stand in a text"
        )


def _find(inputs: Sequence[str | Path], options: ReadOptions, vocab_size: int) -> tuple[list[Found], Reading]:
    """The documents as their files have them, no two with one id, and what is wrong with others."""
    files = find_input_files(inputs)
    reading = Reading(problems=files.problems, notes=files.notes)
    found: dict[str, Found] = {}
    for file in files.files:
        if len(found) == options.limit:
            break
        try:
            good, bad = _read_one(file, options, vocab_size, found)
        except UserError as problem:  # with the file as a whole: what was read of it may be wrong
            good, bad = [], [str(problem)]
        found.update((one.id, one) for one in good)
        reading.problems.extend(bad)
        if good and is_stream(file):
            reading.notes.append(f"{file.shown}: {_said(good)}")
    return list(found.values()), reading


def _read_one(
    file: InputFile, options: ReadOptions, vocab_size: int, before: dict[str, Found]
) -> tuple[list[Found], list[str]]:
    """The selected documents of a file, up to the limit, and what is wrong with others of it."""
    good: dict[str, Found] = {}
    bad: list[str] = []
    for outcome in _outcomes(file, options, vocab_size):
        if isinstance(outcome, UserError):
            bad.append(str(outcome))
        elif problem := _problem(outcome, before.get(outcome.id) or good.get(outcome.id)):
            bad.append(problem)
        else:
            good[outcome.id] = outcome
            if len(before) + len(good) == options.limit:
                break
    return list(good.values()), bad


def _outcomes(file: InputFile, options: ReadOptions, vocab_size: int) -> Iterator[Found | UserError]:
    """The selected documents of a file and the problems with others.

    Raises:
        UserError: of the file as a whole.
    """
    columns = Columns(id=options.id_column, content=options.column)
    try:
        for outcome in read_file(file, columns, vocab_size):
            if isinstance(outcome, UserError) or options.selected(outcome.id):
                yield outcome
    except OSError as error:
        raise UserError(f"{file.shown}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"{file.shown}: too large for this machine's memory") from error


def _problem(one: Found, namesake: Found | None) -> str | None:
    """What is wrong with a document's name."""
    try:
        check_name(one.id, f"{shown(one.source)}: the document's name")
        check_name(one.source, f"{shown(one.source)}: the file's name")
    except UserError as problem:
        return str(problem)
    if namesake is not None:
        return (
            f"two documents have the id '{shown(one.id)}': {shown(namesake.source)} and {shown(one.source)}; "
            "rename one, or give both ids of their own in a .jsonl file"
        )
    return None


def _said(good: list[Found]) -> str:
    """What came through a pipe."""
    texts = [one.content for one in good if isinstance(one.content, str)]
    what = f"{sum(map(len, texts)):,} characters" if texts else "token ids"
    return f"{counted(len(good), 'document')} read, {what}"


def _refuse(problems: list[str], options: ReadOptions, good: int) -> None:
    """Report all that is wrong, unless it is to be skipped and something is left.

    Raises:
        UserError: the report.
    """
    if not problems or (options.skip_bad and good):
        return
    hint = "--skip-bad goes on without" if good else "nothing else is there"
    if len(problems) == 1:
        raise UserError(f"{problems[0]}{f'; {hint} it' * bool(good)}")
    listed = "".join(f"\n  {problem}" for problem in problems[:MOST_PROBLEMS])
    more = f"\n  and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
    raise UserError(f"{counted(len(problems), 'bad input')}; {hint}{' them' * bool(good)}:{listed}{more}")
