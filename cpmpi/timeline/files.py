"""The files that options name: checked before any work, written after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cpmpi.errors import UserError, told_to_the_user
from cpmpi.timeline.intervals import Interval, from_chrome_trace, save_trace


def check_files(
    *, plot: Path | None = None, trace: Path | None = None, json: Path | None = None, csv: Path | None = None,
    run_folder: Path | None = None,
) -> None:  # fmt: skip
    """Refuse what could not be written after hours of work. Each file goes by the name of its option.

    Raises:
        UserError: a folder is missing or cannot be written to, a file is a folder or would be in the run's folder, two
            options name one file, or pictures cannot be drawn here.
    """
    given = {"plot": plot, "trace": trace, "json": json, "csv": csv}
    named = {f"--{name}": path for name, path in given.items() if path is not None}
    seen: dict[Path, str] = {}
    for option, path in named.items():
        place, folder = path.absolute(), path.absolute().parent
        if run_folder is not None and run_folder.absolute() in place.parents:
            raise UserError(f"{option} {path}: is in the run folder, which holds a run alone; choose another place")
        if not folder.is_dir():
            raise UserError(f"{option} {path}: no folder {path.parent}")
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; name a file")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{option} {path}: cannot be written to")
        if (other := seen.setdefault(place, option)) != option:
            raise UserError(f"{option} {path}: {other} names the same file")
    if plot is not None:
        from cpmpi.topology.plot import require_matplotlib

        with told_to_the_user("--plot: "):
            require_matplotlib(plot)


def save_files(intervals: Sequence[Interval], *, plot: Path | None, trace: Path | None, title: str) -> None:
    """Write the files that are asked for.

    Raises:
        UserError: the file system refuses.
    """
    with told_to_the_user(kinds=(OSError,)):
        if trace is not None:
            save_trace(intervals, trace)
        if plot is not None and intervals:
            from cpmpi.timeline.plot import draw_timeline

            draw_timeline(intervals, plot, title=title)


def load_trace(path: Path) -> list[Interval]:
    """What a job's ``--trace`` wrote.

    Raises:
        UserError: it cannot be read, or is no such file, or has nothing in it.
    """
    with told_to_the_user(f"--trace {path}: "):
        intervals = from_chrome_trace(path.read_text(encoding="utf-8"))
    if not intervals:
        raise UserError(f"--trace {path}: has no intervals")
    return intervals
