"""``cpmpi submit``: write the batch script of a job, ask the planner whether it fits, hand it to Slurm."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from cpmpi.errors import UserError, told_to_the_user
from cpmpi.slurm import profile as profiles
from cpmpi.slurm.commands import SlurmError
from cpmpi.slurm.request import Array, BatchRequest, slurm_time
from cpmpi.slurm.script import TASK
from cpmpi.slurm.site import Partition, largest_index, partitions, write_profile
from cpmpi.slurm.submit import Script, Submission, scripts
from cpmpi.slurm.submit import submit as hand_over
from cpmpi.text import duration
from cpmpi.version import __version__

FILE = click.Path(path_type=Path)
AUTO = "auto"
LEAVE_S = 20  # of the notice, to end in once the state is saved
MOST_NODES = 64  # tried for --nodes auto where no partition tells
OPTIONS = [
    click.option("-J", "--job-name", help="As squeue shows it.  [default: cpmpi]"),
    click.option("-A", "--account", help="Who pays."),
    click.option("-p", "--partition", help="One, or several with commas between them."),
    click.option("-q", "--qos", help="Quality of service."),
    click.option("-C", "--constraint", help="Features that nodes must have."),
    click.option("--reservation", help="A reservation to run in."),
    click.option("-N", "--nodes", metavar="N|auto", help="Nodes; auto: the fewest that fit.  [default: 1]"),
    click.option("--tasks-per-node", "--ntasks-per-node", type=int, help="Ranks on each node.  [default: 1]"),
    click.option("-c", "--cpus-per-task", type=int, help="Cores of each rank."),
    click.option("--gpus-per-node", type=int, help="GPUs of each node."),
    click.option("--mem", "memory", metavar="SIZE", help="Memory of each node, such as 64G; 0: all of it."),
    click.option("-t", "--time", metavar="TIME|auto", help="Time limit: 90m, 12h, 2d or as Slurm writes it."),
    click.option("-a", "--array", metavar="INDICES", help="An array such as 0-99%8; %a in the command is the index."),
    click.option("-d", "--dependency", metavar="JOBS", help="Jobs to wait for, such as afterok:1234."),
    click.option("--signal", "signal_s", type=int, metavar="SECONDS",
                 help="Save the state this long before the time limit; 0: do not.  [default: 120]"),
    click.option("--requeue/--no-requeue", default=None, help="Go on by itself after a stop.  [default: requeue]"),
    click.option("--launcher", metavar="WORDS", help="srun with its --mpi, or mpirun.  [default: srun --mpi=pmix -K1]"),
    click.option("--container", metavar="WORDS", help="Before the command, such as 'apptainer exec image.sif'."),
    click.option("--command", metavar="WORDS", help="How cpmpi is called on the nodes.  [default: cpmpi]"),
    click.option("--setup", multiple=True, metavar="LINE", help="Line of bash before the job: modules, environments."),
    click.option("--sbatch", multiple=True, metavar="OPTION", help="Another option of sbatch, as it stands."),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Made:
    """A job that is ready to be submitted: what is asked for, its scripts, and what there is to say."""

    request: BatchRequest
    scripts: list[Script]
    notes: list[str]
    output: str
    overwrite: bool
    checked: bool
    """Whether the output folder is one that the job would write a run to, and is looked at first."""


def request_options(command: Any) -> Any:
    """Add the options that fill a batch request."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command("submit")
