"""A folder with documents and batch jobs on them, for tests on the real Slurm of the emulated cluster."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpmpi.run.reader import open_run
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record

from ..conftest import ROOT
from .emulated import NODES, Cluster

DEMO = ROOT / "examples" / "demo" / "checkpoint"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
CPMPI = (sys.executable, "-m", "cpmpi")


def wait_for(condition: Callable[[], object], seconds: float = 90, told: Callable[[], str] = str) -> None:
    """Until a condition holds; where it never does, the failure says what ``told`` says then."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain\n{told()}"
        time.sleep(0.3)


class Jobs:
    """A folder with documents, and jobs on them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.run, self.input = folder / "RUN", folder / "documents.jsonl"

    def slurm(self, *command: str) -> str:
        return self.cluster.slurm(*command)

    def wait_for(self, condition: Callable[[], object], seconds: float = 90) -> None:
        wait_for(condition, seconds, self.circumstances)

    def circumstances(self) -> str:
        """All jobs with states and reasons, the nodes, and the last lines of every log: why something did not come."""
        told = [
            self.slurm("squeue", "-t", "all", "-o", "%i %j %T %r %M %N"),
            self.slurm("sinfo", "-N", "-o", "%N %T %E"),
        ]
        for node in NODES:
            ids = self.cluster.script("on", "login", "ip", "netns", "pids", f"cpmpi-{node}").split()
            lines = self.slurm("ps", "-o", "pid,stat,etimes,times,args", "-p", ",".join(ids)) if ids else ""
            told.append(f"{node}:\n" + "\n".join(line[:200] for line in lines.splitlines() if "slurmd -N" not in line))
        for file in sorted(self.folder.glob("**/log/slurm-*.out")):
            told.append("\n".join([f"{file.name}:", *file.read_text().splitlines()[-15:]]))
        for file in sorted(self.folder.glob("**/log/jobs.jsonl")):
            told.append(f"{file}:\n{file.read_text()}")
        return "\n".join(told)

    def status(self) -> str:
        return self.slurm(*CPMPI, "status", str(self.run))

    def documents(self, count: int, tokens: int) -> None:
        with (self.folder / "documents.jsonl").open("w") as file:
            for i in range(count):
                ids = [(7 * i + 31 * k) % 1000 for k in range(tokens)]
                file.write(json.dumps({"id": f"d{i}", "token_ids": ids}) + "\n")

    def wait_for_start(self, number: int) -> None:
        """The job's start of this number, and its first document under way."""

        def starts() -> list:
            return [e for e in record.entries(self.run / "log") if "started" in e]

        self.wait_for(lambda: len(starts()) == number)
        self.wait_for(lambda: (record.read_status(self.run / "log") or {"at": 0})["at"] > starts()[-1]["started"] + 1)

    def submit(self, *options: str, more: Sequence[str] = ()) -> str:
        words = ["--", "score", "--model", str(DEMO), "--input", str(self.input)]
        words += ["--output", str(self.run), "--attention", "ring", *more]
        command = ["--command", " ".join(CPMPI), "--time", "10m"]
        printed = self.cluster.slurm(*CPMPI, "submit", *command, *options, *words)
        found = re.search(r"^job (\d+)$", printed, re.M)
        assert found, printed
        return found[1]

    def kill(self, node: str) -> list[int]:
        """Kill all ranks on a node, as the kernel does where memory ends: nothing is said, nothing saved."""
        pids = [int(pid) for pid in self.cluster.script("on", "login", "ip", "netns", "pids", f"cpmpi-{node}").split()]
        ranks = [pid for pid in pids if b"--output" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
        ranks = [pid for pid in ranks if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        return ranks

    def state(self, job: str) -> str:
        return self.cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def ended(self, job: str) -> bool:
        return self.state(job) in ENDED

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
