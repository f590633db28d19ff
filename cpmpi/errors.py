"""Errors that the user can act on, and the words for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A problem that the user can act on: one line that names the file, the numbers and the choices.

    No ``ValueError``: those are of libraries, of the rooms that stand on the ground (`kernels`, `topology`), or bugs.
    """


@contextmanager
def told_to_the_user(about: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Within it, a library's ValueError or OSError is the user's: the one place where that is decided.

    Put it round a single call of a library, or of a room that stands on the ground and knows no error of ours: round
    more, a bug would be told to the user as theirs.

    Args:
        about: what the text begins with, such as the option that asked for it.
        kinds: of errors that the user can mend.
    """
    try:
        yield
    except kinds as error:
        raise UserError(about + one_line(error)) from error


def told(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The result of ``work(*args, **kwargs)``, a call as `told_to_the_user` takes it."""
    with told_to_the_user():
        return work(*args, **kwargs)


class Stopped(UserError):
    """A job was told to stop, by a signal or a time limit, and did so on all ranks with its state saved."""

    status = 75
    """Exit status of the job (EX_TEMPFAIL): the same command goes on. 1 where that would not help."""
    saved = False
    """Whether a document in work was saved: then the next start gets further."""

    def give_up(self, why: str) -> None:
        """Say that starting it again would end in the same way."""
        self.status = 1
        self.args = (f"{self}; {why}",)


def one_line(error: BaseException) -> str:
    """An error's text in one line, at most 300 characters of it."""
    text = " ".join(str(error).split())
    return (text[:300] + "..." if len(text) > 300 else text) or type(error).__name__


def why(problem: BaseException) -> str:
    """An error in one line that begins with the file, where it is the system's and has one."""
    if isinstance(problem, OSError) and problem.strerror and problem.filename:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem) if isinstance(problem, UserError) else one_line(problem)


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
