"""``cpmpi export``: documents of a run for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from cpmpi.choices import EXPORTS
from cpmpi.jobs.options import FOLDER
from cpmpi.text import counted, human_bytes, shown


@click.command(name="export")
@click.argument("run", type=FOLDER)
@click.option(
    "--to", required=True, type=click.Choice(EXPORTS),
    help="transformers, safetensors: keys and values; parquet, csv: a table with a row per token.",
)  # fmt: skip
@click.option(
    "--output", required=True, type=FOLDER, help="The file; for keys and values of several documents, a folder."
)
@click.option(
    "--document", "documents", multiple=True, metavar="ID",
    help="Only this document; may be given again.  [default: all]",
)  # fmt: skip
@click.option(
    "--model", type=FOLDER,
    help="Checkpoint folder whose tokenizer gives the tokens' text.  [default: where the run says it was]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
def command(run: Path, to: str, output: Path, documents: tuple[str, ...], model: Path | None, overwrite: bool) -> None:
    """Write documents of RUN for other tools, with every checksum compared on the way."""
    from cpmpi.engine.export import ExportOptions, export

    options = ExportOptions(run=run, to=to, output=output, documents=documents, model=model, overwrite=overwrite)
    files = export(options, lambda line: click.echo(line, err=True))
    size = human_bytes(sum(file.stat().st_size for file in files))
    click.echo(f"{shown(output)}: {counted(len(files), 'file')}, {size}")
