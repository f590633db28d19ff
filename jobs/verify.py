"""``cpmpi verify``: is everything in a run folder what was written?"""

from __future__ import annotations

from pathlib import Path

import click

from cpmpi.run.verify import verify_run
from cpmpi.text import counted, human_bytes


@click.command("verify")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Check sizes, outputs and checksum tables, but do not read the KV.")
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True, help="Threads that read KV.")
def command(run: Path, quick: bool, threads: int) -> None:
    """Check the files of RUN: a line for every problem, and exit status 1 if there is one."""
    found = verify_run(run, quick=quick, threads=threads)
    for problem in found.problems:
        click.echo(problem)
    if found.problems:
        raise SystemExit(1)
    parts = [counted(found.documents, "document")]
    if found.shards:
        kv = f"{human_bytes(found.kv_bytes)} of KV" if not quick else "no KV read"
        parts += [counted(found.shards, "shard"), kv]
    click.echo(f"{run}: ok ({', '.join(parts)})")
