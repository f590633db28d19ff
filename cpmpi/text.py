"""Words and numbers for people: names fit for a terminal, plain tables, sizes, times."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from cpmpi.errors import UserError

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}  # powers of 1000 or 1024
MOST_SHOWN = 500  # characters of a name


def shown(name: object, most: int = MOST_SHOWN) -> str:
    """A name from outside (an id, a file, a source) as it may stand in a line: what is no visible character is escaped.

    A newline would break the line, and an escape sequence would be obeyed by the terminal. Of a name longer than
    ``most`` characters, the middle is left out.
    """
    text = str(name)
    cut = len(text) > 2 * most
    text = escaped(text[:most] + text[-most:] if cut else text)  # the middle of a very long one is never looked at
    if len(text) <= most and not cut:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"


def escaped(text: str) -> str:
    """The text in one line of visible characters: all others as Python writes them, such as ``\\n`` and ``\\x1b``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def escaped_lines(text: str) -> str:
    """Several lines, each escaped: the line ends that are there are meant."""
    return "\n".join(map(escaped, text.split("\n")))


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: ``1 document``, ``3,000 documents``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def width(text: str) -> int:
    """The columns that a text takes in a terminal: wide characters, as of Chinese, take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """The beginning of a line, as much of it as fits so many columns."""
    kept = ""
    for c in text:
        columns -= width(c)
        if columns < 0:
            return kept
        kept += c
    return kept


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """The rows under their header, columns aligned: the first ``left`` to the left, the others to the right.

    Cells are escaped; names that may be long are for the caller to shorten.
    """
    lines = [[escaped(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        gaps = [" " * (w - width(c)) for c, w in zip(cells, widths, strict=True)]
        return "  ".join(c + gap if i < left else gap + c for i, (c, gap) in enumerate(zip(cells, gaps))).rstrip()

    return "\n".join([line(lines[0]), line(["-" * w for w in widths]), *map(line, lines[1:])])


def human_bytes(count: float) -> str:
    """A byte count in the unit a person would choose: ``131 GB``, ``1.5 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"


def seconds_text(seconds: float) -> str:
    """Seconds with the unit that suits them, three digits."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (36000.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def duration(seconds: float) -> str:
    """Seconds as people read them: 0.8 s, 42 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def parse_bytes(text: str, name: str) -> int:
    """Bytes of a size such as 8GB, 800MB, 1.5TB or 8GiB: units of 1000 or, with ``i``, of 1024.

    Args:
        text: the size.
        name: what it is the size of, for errors.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]{1,2})?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if found is None:
        raise UserError(f"{name} {shown(text)}: not a size such as 8GB, 800MB or 8GiB")
    number, unit, binary = found.groups()
    size = float(number) * (1024 if binary else 1000) ** UNITS[unit or ""]
    if not 1 <= size < 1e18:
        raise UserError(f"{name} {shown(text)}: must be between a byte and a million TB")
    return int(size)