@request_options
@click.option(
    "--profile", type=FILE, help="Site defaults.  [default: $CPMPI_SLURM_PROFILE, ~/.config/cpmpi/slurm.toml]"
)
@click.option("--write-profile", "new_profile", type=FILE, metavar="FILE", help="Look at this site, write a profile.")
@click.option("--hardware", metavar="NAME", help="For the forecast: h100, h200, a100 or cpu.  [default: as asked for]")
@click.option("--force", is_flag=True, help="Submit also what the planner says will not fit.")
@click.option("--dry-run", is_flag=True, help="Print the batch script and submit nothing.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
def command(
    profile: Path | None, new_profile: Path | None, hardware: str | None, force: bool, dry_run: bool,
    words: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Submit a command of cpmpi to Slurm: cpmpi submit -N 4 --time 12h -- prefill --model ... --output RUN

    The batch script goes to RUN/log/job.sbatch: read it, change it, submit it by hand. A job that is stopped by its
    time limit or preempted saves its state, goes back into the queue and goes on. Before it is submitted, memory, time
    and disk are compared with what the planner says.
    """
    if new_profile is not None:
        save_profile(new_profile)
        return
    made = make(words, profile=profile, hardware=hardware, force=force, **options)
    for line in made.notes:
        click.echo(line, err=True)
    if dry_run:
        for script in made.scripts:
            click.echo(script.text, nl=False)
        return
    done = hand_in(made)
    click.echo(describe(done))


def submit(
    words: Sequence[str], *, profile: str | os.PathLike[str] | None = None, hardware: str | None = None,
    force: bool = False, **options: Any,
) -> Submission:  # fmt: skip
    """Submit a command of cpmpi to Slurm, as ``cpmpi submit`` does.

    Args:
        words: the command, such as ``["prefill", "--model", "DIR", "--input", "book.txt", "--output", "RUN"]``.
        profile: site defaults, instead of the user's.
        hardware: for the forecast.
        force: submit also what the planner says will not fit.
        options: fields of `cpmpi.slurm.request.BatchRequest`, such as ``nodes=4, time="12h"``; ``nodes`` and ``time``
            may be ``"auto"``.

    Raises:
        UserError: an option is wrong, the job would not fit, or Slurm refuses it: with Slurm's own message.
    """
    return hand_in(make(words, profile=profile, hardware=hardware, force=force, **options))


def save_profile(path: Path) -> None:
    """Look at the site and write its profile, never over one that is there."""
    if path.exists():
        raise UserError(f"{path}: is there already; choose another name, or delete it first")
    with told_to_the_user():
        text = write_profile()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    click.echo(text, nl=False)
    click.echo(f"written to {path}; used with --profile {path}, or from {profiles.VARIABLE}", err=True)


def make(
    words: Sequence[str], *, profile: str | os.PathLike[str] | None, hardware: str | None, force: bool, **options: Any
) -> Made:
    """The scripts of a job, with the planner's word on it.

    Raises:
        UserError: an option is wrong, or the job would not fit.
    """
    params = parse(words)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    automatic = [name for name in ("nodes", "time") if given.get(name) == AUTO]
    for name in automatic:
        del given[name]
    with told_to_the_user():
        path = Path(profile) if profile is not None else profiles.default_profile()
        values = {} if path is None else profiles.read_profile(path)
        if "nodes" in given:
            given["nodes"] = _count("nodes", given["nodes"])
        request = BatchRequest(**values) | given
    output = str(params.get("output") or params["run"])
    if request.array is not None and TASK not in output and not params.get("share"):
        share = " (or all tasks share one run and its documents, with --share)" if "share" in params else ""
        raise UserError(
            f"--array {request.array}: every task writes a run of its own, so --output must have {TASK}, which becomes "
            f"the task's index: --output {output}-{TASK}{share}"
        )
    request, notes = planned(params, request, hardware, automatic, force=force)
    words = [*words, *grace(words, params, request)]
    line = shlex.join(["cpmpi", *words])
    head = [f"cpmpi {__version__}: {request.nodes} x {request.tasks_per_node} ranks for: {line}",
            "To submit it by hand: sbatch FILE. The same again goes on where it stopped."]  # fmt: skip
    size = _largest_index() if request.array is not None else None
    with told_to_the_user():
        made, more = scripts(request, words, output=output, folder=Path.cwd(), head=head, array_size=size)
    return Made(
        request=request, scripts=made, notes=[*notes, *more], output=output, overwrite=bool(params.get("overwrite")),
        checked="output" in params and TASK not in output,
    )  # fmt: skip


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options of the command to submit, checked as that command does.

    Raises:
        UserError: it is none that runs as a batch job.
    """
    from cpmpi.jobs.cli import COMMANDS, cli

    if not words:
        raise click.UsageError("give the command to submit after --: cpmpi submit [options] -- prefill ...")
    name, *rest = words
    found = cli.get_command(click.Context(cli), name) if name in COMMANDS else None
    if found is None or not {"quiet", "model"} <= {option.name for option in found.params}:
        runs = [n for n in COMMANDS if n in ("prefill", "score", "extend", "generate")]
        raise UserError(f"{name}: no command that runs as a batch job; choose one of {', '.join(runs)}")
    return found.make_context(f"cpmpi {name}", list(rest)).params


def grace(words: Sequence[str], params: dict[str, Any], request: BatchRequest) -> list[str]:
    """The time that Slurm's notice leaves a job to save its state, where the user gave none and the default is another.

    Args:
        words, params: the command, and its options as they were parsed.
        request: what Slurm is asked for.
    """
    given = any(word == "--grace" or word.startswith("--grace=") for word in words)
    left_s = max(1, request.signal_s - LEAVE_S)
    if "grace" not in params or given or not request.signal_s or left_s == params["grace"]:
        return []
    return ["--grace", str(left_s)]


def planned(
    params: dict[str, Any], request: BatchRequest, hardware: str | None, automatic: Sequence[str], *, force: bool
) -> tuple[BatchRequest, list[str]]:
    """The request with nodes and time as the planner sets them, and what it says.

    Raises:
        UserError: the job would not fit, and is not forced.
    """
    if "inputs" not in params or "run" in params:
        if automatic:
            raise UserError(f"--{automatic[0]} auto: the planner knows no job that goes on from stored documents")
        return request, ["no forecast: the planner knows no job that goes on from stored documents"]
    from cpmpi.jobs import forecast as plans

    if request.array is not None:  # the first task stands for all
        first = str(Array.parse(request.array).indices[0])
        params = {**params, "inputs": tuple(item.replace(TASK, first) for item in params["inputs"])}
    here = _partition(request)
    memory = here.memory_mb * plans.MB if here is not None and here.memory_mb > 1 else None
    chip = plans.chip_of(hardware, request, memory)
    work = plans.within(plans.work_of(params), params.get("most_tokens"))
    found = plans.forecast(params, request, chip, work)
    notes = []
    if params.get("share") and request.array is not None:
        tasks = Array.parse(request.array)
        at_once = min(len(tasks.indices), tasks.limit or len(tasks.indices))
        found = replace(found, seconds=found.seconds / at_once)
        notes.append(f"{at_once} tasks at a time share the documents: times are those of a task")
    if "nodes" in automatic:
        most = here.nodes if here is not None else MOST_NODES
        while request.nodes < most and (
            not found.fits or (request.time_s is not None and found.seconds > request.time_s - request.signal_s)
        ):
            request = request | {"nodes": min(most, request.nodes * 2)}
            found = plans.forecast(params, request, chip, work)
        notes.append(f"--nodes auto: {request.nodes} of {most}, the fewest in steps of two with memory and time enough")
    if "time" in automatic:
        limit = plans.own_limit(found.seconds, request.signal_s)
        request = request | {"time": slurm_time(limit)}
        notes.append(f"--time auto: {request.time}, twice the predicted {duration(found.seconds)} and 5 min to start")
    problems = list(plans.refusals(found, request, Path(params["output"]).absolute()))
    if problems and not force:
        raise UserError(f"{'; '.join(problems)} (--force submits it all the same)")
    return request, [*notes, *plans.remarks(found, request), *(f"warning: {problem}" for problem in problems)]


def hand_in(made: Made) -> Submission:
    """Submit what was made.

    Raises:
        UserError: the log folder cannot be written to, or Slurm is not here or refuses.
    """
    from cpmpi.run.folder import check_folder

    if made.checked:
        check_folder(Path(made.output), overwrite=made.overwrite)
    with told_to_the_user():
        jobs = hand_over(made.scripts, made.request)
    folder = made.scripts[0].path.parent
    names = [f"slurm-{job}_%a.out" if made.request.array else f"slurm-{job}.out" for job in jobs]
    return Submission(
        job_ids=tuple(jobs), logs=tuple(folder / name for name in names), notes=tuple(made.notes),
        scripts=tuple(script.path for script in made.scripts),
    )  # fmt: skip


def describe(done: Submission) -> str:
    """What was submitted, where its logs are, and what to run next."""
    lines = [f"job {', '.join(done.job_ids)}"]
    lines += [f"  script {_near(path)}" for path in done.scripts]
    lines += [f"  log    {_near(path)}" for path in done.logs]
    run = shlex.quote(str(_near(done.scripts[0].parent.parent)))
    lines += ["next:", f"  cpmpi status {run} --watch", f"  cpmpi cancel {run}"]
    return "\n".join(lines)


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _count(name: str, text: str | int) -> int:
    if not str(text).isdigit():
        raise ValueError(f"--{name} {text}: a number, or auto")
    return int(text)


def _partition(request: BatchRequest) -> Partition | None:
    """The partition that the job will run in, where Slurm tells."""
    try:
        found = partitions()
    except SlurmError:
        return None
    wanted = (request.partition or "").split(",")[0]
    return next((p for p in found if p.name == wanted or (not wanted and p.default)), None)


def _largest_index() -> int | None:
    try:
        return largest_index()
    except SlurmError:
        return None
