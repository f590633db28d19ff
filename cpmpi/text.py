"""Words and numbers for people: plain tables, sizes, times."""

from __future__ import annotations

from collections.abc import Sequence

from cpmpi.errors import UserError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """The rows under their header, columns aligned: the first ``left`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


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
    """Bytes of a size such as 8GB, 800MB or 1.5TB; ``name`` says in errors what it is the size of.

    Raises:
        UserError: it is no size.
    """
    number = text.strip().lower().removesuffix("b")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = float(number.removesuffix(unit)) * UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"{name} {text}: not a size such as 8GB or 800MB") from None
    if not 0 < size < float("inf"):
        raise UserError(f"{name} {text}: must be more than nothing")
    return int(size)


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 rank, 2 ranks."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
