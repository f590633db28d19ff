"""Slurm's commands, run once each, with their own words passed on where they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

PATIENCE_S = 120


class SlurmError(ValueError):
    """Slurm is not here, or refused; the text is Slurm's own where it gave one."""


def slurm(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        SlurmError: it is not on the PATH, fails, or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"no {command[0]} on the PATH: this is no machine with Slurm, or its module is not loaded "
            "(cpmpi submit --dry-run prints the script all the same)"
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in {PATIENCE_S} s; is the Slurm controller up?") from None
    if done.returncode:
        raise SlurmError(own_words(done.stderr or done.stdout, command))
    return done.stdout


def own_words(text: str, command: Sequence[str]) -> str:
    """The message of a failed command in one line, without the name of the program before each."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in lines]
    return f"{command[0]}: {'; '.join(said) or 'failed without a message'}"
