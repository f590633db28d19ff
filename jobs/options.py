"""The options of the commands that run a model, made of the dataclasses that state them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from cpmpi.engine.options import JobOptions, ModelOptions, spelled
from cpmpi.errors import UserError
from cpmpi.text import counted


class Named(click.Path):
    """A path that is not empty: Python takes the empty one, a shell's unset variable, for the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty; is a variable not set?", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = Named(path_type=Path)
FIRST = ("model", "run", "inputs", "output")  # in help texts


def option_of(each: Field[Any], **changes: Any) -> Callable[..., Any]:
    """The click option of a field of job options; ``changes`` replace what its metadata say."""
    known = each.metadata
    wanted: dict[str, Any] = {}
    if known.get("flag"):
        return click.option(spelled(each.name), is_flag=True, help=known["help"])
    if known.get("repeated"):
        return click.option(
            known["repeated"], each.name, multiple=True, metavar=known.get("metavar", "TEXT"), help=known["help"]
        )
    if each.type == "bool | None":
        return click.option(f"{spelled(each.name)}/--no-{spelled(each.name)[2:]}", default=None, help=known["help"])
    if known["choices"]:
        wanted["type"] = click.Choice(known["choices"])
    elif known["least"] is not None:
        wanted["type"] = click.IntRange(min=known["least"])
    elif each.type.startswith("Path"):
        wanted["type"] = FOLDER
    if known.get("needed"):
        wanted["required"] = True
    elif each.default is not None:
        wanted |= {"default": each.default, "show_default": True}
    if known.get("metavar"):
        wanted["metavar"] = known["metavar"]
    return click.option(spelled(each.name), each.name, **{**wanted, "help": known["help"], **changes})


def job_option(name: str, **changes: Any) -> Callable[..., Any]:
    """The click option of a field of `JobOptions` by its name, for commands that share some; see `option_of`."""
    return option_of(next(each for each in fields(JobOptions) if each.name == name), **changes)


def inputs_of(each: Field[Any]) -> list[Callable[..., Any]]:
    """``--input`` with one or several values, or many after it as a shell expands them."""
    named = click.option(
        "--input", "inputs", required=True, multiple=True, metavar="FILE...", help=each.metadata["help"], type=Named()
    )
    return [named, click.argument("more_inputs", nargs=-1, metavar="", type=Named())]


def options_of(kind: type[ModelOptions], *left_out: str) -> Callable[..., Any]:
    """Add to a command all options of a kind of job, but for some."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        known = {each.name: each for each in fields(kind)}
        added: list[Callable[..., Any]] = []
        for name in (*[n for n in FIRST if n in known], *[n for n in known if n not in FIRST]):
            if name == "inputs":
                added += inputs_of(known[name])
            elif known[name].metadata.get("command_line", True) and name not in left_out:
                added.append(option_of(known[name]))
        for each in reversed(added):
            command = each(command)
        return command

    return add


def asked(kind: type[ModelOptions], options: dict[str, Any]) -> Any:
    """The options of a kind of job from those of the command line.

    Raises:
        AgreedError: a value cannot be; all ranks were given the same.
    """
    from cpmpi.comm.ranks import AgreedError

    if "inputs" in options:
        options["inputs"] = (*options["inputs"], *options.pop("more_inputs"))
    try:
        return kind(command=shlex.join(["cpmpi", *sys.argv[1:]]), **options)
    except UserError as problem:
        raise AgreedError(str(problem)) from None


def run_documents(**options: Any) -> None:
    """Run the main job with the options of the command line, and print its results on rank 0."""
    from cpmpi.comm.ranks import AgreedError
    from cpmpi.engine.report import print_results
    from cpmpi.engine.run import run

    outcome = run(asked(JobOptions, options))
    print_results(outcome)
    if outcome.failed:
        first, of = next(iter(outcome.failed.values())), len(outcome.job.spec.documents)
        raise AgreedError(f"{len(outcome.failed)} of {counted(of, 'document')} failed; the first: {first}")
