"""Documents that several jobs share: what part of their time goes into documents, how soon one is taken over, claims.

    python -m benchmarks.corpus [--documents 200] [--jobs 4] [--tokens 4000] [--takeover/--no-takeover]

Jobs are processes of one rank and one thread on this machine, without Slurm, which score documents of mixed lengths
(log-normal, from a tenth to eight times the median) on the demo's checkpoint, with one run folder. From the first
claim until the run is complete, jobs could have worked for ``jobs * elapsed`` seconds: that is the ideal. What they
worked are the seconds that the documents took, computing and storing them. The rest went into claims, parts, waiting,
reading the weights, and the end, when some have nothing left. With more jobs than cores both are longer alike.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.main_job import emit
from cpmpi.run.verify import verify_run
from cpmpi.slurm import record
from cpmpi.slurm.claims import Claims
from tests.conftest import clean_environment

MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo" / "checkpoint"


def make_documents(path: Path, count: int, median: int) -> None:
    """A list of documents with lengths that differ by a factor of eighty."""
    random = np.random.default_rng(0)
    lengths = np.clip(median * random.lognormal(0, 0.8, count), median / 10, median * 8).astype(int)
    with path.open("w") as file:
        for i, length in enumerate(lengths.tolist()):
            file.write(json.dumps({"id": f"d{i}", "token_ids": random.integers(0, 1000, length).tolist()}) + "\n")


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A job that shares the documents in a folder."""
    words = [sys.executable, "-m", "cpmpi", "score", "--share", "--quiet", "--model", str(MODEL), "--attention", "ring"]
    words += ["--input", str(folder / "documents.jsonl"), "--output", str(folder / "run"), *more]
    return subprocess.Popen(words, env=clean_environment(), stdout=subprocess.DEVNULL, start_new_session=True)


def measure_share(folder: Path, count: int, jobs: int, median: int) -> None:
    """All documents on so many jobs at a time."""
    make_documents(folder / "documents.jsonl", count, median)
    running = [start(folder) for _ in range(jobs)]
    claims = folder / "run" / "parts"
    while not list(claims.glob("0*.claim")):
        time.sleep(0.01)
    began = time.time()
    assert [job.wait() for job in running] == [0] * jobs
    ended = (folder / "run" / "run.h5").stat().st_mtime
    entries = record.documents(folder / "run" / "log")
    assert sorted(e["document"] for e in entries) == sorted(f"d{i}" for i in range(count)), "each once"
    assert verify_run(folder / "run").problems == []
    worked = sum(e["rank_seconds"] for e in entries)
    by_job = [sum(e["rank_seconds"] for e in entries if e["job"] == job) for job in {e["job"] for e in entries}]
    emit(documents=count, jobs=jobs, tokens=sum(e["tokens"] for e in entries), elapsed_s=ended - began, worked_s=worked,
         share=worked / (jobs * (ended - began)), least_of_a_job=min(by_job) / (ended - began),
         last_to_complete_s=ended - max(e["at"] for e in entries), between_documents_s=pauses(entries),
         cores=len(os.sched_getaffinity(0)))  # fmt: skip


def pauses(entries: list[record.Entry]) -> float:
    """The median time from the end of a document to the work on the next one of the same job."""
    found = []
    for job in {e["job"] for e in entries}:
        mine = [e for e in entries if e["job"] == job]
        found += [b["at"] - b["seconds"] - a["at"] for a, b in pairwise(mine)]
    return float(np.median(found))


def measure_takeover(folder: Path) -> None:
    """A job is killed in a document; another one, which has nothing left to do, takes it over."""
    make_documents(folder / "documents.jsonl", 2, 20_000)
    one = start(folder, "--stay")
    claims = folder / "run" / "parts"
    while not (claims / "000000.claim").exists() and not (claims / "000001.claim").exists():
        time.sleep(0.01)
    (victim,) = claims.glob("0*.claim")
    owner = victim.read_text()
    other = start(folder, "--stay")
    while len(list(claims.glob("0*.claim"))) < 2:
        time.sleep(0.01)
    os.killpg(one.pid, signal.SIGKILL)
    one.wait()
    killed = time.monotonic()
    while victim.exists() and victim.read_text() in ("", owner):
        time.sleep(0.01)
    emit(takeover_s=time.monotonic() - killed)
    assert other.wait() == 0
    assert verify_run(folder / "run").problems == []


def measure_claims(folder: Path, seconds: float = 3.0) -> None:
    """Claims taken and given back by one process, with nobody else."""
    with Claims(folder / "claims", lambda name: False) as claims:
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            assert claims.take(f"{count % 200:06d}")
            claims.drop(f"{count % 200:06d}")
            count += 1
    emit(claims_per_s=count / seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4000, help="of the median document")
    parser.add_argument("--takeover", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("share", "takeover", "claims"):
            (Path(scratch) / name).mkdir()
        measure_claims(Path(scratch) / "claims")
        measure_share(Path(scratch) / "share", args.documents, args.jobs, args.tokens)
        if args.takeover:
            measure_takeover(Path(scratch) / "takeover")


if __name__ == "__main__":
    main()
