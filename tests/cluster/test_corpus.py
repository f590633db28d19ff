"""Jobs of a real Slurm that share a run: killed, preempted, of several sizes; every document once, nothing lost."""

import json
import re
import time
from collections.abc import Callable

import pytest

from cpmpi.run.reader import open_run
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record

from .jobs import Jobs

pytestmark = pytest.mark.cluster
ENDED = {"COMPLETED", "FAILED", "CANCELLED"}


def documents(jobs: Jobs, lengths) -> None:
    with jobs.input.open("w") as file:
        for i, tokens in enumerate(lengths):
            ids = [(7 * i + 31 * k) % 1000 for k in range(tokens)]
            file.write(json.dumps({"id": f"d{i}", "token_ids": ids}) + "\n")


def done(jobs: Jobs) -> list[record.Entry]:
    return record.documents(jobs.run / "log")


def at_work(jobs: Jobs, task: str) -> bool:
    return any(status["job"] == task for status in record.shared_statuses(jobs.run / "log"))


def check_each_once(jobs: Jobs, lengths) -> None:
    assert sorted(str(e["document"]) for e in done(jobs)) == sorted(f"d{i}" for i in range(len(lengths)))
    assert verify_run(jobs.run).problems == []
    assert not (jobs.run / "parts").exists()
    with open_run(jobs.run) as run:
        assert run.complete
        assert [document.n_tokens for document in run.documents] == list(lengths)


def test_tasks_of_an_array_share_a_run(jobs):
    """Submitted as one array; no task waits for another, and the last one makes the run whole."""
    lengths = [900, 300, 2000, 500, 1500, 700]
    documents(jobs, lengths)
    job = jobs.submit("--array", "1-2", more=["--share"])
    jobs.wait_for(lambda: set(jobs.state(job).split()) <= ENDED)
    assert jobs.state(job).split() == ["COMPLETED"] * 2, jobs.circumstances()
    check_each_once(jobs, lengths)
    assert "6 of 6 finished" in jobs.status()


@pytest.mark.slow
def test_four_jobs_of_which_one_is_killed_and_one_preempted(jobs):
    """What the killed one had is taken over in less than a minute; the preempted one comes back."""
    lengths = [30_000] * 5 + [8_000] * 9 + [3_000] * 10
    documents(jobs, lengths)
    job = jobs.submit("--array", "1-4", "--sbatch=--exclusive", more=["--share", "--checkpoint", "0"])
    jobs.wait_for(lambda: all(at_work(jobs, f"{job}_{task}") for task in (1, 2, 3, 4)))
    assert "4 running" in jobs.status()

    number = jobs.slurm("squeue", "-h", "-r", "-j", f"{job}_2", "-o", "%A").strip()
    claims = {path: path.read_text() for path in (jobs.run / "parts").glob("0*.claim")}
    (victim,) = [path for path, text in claims.items() if text.startswith(f"SLURM 0 {number}\n")]
    assert jobs.kill(jobs.slurm("squeue", "-h", "-r", "-j", f"{job}_2", "-o", "%N").strip())
    killed = time.time()

    node = jobs.slurm("squeue", "-h", "-r", "-j", f"{job}_3", "-o", "%N").strip()
    jobs.slurm(
        "sbatch", "--parsable", "-p", "urgent", "-w", node, "--exclusive", "-o/dev/null", "--wrap", "sleep 2"
    )  # fmt: skip
    jobs.wait_for(lambda: jobs.state(f"{job}_3").split()[0] != "RUNNING")
    assert "failed" not in "".join(line for line in jobs.status().splitlines() if f"{job}_3" in line)

    def taken_over() -> bool:
        return not victim.exists() or not victim.read_text().startswith(f"SLURM 0 {number}\n")

    jobs.wait_for(taken_over)
    print(f"\ntaken over {time.time() - killed:.1f} s after the kill")
    jobs.wait_for(lambda: set(jobs.state(job).split()) <= ENDED, 300)
    states = {task: jobs.state(f"{job}_{task}") for task in (1, 2, 3, 4)}
    assert (states.pop(2), set(states.values())) == ("FAILED", {"COMPLETED"}), jobs.circumstances()
    check_each_once(jobs, lengths)
    starts = [e["restarts"] for e in record.entries(jobs.run / "log") if "started" in e and e["job"] == f"{job}_3"]
    assert starts == [0, 1]


