"""``cpmpi extend``: score what may follow stored documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cpmpi.engine.options import ExtendOptions
from cpmpi.jobs.options import asked, options_of
from cpmpi.text import counted, duration, shown, table

if TYPE_CHECKING:
    from cpmpi.engine.append import Appended
    from cpmpi.run.scores import Row

MOST_ROWS, NAME_WIDTH = 40, 50


@click.command(name="extend")
@options_of(ExtendOptions)
def command(**options: Any) -> None:
    """Score what may follow stored documents, which are not computed again.

    Every continuation becomes, in a run folder of its own, a log-probability for each of its tokens given the whole
    stored document; scores.csv has a line for each, and says of several answers which is best. With --append texts
    become a part of their documents instead.
    """
    from cpmpi.engine.continuations import extend

    wanted: ExtendOptions = asked(ExtendOptions, options)
    if wanted.append:
        append(wanted)
        return
    done = extend(wanted)
    if done.job.ranks.is_root:
        click.echo(rows_text(done.rows))
        click.echo(f"{counted(len(done.rows), 'continuation')} in {duration(done.seconds)}")
        click.echo(f"run folder: {shown(wanted.output or '')}")


def append(wanted: ExtendOptions) -> None:
    """Append texts to the stored documents, and say which."""
    from cpmpi.engine import append

    done = append.append(wanted)
    if done.ranks.is_root:
        if done.texts:
            click.echo(appended_text(done.texts))
        before = f", {done.before} were there already" * bool(done.before)
        click.echo(f"{counted(len(done.texts), 'text')} appended{before}, in {duration(done.seconds)}")
        click.echo(f"run folder: {shown(wanted.run)}")


def appended_text(texts: Sequence[Appended]) -> str:
    """What was appended as a table, or the first of much."""
    lines = []
    for text in texts[:MOST_ROWS]:
        numbers = f"{text.n_tokens:,}", f"{text.logprob:.6g}", f"{text.total:,}"
        lines.append((shown(text.id, NAME_WIDTH), shown(text.document, NAME_WIDTH), *numbers))
    words = table(("text", "document", "tokens", "log-probability", "document's tokens"), lines, left=2)
    more = len(texts) - MOST_ROWS
    return words + (f"\n... and {more:,} more" if more > 0 else "")


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
