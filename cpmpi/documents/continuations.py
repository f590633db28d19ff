"""What may follow stored documents, from a .jsonl file: texts, token ids, or a question with several answers.

A line is ``{"document": ID, "id": NAME, ...}`` with one of

- ``"text"``: a continuation;
- ``"token_ids"``: the same as token ids;
- ``"choices"``: answers (texts, or lists of token ids), after the question in ``"text"`` where there is one.

``"upto": N`` continues the first N tokens of the document instead of all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmpi.documents.records import numbered_lines
from cpmpi.documents.tokenization import load_tokenizer, tokenize
from cpmpi.errors import UserError, some

KEYS = ("document", "id", "text", "token_ids", "choices", "upto")
TAIL_TOKENS = 16  # of a document, to see whether its last token and a text's first would be one token

ALONE = " (unconditional)"  # after the id of a line whose answers are scored without document and question
BOS = "bos"

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Continuation:
    """A line: what may follow a document.

    Attributes:
        id: its name; that of answer i of several is ``ID/i``.
        source: the file and line.
        document: the id of the stored document.
        upto: tokens of it that are the context; None: all.
        stem: token ids of the question before the answers; may be empty.
        answers: token ids of each.
        n_bytes: of each answer's text in UTF-8; 0 where token ids were given.
        chosen: whether the answers are choices, to be compared.
    """

    id: str
    source: str
    document: str
    upto: int | None
    stem: TokenIds
    answers: tuple[TokenIds, ...]
    n_bytes: tuple[int, ...]
    chosen: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The id of each answer."""
        return tuple(f"{self.id}/{i}" for i in range(len(self.answers))) if self.chosen else (self.id,)


def read_continuations(files: Sequence[str], *, checkpoint: Path, vocab_size: int) -> list[Continuation]:
    """All lines of .jsonl files, in order.

    Raises:
        UserError: a line is broken or an id occurs twice; file, line and choices are named.
    """
    found, seen = [], dict[str, str]()
    tokenizer = cache(lambda: load_tokenizer(checkpoint))  # token ids need none
    for source, record in _records(files):
        continuation = _read(record, source, tokenizer, vocab_size)
        for name in continuation.names:
            if name in seen:
                raise UserError(f"{source}: the id {name!r} occurs twice; first at {seen[name]}")
            seen[name] = source
        found.append(continuation)
    if not found:
        raise UserError(f"{', '.join(files)}: no continuations there: all lines are blank")
    return found


def without_context(continuations: Sequence[Continuation], prefix: TokenIds) -> list[Continuation]:
    """The same answers after ``prefix`` alone (ids, at least one), without document and question: lines of their own.

    Raises:
        UserError: one of them has the name of another line.
    """
    found = [replace(c, id=c.id + ALONE, upto=0, stem=prefix) for c in continuations]
    names = {name for c in continuations for name in c.names}
    if twice := [name for c in found for name in c.names if name in names]:
        raise UserError(f"{found[0].source}: the id {twice[0]!r} is that of an unconditional score; choose another one")
    return found


def prefix_ids(given: str, tokenizer: Callable[[], Any], bos: int | None) -> TokenIds:
    """The token ids of what ``--unconditional`` says: ``bos``, the token that begins a text, or a text.

    Raises:
        UserError: there is no such token, or the text has no tokens.
    """
    if given == BOS:
        if bos is None:
            raise UserError("--unconditional bos: this checkpoint has no token that begins a text; give a text")
        return np.array([bos], np.int64)
    ids = np.empty(0, np.int64)
    if given:
        ids = tokenize(tokenizer(), whole_characters(given, "--unconditional")).astype(np.int64)
    if not len(ids):
        raise UserError("--unconditional is empty: it has no token after which to score; give a text, or bos")
    return ids


