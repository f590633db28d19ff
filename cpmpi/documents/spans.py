"""Parts of a text whose scores are summed: its lines, sentences or paragraphs, or those that a file names.

Lines, sentences and paragraphs cut a text without a gap, so that every character is in one:

- a line ends with its newline (``\\n``);
- a paragraph ends with the blank lines after it (lines of blanks and tabs alone are blank);
- a sentence ends after ``.``, ``!``, ``?`` or their like in other scripts, with the quotes and brackets that close
  after them and the white space that follows, which must be there but after an ideographic full stop; or with a
  paragraph. Abbreviations are not known: "Dr. Watson" is two.

Legend: S spans.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpmpi.choices import SPANS
from cpmpi.documents.records import check_name, kind, numbered_lines, quoted
from cpmpi.errors import UserError, some
from cpmpi.text import shown

BLANK_LINES = r"\r?\n(?:[ \t]*\r?\n)+"
# Where a part ends. A run of full stops is looked at from its first one alone: from each, it would take its square.
ENDS = {
    "lines": re.compile(r"\n"),
    "paragraphs": re.compile(BLANK_LINES),
    "sentences": re.compile(
        r"(?<![.!?…؟۔।])[.!?…؟۔।]++[\"'»”’)\]]*+\s++|(?<![。！？])[。！？]++[」』”’）]*+\s*+|" + BLANK_LINES
    ),
}
KEYS = ("document", "start", "stop", "id")


class Named(NamedTuple):
    """A span that a file names: first character and the one after the last, its id, and where it stands."""

    start: int
    stop: int
    id: str
    source: str


class Spans(NamedTuple):
    """The spans of a document: start and stop character (S, 2), and the id of each; no ids where they are cut."""

    characters: npt.NDArray[np.int64]
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SpanRule:
    """How spans are found.

    Attributes:
        name: as the option has it.
        named: for each document, what a file names; nothing where texts are cut by a rule.
    """

    name: str
    named: dict[str, list[Named]] = field(default_factory=dict)

    @property
    def cuts(self) -> bool:
        """Whether texts are cut by a rule."""
        return self.name in ENDS

    @property
    def recorded(self) -> str:
        """The rule for the record: equal where spans are equal."""
        if self.cuts:
            return self.name
        spans = [(document, *one[:3]) for document, named in sorted(self.named.items()) for one in named]
        return f"file {hashlib.sha256(json.dumps(spans).encode()).hexdigest()[:16]}"

    def of(self, document: str, text: str) -> Spans:
        """The spans of a text.

        Raises:
            UserError: one goes beyond the text; the line is named.
        """
        if self.cuts:
            return Spans(cut(text, self.name))
        named = self.named.get(document, [])
        for one in named:
            if one.stop > len(text):
                raise UserError(
                    f"{one.source}: the span ends at character {one.stop}, but document '{shown(document)}' has "
                    f"{len(text)} characters"
                )
        bounds = [(one.start, one.stop) for one in named]
        return Spans(np.array(bounds, np.int64).reshape(-1, 2), tuple(one.id for one in named))

    def check_documents(self, ids: list[str]) -> None:
        """Refuse a file that names documents which are not there.

        Raises:
            UserError: it does; the first line is named.
        """
        for document, named in self.named.items():
            if document not in ids:
                have = some([f"'{shown(id, 40)}'" for id in ids])
                raise UserError(f"{named[0].source}: no document '{shown(document)}' in the input: {have}")


def cut(text: str, rule: str) -> npt.NDArray[np.int64]:
    """Start and stop (S, 2) of the lines, sentences or paragraphs of a text, which leave no gap."""
    stops = [end.end() for end in ENDS[rule].finditer(text)]
    if rule != "lines" and stops and not text[: stops[0]].strip():
        stops = stops[1:]
    if stops[-1:] != [len(text)]:
        stops.append(len(text))
    return np.column_stack([[0, *stops[:-1]], stops]).astype(np.int64)


def read_spans(option: str) -> SpanRule:
    """The rule that ``--spans`` asks for.

    Raises:
        UserError: it is none of the choices, or a line of the file is broken.
    """
    if option in SPANS:
        return SpanRule(name=option)
    if not option.endswith(".jsonl"):
        raise UserError(f"--spans {shown(option)}: choose {', '.join(SPANS)}, or a .jsonl file")
    named: dict[str, list[Named]] = {}
    for number, line in numbered_lines(option, f"--spans {shown(option)}"):
        document, span = _parse(line, f"{shown(option)}:{number}")
        named.setdefault(document, []).append(span)
    if not named:
        raise UserError(f"--spans {shown(option)}: no spans there: all lines are blank")
    return SpanRule(name=option, named=named)


def _parse(line: str, source: str) -> tuple[str, Named]:
    """The document and the span of a line."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f'{source}: must be an object with "document", "start" and "stop", not {kind(record)}')
    if unknown := [key for key in record if key not in KEYS]:
        raise UserError(f"{source}: unknown {some([quoted(key) for key in unknown])}; the keys are {', '.join(KEYS)}")
    for key in ("document", "id"):
        record[key] = str(record[key]) if type(record.get(key)) is int else record.get(key, "")
        if not isinstance(record[key], str) or (key == "document" and not record[key]):
            raise UserError(f'{source}: "{key}" must be a string, not {kind(record[key])}')
        check_name(record[key], f'{source}: "{key}"')
    for key in ("start", "stop"):
        if type(record.get(key)) is not int:
            raise UserError(f'{source}: "{key}" must be an integer, not {kind(record.get(key))}')
    if not 0 <= record["start"] < record["stop"]:
        raise UserError(
            f"{source}: start {record['start']} and stop {record['stop']}: must be characters counted from 0, at least "
            "one of them"
        )
    return record["document"], Named(record["start"], record["stop"], record["id"], source)
