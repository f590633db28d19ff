"""Kill a job of several documents at random moments, start it again each time, and look at what is left.

    python -m tests.chaos --kills 200

A job keeps KV and takes checkpoints after every layer it can. It is ended by kill -9 of one rank, of the launcher or of
all processes at once, by SIGTERM to every rank, or by SIGUSR1 to the launcher, and started again on 1 to 4 ranks, as
chance has it. After every end no process may be left, each HDF5 file must open, and `verify` may name nothing but
unfinished work. In the end all results must be those of a job that was left alone: bit for bit where all of a document
was done by as many ranks as there, else within the rounding of `tests.tolerances`.

How much work was done twice is counted in the ranks' logs, which say when each attention is done.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

import cpmpi
from cpmpi.errors import UserError
from cpmpi.run.verify import verify_run
from tests.launched import Launched
from tests.tolerances import check_keys, check_logprobs

LENGTHS = (2500, 1800, 2200)
LAYERS = 8
KINDS = ("rank", "launcher", "all", "SIGTERM", "SIGUSR1")
GONE_S, DONE_S, LAYER_S = 120.0, 600.0, 0.1
DONE = re.compile(r"document (\d+): attention (\d+) is done")
STARTED = re.compile(r" 0/(\d+) INFO on ")
MOST_RANKS, UNDISTURBED_RANKS = 4, 2


@dataclass
class Figures:
    """What a series of kills led to."""

    kills: Counter[str] = field(default_factory=Counter)
    """By kind."""
    saved: int = 0
    """Ends with exit status 75."""
    inside: int = 0
    """Starts that went on inside a document."""
    dealt_anew: int = 0
    """Of them those that moved KV to other ranks."""
    exact: int = 0
    """Documents, in the end, that had to be the same bit for bit, and were."""
    rounded: int = 0
    """Documents that several numbers of ranks did."""
    redone: list[int] = field(default_factory=list)
    """For every kill, layers (of a document) that were computed and had to be computed again."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.kills.items()))
        redone = f"median {statistics.median(self.redone):g}, worst {max(self.redone)}" if self.redone else "none"
        return (
            f"{sum(self.kills.values())} kills ({kinds}); {self.saved} ended with status 75, "
            f"{self.inside} starts went on inside a document, {self.dealt_anew} of them with KV from other ranks; "
            f"layers redone after a kill, of {LAYERS} a document: {redone}; results: {self.exact} documents the same "
            f"bit for bit, {self.rounded} of several numbers of ranks within rounding; {len(self.problems)} problems"
        )

    def add(self, other: Figures) -> None:
        """Take over what another series led to."""
        self.kills += Counter(other.kills)
        for name in ("saved", "inside", "dealt_anew", "exact", "rounded", "redone", "problems"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def make(folder: Path) -> None:
    """A small model and documents."""
    from tests.tiny_models import VOCABULARY, save_tiny, tiny_config

    save_tiny(folder / "model", tiny_config("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192))
    (folder / "documents").mkdir()
    for i, n in enumerate(LENGTHS):
        np.save(folder / "documents" / f"{i}.npy", np.random.default_rng(i).integers(3, VOCABULARY, n))


class Job(Launched):
    """A job under way, with all its processes."""

    def __init__(self, folder: Path, output: Path, ranks: int) -> None:
        words = ["prefill", "--model", str(folder / "model"), "--input", str(folder / "documents")]
        words += ["--output", str(output), "--checkpoint", "0", "--attention", "ring", "--chunk-tokens", "200"]
        words += ["--grace", "60", "--kv-dtype", "float32"]
        super().__init__(words, output.with_suffix(".out"), ranks)

    def ranks(self) -> list[int]:
        """The processes of the ranks."""
        return [pid for pid in self.processes() if pid != self.launcher.pid]

    def attack(self, kind: str, chance: random.Random) -> None:
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
        self.close()
        return status, left


class Start(NamedTuple):
    """What rank 0's log says of a start: its ranks, and the attentions (document, number) that it did."""

    ranks: int
    done: list[tuple[int, int]]


def starts(output: Path) -> list[Start]:
    """All starts of a job so far."""
    log = output / "log" / "rank-00000.log"
    found: list[Start] = []
    for line in log.read_text().splitlines() if log.exists() else ():
        if match := STARTED.search(line):
            found.append(Start(int(match[1]), []))
        elif match := DONE.search(line):
            found[-1].done.append((int(match[1]), int(match[2])))
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


def compare(output: Path, undisturbed: Path, figures: Figures) -> None:
    """Note where two runs differ."""
    with cpmpi.open_run(output) as a, cpmpi.open_run(undisturbed) as b:
        for i, (x, y) in enumerate(zip(a.documents, b.documents, strict=True)):
            ranks = {start.ranks for start in starts(output) if any(document == i for document, _ in start.done)}
            alike = ranks == {UNDISTURBED_RANKS}
            try:
                check_logprobs(x.logprobs, y.logprobs)
                for layer in range(LAYERS):
                    for found, expected in zip(x.kv(layer), y.kv(layer), strict=True):
                        (np.testing.assert_array_equal if alike else check_keys)(found, expected)
                if alike:
                    np.testing.assert_array_equal(x.logprobs, y.logprobs)
            except AssertionError as error:
                figures.problems.append(f"document {x.id}, by {ranks} ranks, differs from the undisturbed run: {error}")
            figures.exact += alike
            figures.rounded += not alike


def chaos(
    folder: Path, kills: int, seed: int = 0, ranks: int | None = None,
    so_far: Callable[[Figures], None] = lambda _: None,
) -> Figures:  # fmt: skip
    """Kill jobs until there were so many kills; each series of them ends with a finished run.

    Args:
        folder: to work in.
        kills: how many.
        seed: of the moments, and of the numbers of ranks.
        ranks: always so many; None: drawn for each start.
        so_far: is given the figures after each series.
    """
    figures, chance = Figures(), random.Random(seed)
    make(folder)
    whole = Job(folder, folder / "whole", UNDISTURBED_RANKS)
    status, _ = whole.wait(DONE_S)
    assert status == 0, whole.said()
    with cpmpi.open_run(folder / "whole") as run:
        assert run.complete
    series = 0
    while sum(figures.kills.values()) < kills:
        output = folder / f"run-{series}"
        kill_until_done(folder, output, ranks, kills, figures, chance)
        figures.problems += verify_run(output).problems
        compare(output, folder / "whole", figures)
        shutil.rmtree(output)
        series += 1
        so_far(figures)
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
        if len(found) > len(before) and len(found[-1].done) >= layers:
            time.sleep(part * LAYER_S)
            return
        time.sleep(0.02)


def kill_until_done(
    folder: Path, output: Path, ranks: int | None, kills: int, figures: Figures, chance: random.Random
) -> None:
    """Start a job, end it at a random moment of its work, and so on until it is done or there were enough kills."""
    while True:
        killed, kind = False, KINDS[sum(figures.kills.values()) % len(KINDS)]
        with Job(folder, output, ranks or chance.randint(1, MOST_RANKS)) as job:
            if sum(figures.kills.values()) < kills:
                wait_for_moment(job, output, chance)
                if killed := job.launcher.poll() is None:
                    job.attack(kind, chance)
                    figures.kills[kind] += 1
            status, left = job.wait(GONE_S if killed else DONE_S)
        said = job.said()
        figures.inside += " goes on after layer " in said
        figures.dealt_anew += " is dealt anew to " in said
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
    *before, now = starts(output) or [Start(0, [])]
    if before:
        done = {attention for start in before for attention in start.done}
        figures.redone.append(len(done & set(now.done)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, help="of every start  [default: drawn from 1 to 4]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, help="JSON file to add the figures to, after each series of kills")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    before = json.loads(asked.figures.read_text()) if asked.figures and asked.figures.exists() else {}

    def so_far(figures: Figures) -> None:
        if asked.figures:
            all_of_them = Figures(**copy.deepcopy(before))
            all_of_them.add(figures)
            asked.figures.write_text(json.dumps(vars(all_of_them)))

    with tempfile.TemporaryDirectory() as folder:
        figures = chaos(Path(folder), asked.kills, asked.seed, asked.ranks, so_far)
    print(figures)
    for problem in figures.problems:
        print(problem)
    sys.exit(bool(figures.problems))


if __name__ == "__main__":
    main()
