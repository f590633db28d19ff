"""What Slurm gave this job: every ``SLURM_*`` variable that is read, in one table, and one frozen record of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

# field of the record -> the variables that tell it, the first that is set counts
VARIABLES: dict[str, tuple[str, ...]] = {
    "job_id": ("SLURM_JOB_ID", "SLURM_JOBID"),
    "job_name": ("SLURM_JOB_NAME",),
    "partition": ("SLURM_JOB_PARTITION",),
    "account": ("SLURM_JOB_ACCOUNT",),
    "array_job_id": ("SLURM_ARRAY_JOB_ID",),
    "array_task_id": ("SLURM_ARRAY_TASK_ID",),
    "restart_count": ("SLURM_RESTART_COUNT",),
    "het_parts": ("SLURM_HET_SIZE",),
    "nodes": ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
    "node_list": ("SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    "tasks": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "tasks_per_node": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    "cpus_per_task": ("SLURM_CPUS_PER_TASK",),
    "cpus_on_node": ("SLURM_CPUS_ON_NODE",),
    "memory_per_node_mb": ("SLURM_MEM_PER_NODE",),
    "gpus_on_node": ("SLURM_GPUS_ON_NODE",),
    "end_time": ("SLURM_JOB_END_TIME",),
}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The allocation that this process runs in; what Slurm does not tell is None.

    Attributes:
        job_id: the job's own number, also of an array task.
        array_job_id, array_task_id: of a task of an array.
        restart_count: how often the job was requeued.
        het_parts: parts of a heterogeneous job.
        nodes, node_list, tasks, tasks_per_node: of the job step, or of the job outside of steps; ``tasks_per_node``
            as Slurm writes it, such as ``4(x2),1``, and `per_node` as a list.
        cpus_per_task, cpus_on_node, memory_per_node_mb, gpus_on_node: what a task and this node have.
        end_time: when the time limit ends the job, seconds since 1970 (not told before Slurm 22.05).
    """

    job_id: int
    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    array_job_id: int | None = None
    array_task_id: int | None = None
    restart_count: int = 0
    het_parts: int | None = None
    nodes: int | None = None
    node_list: str | None = None
    tasks: int | None = None
    tasks_per_node: str | None = None
    cpus_per_task: int | None = None
    cpus_on_node: int | None = None
    memory_per_node_mb: int | None = None
    gpus_on_node: int | None = None
    end_time: int | None = None

    @property
    def name(self) -> str:
        """The job as Slurm's commands take it: ``1234``, or ``1230_4`` for a task of an array."""
        if self.array_job_id is None or self.array_task_id is None:
            return str(self.job_id)
        return f"{self.array_job_id}_{self.array_task_id}"

    @property
    def per_node(self) -> tuple[int, ...]:
        """Tasks on each node; they may differ."""
        return () if self.tasks_per_node is None else expand_counts(self.tasks_per_node)

    def line(self) -> str:
        """The allocation in one line, for the log."""
        parts = [f"Slurm job {self.name}"]
        parts += [f"({self.job_name})"] if self.job_name else []
        parts += [f"on {self.partition}"] if self.partition else []
        words = [" ".join(parts)]
        words += [f"{self.nodes} nodes {self.node_list}"] if self.nodes else []
        words += [f"{self.tasks} tasks ({self.tasks_per_node} a node)"] if self.tasks else []
        words += [f"{self.cpus_per_task} cores a task"] if self.cpus_per_task else []
        words += [f"{self.gpus_on_node} GPUs on this node"] if self.gpus_on_node else []
        words += [f"{self.memory_per_node_mb} MB a node"] if self.memory_per_node_mb else []
        words += [f"{self.het_parts} parts (heterogeneous)"] if self.het_parts else []
        words += [f"until {datetime.fromtimestamp(self.end_time):%Y-%m-%d %H:%M:%S}"] if self.end_time else []
        words += [f"started {self.restart_count + 1} times"] if self.restart_count else []
        return ", ".join(words)


def allocation(environment: Mapping[str, str] | None = None) -> Allocation | None:
    """The allocation that the environment (by default this process's) tells of; None outside of Slurm jobs.

    Raises:
        ValueError: a variable that must be a number is none.
    """
    environment = os.environ if environment is None else environment
    found: dict[str, Any] = {}
    for field in fields(Allocation):
        name = next((name for name in VARIABLES[field.name] if environment.get(name)), None)
        if name is not None:
            found[field.name] = environment[name] if "str" in str(field.type) else _number(name, environment[name])
    return Allocation(**found) if "job_id" in found else None


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name}={text}: must be a number")
    return int(text)


def expand_counts(text: str) -> tuple[int, ...]:
    """Slurm's short form of a list of counts: ``4(x2),1`` is 4, 4, 1."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return tuple(counts)


def few_cores(*, cores: int, node_cores: int, node_ranks: int, node: str) -> str | None:
    """What to tell the user where a rank may use a single core though the node has some for each; else None.

    Slurm gives a task one core unless it is told otherwise, so a rank would compute with a small part of its node.

    Args:
        cores: that this rank may use.
        node_cores: that the node has.
        node_ranks: ranks on the node.
        node: its name.
    """
    share = node_cores // max(1, node_ranks)
    if cores > 1 or share < 2:
        return None
    return (
        f"a rank on {node} may use 1 of its {node_cores} cores: with {node_ranks} rank{'s' * (node_ranks != 1)} a node "
        f"give sbatch -c {share} (--cpus-per-task), and srun the same, which from Slurm 22.05 on does not inherit it"
    )
