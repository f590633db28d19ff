"""``cpmpi report``: a picture of every document of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "folder", type=click.Path(path_type=Path), help="Folder for the pictures.  [default: RUN/report]")
def command(run: Path, folder: Path | None) -> None:
    """Draw the surprisal along each finished document of RUN, one PNG each, and print their paths."""
    from cpmpi.run.paths import RunPaths
    from cpmpi.run.reader import open_run
    from cpmpi.run.surprisal import draw_surprisal

    folder = folder or RunPaths(run).report
    with open_run(run) as opened:
        for i, document in enumerate(opened.documents):
            if not document.complete:
                why = f"failed: {document.failed}" if document.failed else "is not finished"
                click.echo(f"document {document.id!r} {why}", err=True)
                continue
            if document.n_tokens < 2:
                click.echo(f"document {document.id!r} has one token: there is no surprisal to draw", err=True)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"surprisal-{i:06d}.png"
            title = f"{document.id}: {document.n_tokens:,} tokens, perplexity {document.perplexity:.3f}"
            draw_surprisal(document, path, title)
            click.echo(f"{path}")
