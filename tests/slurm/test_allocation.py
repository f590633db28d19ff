"""The allocation from what Slurm sets: one job, an array's task, a heterogeneous job, uneven tasks, none."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from cpmpi.slurm.allocation import VARIABLES, Allocation, allocation, expand_counts, few_cores

# As Slurm 22.05 sets it inside `srun` for a task of an array on 2 nodes.
TASK = {
    "SLURM_JOB_ID": "17", "SLURM_JOBID": "17", "SLURM_JOB_NAME": "cpmpi", "SLURM_JOB_PARTITION": "batch",
    "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "8",
    "SLURM_MEM_PER_NODE": "64000", "SLURM_GPUS_ON_NODE": "4", "HOME": "/root",
}  # fmt: skip


def test_a_task_of_an_array():
    found = allocation(TASK)
    assert found == Allocation(
        job_id=17, job_name="cpmpi", partition="batch", array_job_id=15, array_task_id=2, restart_count=1, nodes=2,
        node_list="n[1-2]", tasks=3, tasks_per_node="2,1", cpus_per_task=4, cpus_on_node=8, memory_per_node_mb=64000,
        gpus_on_node=4,
    )  # fmt: skip
    assert found.name == "15_2"
    assert found.per_node == (2, 1)
    assert found.line() == (
        "Slurm job 15_2 (cpmpi) on batch, 2 nodes n[1-2], 3 tasks (2,1 a node), 4 cores a task, 4 GPUs on this node, "
        "64000 MB a node, started 2 times"
    )


def test_outside_of_slurm_there_is_none():
    assert allocation({"HOME": "/root", "SLURM_CONF": "/etc/slurm.conf"}) is None


def test_a_step_counts_before_its_job():
    found = allocation({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_HET_SIZE": "2"})
    assert found is not None
    assert (found.name, found.tasks, found.het_parts, found.restart_count) == ("1", 2, 2, 0)
    assert "2 parts (heterogeneous)" in found.line()


def test_what_is_no_number_is_named():
    with pytest.raises(ValueError, match="SLURM_NTASKS=many: must be a number"):
        allocation({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "many"})


@pytest.mark.parametrize(("text", "counts"), [("2", (2,)), ("2(x3),1", (2, 2, 2, 1)), ("1,4(x2)", (1, 4, 4))])
def test_counts(text, counts):
    assert expand_counts(text) == counts


def test_one_core_of_many_is_told_with_the_option_to_add():
    told = few_cores(cores=1, node_cores=64, node_ranks=4, node="n7")
    assert told is not None
    assert re.search(r"a rank on n7 may use 1 of its 64 cores: with 4 ranks .* -c 16 \(--cpus-per-task\)", told)
    assert "\n" not in told
    assert few_cores(cores=1, node_cores=4, node_ranks=4, node="n7") is None, "that is its share"
    assert few_cores(cores=2, node_cores=64, node_ranks=4, node="n7") is None, "somebody asked for it"


def test_every_variable_that_is_read_is_in_the_table():
    """No other file of the room reads the environment for one; the table has a row for every field, and no other."""
    assert VARIABLES.keys() == {field.name for field in fields(Allocation)}
    room = Path(__file__).resolve().parents[2] / "slurm"
    for file in room.glob("*.py"):
        if file.name != "allocation.py":
            read = re.findall(r"environ[^\n]*[\"'](SLURM_\w+)[\"']", file.read_text())
            assert not read, f"{file.name} reads {read}"
