"""``cpmpi import``: a run of keys and values that were computed elsewhere."""

from __future__ import annotations

from typing import Any

import click

from cpmpi.engine.options import ImportOptions
from cpmpi.jobs.options import Named, asked, options_of
from cpmpi.text import counted, shown


@click.command(name="import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=Named())
@options_of(ImportOptions)
def command(**options: Any) -> None:
    """Make a run of safetensors files with keys and values, a document each, to extend and to generate from.

    A file has token_ids, layers.0.key, layers.0.value and so on, as `cpmpi export` writes them. The model computes each
    document's last token again and compares; without log-probabilities in the file there are none in the run.
    """
    from cpmpi.engine.import_kv import import_kv

    wanted: ImportOptions = asked(ImportOptions, options)
    done = import_kv(wanted)
    if done.ranks.is_root:
        tokens = sum(file.n_tokens for file in done.files)
        click.echo(f"{counted(len(done.files), 'document')}, {counted(tokens, 'token')}")
        click.echo(f"run folder: {shown(wanted.output)}")
