"""``cpmpi report``: a picture of every document of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpmpi.errors import UserError, some
from cpmpi.text import counted, shown

if TYPE_CHECKING:
    from cpmpi.run.reader import Document

TITLE_WIDTH = 70  # of a document's name


@click.command(name="report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "folder", type=click.Path(path_type=Path), help="Folder for the pictures.  [default: RUN/report]")
@click.option(
    "--documents", "wanted", multiple=True, metavar="WHICH",
    help="Draw only these: an id, a number as `cpmpi inspect` shows it, or a range such as 0-9. May be given again.",
)  # fmt: skip
def command(run: Path, folder: Path | None, wanted: tuple[str, ...]) -> None:
    """Draw the surprisal along each finished document of RUN, one PNG each, and print their paths."""
    from cpmpi.run.paths import RunPaths
    from cpmpi.run.reader import open_run
    from cpmpi.run.surprisal import draw_surprisal, require_matplotlib

    require_matplotlib()  # before there is a folder for its pictures
    folder = folder or RunPaths(run).report
    with open_run(run) as opened:
        for i in chosen(opened.documents, wanted):
            document = opened.documents[i]
            if not document.complete:
                why = f"failed: {document.failed}" if document.failed else "is not finished"
                click.echo(f"document '{shown(document.id)}' {why}", err=True)
                continue
            if not document.scored:
                click.echo(f"document '{shown(document.id)}' was imported without log-probabilities", err=True)
                continue
            if document.n_tokens < 2:
                click.echo(f"document '{shown(document.id)}' has one token: there is no surprisal to draw", err=True)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"surprisal-{i:06d}.png"
            name = shown(document.id, TITLE_WIDTH)
            title = f"{name}: {document.n_tokens:,} tokens, perplexity {document.perplexity:.3f}"
            draw_surprisal(document, path, title)
            click.echo(shown(path))


def chosen(documents: Sequence[Document], wanted: Sequence[str]) -> list[int]:
    """The places of the wanted documents in the run's order, all where nothing is named.

    A name that is a document's id means that document, else it is a number or a range of numbers, both ends in it.

    Raises:
        UserError: there is no such document.
    """
    if not wanted:
        return list(range(len(documents)))
    places = {document.id: i for i, document in enumerate(documents)}
    found: set[int] = set()
    for which in wanted:
        numbers = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", which)
        if which in places:
            found.add(places[which])
        elif numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]) < len(documents):
            found.update(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        else:
            ids = some([f"'{shown(id, 40)}'" for id in places])
            last = f"the run has {counted(len(documents), 'document')}, 0 to {len(documents) - 1}"
            raise UserError(f"--documents {shown(which)}: no such document; {last}: {ids}")
    return sorted(found)
