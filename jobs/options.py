"""The options of the commands that run documents, made of the one dataclass that states them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from cpmpi.engine.options import JobOptions, spelled

FOLDER = click.Path(path_type=Path)
FIELDS = {each.name: each for each in fields(JobOptions)}
NEEDED = ("model", "output")
INPUTS = (
    click.option(
        "--input", "inputs", required=True, multiple=True, metavar="FILE...", help=FIELDS["inputs"].metadata["help"]
    ),
    click.argument("more_inputs", nargs=-1, metavar=""),
)  # fmt: skip


def option_of(name: str, **changes: Any) -> Callable[..., Any]:
    """The click option of a field of `JobOptions`; ``changes`` replace what its metadata say."""
    each: Field[Any] = FIELDS[name]
    known = each.metadata
    wanted: dict[str, Any] = {}
    if known.get("flag"):
        return click.option(spelled(name), is_flag=True, help=known["help"])
    if each.type == "bool | None":
        return click.option(f"{spelled(name)}/--no-{spelled(name)[2:]}", default=None, help=known["help"])
    if known["choices"]:
        wanted["type"] = click.Choice(known["choices"])
    elif known["least"] is not None:
        wanted["type"] = click.IntRange(min=known["least"])
    elif each.type.startswith("Path"):
        wanted["type"] = FOLDER
    if name in NEEDED:
        wanted["required"] = True
    elif each.default is not None:
        wanted |= {"default": each.default, "show_default": True}
    if known.get("metavar"):
        wanted["metavar"] = known["metavar"]
    return click.option(spelled(name), **{**wanted, "help": known["help"], **changes})


def document_options(*left_out: str) -> Callable[..., Any]:
    """Add the options of the jobs that take a model and documents, but for some."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        names = [n for n, each in FIELDS.items() if each.metadata.get("command_line", True) and n not in left_out]
        model, *others = map(option_of, names)
        for each in reversed((model, *INPUTS, *others)):
            command = each(command)
        return command

    return add


def run_documents(more_inputs: tuple[str, ...], inputs: tuple[str, ...], **options: Any) -> None:
    """Run the main job with the options of the command line, and print its results on rank 0."""
    from cpmpi.engine.report import print_results
    from cpmpi.engine.run import run

    command = shlex.join(["cpmpi", *sys.argv[1:]])
    print_results(run(JobOptions(inputs=(*inputs, *more_inputs), command=command, **options)))
