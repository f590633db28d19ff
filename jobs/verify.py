"""``cpmpi verify``: is everything in a run folder what was written? And, on request, have it so again."""

from __future__ import annotations

from pathlib import Path

import click

from cpmpi.errors import UserError
from cpmpi.run.verify import Verification, verify_run
from cpmpi.text import counted, human_bytes


@click.command("verify")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Check sizes, outputs and checksum tables, but do not read the KV.")
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True, help="Threads that read KV.")
@click.option("--repair", "mend", is_flag=True, help="Compute again what is damaged; under mpirun, on any ranks.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR",
              help="With --repair: the checkpoint that made the run.  [default: where it was then]")  # fmt: skip
def command(run: Path, quick: bool, threads: int, mend: bool, model: Path | None) -> None:
    """Check the files of RUN: a line for every problem, and exit status 1 if there is one."""
    if model is not None and not mend:
        raise UserError("--model is for --repair")
    if mend:
        found, speaks = _repaired(run, model)
    else:
        found, speaks = verify_run(run, quick=quick, threads=threads), True
    for problem in found.problems if speaks else ():
        click.echo(problem)
    if found.problems and mend:
        from cpmpi.comm.ranks import AgreedError

        raise AgreedError(f"{run}: {counted(len(found.problems), 'problem')} left")
    if found.problems:
        raise SystemExit(1)
    parts = [counted(found.documents, "document")]
    if found.shards:
        kv = f"{human_bytes(found.kv_bytes)} of KV" if not quick or mend else "no KV read"
        parts += [counted(found.shards, "shard"), kv]
    if speaks:
        click.echo(f"{run}: ok ({', '.join(parts)})")


def _repaired(run: Path, model: Path | None) -> tuple[Verification, bool]:
    """What is found after the repair, and whether this rank says so."""
    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import start
    from cpmpi.engine.repair import repair

    ranks = start()
    return repair(run, model, ranks, Progress(enabled=ranks.is_root)), ranks.is_root
