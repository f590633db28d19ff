"""``cpmpi extend``: score what may follow stored documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cpmpi.engine.options import ExtendOptions
from cpmpi.jobs.options import asked, options_of
from cpmpi.text import counted, duration, shown, table

if TYPE_CHECKING:
    from cpmpi.run.scores import Row

MOST_ROWS, NAME_WIDTH = 40, 50


@click.command(name="extend")
@options_of(ExtendOptions)
def command(**options: Any) -> None:
    """Score what may follow stored documents, which are not computed again.

    Every continuation becomes, in a run folder of its own, a log-probability for each of its tokens given the whole
    stored document; scores.csv has a line for each, and says of several answers which is best.
    """
    from cpmpi.engine.continuations import extend

    wanted: ExtendOptions = asked(ExtendOptions, options)
    done = extend(wanted)
    if done.job.ranks.is_root:
        click.echo(rows_text(done.rows))
        click.echo(f"{counted(len(done.rows), 'continuation')} in {duration(done.seconds)}")
        click.echo(f"run folder: {shown(wanted.output)}")


def rows_text(rows: Sequence[Row]) -> str:
    """The scores as a table, or the first of many."""
    lines = []
    for row in rows[:MOST_ROWS]:
        numbers = f"{row.n_tokens:,}", f"{row.logprob:.6g}", f"{row.per_token:.4f}"
        best = "yes" if row.best else ""
        lines.append((shown(row.id, NAME_WIDTH), *numbers, "yes" if row.greedy else "no", best))
    text = table(("continuation", "tokens", "log-probability", "a token", "greedy", "best"), lines, left=1)
    more = len(rows) - MOST_ROWS
    return text + (f"\n... and {more:,} more in scores.csv" if more > 0 else "")
