"""The command line: one lazily imported module of ``jobs`` per command.

``cpmpi --help`` and the commands that only read files never import torch or start MPI.
"""

from __future__ import annotations

import importlib
import sys

import click

from cpmpi import __version__

# command name -> (module with a click command called `command`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "topology": ("cpmpi.jobs.topology", "what the machine is: discover, measure, save, draw"),
}


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cpmpi")
def cli() -> None:
    """Exact whole-document LLM prefill and scoring as MPI batch jobs."""


def main() -> None:
    """Entry point of the console script."""
    sys.exit(cli.main(standalone_mode=True))
