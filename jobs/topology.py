"""``cpmpi topology``: what the machine is, measured, saved and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpmpi.errors import UserError, told, told_to_the_user

if TYPE_CHECKING:
    from cpmpi.comm.ranks import Ranks
    from cpmpi.topology.describe import Topology

FILE = click.Path(path_type=Path)


@click.command("topology")
@click.option("--json", "json_file", type=FILE, help="Save the description.")
@click.option("--plot", "plot_file", type=FILE, help="Draw it: FILE.png, FILE.svg or FILE.pdf.")
@click.option("--read", "read_file", type=FILE, help="Read a saved description, discover nothing.")
@click.option("--synthetic", metavar="SPEC", help="Generate one, such as nodes=128,gpus=8,leaf=16,machine=dgx-h100.")
@click.option("--leaf-file", type=FILE, help="Nodes by switch, in the format of topology.conf.")
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
    from cpmpi.timeline.files import check_files

    if read_file is not None and synthetic is not None:
        raise UserError("give --read or --synthetic, not both")
    if synthetic is not None:
        from cpmpi.comm.ranks import first_of_launch
        from cpmpi.topology.synthetic import synthetic as generate

        check_files(plot=plot_file, json=json_file)
        topology = told(generate, synthetic)
        if first_of_launch():
            show(topology, json_file, plot_file, quiet)
        return

    from cpmpi.comm.ranks import start

    ranks = start()
    ranks.on_root(check_files, plot=plot_file, json=json_file)
    if read_file is not None and ranks.size == 1:
        from cpmpi.topology.describe import Topology

        topology = told(Topology.load, read_file)
    else:
        topology = described(ranks, read_file, leaf_file, measure=measure)
    ranks.on_root(show, topology, json_file, plot_file, quiet)


def described(ranks: Ranks, saved: Path | None, leaf_file: Path | None, *, measure: bool = True) -> Topology:
    """The saved description, which must be of these ranks, or what is discovered now. Collective.

    Raises:
        AgreedError: on all ranks: a file cannot be read or does not fit.
    """
    from cpmpi.topology.describe import Topology
    from cpmpi.topology.discover import discover, require_match

    if saved is None:
        topology: Topology = ranks.together(told, discover, ranks.comm, measure=measure, leaf_file=leaf_file)
        return topology
    topology = ranks.on_root(told, Topology.load, saved)
    ranks.together(told, require_match, ranks.comm, topology)
    return topology


def show(topology: Topology, json_file: Path | None, plot_file: Path | None, quiet: bool) -> None:
    """Print a description, save it and draw it, as asked for.

    Raises:
        UserError: a file cannot be written.
    """
    from cpmpi.topology.text import summary

    if not quiet:
        click.echo(summary(topology))
    with told_to_the_user(kinds=(OSError,)):
        if json_file is not None:
            topology.save(json_file)
        if plot_file is not None:
            from cpmpi.topology.plot import draw_machine

            draw_machine(topology, plot_file)
