"""Claims of jobs on documents: whose they are, and when another job may take them. Slurm's commands are faked."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import pytest

from cpmpi.slurm import claims as module
from cpmpi.slurm.allocation import VARIABLES
from cpmpi.slurm.claims import Claims, State, time_left_s

from .fake import FakeSlurm

OLD_S = 8 * 86_400  # older than the library's own limit of seven days


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """This process is Slurm's job 17, and all jobs of the fake squeue are asked for."""
    fake = FakeSlurm(tmp_path / "fake", ["squeue"])
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("SLURM_JOBID", "17")
    return fake


@pytest.fixture
def alone(monkeypatch):
    for name in {"SLURM_JOBID", *(name for names in VARIABLES.values() for name in names)}:
        monkeypatch.delenv(name, raising=False)


def put(folder, owner, age_s=OLD_S, name="000003"):
    """A claim of somebody else, of this age."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.claim"
    path.write_text(f"{owner}\nnode1\n" if owner else "")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def known(fake, *lines):
    """What squeue tells; it is asked in two ways, and the number stands first in both."""
    fake.prints("squeue", "".join(f"{line}\n" for line in lines))


def claims_in(folder, held=False, restarts=0):
    return Claims(folder, lambda name: held, restarts)


def test_one_has_it_and_gives_it_back(tmp_path, alone):
    one, two = claims_in(tmp_path / "parts", held=True), claims_in(tmp_path / "parts", held=True)
    with one:
        assert one.take("000003")
        assert one.look() == {"000003": State.MINE}
        assert two.look() == {"000003": State.YOUNG}
        assert not two.take("000003")
    assert two.look() == {}
    assert two.take("000003")
    two.drop("000003")
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_running_job_keeps_its_claim_however_old_it_is(tmp_path, slurm):
    put(tmp_path / "parts", "SLURM 0 12")
    known(slurm, "12 RUNNING", "17 RUNNING")
    claims = claims_in(tmp_path / "parts")
    assert claims.look() == {"000003": State.LIVES}
    assert not claims.take("000003")


@pytest.mark.parametrize("said", [["12 PENDING", "17 RUNNING"], ["17 RUNNING"]])
def test_a_dead_or_waiting_job_loses_its_claim_and_no_file(tmp_path, slurm, said):
    """Also where a file has the name that it works on: nothing but the claim is touched."""
    result = tmp_path / "parts" / "000003" / "run.h5"
    put(tmp_path / "parts", "SLURM 0 12", age_s=11)
    result.parent.mkdir()
    result.write_text("precious")
    known(slurm, *said)
    claims = claims_in(tmp_path / "parts")
    assert claims.look() == {"000003": State.DEAD}
    assert claims.take("000003")
    assert claims.owner("000003") == ("SLURM", "0", "17")
    assert result.read_text() == "precious"


def test_slurm_is_asked_once_a_while_for_all_claims(tmp_path, slurm):
    for i in range(9):
        put(tmp_path / "parts", f"SLURM 0 {20 + i}", name=f"{i:06d}")
    known(slurm, *(f"{20 + i} RUNNING" for i in range(9)))
    claims = claims_in(tmp_path / "parts")
    assert set(claims.look().values()) == set(claims.look().values()) == {State.LIVES}
    assert [call[0] for call in slurm.calls("squeue")] == ["--me"]


def test_a_requeued_job_takes_back_what_its_last_start_had(tmp_path, slurm):
    """To Slurm the number lives; the file lock went with the process."""
    put(tmp_path / "parts", "SLURM 0 17")
    known(slurm, "17 RUNNING")
    assert not claims_in(tmp_path / "parts", held=True).take("000003"), "another program of this job has it"
    assert not claims_in(tmp_path / "parts", held=None).take("000003"), "no file locks, and not requeued"
    assert claims_in(tmp_path / "parts", held=False).take("000003")
    put(tmp_path / "parts", "SLURM 0 17", name="000004")
    assert claims_in(tmp_path / "parts", held=None, restarts=1).take("000004")


def test_killed_before_it_wrote_its_name(tmp_path, slurm):
    known(slurm, "17 RUNNING")
    put(tmp_path / "parts", "", age_s=50)
    claims = claims_in(tmp_path / "parts")
    assert claims.look() == {"000003": State.YOUNG}
    assert not claims.take("000003")
    put(tmp_path / "parts", "", age_s=70)
    assert claims.look() == {"000003": State.DEAD}
    assert claims.take("000003")


def test_no_answer_of_slurm_takes_nothing(tmp_path, slurm):
    put(tmp_path / "parts", "SLURM 0 12")
    claims = claims_in(tmp_path / "parts")
    for why in ("Zero Bytes were transmitted or received", "Unable to contact slurm controller (connect failure)"):
        slurm.fails("squeue", f"slurm_load_jobs error: {why}\n")
        assert claims.look() == {"000003": State.LIVES}
        assert not claims.take("000003")
    (slurm.folder / "squeue.err").unlink()
    known(slurm, "17 RUNNING")
    assert claims.take("000003"), "an answer counts again"


def test_processes_of_this_machine_and_of_others(tmp_path, alone):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    system, machine, number = module.me()
    put(tmp_path / "parts", f"{system} {machine} {ended.pid}")
    put(tmp_path / "parts", f"{system} {int(machine) + 1} {ended.pid}", name="000004")
    put(tmp_path / "parts", f"{system} {machine} {os.getppid()}", name="000005")
    put(tmp_path / "parts", f"{system} {machine} {number}", name="000006")
    claims = Claims(tmp_path / "parts", lambda name: name == "000005")
    assert {name: state.name for name, state in claims.look().items()} == {
        "000003": "DEAD", "000004": "LIVES", "000005": "LIVES", "000006": "DEAD",
    }  # fmt: skip
    assert claims.take("000003")
    assert not claims.take("000004")
    assert not claims.take("000005")
    assert claims.take("000006"), "our number, from before the machine started anew"


def test_an_owner_that_cannot_be_written_is_no_claim(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(os, "fdopen", lambda fd, mode: (os.close(fd), io.StringIO())[1])
    claims = claims_in(tmp_path / "parts")
    with pytest.raises(OSError, match="cannot be written"):
        claims.take("000003")
    assert not (tmp_path / "parts" / "000003.claim").exists()


def test_the_time_that_is_left(slurm):
    assert time_left_s(int(time.time()) + 100, 17) == pytest.approx(100, abs=2)
    for said, seconds in (("1-02:03:04", 93_784), ("2:03:04", 7_384), ("3:04", 184), ("UNLIMITED", None)):
        known(slurm, said)
        assert time_left_s(None, 17) == seconds
