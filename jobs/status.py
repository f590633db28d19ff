"""``cpmpi status``: where a submitted run stands: its jobs, its documents, and what went wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cpmpi.errors import UserError
from cpmpi.run.paths import RunPaths
from cpmpi.run.reader import open_run
from cpmpi.slurm import record
from cpmpi.slurm.commands import SlurmError
from cpmpi.slurm.queue import QueuedJob, my_jobs, of_run
from cpmpi.text import duration

MOST_JOBS = 8  # shown one by one
LAST_LINES = 4  # of the log of a failure
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING")
LOST_S = 60  # after so long without a word a job that Slurm does not speak of is taken for dead
SAVED = "stopped with its state saved; submit it again, it goes on"
TOLD = {"at", "finished", "of", "document", "layer", "layers", "tokens", "tokens_per_s"}  # by a job that runs
OUR_ERROR = "error: "  # begins our own line, which names the rank where one failed; Slurm's begin with a program


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of a run, or of all runs of an array: how many are finished and have failed, and of how many."""

    finished: int
    failed: int
    of: int
    runs: int = 1


@click.command("status")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Look again and again until the jobs have ended.")
@click.option("--interval", type=click.FloatRange(min=1), default=10.0, show_default=True, help="Seconds between.")
def command(run: Path, watch: bool, interval: float) -> None:
    """Where RUN stands: its jobs in Slurm, the documents, the one that is being computed, and what went wrong.

    Without Slurm, all that the run folder itself tells. For an array, RUN is the folder that holds the runs.
    """
    while True:
        lines, alive = look(run)
        if watch and sys.stdout.isatty():
            click.echo("\x1b[2J\x1b[H", nl=False)
        click.echo("\n".join(lines))
        if not watch or not alive:
            return
        time.sleep(interval)


def look(folder: Path) -> tuple[list[str], bool]:
    """What there is to say of a run now, and whether anything is still going on.

    Raises:
        UserError: there is neither a run nor the record of one.
    """
    log = RunPaths(folder).log
    entries = record.entries(log)
    documents = documents_of(folder)
    if not entries and documents is None:
        raise UserError(f"{folder}: no run here, and no record of jobs ({record.JOBS} in its log folder)")
    numbers = list(dict.fromkeys(str(e.get("job")) for e in entries if e.get("job")))
    jobs, missing = _queue(numbers)
    status, at_work = _status(log), _at_work(log, jobs)
    alive = any(job.alive for job in jobs) or (not jobs and (bool(at_work) or _seems_alive(entries, status)))
    lines = [f"run        {folder}"]
    lines += [f"jobs       {line}" for line in job_lines(jobs, entries, missing)]
    if at_work:
        lines += [f"documents  {line}" for line in shared_lines(documents, at_work)]
    else:
        lines += [f"documents  {line}" for line in document_lines(documents, status, entries, alive)]
    lines += [f"log        {line}" for line in failure_lines(log, jobs, entries)]
    return lines, alive


def _status(log: Path) -> dict[str, Any] | None:
    """What the job that runs told last; None where that is nothing, or damaged."""
    found = record.read_status(log)
    return found if found is not None and found.keys() >= TOLD else None


def _queue(numbers: Sequence[str]) -> tuple[list[QueuedJob], str | None]:
    """The jobs of these numbers, and why Slurm could not be asked."""
    if not numbers:
        return [], None
    try:
        return of_run(my_jobs(), numbers), None
    except SlurmError as problem:
        return [], str(problem).split(":")[0]


def _seems_alive(entries: Sequence[record.Entry], status: dict[str, Any] | None) -> bool:
    """Without Slurm's word: whether the last start has no end, and its status was written lately."""
    last = next((e for e in reversed(entries) if "started" in e or "ended" in e), {})
    return "started" in last and status is not None and time.time() - status["at"] < LOST_S


def _at_work(log: Path, jobs: Sequence[QueuedJob]) -> list[dict[str, Any]]:
    """What the jobs say that share the documents and are at work: they run in Slurm, or spoke lately."""
    running = {job.name for job in jobs if job.state in RUNNING}
    asleep = {job.name for job in jobs} - running
    found = [status for status in record.shared_statuses(log) if status.keys() >= {"job", *TOLD}]
    return [s for s in found if s["job"] in running or (s["job"] not in asleep and time.time() - s["at"] < LOST_S)]


def documents_of(folder: Path) -> Documents | None:
    """How many documents are finished; None where there is no run yet."""
    folders = [folder] if RunPaths(folder).index.exists() else []
    if not folders and folder.is_dir():
        folders = [p for p in sorted(folder.iterdir()) if RunPaths(p).index.exists()]
    if not folders:
        return None
    counts = [_count(one) for one in folders]
    finished, failed, of = (sum(column) for column in zip(*counts, strict=True))
    return Documents(finished=finished, failed=failed, of=of, runs=len(folders))


def _count(folder: Path) -> tuple[int, int, int]:
    """Finished and failed documents of a run, and all; by its last word where the job just writes ``run.h5``."""
    try:
        with open_run(folder) as opened:
            ends = [(document.complete, bool(document.failed)) for document in opened.documents]
    except (OSError, UserError):
        last = _status(RunPaths(folder).log)
        if last is None:
            raise
        return last["finished"], 0, last["of"]
    return sum(complete for complete, _ in ends), sum(failed for _, failed in ends), len(ends)