def _records(files: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not blank, with its file and number."""
    for file in files:
        if not file.endswith(".jsonl"):
            raise UserError(f"{file}: continuations come in .jsonl files, a line each")
        for number, line in numbered_lines(file, file):
            yield f"{file}:{number}", _parse(line, f"{file}:{number}")


def _parse(line: str, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{source}: not JSON: {problem}") from problem
    if not isinstance(record, dict):
        raise UserError(f"{source}: must be an object with {', '.join(KEYS[:3])} and so on")
    if unknown := [key for key in record if key not in KEYS]:
        raise UserError(f"{source}: unknown {some([repr(k) for k in unknown])}; the keys are {', '.join(KEYS)}")
    return record


def _read(record: dict[str, Any], source: str, tokenizer: Callable[[], Any], vocab_size: int) -> Continuation:
    for key in ("document", "id"):
        if type(record.get(key)) is int:  # as the ids of documents
            record[key] = str(record[key])
        if not isinstance(record.get(key), str) or not record[key]:
            raise UserError(f'{source}: "{key}" must be a string that is not empty')
        whole_characters(record[key], source)
    upto = record.get("upto")
    if upto is not None and (type(upto) is not int or upto < 1):
        raise UserError(f'{source}: "upto" must be a number of tokens from 1 on, not {upto!r}')
    chosen = "choices" in record
    if ("token_ids" in record) + chosen > 1 or not (chosen or "token_ids" in record or "text" in record):
        raise UserError(f'{source}: {record["id"]!r} needs one of "text", "token_ids" and "choices"')
    if "token_ids" in record and "text" in record:
        raise UserError(f'{source}: {record["id"]!r} has both "text" and "token_ids"')
    question = record.get("text", "") if chosen else ""
    given = record["choices"] if chosen else [record["token_ids"] if "token_ids" in record else record["text"]]
    if not isinstance(given, list) or not given:
        raise UserError(f'{source}: "choices" must be a list of texts or of token ids that is not empty')
    if not isinstance(question, str):
        raise UserError(f'{source}: "text" must be a string')
    stem = _ids(question, source, tokenizer, vocab_size) if question else np.empty(0, np.int64)
    return Continuation(
        id=record["id"], source=source, document=record["document"], upto=upto, stem=stem, chosen=chosen,
        answers=tuple(_ids(answer, source, tokenizer, vocab_size) for answer in given),
        n_bytes=tuple(len(answer.encode()) if isinstance(answer, str) else 0 for answer in given),
    )  # fmt: skip


def _ids(given: Any, source: str, tokenizer: Callable[[], Any], vocab_size: int) -> TokenIds:
    """The token ids of a text or of a list of them; no special tokens are added in the middle of a document."""
    if isinstance(given, str):
        ids = tokenize(tokenizer(), whole_characters(given, source), special_tokens=False).astype(np.int64)
    elif not isinstance(given, list):
        raise UserError(f"{source}: must be a text or a list of integers, not {json.dumps(given)[:50]}")
    elif wrong := [i for i in given if type(i) is not int]:
        raise UserError(f"{source}: token ids must be integers, not {json.dumps(wrong[0])[:50]}")
    elif bad := [i for i in given if not 0 <= i < vocab_size]:
        raise UserError(f"{source}: token id {bad[0]}: the vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}")
    else:
        ids = np.array(given, np.int64)
    if not len(ids):
        raise UserError(f"{source}: an empty text or list has no tokens to score")
    return ids


def whole_characters(text: str, source: str) -> str:
    """The text, unless it has half a character (a lone surrogate): neither files nor tokenizers take it.

    Raises:
        UserError: it has one.
    """
    if half := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        raise UserError(f"{source}: holds {ascii(half)[1:-1]}, half of a character (a lone surrogate)")
    return text


def would_merge(tokenizer: Any, before: npt.NDArray[np.integer], after: TokenIds) -> bool:
    """Whether the tokenizer, given the whole text, would join the last tokens before with the first ones after."""
    head, tail = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before[-TAIL_TOKENS:], after))
    apart = [tokenize(tokenizer, text, special_tokens=False) for text in (head, tail)]
    return not np.array_equal(tokenize(tokenizer, head + tail, special_tokens=False), np.concatenate(apart))
