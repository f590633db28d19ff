"""Write docs/cli.md, the command line's reference, from the commands themselves."""

from __future__ import annotations

from pathlib import Path

import click

from cpmpi.jobs.cli import cli

TARGET = Path(__file__).resolve().parent / "cli.md"


def reference() -> str:
    """The reference as Markdown: the help of every command."""
    names = cli.context_settings["help_option_names"]
    parts = ["# Command line", "Written by `make docs` from the commands themselves."]
    for name in ("", *cli.list_commands(click.Context(cli))):
        command = cli if not name else cli.get_command(click.Context(cli), name)
        assert command is not None
        title = f"cpmpi {name}".strip()
        context = click.Context(command, info_name=title, terminal_width=100, help_option_names=names)
        parts += [f"## {title}", f"```\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
