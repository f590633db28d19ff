"""Files cut off and bytes flipped, of every file of a run: nothing is silent, and every command ends with a line."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cpmpi.run import seal
from tests.forked import Ended, in_child
from tests.test_power import Job

SEEN_BY_NOBODY = ("log/",)  # what is told to people, and read back by `status` alone
FINE = ("", "UserError", "AgreedError", "SystemExit", "UsageError", "BadParameter", "ClickException")
TIMEOUT_S = 60.0


class Case(NamedTuple):
    """A file of a run, cut off at a length, or with a bit flipped."""

    run: str
    file: str
    length: int = -1
    offset: int = -1
    bit: int = 0

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        if self.length >= 0:
            os.truncate(path, self.length)
            return
        with open(path, "r+b") as raw:
            byte = os.pread(raw.fileno(), 1, self.offset)[0]
            os.pwrite(raw.fileno(), bytes([byte ^ 1 << self.bit]), self.offset)


class Runs:
    """A run that is whole, and one that was stopped inside its second document, of one model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, Job(folder)
        self.job.begin(folder / "begun")
        self.job.run("ab", folder / "whole")
        (folder / "questions.jsonl").write_text('{"document": "a.npy", "token_ids": [5, 6]}\n')

    def files(self, run: str) -> list[str]:
        """Those with something in them."""
        paths = sorted((self.folder / run).rglob("*"))
        return [str(p.relative_to(self.folder / run)) for p in paths if p.is_file() and p.stat().st_size]

    def cases(self, lengths: int, flips: int, chance: random.Random) -> Iterator[Case]:
        """So many lengths and flips of each file."""
        for run in ("whole", "begun"):
            for file in self.files(run):
                size = (self.folder / run / file).stat().st_size
                for length in chance.sample(range(size), min(lengths, size)):
                    yield Case(run, file, length=length)
                for _ in range(flips):
                    yield Case(run, file, offset=chance.randrange(size), bit=chance.randrange(8))

    def commands(self, run: Path, also_jobs: bool) -> Iterator[list[str]]:
        """All that a user may do with a run; the last ones change it."""
        yield from (["inspect", str(run)], ["status", str(run)], ["verify", str(run)])
        if also_jobs:
            model = ["--model", str(self.folder / "model"), "--quiet"]
            questions = ["--input", str(self.folder / "questions.jsonl"), "--output", str(run) + "-scores"]
            yield ["extend", *model, "--run", str(run), *questions]
            inputs = [str(self.folder / f"{name}.npy") for name in "ab"]
            yield ["prefill", *model, "--input", *inputs, "--output", str(run), "--chunk-tokens", "32"]

    def look(self, case: Case, also_jobs: bool) -> list[str]:
        """What is wrong with what the commands say of a damaged run."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            run = Path(place) / "run"
            shutil.copytree(self.folder / case.run, run)
            case.apply(run)
            wrong, verified = [], ""
            for command in self.commands(run, also_jobs):
                ended = in_child(_cli, command, timeout_s=TIMEOUT_S)
                wrong += [f"{case}: {command[0]}: {problem}" for problem in _problems(ended)]
                said = ended.printed + ended.text
                if command[0] == "verify":
                    verified = said
            if case.file not in verified and not case.file.startswith(SEEN_BY_NOBODY) and self.matters(case):
                wrong.append(f"{case}: verify does not name it: {verified[-200:]}")
            if also_jobs and not ended.error and (case.run == "begun" or case.file.startswith(SEEN_BY_NOBODY)):
                wrong += [f"{case}: {problem}" for problem in in_child(self.result, run).value or ()]
            return wrong

    def matters(self, case: Case) -> bool:
        """Whether `verify` must name the file: any damage of a whole run, but for the mark that HDF5 leaves of a writer
        that was killed; of a run under way, of the rows of a checkpoint."""
        if case.run == "begun":
            return case.file.startswith("checkpoints/") and case.file.endswith(".h5")
        if case.file != "run.h5" or case.bit or case.length >= 0:
            return True
        header = (self.folder / case.run / case.file).read_bytes()[: seal.HEADER.size]
        return bool(case.offset != seal.HEADER.unpack(header)[3] + seal.WRITE_MARKS[0])

    def result(self, run: Path) -> list[str]:
        """What a job that went on made of it: right, or else `verify` says what is wrong."""
        import cpmpi
        from cpmpi.run.verify import verify_run
        from tests.test_power import made

        if verify_run(run).problems:
            return []
        with cpmpi.open_run(run) as found:
            return [
                f"{d.id} is wrong, and nobody says so" for d in found.documents if made(d) != self.job.truth[d.id[0]]
            ]


def _cli(command: list[str]) -> None:
    from cpmpi.jobs.cli import cli

    cli.main(command, standalone_mode=False)


def _problems(ended: Ended) -> list[str]:
    """What must never come of a command."""
    if ended.signal == "SIGKILL":
        return [f"hangs: {ended.printed[-300:]}"]
    if ended.signal:
        return [f"brings the interpreter down with {ended.signal}"]
    if ended.error not in FINE:
        return [f"ends with {ended.error}: {ended.text}\n{ended.value}"]
    if "Traceback" in ended.printed or "\n" in ended.text:
        return [f"says more than a line: {ended.printed} {ended.text}"]
    return []


class Damages(NamedTuple):
    """A series of damages.

    Attributes:
        lengths: that each file is cut off at.
        flips: of a bit, in each file.
        jobs_each: the jobs run with every ``jobs_each``-th case.
        seed: of the places.
        part: such as 2/5, of all cases.
    """

    lengths: int
    flips: int
    jobs_each: int
    seed: int
    part: str = "1/1"


def run_cases(folder: Path, series: Damages) -> tuple[list[str], Counter[str]]:
    """What is wrong, and how often each file was damaged."""
    runs, chance, done = Runs(folder), random.Random(series.seed), Counter[str]()
    wrong: list[str] = []
    mine, of = map(int, series.part.split("/"))
    cases = list(runs.cases(series.lengths, series.flips, chance))
    size = -(-len(cases) // of)
    todo = list(enumerate(cases))[(mine - 1) * size : mine * size]
    for so_far, (number, case) in enumerate(todo):
        if so_far % 50 == 0:
            print(f"{so_far} of {len(todo)} damages, {len(wrong)} wrong", *wrong, sep="\n", file=sys.stderr, flush=True)
        wrong += runs.look(case, number % series.jobs_each == 0)
        done[f"{case.run}/{case.file} {'cut off' if case.length >= 0 else 'flipped'}"] += 1
    return wrong, done


@pytest.mark.mpi(1)
@pytest.mark.parametrize(
    ("lengths", "flips", "jobs_each"), [(1, 1, 12), pytest.param(200, 40, 20, marks=pytest.mark.slow)]
)
def test_no_damage_is_silent_and_no_command_breaks(tmp_path, lengths, flips, jobs_each):
    """Other places each time."""
    seed = random.randrange(1 << 32)
    wrong, _ = run_cases(tmp_path, Damages(lengths, flips, jobs_each, seed))
    assert not wrong, f"seed {seed}: {len(wrong)}:\n" + "\n".join(wrong[:10])


if __name__ == "__main__":  # LENGTHS FLIPS JOBS_EACH [SEED [PART]]
    lengths_, flips_, each = (int(number) for number in sys.argv[1:4])
    chosen = int(sys.argv[4]) if len(sys.argv) > 4 else random.randrange(1 << 32)
    asked = Damages(lengths_, flips_, each, chosen, *sys.argv[5:6])
    with tempfile.TemporaryDirectory(prefix="cpmpi-bytes-") as made_here:
        faults, often = run_cases(Path(made_here), asked)
    print("\n".join(faults))
    print("\n".join(f"{count:5} {file}" for file, count in often.items()))
    print(f"{asked}: {sum(often.values())} damages, {len(faults)} wrong")
    sys.exit(bool(faults))
