"""Batch jobs on a real Slurm: submitted, told to stop, preempted, cancelled, on nodes that fail; every run is whole.

Jobs run in partition ``batch``; what is submitted to ``urgent`` preempts them.
"""

import json
import os
import re
import sys
from contextlib import suppress

import numpy as np
import pytest

from cpmpi.run.reader import open_run
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record
from cpmpi.slurm.profile import read_profile

from ..conftest import ROOT, mpirun_path
from .jobs import CPMPI, DEMO, wait_for

pytestmark = pytest.mark.cluster

ALLOCATION = """
import json
from cpmpi.slurm.allocation import allocation
a = allocation()
print(json.dumps([a.per_node, a.cpus_per_task, a.cpus_on_node]))
"""


def test_told_preempted_and_a_node_lost_the_run_is_whole(jobs):
    """One job: told by its batch shell alone, as --signal=B: does; preempted; then one of its nodes goes down."""
    jobs.documents(6, tokens=20_000)
    job = jobs.submit("-N", "2", "--tasks-per-node", "1")
    jobs.wait_for(lambda: record.read_status(jobs.run / "log"))
    assert "1 running" in jobs.status()
    jobs.slurm("scancel", "--signal=USR1", "--batch", job)
    jobs.wait_for(lambda: len(jobs.ends()) == 1)
    jobs.wait_for(lambda: jobs.state(job) == "PENDING")
    assert "stopped before, will go on; waiting: until its begin time" in jobs.status()

    jobs.wait_for_start(2)
    urgent = jobs.slurm(
        "sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 2"
    ).strip()
    jobs.wait_for(lambda: jobs.state(job) != "RUNNING")
    assert "failed" not in jobs.status()
    jobs.wait_for(lambda: jobs.ended(urgent))

    jobs.wait_for_start(3)
    nodes = jobs.slurm("squeue", "-h", "-j", job, "-o", "%N").strip()
    last = jobs.slurm("scontrol", "show", "hostnames", nodes).split()[-1]
    jobs.slurm("scontrol", "update", f"nodename={last}", "state=down", "reason=test")
    jobs.wait_for(lambda: jobs.state(job) != "RUNNING")
    with suppress(RuntimeError):  # where it has come back by itself
        jobs.slurm("scontrol", "update", f"nodename={last}", "state=resume")
    jobs.wait_for(lambda: jobs.ended(job), 180)
    jobs.check_whole(job)
    assert jobs.ends()[-1] == ("complete", 6)
    assert jobs.ends()[0][0] == "stopped"
    assert re.search(rf"Slurm job {job} \(cpmpi\) on batch, 2 nodes .* 2 tasks .*started 4 times", jobs.log(job))
    assert "ended well" in jobs.status()


def test_a_cancelled_job_stays_cancelled(jobs):
    """It saves its state when it is told, and yet must not put itself back into the queue."""
    jobs.documents(4, tokens=20_000)
    job = jobs.submit("--tasks-per-node", "2", "--launcher", f"{mpirun_path()} --bind-to none")
    jobs.wait_for(lambda: record.read_status(jobs.run / "log"))
    assert jobs.slurm(*CPMPI, "cancel", str(jobs.run)) == f"cancelled {job}\n"
    jobs.wait_for(lambda: jobs.ended(job))
    assert jobs.state(job) == "CANCELLED"
    assert f"{job}: cancelled" in jobs.status()
    with pytest.raises(RuntimeError, match=rf"error: .*none of its jobs \({job}\) waits or runs"):
        jobs.slurm(*CPMPI, "cancel", str(jobs.run))


