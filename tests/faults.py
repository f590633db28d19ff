"""A disk that fails at each call in turn: what is left is never wrong, no rank hangs, and the same job goes on.

    python -m tests.faults --places 100

A small job with keys and values and checkpoints runs again and again in one launch of two ranks under plain ``python``,
so that no launcher ends ranks that wait. Each time one call of one rank fails, by `faults.c`: write, pwrite, fsync,
rename, unlink, ftruncate, or open for writing, anywhere below the run folder. Then all ranks must have the same error,
which names the file, or none; `verify` may name nothing but unfinished work; and the same job must go on to the results
of one that was left alone, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.conftest import ROOT, clean_environment, mpirun_path

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
LENGTHS, LAYERS = (150, 90), 3
TIMEOUT_S = 3600.0
# Files without which a job goes on: what they say is for people, or a later start finds it again.
SPARED = ("log/beats/", "log/status.", "log/rank-", "log/jobs.jsonl", "checkpoints/")
# The folder is synced after a file was deleted or a folder was made in it; that of checkpoints, with every one of them.
SPARED_CALLS = {("fsync", "."), ("fsync", "checkpoints"), ("unlink", "summary.csv.tmp")}


class Place(NamedTuple):
    """A call: whose, which, on which file (relative to the run folder), and the how manieth of its kind there."""

    rank: int
    operation: str
    file: str
    nth: int


@dataclass
class Figures:
    """What a series of faults led to."""

    places: int = 0
    errors: int = 0
    """Faults that ended the job, with an error on all ranks."""
    spared: int = 0
    """Faults that did not."""
    missed: int = 0
    """Calls that were not made this time."""
    operations: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.operations.items()))
        return (
            f"{self.places} faults ({kinds}): {self.errors} ended the job, {self.spared} did not, {self.missed} calls "
            f"were not made again; {len(self.problems)} problems"
        )


def build(folder: Path) -> Path:
    """The library that makes calls fail, compiled."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def make(folder: Path) -> None:
    """A small model and documents."""
    from tests.tiny_models import VOCABULARY, save_tiny, tiny_config

    save_tiny(folder / "model", tiny_config("llama", num_hidden_layers=LAYERS))
    for i, n in enumerate(LENGTHS):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(3, VOCABULARY, n))


def command(folder: Path) -> dict[str, Any]:
    """The job."""
    return {
        "model": folder / "model", "inputs": [folder / f"{i}.npy" for i in range(len(LENGTHS))],
        "output": folder / "run", "attention": "ring", "checkpoint": 0, "hang_timeout": 20,
    }  # fmt: skip


class Sweep:
    """The faults, on one rank of a launch that has the library loaded."""

    def __init__(self, folder: Path, library: Path) -> None:
        from mpi4py import MPI

        self.comm, self.folder, self.run = MPI.COMM_WORLD, folder, folder / "run"
        self.shim = ctypes.CDLL(str(library))
        self.figures = Figures()
        self.whole: Any = None

    def job(self) -> str | None:
        """The job, to its end; or the error with which it ended here."""
        import cpmpi

        try:
            cpmpi.prefill(**command(self.folder)).close()
        except cpmpi.UserError as problem:
            return str(problem)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return None

    def calls(self) -> list[Place]:
        """Every call of every rank in a job that is left alone."""
        log = self.folder / f"calls-{self.comm.rank}"
        self.shim.fault_log(str(log).encode())
        assert self.job() is None
        self.shim.fault_log(b"")
        seen: Counter[tuple[str, str]] = Counter()
        mine = []
        for line in log.read_text().splitlines():
            operation, path = line.split(" ", 1)
            file = os.path.relpath(path, self.run)
            mine.append(Place(self.comm.rank, operation, file, seen[operation, file]))
            seen[operation, file] += 1
        self.whole = self.results()
        places = [place for rank in self.comm.allgather(mine) for place in rank]
        return [place for place in places if not place.file.startswith(("log/beats/", "log/status."))]  # by the clock

    def results(self) -> list[Any]:
        """All log-probabilities, keys and values."""
        import cpmpi

        with cpmpi.open_run(self.run) as run:
            found: list[Any] = [document.logprobs for document in run.documents]
            found += [x for d in run.documents for layer in range(LAYERS) for x in d.kv(layer, raw=True)]
        return found

    def fault(self, place: Place, error: int, sticky: bool) -> None:
        """A job with one fault, and the same one again."""
        if self.comm.rank == 0:
            shutil.rmtree(self.run)
        self.comm.Barrier()
        if place.rank == self.comm.rank:
            path = str((self.run / place.file).resolve())
            self.shim.fault_arm(place.operation.encode(), path.encode(), place.nth, error, int(sticky), 0)
        said = self.comm.allgather(self.job())
        hit = self.comm.allgather(self.shim.fault_hits())[place.rank]
        self.shim.fault_arm(b"", b"", -1, 0, 0, 0)
        self.comm.Barrier()
        if self.comm.rank == 0:
            self.figures.problems += [
                f"{place}, {errno.errorcode[error]}{' and so on' * sticky}: {text}"
                for text in self.judge(place, os.strerror(error), said, sticky, hit)
            ]
        self.comm.Barrier()
        again = self.comm.allgather(self.job())
        if self.comm.rank == 0:
            texts = [f"started again: {text}" for text in set(again) if text is not None]
            if not texts:
                texts = self.differences()
            self.figures.problems += [f"{place}, {errno.errorcode[error]}: {text}" for text in texts]

    def judge(self, place: Place, error: str, said: list[str | None], sticky: bool, hit: int) -> list[str]:
        """What is wrong with how the job ended, and with what it left."""
        from cpmpi.run.verify import verify_run

        figures = self.figures
        figures.places += 1
        figures.operations[place.operation] += 1
        figures.missed += not hit
        figures.errors += said[0] is not None
        figures.spared += said[0] is None and bool(hit)
        found = []
        if len({text and text.removeprefix(f"rank {place.rank}/{len(said)}: ") for text in said}) > 1:
            found.append(f"ranks differ: {said}")
        if said[0] is None:
            if hit and not place.file.startswith(SPARED) and place[1:3] not in SPARED_CALLS:
                found.append("nobody noticed")
            return found + self.differences()
        file = self.run if sticky else (self.run / place.file.removesuffix(".tmp")).resolve()
        if hit and not (str(file) in said[0] and error in said[0] and "\n" not in said[0]):
            found.append(f"not a line with the file and the reason: {said[0]}")
        if (self.run / "run.h5").exists():
            found += [p for p in verify_run(self.run).problems if "not complete: " not in p]
        return found

    def differences(self) -> list[str]:
        """Where the finished run is not what it should be."""
        from cpmpi.run.verify import verify_run

        problems = list(verify_run(self.run).problems)
        same = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(self.results(), self.whole))
        return problems + ["results differ from those of a job that was left alone"] * (not same)


