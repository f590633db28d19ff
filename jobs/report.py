"""``cpmpi report``: a run as one HTML page, and its plots as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpmpi.errors import UserError, some
from cpmpi.jobs.options import FOLDER
from cpmpi.text import counted, human_bytes, shown

if TYPE_CHECKING:
    from cpmpi.run.reader import Document


@click.command(name="report")
@click.argument("run", type=FOLDER)
@click.option("--output", type=FOLDER, metavar="FILE.html", help="The page.  [default: RUN/report/report.html]")
@click.option("--images", type=FOLDER, metavar="FOLDER", help="Draw each plot as PNG and SVG, too (needs matplotlib).")
@click.option(
    "--documents", "wanted", multiple=True, metavar="WHICH",
    help="Only these: an id, a number as `cpmpi inspect` shows it, or a range such as 0-9. May be given again.",
)  # fmt: skip
@click.option("--trace", type=FOLDER, metavar="FILE", help="What the job's --trace wrote: a timeline in the page.")
@click.option(
    "--tokens", type=click.IntRange(min=0), default=5_000_000, show_default=True, metavar="COUNT",
    help="Of so many tokens, text and numbers are in the page (some 5 bytes each); of documents beyond, results and "
    "curves.",
)  # fmt: skip
@click.option(
    "--model", type=FOLDER,
    help="Checkpoint folder whose tokenizer gives the tokens' text.  [default: where the run says it was]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
def command(
    run: Path, output: Path | None, images: Path | None, wanted: tuple[str, ...], trace: Path | None, tokens: int,
    model: Path | None, overwrite: bool,
) -> None:  # fmt: skip
    """Write RUN as one HTML page that needs no network: its documents, curves, texts coloured by surprisal, the time
    and the machine. Prints its path."""
    from cpmpi.report.report import ReportOptions, report
    from cpmpi.run.reader import open_run

    with open_run(run) as opened:
        places = chosen(opened.documents, wanted)
    options = ReportOptions(
        run=run, output=output, images=images, documents=places, trace=trace, tokens=tokens, model=model,
        overwrite=overwrite,
    )  # fmt: skip
    page, pictures = report(options, lambda line: click.echo(line, err=True))
    click.echo(f"{shown(page)}: {counted(len(places), 'document')}, {human_bytes(page.stat().st_size)}")
    if images is not None:
        click.echo(f"{shown(images)}: {counted(len(pictures), 'picture')}")


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
