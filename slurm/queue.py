"""The user's jobs as Slurm sees them, from one ``squeue`` a look, and what their states and reasons mean in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpmpi.slurm.commands import slurm

COLUMNS = ("%i", "%F", "%T", "%r", "%M", "%L", "%D", "%N", "%S")
ENDED = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "DEADLINE")
)
# states of an end after which Slurm puts a job back into the queue, where that is allowed
COME_BACK = frozenset({"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REQUEUED"})
STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUSPENDED": "suspended: it keeps its nodes, but does not run",
    "STOPPED": "stopped by a signal: it keeps its nodes, but does not run",
    "COMPLETING": "ending: its last processes leave",
    "CONFIGURING": "its nodes are being prepared",
    "SIGNALING": "being told of its end",
    "STAGE_OUT": "its files are being moved",
    "RESIZING": "changing its size",
    "REQUEUED": "going back into the queue",
    "REQUEUE_FED": "going back into the queue",
    "REQUEUE_HOLD": "back in the queue, but held: scontrol release lets it go",
    "SPECIAL_EXIT": "back in the queue, but held after a failure: scontrol release lets it go",
    "COMPLETED": "ended well",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "TIMEOUT": "reached its time limit; submit it again, it goes on",
    "OUT_OF_MEMORY": "killed for lack of memory: ask for more with --mem, or for more nodes",
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "its nodes did not start",
    "PREEMPTED": "preempted by a more urgent job",
    "DEADLINE": "reached its deadline",
}
REASONS = {
    "None": "not looked at yet",
    "Priority": "others come first",
    "Resources": "until nodes are free",
    "Dependency": "for the jobs that it depends on",
    "DependencyNeverSatisfied": "for jobs that failed or are gone: it will never start; cancel it",
    "BeginTime": "until its begin time (a requeued job pauses for about two minutes)",
    "JobHeldUser": "held by its user: scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "for other tasks of its array (the limit after %)",
    "PartitionTimeLimit": "its time limit is longer than the partition's: it will never start there",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives: it will never start there",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "Reservation": "for its reservation",
    "Licenses": "for licences",
    "NodeDown": "a node that it needs is down",
    "AssocGrpCpuLimit": "for its account's limit of cores",
    "AssocGrpNodeLimit": "for its account's limit of nodes",
    "AssocMaxJobsLimit": "for its account's limit of jobs",
    "QOSMaxJobsPerUserLimit": "for the limit of jobs of its quality of service",
    "BadConstraints": "no node can satisfy what it asks for: it will never start",
    "launch failed requeued held": "held after its launch failed: scontrol release lets it go",
}


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job, or a task of an array, in Slurm's words.

    Attributes:
        name: as Slurm's commands take it, ``17`` or ``15_2``; ``family`` is the number of all tasks of an array.
        state, reason: Slurm's.
        used, left: how long it has run, and how long it may.
        nodes, node_list: how many, and which once it runs.
        start: when it started, or will at the latest by Slurm's estimate; ``N/A`` where there is none.
    """

    name: str
    family: str
    state: str
    reason: str
    used: str
    left: str
    nodes: str
    node_list: str
    start: str

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.state not in ENDED

    def words(self, *, started: bool = False, requeue: bool = True) -> str:
        """The state for a person.

        Args:
            started: whether the job has run before: then it waits to go on, not to begin.
            requeue: whether it was submitted as one that comes back by itself.
        """
        text = STATES.get(self.state, self.state.lower())
        if self.state == "PENDING":
            again = "stopped before, will go on; " if started else ""
            why = self.reason.strip("()").split(",")[0]
            text = f"{again}{text}: {REASONS.get(why, why)}"
            return text + (f"; starts by {self.start.replace('T', ' ')}" if self.start[:1].isdigit() else "")
        if self.state == "RUNNING":
            return f"{text} for {self.used} on {self.node_list or f'{self.nodes} nodes'}, {self.left} left"
        if self.state in COME_BACK - {"REQUEUED"}:
            return text + ("; it comes back by itself" if requeue else "; submit it again, it goes on")
        return text


def my_jobs() -> list[QueuedJob]:
    """All jobs of this user that Slurm still knows, those that ended a while ago among them.

    Raises:
        SlurmError: there is no Slurm here, or it does not answer.
    """
    printed = slurm("squeue", "--me", "--noheader", "--array", "--states=all", "--format", "|".join(COLUMNS))
    return [QueuedJob(**dict(zip(_FIELDS, line.split("|"), strict=True))) for line in printed.splitlines() if line]


_FIELDS = ("name", "family", "state", "reason", "used", "left", "nodes", "node_list", "start")


def of_run(queue: Iterable[QueuedJob], numbers: Iterable[str]) -> list[QueuedJob]:
    """The jobs among ``queue`` with these numbers, tasks of arrays by the number of all."""
    wanted = {number.split("_")[0] for number in numbers}
    return [job for job in queue if job.family in wanted]


def cancel(jobs: Iterable[QueuedJob]) -> None:
    """End jobs: running ones are told first.

    Raises:
        SlurmError: Slurm refuses.
    """
    slurm("scancel", *dict.fromkeys(job.name for job in jobs))
