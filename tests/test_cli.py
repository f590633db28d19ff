"""The command line: every command and option is documented, the reference is current, the README's commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from cpmpi.jobs.cli import COMMANDS, cli

from .conftest import ROOT


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help, name
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help or isinstance(option.type, click.Choice | click.IntRange), f"{name} {option.name}"
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output


def test_reference_is_current():
    """Written in a process of its own: click keeps the help option that a command was first asked with."""
    code = "import make_cli; print(make_cli.reference(), end='')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", env=environment, capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "cli.md").read_text() == done.stdout, "run `make docs`"


def test_help_lists_every_command():
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", result.output, re.M), name


def test_every_command_accepts_debug_even_those_in_groups():
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        inner = list(command.commands) if isinstance(command, click.Group) else []
        for line in ([name], *([name, one] for one in inner)):
            result = CliRunner().invoke(cli, [*line, "--debug", "--help"])
            assert result.exit_code == 0, result.output
            assert result.output.count("--debug") == 1, line
