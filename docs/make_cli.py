"""Write docs/cli.md, the command line's reference, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from cpmpi.jobs.cli import cli

TARGET = Path(__file__).resolve().parent / "cli.md"


def reference() -> str:
    """The reference as Markdown: the help of every command."""
    names = cli.context_settings["help_option_names"]
    parts = ["# Command line", "Written by `make docs` from the commands themselves."]
    parts += _of("cpmpi", cli, names)
    return "\n\n".join(parts) + "\n"


def _of(title: str, command: click.Command, names: list[str]) -> Iterator[str]:
    """The help of a command and of the commands in it."""
    context = click.Context(command, info_name=title, terminal_width=100, help_option_names=names)
    yield f"## {title}"
    yield f"```\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _of(f"{title} {name}", inner, names)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
