"""Slurm's commands as scripts on the PATH, for tests without a Slurm: they print what a test says and note their calls.

Every command is this file under another name. ``folder/NAME.out`` is what a command prints, ``folder/NAME.err`` what it
fails with. ``srun`` and ``mpirun`` run the command that they are given, once.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = ("sbatch", "squeue", "scontrol", "sinfo", "sacctmgr", "scancel", "srun", "mpirun")
PROGRAM = '#!/bin/sh\nexec {python} {here} {name} {folder} "$@"\n'


class FakeSlurm:
    """The commands in ``folder``, all of them or those of these names; put ``path`` in front of the PATH."""

    def __init__(self, folder: Path, names: Sequence[str] = NAMES) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for name in names:
            program = folder / "bin" / name
            program.write_text(PROGRAM.format(python=sys.executable, here=__file__, name=name, folder=folder))
            program.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def prints(self, name: str, text: str) -> None:
        (self.folder / f"{name}.out").write_text(text)

    def fails(self, name: str, text: str) -> None:
        (self.folder / f"{name}.err").write_text(text)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a command."""
        file = self.folder / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [arguments for called, *arguments in lines if called == name]


def main(name: str, folder: Path, arguments: list[str]) -> int:
    with (folder / "calls").open("a") as calls:
        calls.write(json.dumps([name, *arguments]) + "\n")
    failure, output = folder / f"{name}.err", folder / f"{name}.out"
    if failure.exists():
        sys.stderr.write(failure.read_text())
        return 1
    if name in ("srun", "mpirun") and "--mpi=list" not in arguments:
        while arguments and (arguments[0].startswith("-") or arguments[0].isdigit()):
            arguments = arguments[1:]
        os.execvp(arguments[0], arguments)
    if name == "sbatch" and not output.exists():
        number = 100 + len([line for line in (folder / "calls").read_text().splitlines() if '"sbatch"' in line])
        print(number)
    elif output.exists():
        sys.stdout.write(output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