def job_lines(jobs: Sequence[QueuedJob], entries: Sequence[record.Entry], missing: str | None) -> Iterator[str]:
    """A line for each job, or for each state where there are many."""
    started = {str(e.get("job")) for e in entries if "started" in e}
    comes_back = {str(e.get("job")): bool(e.get("requeue", True)) for e in entries if "submitted" in e}
    saved = _saved(entries)
    words = [(j, j.words(started=j.name in started, requeue=comes_back.get(j.family, True))) for j in jobs]
    words = [(j, SAVED if j.state == "FAILED" and j.name in saved else text) for j, text in words]
    if len(words) > MOST_JOBS:
        states = [job.state for job, _ in words]
        yield f"{len(words)}: " + ", ".join(f"{states.count(s)} {s.lower()}" for s in dict.fromkeys(states))
        return
    yield from (f"{job.name}: {text}" for job, text in words)
    if not jobs:
        yield from _from_record(entries, missing)


def _saved(entries: Sequence[record.Entry]) -> set[str]:
    """The jobs that ended by themselves with their state saved, which Slurm calls failed."""
    last = {str(e.get("job")): e for e in entries if "ended" in e}
    return {n for n, e in last.items() if e.get("how") == "stopped" and (e.get("saved") or e.get("finished_here"))}


def _from_record(entries: Sequence[record.Entry], missing: str | None) -> Iterator[str]:
    """The last job by what the run folder tells."""
    if not entries:
        yield "no record of any"
        return
    last = entries[-1]
    name = last.get("job") or f"on {last.get('node', 'this machine')}, without Slurm"
    unknown = f"{missing}" if missing else "Slurm knows it no more"
    if "ended" in last:
        how = {"complete": "ended well", "stopped": "stopped with its state saved; the same command goes on"}
        yield f"{name}: {how.get(last.get('how', ''), 'failed')}" + (f" ({last['why']})" if last.get("why") else "")
    elif "started" in last:
        hint = f"; {unknown}" if last.get("job") else ""
        yield f"{name}: started {_ago(last['started'])}, no word of its end: running, or killed{hint}"
    else:
        yield f"{name}: submitted {_ago(last.get('submitted', 0))}; {unknown}"


def document_lines(
    documents: Documents | None, status: dict[str, Any] | None, entries: Sequence[record.Entry], alive: bool
) -> Iterator[str]:
    """Finished, running, waiting and failed ones, and how far the running one is."""
    if documents is None:
        yield "none yet: the run has not begun"
        return
    last = next((e for e in reversed(entries) if "started" in e or "ended" in e), {})
    left_over = documents.of - documents.finished - documents.failed
    running = int(alive and status is not None and "started" in last and left_over > 0)
    runs = f" in {documents.runs} runs" if documents.runs > 1 else ""
    counts = f"{documents.finished} of {documents.of} finished{runs}"
    others = ((running, "running"), (left_over - running, "waiting"), (documents.failed, "failed"))
    yield counts + "".join(f", {count} {word}" for count, word in others if count)
    if running and status is not None:
        yield _progress(status, of="all")


def shared_lines(documents: Documents | None, at_work: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The counts, and a line for each job that shares the documents."""
    if documents is None:
        yield "none yet: the run has not begun"
        return
    waiting = max(0, documents.of - documents.finished - documents.failed - len(at_work))
    others = ((len(at_work), "running"), (waiting, "waiting"), (documents.failed, "failed"))
    counts = f"{documents.finished} of {documents.of} finished"
    yield counts + "".join(f", {count} {word}" for count, word in others if count)
    for status in at_work[:MOST_JOBS]:
        yield f"{status['job']}: {_progress(status, of='it')}"
    if len(at_work) > MOST_JOBS:
        yield f"... and {len(at_work) - MOST_JOBS} more jobs"


def _progress(status: dict[str, Any], *, of: str) -> str:
    left = f", {duration(status['left_s'])} left for {of}" if status.get("left_s") is not None else ""
    return (
        f"{status['document']}: layer {status['layer']} of {status['layers']}, {status['tokens']:,} tokens, "
        f"{status['tokens_per_s']:,.0f} tokens/s{left} (told {_ago(status['at'])})"
    )


def failure_lines(log: Path, jobs: Sequence[QueuedJob], entries: Sequence[record.Entry]) -> Iterator[str]:
    """The last lines of the log of a job that failed, that of the rank that failed first."""
    failed = [job.name for job in jobs if not job.alive and job.state in ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL")]
    failed = [name for name in failed if name not in _saved(entries)]
    last = entries[-1] if entries else {}
    if not jobs and last.get("how") == "failed" and last.get("job"):
        failed = [str(last["job"])]
    if not failed:
        return
    file = log / f"slurm-{failed[-1]}.out"
    if not file.exists():
        return
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - (1 << 16)))
        lines = [line for line in opened.read().decode(errors="replace").splitlines() if line.strip()]
    first = next((line for line in lines if line.startswith(OUR_ERROR)), None)
    yield from [str(file), *([first] if first else []), *(line for line in lines[-LAST_LINES:] if line != first)]


def _ago(when: float) -> str:
    return f"{duration(max(0.0, time.time() - when))} ago"
