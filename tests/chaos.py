"""Kill a job of several documents at random moments, start it again each time, and look at what is left.

    python -m tests.chaos --kills 200

A job keeps KV and takes checkpoints after every layer it can. It is ended by kill -9 of one rank, of the launcher or of
all processes at once, by SIGTERM to every rank, or by SIGUSR1 to the launcher. After every end each HDF5 file must open
and `verify` may name nothing but unfinished work; in the end all results must be those of a job that was left alone.

How much work was done twice is counted in the ranks' logs, which say when each attention is done.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

import cpmpi
from cpmpi.errors import UserError
from cpmpi.run.verify import verify_run
from tests.conftest import ROOT, clean_environment

LENGTHS = (2500, 1800, 2200)
LAYERS = 8
KINDS = ("rank", "launcher", "all", "SIGTERM", "SIGUSR1")
TOKEN = "CPMPI_CHAOS"
GONE_S, DONE_S, LAYER_S = 120.0, 600.0, 0.1
DONE = re.compile(r"document (\d+): attention (\d+) is done")
STARTED = " INFO on "


@dataclass
class Figures:
    """What a series of kills led to."""

    kills: Counter[str] = field(default_factory=Counter)
    saved: int = 0
    """Ends with exit status 75."""
    inside: int = 0
    """Starts that went on inside a document."""
    redone: list[int] = field(default_factory=list)
    """For every kill, layers (of a document) that were computed and had to be computed again."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.kills.items()))
        redone = f"median {statistics.median(self.redone):g}, worst {max(self.redone)}" if self.redone else "none"
        return (
            f"{sum(self.kills.values())} kills ({kinds}); {self.saved} ended with status 75, "
            f"{self.inside} starts went on inside a document; "
            f"layers redone after a kill, of {LAYERS} a document: {redone}; {len(self.problems)} problems"
        )