def test_odd_names_arrays_and_refusals(jobs):
    """What sbatch's own reader makes of our quoting; an array of two tasks; Slurm's refusals with the choices."""
    odd = jobs.folder / "a'; echo foo #1 %j"
    odd.mkdir()
    jobs.folder, jobs.run = odd, odd / "run-%a"
    for task in (3, 4):
        jobs.documents(1, tokens=100 + task)
        (odd / "documents.jsonl").rename(odd / f"documents-{task}.jsonl")
    jobs.input = odd / "documents-%a.jsonl"
    job = jobs.submit("--array", "3-4", "--job-name", 'it\'s \\ a #1 "name"')
    jobs.wait_for(lambda: set(jobs.state(job).split()) <= {"COMPLETED", "FAILED"})
    assert jobs.state(job).split() == ["COMPLETED"] * 2
    assert jobs.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%j").splitlines() == ['it\'s \\ a #1 "name"'] * 2
    for task in (3, 4):
        assert (odd / "log" / f"slurm-{job}_{task}.out").exists()
        with open_run(odd / f"run-{task}") as run:
            assert run.complete
            assert run.documents[0].n_tokens == 100 + task
    jobs.run = odd
    assert "2 of 2 finished in 2 runs" in jobs.status()
    jobs.input, jobs.run = odd / "documents-3.jsonl", odd / "other"
    with pytest.raises(
        RuntimeError, match=r"error: sbatch: .*partition.*no partition nowhere here; .* batch, urgent\)"
    ):
        jobs.submit("-p", "nowhere")


def test_the_ready_scripts_run(slurm_cluster, tmp_path):
    """Each file of jobs/sbatch as it stands, in a folder with what it names, the chained one after its job."""
    (tmp_path / "CHECKPOINT").symlink_to(DEMO)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "book.txt").write_text("def f(x):\n    return x\n" * 40)
    for part in range(4):
        (tmp_path / f"part-{part}.jsonl").write_text(
            json.dumps({"id": "a", "token_ids": list(range(60 + part))}) + "\n"
        )
    program = tmp_path / "bin" / "cpmpi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {" ".join(CPMPI)} "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"

    def sbatch(name: str, *options: str) -> str:
        file = str(ROOT / "jobs" / "sbatch" / f"{name}.sbatch")
        printed: str = slurm_cluster.slurm("sbatch", "--parsable", f"--chdir={tmp_path}", *options, file, PATH=path)
        return printed.strip()

    numbers = {name: sbatch(name) for name in ("one-node", "nodes", "gpus", "array")}
    numbers["after"] = sbatch("after", f"--dependency=afterok:{numbers['one-node']}")

    def states() -> dict[str, set[str]]:
        lines = slurm_cluster.slurm("squeue", "-h", "-t", "all", "-r", "-o", "%F %T").splitlines()
        found = [line.split() for line in lines]
        return {name: {state for number, state in found if number == job} for name, job in numbers.items()}

    wait_for(lambda: all(s <= {"COMPLETED", "FAILED", "CANCELLED"} for s in states().values()), 240)
    logs = "".join(file.read_text() for file in tmp_path.glob("slurm-*.out"))
    assert states() == {name: {"COMPLETED"} for name in numbers}, logs
    assert "RUN: ok (1 document, 2 shards" in logs
    with open_run(tmp_path / "RUN") as one, open_run(tmp_path / "RUN-gpus") as four:
        assert one.complete
        assert four.world_size == 4
        np.testing.assert_allclose(one.documents[0].logprobs, four.documents[0].logprobs, rtol=1e-4, atol=1e-4)
    for part in range(4):
        with open_run(tmp_path / "scores" / f"part-{part}") as run:
            assert run.documents[0].n_tokens == 60 + part


def test_the_site_is_looked_at(slurm_cluster, tmp_path):
    """The profile says what this Slurm has, and srun with it gives one world."""
    slurm_cluster.slurm(*CPMPI, "submit", "--write-profile", str(tmp_path / "site.toml"))
    values = read_profile(tmp_path / "site.toml")
    assert (values["partition"], values["launcher"]) == ("batch", "srun --mpi=pmix -K1")
    assert (values["gpus_per_node"], values["tasks_per_node"], values["cpus_per_task"]) == (4, 4, 2)
    told = slurm_cluster.slurm("srun", "-N2", "-n3", "-c2", sys.executable, "-c", ALLOCATION)
    assert sorted(json.loads(line) for line in told.splitlines()) == [[[2, 1], 2, cores] for cores in (2, 4, 4)]


