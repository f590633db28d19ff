"""The power goes at any moment of a repair: what is found then is repaired by the same command, to the bit."""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from pathlib import Path

import pytest

from tests import test_repair
from tests.disk import STRACE, disk_after, moments, record
from tests.forked import in_child
from tests.test_power import Job, made, main

SHORT, LONG = 4, 200
DAMAGES = (test_repair.a_shard_that_is_cut_off, test_repair.a_key, test_repair.the_nll, test_repair.the_structure)


def repaired(run: Path) -> list[str]:
    """Repair a run in this process: what is still wrong."""
    from mpi4py import MPI

    from cpmpi.comm.progress import Progress
    from cpmpi.comm.ranks import Ranks
    from cpmpi.engine.repair import repair

    return repair(run, None, Ranks(MPI.COMM_SELF), Progress(enabled=False)).problems


def history(job: Job, disk: Path) -> None:
    """A run that is whole and lasts, then a repair after each damage, which lasts, too."""
    run = disk / "run"
    job.run("ab", run)
    for i, damage in enumerate(DAMAGES):
        damage(run)
        sync(run)
        (disk / f"mark-{i}").touch()
        assert repaired(run) == []
        (disk / f"mark-done-{i}").touch()


def sync(run: Path) -> None:
    """Have all that is there last, as it would after some seconds."""
    for path in (run, *run.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def look(job: Job, run: Path, done: bool) -> str:
    """Repair what was found; what is wrong then, or nothing; where it was ``done``, it must be whole before."""
    import cpmpi
    from cpmpi.run.verify import verify_run

    if done and (problems := verify_run(run).problems):
        return f"was said to be whole: {problems}"
    if problems := repaired(run):
        return str(problems)
    with cpmpi.open_run(run) as found:
        wrong = [d.id for d in found.documents if not d.complete or made(d) != job.truth[d.id[0]]]
    left = [str(path) for path in ((run / "repair"), *run.rglob("*.tmp")) if path.exists()]
    return " ".join([f"{name} is not what it was" for name in wrong] + left)


def run_disks(folder: Path, number: int, seed: int) -> list[str]:
    """Build so many disks, and one more after each repair; say of each that is not as it must be what is wrong."""
    job, disk = Job(folder), folder / "disk"
    disk.mkdir()
    recording, wrong, chance = record(lambda: history(job, disk), disk), [], random.Random(seed)
    after = [recording.marks[f"done-{i}"] + 1 for i in range(len(DAMAGES))]
    some = (moment for moment in moments(recording, 100 * number, chance) if moment > recording.marks["0"])
    for moment in (*after, *itertools.islice(some, number)):
        done = moment in after
        with tempfile.TemporaryDirectory(dir=folder) as place:
            crash = disk_after(recording, moment, chance.randrange(1 << 32), Path(place), least=done)
            ended = in_child(look, job, Path(place) / "run", done)
            bad = ended.signal or ended.error
            if problem := f"{bad}: {ended.text}" if bad else ended.value:
                at = sum(recording.marks[str(i)] < moment for i in range(len(DAMAGES))) - 1
                wrong.append(f"{DAMAGES[at].__name__}: {problem.replace(place, '')}; {crash}")
    return wrong


@pytest.mark.skipif(STRACE is None, reason="no strace")
@pytest.mark.mpi(1)
@pytest.mark.parametrize("number", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_repair_that_the_power_cut_off_is_done_by_the_same_command(tmp_path, number):
    """Other moments each time."""
    seed = random.randrange(1 << 32)
    wrong = run_disks(tmp_path, number, seed)
    assert not wrong, f"seed {seed}: {len(wrong)} of {number}:\n" + "\n".join(wrong[:10])


if __name__ == "__main__":
    main(run_disks)