@pytest.mark.slow
def test_what_is_left_at_the_time_limit_is_for_the_next_start(jobs):
    """A job of one minute takes no document that it could not finish, says so, and comes back; a large one helps.

    How long a document takes is told by those before: where this machine gets much slower within one, Slurm ends the
    job, and the next one goes on as well.
    """
    lengths = [12_000] * 36 + [500] * 4
    documents(jobs, lengths)
    more = ["--share", "--grace", "5"]
    small = jobs.submit("--time", "1", "--signal", "0", more=more)
    large = jobs.submit("-N", "2", "--tasks-per-node", "1", more=[*more, "--most-tokens", "1000"])
    jobs.wait_for(lambda: jobs.ended(large))
    assert jobs.state(large) == "COMPLETED", jobs.log(large)
    jobs.wait_for(lambda: jobs.ended(small), 400)
    said = jobs.log(small)
    for _ in range(4):
        if jobs.state(small) != "TIMEOUT":
            break
        small = jobs.submit("--time", "1", "--signal", "0", more=more)
        jobs.wait_for(lambda job=small: jobs.ended(job), 400)
        said += jobs.log(small)
    assert jobs.state(small) == "COMPLETED", jobs.circumstances()
    check_each_once(jobs, lengths)
    late = r"document 'd\d+' \(12,000 tokens\) takes about .*, and .* are left before the time to stop: not begun; "
    assert re.search(late, said)
    short = {e["document"] for e in done(jobs) if e["tokens"] == 500 and e["job"] == large}
    assert short == {f"d{i}" for i in range(36, 40)}


@pytest.mark.slow
def test_states_are_shown_for_what_they_are(jobs):
    """On jobs that do not come back by themselves: preempted while they save, preempted and killed, and a node lost.
    (Without control groups this Slurm ends no job as OUT_OF_MEMORY.)"""
    documents(jobs, [20_000] * 6)

    def preempt(node: str) -> None:
        jobs.slurm("sbatch", "-p", "urgent", "-w", node, "--exclusive", "-o/dev/null", "--wrap", "sleep 2")

    assert ends_as(jobs, preempt) == "FAILED", "as Slurm sees exit status 75"
    assert "stopped with its state saved; submit it again, it goes on" in jobs.status()
    deaf = """sh -c 'trap "" USR1 TERM; sleep 60' cpmpi"""
    assert ends_as(jobs, preempt, "--command", deaf) == "PREEMPTED"
    assert "preempted by a more urgent job; submit it again, it goes on" in jobs.status()

    def lose(node: str) -> None:
        jobs.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        jobs.kill(node)

    assert ends_as(jobs, lose) == "NODE_FAIL"
    assert "lost a node; submit it again, it goes on" in jobs.status()


def ends_as(jobs: Jobs, end: Callable[[str], None], *options: str) -> str:
    """The state of a job that does not come back, after its node was treated so while it ran."""
    job = jobs.submit("--no-requeue", *options)
    jobs.wait_for(lambda: jobs.state(job) == "RUNNING")
    started = time.time()
    if "--command" not in options:
        jobs.wait_for(lambda: (record.read_status(jobs.run / "log") or {"at": 0})["at"] > started)
    end(jobs.slurm("squeue", "-h", "-j", job, "-o", "%N").strip())
    jobs.wait_for(lambda: jobs.state(job) not in ("RUNNING", "COMPLETING"), 60)
    return jobs.state(job)
