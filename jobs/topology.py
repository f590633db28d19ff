"""``cpmpi topology``: what the machine is, measured, saved and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpmpi.errors import UserError

if TYPE_CHECKING:
    from cpmpi.topology.describe import Topology


@click.command("topology")
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
    if read_file is not None and synthetic is not None:
        raise UserError("give --read or --synthetic, not both")
    if plot_file is not None:
        from cpmpi.topology.plot import require_matplotlib

        with told_to_the_user():
            require_matplotlib(plot_file)
    if synthetic is not None:
        from cpmpi.jobs.cli import first_of_launch
        from cpmpi.topology.synthetic import synthetic as generate

        with told_to_the_user():
            topology = generate(synthetic)
        if first_of_launch():
            show(topology, json_file, plot_file, quiet)
        return

    from cpmpi.comm.ranks import AgreedError, start
    from cpmpi.topology.discover import discover, require_match

    ranks = start()
    try:
        if read_file is None:
            topology = discover(ranks.comm, measure=measure, leaf_file=leaf_file)
        else:
            topology = ranks.on_root(load, read_file)
            if ranks.size > 1:
                require_match(ranks.comm, topology)
    except ValueError as error:
        raise AgreedError(str(error)) from error
    ranks.on_root(show, topology, json_file, plot_file, quiet)


def load(path: Path) -> Topology:
    """The description in a file.

    Raises:
        UserError: it cannot be read or is none.
    """
    from cpmpi.topology.describe import Topology

    with told_to_the_user():
        return Topology.load(path)


def show(topology: Topology, json_file: Path | None, plot_file: Path | None, quiet: bool) -> None:
    """Print a description, save it and draw it, as asked for.

    Raises:
        UserError: a file cannot be written.
    """
    from cpmpi.topology.text import summary

    with told_to_the_user():
        if not quiet:
            click.echo(summary(topology))
        if json_file is not None:
            topology.save(json_file)
        if plot_file is not None:
            from cpmpi.topology.plot import draw

            draw(topology, plot_file)


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """``cpmpi.topology`` stands on nothing of ours: its ValueErrors become errors of the command line here."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
