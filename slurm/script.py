"""The text of a batch script: a pure function of the request and the command; readable, and to be run by hand too.

Every value is quoted, for the shell in the body and for sbatch's own reader in the lines with its options.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from cpmpi.slurm.request import BatchRequest, slurm_time

TASK = "%a"  # in a word of the command: the index of the array's task, as in Slurm's own file names
STATE_SAVED = 75  # EX_TEMPFAIL of sysexits.h: stopped with the state saved, the same command goes on

TRAP = """\
# Slurm tells this shell alone when the end is near (--signal) or the job is preempted. It goes on to the ranks as
# SIGUSR1: SIGTERM would make srun kill them at once.
ranks=
trap 'told=1; [ -z "$ranks" ] || kill -s USR1 "$ranks"' USR1 TERM
"""
WAIT = """\
# A signal ends the wait but not the ranks, so we wait once more.
ranks=$!
told=1
while [ -n "$told" ]; do
  told=
  wait "$ranks"
  status=$?
done
trap - USR1 TERM
"""
REQUEUE = """\
# State saved: into the queue again, unless the job was cancelled meanwhile.
if [ "$status" = {saved} ] && [ "$(squeue --noheader --jobs "$this" --format %T)" = RUNNING ]; then
  echo "stopped with its state saved, after ${{SLURM_RESTART_COUNT:-0}} requeues: requeue $this"
  scontrol requeue "$this" && sleep 60  # until Slurm ends this shell
fi
"""


def render(
    request: BatchRequest,
    words: Sequence[str],
    *,
    folder: str | None,
    log: str,
    head: Sequence[str] = (),
    offset: int = 0,
) -> str:  # fmt: skip
    """The batch script.

    Args:
        request: what to ask Slurm for.
        words: the command after ``cpmpi``, a word each, such as ``prefill``, ``--model``, ``DIR``. In an array, ``%a``
            in a word becomes the index of the task.
        folder: absolute path of the folder to run in; None for the one that it is submitted from.
        log: path of Slurm's log file, with its own patterns (``%j``); its folder must be there.
        head: lines of comment for the reader.
        offset: what the indices of this array's tasks lack, where a large array was split.

    Raises:
        ValueError: a value or word has more than one line.
    """
    for text in (*words, *head, folder or "", log):
        if "\n" in text or "\r" in text or "\0" in text:
            raise ValueError(f"{text!r}: must be one line to go into a batch script")
    lines = ["#!/bin/bash", *(f"# {line}" for line in head)]
    lines += [f"#SBATCH {option}" for option in sbatch_options(request, folder, log)]
    if request.setup:
        lines += ["", "# This site's modules and environments", *request.setup]
    lines += ["", "set -u"]
    if request.cpus_per_task is not None:
        lines += ["", f"export OMP_NUM_THREADS={request.cpus_per_task}"]
    this = "${SLURM_JOB_ID}"
    if request.array is not None:
        this = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
        added = f" + {offset}" if offset else ""
        lines += ["", f"task=$((SLURM_ARRAY_TASK_ID{added}))"]
    lines += ["", f'this="{this}"', "", *_command(request, words), WAIT.rstrip()]
    if request.requeue:
        lines += [REQUEUE.format(saved=STATE_SAVED).rstrip()]
    return "\n".join([*lines, 'exit "$status"']) + "\n"


def sbatch_options(request: BatchRequest, folder: str | None, log: str) -> Iterator[str]:
    """The options of sbatch, each as it stands in its line."""
    limit = request.time_s
    options = {
        "job-name": request.job_name,
        "chdir": folder,
        "output": log,
        "open-mode": "append",  # a requeued job goes on in its log
        "account": request.account,
        "partition": request.partition,
        "qos": request.qos,
        "constraint": request.constraint,
        "reservation": request.reservation,
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks_per_node,
        "cpus-per-task": request.cpus_per_task,
        "gpus-per-node": request.gpus_per_node,
        "mem": request.memory,
        "time": None if limit is None else slurm_time(limit),
        "array": request.array,
        "dependency": request.dependency,
        "signal": f"B:USR1@{request.signal_s}" if request.signal_s else None,
    }
    for name, value in options.items():
        if value is not None:
            yield f"--{name}={for_sbatch(str(value))}"
    yield "--requeue" if request.requeue else "--no-requeue"
    yield from (for_sbatch(option) for option in request.sbatch)


def for_sbatch(value: str) -> str:
    """A value quoted for sbatch's reader, which takes a backslash as an escape also between single quotes."""
    return shlex.quote(value.replace("\\", "\\\\"))


def _command(request: BatchRequest, words: Sequence[str]) -> Iterator[str]:
    """The job as an array of words, an option a line, and its start in the background."""
    yield "job=("
    line = shlex.join([*shlex.split(request.container or ""), *shlex.split(request.command)])
    for word in words:
        if word.startswith("--"):
            yield f"  {line}"
            line = ""
        line += (" " if line else "") + _quote(word, array=request.array is not None)
    yield f"  {line}"
    yield ")"
    yield ""
    yield from TRAP.splitlines()
    starter, *options = shlex.split(request.launcher) or [""]
    if starter.endswith("srun") and request.cpus_per_task is not None:
        options.append(f"--cpus-per-task={request.cpus_per_task}")  # not inherited from Slurm 22.05 on
    launch = shlex.join([starter, *options]) if starter else ""
    if starter.endswith(("mpirun", "mpiexec")):
        yield "export SLURM_MPI_TYPE=none  # mpirun starts its own daemons through srun"
        launch += "" if {"-n", "-np"} & {*options} else ' -n "$SLURM_NTASKS"'
    yield f'{launch} "${{job[@]}}" &'.lstrip()


def _quote(word: str, *, array: bool) -> str:
    if not array or TASK not in word:
        return shlex.quote(word)
    return '"$task"'.join(shlex.quote(part) if part else "" for part in word.split(TASK))
