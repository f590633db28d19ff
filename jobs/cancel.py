"""``cpmpi cancel``: end the jobs of a run; what is finished stays."""

from __future__ import annotations

from pathlib import Path

import click

from cpmpi.errors import UserError, told
from cpmpi.run.paths import RunPaths
from cpmpi.slurm import queue, record


@click.command("cancel")
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path) -> None:
    """Cancel the jobs of RUN that wait or run. Finished documents stay, and the same command goes on later."""
    numbers = [str(e["job"]) for e in record.entries(RunPaths(run).log) if e.get("job")]
    if not numbers:
        raise UserError(f"{run}: no record of a job of Slurm ({record.JOBS} in its log folder)")
    jobs = [job for job in queue.of_run(told(queue.my_jobs), numbers) if job.alive]
    if not jobs:
        raise UserError(f"{run}: none of its jobs ({', '.join(dict.fromkeys(numbers))}) waits or runs")
    told(queue.cancel, jobs)
    click.echo(f"cancelled {', '.join(job.name for job in jobs)}")