def test_a_launcher_that_does_not_match_is_told_with_its_log(jobs):
    """srun with a PMI that Open MPI does not speak: ranks that are each alone; the job fails, and status says why."""
    jobs.documents(1, tokens=50)
    job = jobs.submit("--tasks-per-node", "2", "--launcher", "srun --mpi=pmi2 -K1")
    jobs.wait_for(lambda: jobs.ended(job))
    printed = jobs.status()
    assert f"{job}: failed" in printed
    assert "srun --mpi=pmi2 started 2 ranks (PMI_SIZE=2), but MPI sees a world of 1" in printed
    assert not (jobs.run / "run.h5").exists()


@pytest.mark.slow
def test_a_time_limit_of_a_minute_on_a_job_of_three(jobs):
    """Slurm tells the batch shell 10 s before the end, or half a minute earlier; it comes back until it is done."""
    jobs.documents(120, tokens=8_000)
    job = jobs.submit("--time", "1", "--signal", "10")
    jobs.wait_for(lambda: jobs.ended(job), 900)
    jobs.check_whole(job)
    assert len(jobs.ends()) > 1
    assert all(how == "stopped" for how, _ in jobs.ends()[:-1])


@pytest.mark.slow
def test_one_task_of_an_array_comes_back(jobs):
    """It is requeued by its own number; the other task is not touched."""
    for task in (1, 2):
        jobs.documents(4, tokens=20_000)
        (jobs.folder / "documents.jsonl").rename(jobs.folder / f"documents-{task}.jsonl")
    jobs.input, jobs.run = jobs.folder / "documents-%a.jsonl", jobs.folder / "run-%a"
    job = jobs.submit("--array", "1-2")
    told, other = (jobs.folder / f"run-{task}" for task in (1, 2))
    jobs.wait_for(lambda: record.read_status(told / "log"))
    jobs.slurm("scancel", "--signal=USR1", "--batch", f"{job}_1")
    jobs.wait_for(lambda: set(jobs.state(job).split()) <= {"COMPLETED", "FAILED"}, 240)
    assert jobs.state(job).split() == ["COMPLETED"] * 2
    starts = [[e["restarts"] for e in record.entries(run / "log") if "started" in e] for run in (told, other)]
    assert starts == [[0, 1], [0]]
    for run in (told, other):
        assert verify_run(run).problems == []


@pytest.mark.slow
def test_uneven_and_heterogeneous_jobs(slurm_cluster, tmp_path):
    """3 tasks on 2 nodes, and a job of two parts that differ in tasks a node: one world each, the same result."""
    (tmp_path / "book.txt").write_text("def f(x):\n    return x\n" * 40)
    words = [
        *CPMPI,
        "score",
        "--model",
        str(DEMO),
        "--input",
        f"{tmp_path}/book.txt",
        "--attention",
        "ring",
        "--output",
    ]
    slurm_cluster.slurm("srun", "--mpi=pmix", "-K1", "-N2", "-n3", *words, f"{tmp_path}/uneven", timeout_s=120)
    parts = ["srun", "--mpi=pmix", "-K1", "-N1", "-n1", *words, f"{tmp_path}/parts", ":", "-N1", "-n2"]
    slurm_cluster.slurm(*parts, *words, f"{tmp_path}/parts", timeout_s=120)
    with open_run(tmp_path / "uneven") as uneven, open_run(tmp_path / "parts") as parts_run:
        assert uneven.world_size == parts_run.world_size == 3
        np.testing.assert_allclose(uneven.documents[0].logprobs, parts_run.documents[0].logprobs, rtol=1e-4, atol=1e-4)