def make(folder: Path) -> None:
    """A small model and documents."""
    from tests.tiny_models import VOCABULARY, save_tiny, tiny_config

    save_tiny(folder / "model", tiny_config("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192))
    (folder / "documents").mkdir()
    for i, n in enumerate(LENGTHS):
        np.save(folder / "documents" / f"{i}.npy", np.random.default_rng(i).integers(3, VOCABULARY, n))


class Job:
    """A job under way, with all its processes."""

    def __init__(self, folder: Path, output: Path, ranks: int) -> None:
        self.token = f"{output}-{time.monotonic_ns()}"
        self.log = output.with_suffix(".out")
        beside = Path(sys.executable).with_name("mpirun")
        line = [str(beside) if beside.exists() else "mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        line += [sys.executable, "-m", "cpmpi", "prefill", "--model", str(folder / "model")]
        line += ["--input", str(folder / "documents"), "--output", str(output), "--checkpoint", "0"]
        line += ["--attention", "ring", "--chunk-tokens", "200", "--grace", "60"]
        with self.log.open("w") as out:
            self.launcher = subprocess.Popen(
                line, cwd=ROOT, env=clean_environment(**{TOKEN: self.token}), start_new_session=True, stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """All that live, the launcher among them, by a variable in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"{TOKEN}={self.token}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def ranks(self) -> list[int]:
        """The processes of the ranks."""
        return [pid for pid in self.processes() if pid != self.launcher.pid]

    def end(self, kind: str, chance: random.Random) -> None:
        """End it, in one of `KINDS`."""
        ranks = self.ranks()
        targets = {
            "rank": [chance.choice(ranks)] if ranks else [], "launcher": [self.launcher.pid],
            "all": [*ranks, self.launcher.pid], "SIGTERM": ranks, "SIGUSR1": [self.launcher.pid],
        }  # fmt: skip
        number = getattr(signal, kind) if kind.startswith("SIG") else signal.SIGKILL
        for pid in targets[kind]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, timeout_s: float) -> tuple[int, list[int]]:
        """The launcher's exit status, -1 if it has none by then, and processes that live on, which are killed then."""
        try:
            status = self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = -1
        ends = time.monotonic() + (GONE_S if status != -1 else 0)
        while (left := self.processes()) and time.monotonic() < ends:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        return status, left


def starts(output: Path) -> list[list[tuple[int, int]]]:
    """The attentions (document, number) that each start did, by rank 0's log."""
    log = output / "log" / "rank-00000.log"
    found: list[list[tuple[int, int]]] = []
    for line in log.read_text().splitlines() if log.exists() else ():
        if STARTED in line:
            found.append([])
        elif match := DONE.search(line):
            found[-1].append((int(match[1]), int(match[2])))
    return found


def look(output: Path) -> Iterator[str]:
    """What is wrong with what a killed job left, beside being unfinished."""
    if not (output / "run.h5").exists():
        return
    for path in output.rglob("*.h5"):
        try:
            with h5py.File(path) as file:
                file.visit(lambda _: None)
        except OSError as error:
            yield f"{path} does not open: {error}"
    for problem in verify_run(output).problems:
        if "not complete: " not in problem:
            yield problem


def compare(output: Path, undisturbed: Path) -> Iterator[str]:
    """Where two runs differ."""
    with cpmpi.open_run(output) as a, cpmpi.open_run(undisturbed) as b:
        for x, y in zip(a.documents, b.documents, strict=True):
            same = np.array_equal(x.logprobs, y.logprobs, equal_nan=True)
            for layer in range(LAYERS):
                same &= all(map(np.array_equal, x.kv(layer, raw=True), y.kv(layer, raw=True)))
            if not same:
                yield f"document {x.id} differs from the undisturbed run"


def chaos(folder: Path, kills: int, ranks: int = 2, seed: int = 0) -> Figures:
    """Kill jobs until there were so many kills; each series of them ends with a finished run."""
    figures, chance = Figures(), random.Random(seed)
    make(folder)
    whole = Job(folder, folder / "whole", ranks)
    status, _ = whole.wait(DONE_S)
    assert status == 0, whole.log.read_text()
    with cpmpi.open_run(folder / "whole") as run:
        assert run.complete
    series = 0
    while sum(figures.kills.values()) < kills:
        kill_until_done(folder, folder / f"run-{series}", ranks, kills, figures, chance)
        figures.problems += compare(folder / f"run-{series}", folder / "whole")
        figures.problems += verify_run(folder / f"run-{series}").problems
        series += 1
    return figures


def unfinished(output: Path) -> int:
    """Documents that are left."""
    try:
        with cpmpi.open_run(output) as run:
            return sum(not document.complete for document in run.documents)
    except UserError:  # not laid out yet
        return len(LENGTHS)


def wait_for_moment(job: Job, output: Path, chance: random.Random) -> None:
    """Return at a random moment of the work that is left, or when the job is done."""
    before = starts(output)
    if not unfinished(output):  # only the run's own mark is missing
        job.launcher.wait(DONE_S)
    layers, part = divmod(chance.uniform(0, LAYERS * unfinished(output) + 1), 1)
    while job.launcher.poll() is None:
        found = starts(output)
        if len(found) > len(before) and len(found[-1]) >= layers:
            time.sleep(part * LAYER_S)
            return
        time.sleep(0.005)


def kill_until_done(
    folder: Path, output: Path, ranks: int, kills: int, figures: Figures, chance: random.Random
) -> None:
    """Start a job, end it at a random moment of its work, and so on until it is done or there were enough kills."""
    while True:
        job = Job(folder, output, ranks)
        killed, kind = False, KINDS[sum(figures.kills.values()) % len(KINDS)]
        if sum(figures.kills.values()) < kills:
            wait_for_moment(job, output, chance)
            if killed := job.launcher.poll() is None:
                job.end(kind, chance)
                figures.kills[kind] += 1
        status, left = job.wait(GONE_S if killed else DONE_S)
        said = job.log.read_text()
        figures.inside += " goes on after layer " in said
        figures.saved += status == 75
        if left or status == -1:
            figures.problems.append(f"{len(left)} processes were left after {kind}")
        figures.problems += look(output)
        note_redone(output, figures)
        if status == 0:
            return
        if "Traceback" in said or (sum(figures.kills.values()) >= kills and "error:" in said):
            figures.problems.append(f"after {kind}: {said[-2000:]}")
            return


def note_redone(output: Path, figures: Figures) -> None:
    """Count what the latest start did that the starts before had done."""
    *before, now = starts(output) or [[]]
    if before:
        done = {attention for start in before for attention in start}
        figures.redone.append(len(done & set(now)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = chaos(Path(folder), asked.kills, asked.ranks, asked.seed)
    print(figures)
    for problem in figures.problems:
        print(problem)
    sys.exit(bool(figures.problems))


if __name__ == "__main__":
    main()
