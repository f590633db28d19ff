"""Batch jobs on a real Slurm: submitted, told to stop, preempted, cancelled, on nodes that fail; every run is whole.

Jobs run in partition ``batch``; what is submitted to ``urgent`` preempts them.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpmpi.run.reader import open_run
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record

from ..conftest import ROOT
from .emulated import Cluster

pytestmark = pytest.mark.cluster

DEMO = ROOT / "examples" / "demo" / "checkpoint"
CPMPI = (sys.executable, "-m", "cpmpi")


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


class Jobs:
    """A folder with documents, and jobs on them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.run = folder / "RUN"

    def documents(self, count: int, tokens: int) -> None:
        with (self.folder / "documents.jsonl").open("w") as file:
            for i in range(count):
                ids = [(7 * i + 31 * k) % 1000 for k in range(tokens)]
                file.write(json.dumps({"id": f"d{i}", "token_ids": ids}) + "\n")

    def submit(self, *options: str, chunk: int = 1024) -> str:
        words = ["--", "score", "--model", str(DEMO), "--input", str(self.folder / "documents.jsonl")]
        words += ["--output", str(self.run), "--attention", "ring", "--chunk-tokens", str(chunk)]
        command = ["--command", " ".join(CPMPI), "--time", "10m"]
        printed = self.cluster.slurm(*CPMPI, "submit", *command, *options, *words)
        found = re.search(r"^job (\d+)$", printed, re.M)
        assert found, printed
        return found[1]

    def state(self, job: str) -> str:
        return self.cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def ended(self, job: str) -> bool:
        return self.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def log(self, job: str) -> str:
        file = self.run / "log" / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def ends(self) -> list[tuple[str, int]]:
        return [(e["how"], e["finished"]) for e in record.entries(self.run / "log") if "ended" in e]

    def check_whole(self, job: str) -> None:
        assert self.state(job) == "COMPLETED", self.log(job)
        assert verify_run(self.run).problems == []
        with open_run(self.run) as run:
            assert run.complete


@pytest.fixture
def jobs(slurm_cluster, tmp_path) -> Jobs:
    return Jobs(slurm_cluster, tmp_path)


def test_a_signal_ends_in_a_requeue_and_the_run_is_whole(jobs):
    """The batch shell alone is told, as --signal=B: does; the ranks save their state, and the job comes back."""
    jobs.documents(4, tokens=3000)
    t0 = time.monotonic()
    job = jobs.submit("-N", "2", "--tasks-per-node", "1", chunk=16)
    wait_for(lambda: record.read_status(jobs.run / "log"))
    print("first status", time.monotonic() - t0)
    jobs.cluster.slurm("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: jobs.ends())
    print("ended", time.monotonic() - t0, jobs.cluster.slurm("squeue", "-h", "-t", "all", "-o", "%i %T %r %S"))
    wait_for(lambda: jobs.ended(job), 240)
    print("done", time.monotonic() - t0, jobs.log(job))
    jobs.check_whole(job)
    print(jobs.ends())
