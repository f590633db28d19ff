"""``cpmpi topology``: what the machine is, measured, saved and drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Save the description.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw it: FILE.png, FILE.svg or FILE.pdf.")
@click.option(
    "--read", "read_file", type=click.Path(path_type=Path), help="Read a saved description, discover nothing."
)
@click.option("--synthetic", metavar="SPEC", help="Generate one, such as nodes=128,gpus=8,leaf=16,machine=dgx-h100.")
@click.option("--leaf-file", type=click.Path(path_type=Path), help="Nodes by switch, in the format of topology.conf.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure links, for two seconds at most.")
@click.option("--quiet", is_flag=True, help="Print no summary.")
def command(
    json_file: Path | None,
    plot_file: Path | None,
    read_file: Path | None,
    synthetic: str | None,
    leaf_file: Path | None,
    measure: bool,
    quiet: bool,
) -> None:
    """Discover and measure the machine under this job; print, save or draw it.

    Run it under mpirun or srun to see all nodes of the job. With --read, a description is checked against the ranks it
    is launched on, unless that is one: reading and drawing need no launcher.
    """
    first = True
    try:
        if read_file is not None and synthetic is not None:
            raise ValueError("give --read or --synthetic, not both")
        if plot_file is not None:
            from cpmpi.topology.plot import require_matplotlib

            require_matplotlib(plot_file)
        if synthetic is not None:
            from cpmpi.topology.synthetic import synthetic as generate

            topology = generate(synthetic)
        else:
            from mpi4py import MPI

            from cpmpi.topology.describe import Topology
            from cpmpi.topology.discover import discover, require_match

            first = MPI.COMM_WORLD.rank == 0
            if read_file is not None:
                topology = Topology.load(read_file)
                if MPI.COMM_WORLD.size > 1:
                    require_match(MPI.COMM_WORLD, topology)
            else:
                topology = discover(MPI.COMM_WORLD, measure=measure, leaf_file=leaf_file)
        if not first:
            return
        if not quiet:
            from cpmpi.topology.text import summary

            click.echo(summary(topology))
        if json_file is not None:
            topology.save(json_file)
        if plot_file is not None:
            from cpmpi.topology.plot import draw

            draw(topology, plot_file)
    except (ValueError, OSError) as error:
        if first:
            click.echo(f"error: {error}", err=True)
        sys.exit(1)
