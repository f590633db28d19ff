"""The files that a timeline is asked for: a picture and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpmpi.errors import UserError
from cpmpi.timeline.intervals import Interval, save_trace


def check_files(*, plot: Path | None, trace: Path | None, run_folder: Path) -> None:
    """Refuse what could not be written after hours of work.

    Raises:
        UserError: a folder is missing, a file would be in the run's folder, or pictures cannot be drawn here.
    """
    for name, path in (("--plot", plot), ("--trace", trace)):
        if path is None:
            continue
        if run_folder.absolute() in path.absolute().parents:
            raise UserError(f"{name} {path}: is in the run folder, which holds a run alone; choose another place")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{name} {path}: no folder {path.parent}")
    if plot is not None:
        from cpmpi.topology.plot import require_matplotlib

        try:
            require_matplotlib(plot)
        except ValueError as problem:
            raise UserError(f"--plot: {problem}") from problem


def save_files(intervals: Sequence[Interval], *, plot: Path | None, trace: Path | None, title: str) -> None:
    """Write the files that are asked for."""
    if trace is not None:
        save_trace(intervals, trace)
    if plot is not None and intervals:
        from cpmpi.timeline.plot import draw

        draw(intervals, plot, title=title)
