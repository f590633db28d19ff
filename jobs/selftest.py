"""``cpmpi bench selftest``: what a job needs, tried on the ranks of this launch."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpmpi.errors import UserError, told_to_the_user
from cpmpi.jobs.options import job_option
from cpmpi.version import __version__

if TYPE_CHECKING:
    from cpmpi.engine.selftest import Check, Machine

FILE = click.Path(path_type=Path)


@click.command("selftest")
@job_option("device")
@click.option("--folder", type=FILE, default=Path(), show_default="this folder",
              help="Where runs will lie: a file system that all nodes see.")  # fmt: skip
@click.option("--leaf-file", type=FILE, help="Nodes by switch, in the format of topology.conf.")
@click.option("--json", "json_file", type=FILE, help="Save the results, to attach to a report.")
def command(device: str, folder: Path, leaf_file: Path | None, json_file: Path | None) -> None:
    """Try kernels, messages, every schedule, the file system and a short job, each against one process.

    For a machine that is new to you. The exit status is 0 where all that could be tried went well.
    """
    from cpmpi.comm import ranks as launched
    from cpmpi.comm.device import choose_device, set_threads
    from cpmpi.comm.ranks import AgreedError
    from cpmpi.engine.selftest import FAILED, Machine, selftest
    from cpmpi.jobs.topology import described

    ranks = launched.start()
    ranks.on_root(_check_place, json_file)
    on = ranks.together(choose_device, ranks, device)
    set_threads(ranks)
    place = Path(ranks.on_root(_made, folder))
    try:
        topology = described(ranks, None, leaf_file)
        machine = Machine(ranks=ranks, device=on, topology=topology, folder=place)
        checks = selftest(machine, _show if ranks.is_root else lambda check: None)
        ranks.comm.Barrier()
    finally:
        if ranks.is_root:
            shutil.rmtree(place, ignore_errors=True)
    ranks.on_root(_save, json_file, machine, checks)
    failed = [check.name for check in checks if check.outcome == FAILED]
    if failed:
        raise AgreedError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    if ranks.is_root:
        click.echo("all that could be tried went well")


def _check_place(json_file: Path | None) -> None:
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: no folder {json_file.parent}")


def _made(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    with told_to_the_user(f"--folder {folder}: ", (OSError,)):
        return tempfile.mkdtemp(prefix="cpmpi-selftest-", dir=folder.resolve())


def _show(check: Check) -> None:
    click.echo(f"{check.outcome:<8}  {check.name:<20}  {check.told}")


def _save(json_file: Path | None, machine: Machine, checks: list[Check]) -> None:
    """Results, versions and the machine's description, for people who were not there."""
    if json_file is None:
        return
    import torch
    import transformers
    from mpi4py import MPI

    facts: dict[str, Any] = {
        "cpmpi": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__, "mpi": MPI.Get_library_version().strip(" \n\0"),
        "ranks": machine.ranks.size, "device": machine.device.type, "checks": [asdict(check) for check in checks],
        "topology": json.loads(machine.topology.to_json()),
    }  # fmt: skip
    json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
