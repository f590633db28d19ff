"""Hand batch scripts to Slurm, and keep a record of the jobs in the run's log folder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpmpi.slurm import record
from cpmpi.slurm.commands import SlurmError, slurm
from cpmpi.slurm.request import Array, BatchRequest
from cpmpi.slurm.script import TASK, render
from cpmpi.slurm.site import accounts, partitions

SCRIPT = "job.sbatch"


@dataclass(frozen=True, kw_only=True)
class Script:
    """One batch script: the text, and the file that it goes to."""

    path: Path
    text: str


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What was submitted: jobs, their scripts and logs (with Slurm's patterns for tasks), and what there is to say."""

    job_ids: tuple[str, ...]
    logs: tuple[Path, ...]
    scripts: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def log_folder(output: str, folder: Path, *, array: bool) -> Path:
    """Where the logs of a job with this ``--output`` go: into the run, for an array's tasks beside their runs."""
    if array and TASK in output:
        return folder / Path(output[: output.index(TASK)] + "x").parent / "log"
    return folder / output / "log"


def scripts(
    request: BatchRequest, words: Sequence[str], *, output: str, folder: Path, head: Sequence[str] = (),
    array_size: int | None = None,
) -> tuple[list[Script], list[str]]:  # fmt: skip
    """The batch scripts of a job, several where its array has indices from ``array_size`` on; and what to say of it.

    Args:
        request, words, head: see `cpmpi.slurm.script.render`.
        output: the run folder as the command has it; ``%a`` in it is the index of an array's task.
        folder: absolute path of the folder to run in.
        array_size: Slurm's ``MaxArraySize``.

    Raises:
        ValueError: a name that Slurm cannot take.
    """
    logs = log_folder(output, folder, array=request.array is not None)
    if "\\" in str(logs):
        raise ValueError(f"{logs}: Slurm makes no log files in folders with a backslash in their names")
    place = str(logs).replace("%", "%%")
    if request.array is None:
        text = render(request, words, folder=str(folder), log=f"{place}/slurm-%j.out", head=head)
        return [Script(path=logs / SCRIPT, text=text)], []
    parts = [(0, Array.parse(request.array))]
    if array_size is not None and max(parts[0][1].indices) >= array_size:
        parts = parts[0][1].split(array_size)
    made = []
    for offset, array in parts:
        path = logs / (SCRIPT if len(parts) == 1 else f"{Path(SCRIPT).stem}-{offset}.sbatch")
        text = render(
            request | {"array": str(array)}, words, folder=str(folder), log=f"{place}/slurm-%A_%a.out", head=head,
            offset=offset,
        )  # fmt: skip
        made.append(Script(path=path, text=text))
    notes = []
    if len(parts) > 1:
        notes.append(
            f"array {request.array}: Slurm takes indices below {array_size} here (MaxArraySize), so it is submitted "
            f"as {len(parts)} arrays; %a in the command counts on, and a limit after % holds for each of them"
        )
    return made, notes


def submit(made: Sequence[Script], request: BatchRequest) -> list[str]:
    """Write the scripts, hand them to sbatch, note the jobs; the jobs' numbers.

    Raises:
        SlurmError: there is no Slurm, or it refuses the job: with its own message, and the partitions or accounts
            that there are.
        OSError: the log folder cannot be written to.
    """
    jobs: list[str] = []
    for script in made:
        script.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = script.path.with_suffix(".tmp")
        temporary.write_text(script.text, encoding="utf-8")
        os.replace(temporary, script.path)
        try:
            printed = slurm("sbatch", "--parsable", str(script.path))
        except SlurmError as problem:
            done = f" (jobs {', '.join(jobs)} are submitted)" if jobs else ""
            raise SlurmError(f"{problem}{choices(str(problem), request)}{done}") from None
        jobs.append(printed.strip().splitlines()[-1].split(";")[0])
        record.note(script.path.parent, job=jobs[-1], script=script.path.name, requeue=request.requeue,
                    submitted=int(time.time()))  # fmt: skip
    return jobs


def choices(problem: str, request: BatchRequest) -> str:
    """What there is, where Slurm's refusal is about a partition or an account."""
    if "partition" in problem.lower() or "account" in problem.lower():
        try:
            names = [p.name for p in partitions()]
        except SlurmError:
            return ""
        missing = {*(request.partition or "").split(",")} - {"", *names}
        words = [f"no partition {', '.join(sorted(missing))} here"] if missing else []
        words += [f"the partitions are {', '.join(names)}"]
        charged = accounts()
        words += [f"your accounts are {', '.join(charged)}"] if charged else []
        return f" ({'; '.join(words)})"
    return ""
