"""Errors that the user can act on, and the words for them."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A problem that the user can act on: one line that names the file, the numbers and the choices."""


def one_line(error: BaseException) -> str:
    """An error's text in one line, at most 300 characters of it."""
    text = " ".join(str(error).split())
    return (text[:300] + "..." if len(text) > 300 else text) or type(error).__name__


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