def rank_main(folder: Path, library: Path, most: int, part: str, seed: int) -> None:
    """On a rank: all places, or so many of them, or a part."""
    sweep = Sweep(folder, library)
    places = sweep.calls()
    chance = random.Random(seed)
    if most and most < len(places):
        kinds: dict[tuple[str, str], list[int]] = {}
        for i in chance.sample(range(len(places)), len(places)):
            kinds.setdefault((places[i].operation, Path(places[i].file).name), []).append(i)
        turns = [i for turn in range(len(places)) for group in kinds.values() for i in group[turn : turn + 1]]
        places = [places[i] for i in sorted(turns[:most])]  # as many kinds as there can be
    mine, of = map(int, part.split("/"))
    todo = list(enumerate(places))[mine - 1 :: of]
    for done, (i, place) in enumerate(todo, start=1):
        sweep.fault(place, ERRORS[i % len(ERRORS)], sticky=bool(i % 2))
        if sweep.comm.rank == 0 and done % 10 == 0:
            so_far = f"{done} of {len(todo)} of {len(places)}: {sweep.figures}"
            print(so_far, *sweep.figures.problems, sep="\n", file=sys.stderr, flush=True)
    if sweep.comm.rank == 0:
        figures = sweep.figures
        (folder / "figures.json").write_text(json.dumps(vars(figures)))


def faults(folder: Path, places: int = 0, ranks: int = 2, *, part: str = "1/1", seed: int = 0) -> Figures:
    """Let so many calls fail, one after the other; 0: every one, or a part of them.

    Raises:
        AssertionError: the launch did not come to its end.
    """
    library = build(folder)
    make(folder)
    line = [sys.executable, "-m", "tests.faults", "--rank-of", str(folder), "--places", str(places)]
    line += ["--part", part, "--seed", str(seed)]
    if ranks > 1:
        launcher = [mpirun_path(), "--oversubscribe", "--bind-to", "none"]
        line = [*launcher, "-n", str(ranks), "-x", "LD_PRELOAD", *line]
    environment = clean_environment(LD_PRELOAD=str(library), CPMPI_FAULT_FOLDER=str((folder / "run").resolve()))
    done = subprocess.run(line, cwd=ROOT, env=environment, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}"
    found = json.loads((folder / "figures.json").read_text())
    return Figures(**{**found, "operations": Counter(found["operations"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=0, help="calls that fail; 0: all")
    parser.add_argument("--part", default="1/1", help="such as 2/5: of these")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank_of is not None:
        rank_main(asked.rank_of, asked.rank_of / "faults.so", asked.places, asked.part, asked.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = faults(Path(folder), asked.places, asked.ranks, part=asked.part, seed=asked.seed)
    print(figures)
    for problem in figures.problems:
        print(problem)
    sys.exit(bool(figures.problems))


if __name__ == "__main__":
    main()
